"""The commands that make the embedded model: what is interrupted goes on as if nothing had been; a grown tile sees what it saw."""
import sys

import pytest
import torch
from commands import at_call
from reference import randomise
from safetensors.torch import load_file

from model import InternVL
from model.names import official_name, part_of
from model.tiny import eyes, grow


@pytest.fixture
def teach(small_folder, monkeypatch):
    """Runs eyes.py with tiles of 64 pixels into a folder."""
    def run(folder, steps):
        flags = "--model", small_folder, "--tile", 64, "--steps", steps, "--save-every", 2, "--batch-pages", 2, "--seed", 1
        monkeypatch.setattr(sys, "argv", ["eyes.py", str(folder), *map(str, flags)])
        eyes.main()
        return load_file(folder / "model.safetensors")
    return run


def stop():
    raise KeyboardInterrupt


def test_eyes_that_were_interrupted_end_with_the_same_tensors(teach, tmp_path, monkeypatch):
    whole = teach(tmp_path / "whole", 6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch.setattr, eyes, "examples", 4, stop)                       # after the step behind the save of step 2
        teach(tmp_path / "again", 6)
    assert not (tmp_path / "again" / "model.safetensors").exists()              # half a vision encoder is no model
    again = teach(tmp_path / "again", 6)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_eyes_learn_and_leave_a_model_whose_decoder_is_as_drawn(teach, tmp_path, capsys):
    teach(tmp_path / "run", 40)
    losses = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]
    model, drawn = InternVL.from_pretrained(tmp_path / "run", "cpu"), InternVL.from_scratch(tmp_path / "run", 1, "cpu").state_dict()
    assert model.config.vision.tile_pixels == 64 and model.tokenizer("What?").input_ids
    moved = {part_of(name) for name, tensor in model.state_dict().items() if not torch.equal(tensor, drawn[name])}
    assert moved == {"vision", "projector"}


@pytest.mark.official
@torch.no_grad()
def test_a_grown_tile_sees_each_quarter_as_the_small_one_was_seen(small_folder, tmp_path):
    randomise(InternVL.from_scratch(small_folder, seed=0, device="cpu")).save_pretrained(tmp_path / "small")
    grow.main(tmp_path / "small", tmp_path / "large")
    small, large = (InternVL.from_pretrained(tmp_path / name, "cpu") for name in ("small", "large"))
    assert large.config.vision.tile_pixels == 2 * small.config.vision.tile_pixels == 256
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "large"))
    assert {name for name in after if not torch.equal(before[name], after[name])} == {official_name("vision.position")}
    tile = torch.randint(256, (1, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen, grid = small.vision(tile, small.dtype), small.config.vision.grid
    tiles = large.vision(tile.repeat(1, 1, 2, 2), large.dtype).unflatten(1, (2, grid, 2, grid)).transpose(2, 3).flatten(3, 4)
    for quarter in tiles.flatten(0, 2):
        torch.testing.assert_close(quarter, tiles[0, 0, 0], rtol=1e-4, atol=1e-4)
        assert (quarter - seen[0]).norm() < 0.1 * (seen[0] - seen[0].roll(1, 0)).norm()         # one class token for four times as many patches
