"""What a step will hold is counted before the first one."""
import gc
from argparse import Namespace

import pytest
import torch

from extras.memory import (
    QUESTIONS,
    SHARE,
    WORK,
    AttentionKernels,
    attention_kernels,
    choose_split,
    fitting_pages,
    saved_gb,
    step_gb,
)
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


def test_a_step_of_eight_pages_is_split_by_memory(tiny, capsys, monkeypatch):
    choose_parts(tiny, "projector")
    needed = step_gb(tiny, 12, 1)
    fixed, page = needed["in use now"] + needed["gradients and optimizer"], needed["activations"]
    for pages, most in ((8, 100), (8, 8.1), (4, 7.9), (4, 4.1), (2, 3.9), (1, 1.9), (1, 0.1)):
        room = (fixed + most * page) / SHARE + WORK
        assert fitting_pages(tiny, 12, room) == pytest.approx(pages), most
        monkeypatch.setattr("extras.memory.room_gb", lambda device: room)
        for device, given, expected in (("cuda", (None, None), (pages, 8 // pages)), ("cpu", (None, None), (1, 8)), ("cuda", (3, None), (3, 8)), ("cuda", (None, 2), (1, 2))):
            args = Namespace(device=device, batch_pages=given[0], accumulate=given[1], max_tiles=12)
            choose_split(args, tiny)
            assert (args.batch_pages, args.accumulate) == expected
            assert (f"a step: {8 // pages} x {pages} pages" in capsys.readouterr().out) == (device == "cuda" and given == (None, None))


def test_the_kernels_of_attention_are_named(tiny):
    choose_parts(tiny, "projector")
    assert attention_kernels(tiny) == {"tiles": "flash", "prefix": "flash", "branches": "flash"}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert set(attention_kernels(tiny).values()) == {"math"}
    with AttentionKernels(tiny) as kernels, torch.inference_mode():
        tiny.encode_images(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
    assert kernels.found == {"tiles": "flash"}
