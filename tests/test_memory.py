"""What a step will hold is counted before the first one."""
import gc

import pytest
import torch

from extras.memory import QUESTIONS, saved_gb, step_gb
from train import choose_parts


@pytest.mark.parametrize("parts", ["projector", "projector,llm", "projector,llm,vision"])
def test_the_largest_page_is_foretold_from_two_small_ones(tiny, parts):
    choose_parts(tiny, parts)
    for tiles, batch in ((5, 1), (13, 2)):
        needed = step_gb(tiny, tiles - 1, batch)                                # and a thumbnail
        assert needed["activations"] == pytest.approx(batch * saved_gb(tiny, tiles), rel=0.03)


def test_gradients_and_optimizer_take_three_float32_numbers_a_trained_parameter(tiny):
    choose_parts(tiny, "projector")
    optimizer = torch.optim.AdamW(tiny.projector.parameters())
    for parameter in tiny.projector.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [parameter.grad for parameter in tiny.projector.parameters()]
    held += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert step_gb(tiny, 1, 1)["gradients and optimizer"] == sum(tensor.nbytes for tensor in held) / 1e9


def test_counting_leaves_nothing_behind(tiny):
    choose_parts(tiny, "projector")

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    saved_gb(tiny, 1)
    before = tensors()
    saved_gb(tiny, 1)
    assert tensors() == before
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_a_page_shared_by_its_questions_is_kept_once(tiny, monkeypatch):
    choose_parts(tiny, "projector")
    shared = saved_gb(tiny, 4)
    monkeypatch.setattr("extras.memory.QUESTIONS", 1)
    assert shared < 1.7 * saved_gb(tiny, 4) and QUESTIONS == 4
