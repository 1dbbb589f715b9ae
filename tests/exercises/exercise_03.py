"""3. What does the pixel shuffle move where?

32 x 32 patches of width 1024 become 16 x 16 tokens of width 4096: four neighbours are put side by side. In which order? Write it
with reshape and transpose alone, without einops.

Hint: split both axes of the grid into (16, 2), bring the two 2s next to the width, and flatten. The order of the four is
row first: (0, 0), (0, 1), (1, 0), (1, 1). Check with a grid whose values are their own numbers.
"""
import numpy as np


def pixel_shuffle(patches):
    """(h, w, d) patches in rows and columns -> (h / 2, w / 2, 4 d)."""
    raise NotImplementedError("write me")


def test_four_neighbours_become_one_token():
    numbers = np.arange(16).reshape(4, 4, 1)
    assert pixel_shuffle(numbers)[0, 0].tolist() == [0, 1, 4, 5] and pixel_shuffle(numbers)[1, 1].tolist() == [10, 11, 14, 15]


def test_it_is_what_the_projector_sees(monkeypatch):
    import torch

    from model import InternVL
    model = InternVL.from_pretrained("tiny", "cpu")
    side, width = model.config.vision.grid, model.config.vision.width
    patches, seen = torch.randn(1, side * side, width), []
    model.projector.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.projector(patches)
    expected = pixel_shuffle(patches[0].reshape(side, side, width).numpy())
    assert np.array_equal(seen[0][0].numpy(), expected.reshape(-1, 4 * width))
