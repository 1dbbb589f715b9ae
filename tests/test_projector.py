"""The projector merges the right patches and is the official MLP."""
import dataclasses

import torch
from reference import reference_model, reference_pixels

from model.config import Config, VisionConfig
from model.projector import Projector


class Passing(Projector):
    """A projector whose MLP lets everything pass, so that the shuffle can be seen."""

    def __init__(self, grid, width):
        super().__init__(dataclasses.replace(Config(), vision=VisionConfig(width, heads=1, tile_pixels=grid, patch_pixels=1)))
        self.norm = self.up = self.out = torch.nn.Identity()


def test_four_neighboring_patches_become_one_token(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.gelu", lambda x: x)
    patches = torch.arange(16.0).view(1, 16, 1)                 # golden vector
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert Passing(4, 1)(patches)[0].tolist() == expected


def test_the_shuffle_equals_the_four_step_original(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.gelu", lambda x: x)
    patches = torch.randn(3, 32 * 32, 8)
    x = patches.view(3, 32, 32, 8)                              # the steps as the official code takes them, version v2
    x = x.reshape(3, 32, 16, 16).permute(0, 2, 1, 3).reshape(3, 16, 16, 32).permute(0, 2, 1, 3)
    assert torch.equal(Passing(32, 8)(patches), x.reshape(3, 256, 32))


def test_parameters_are_4482816():
    with torch.device("meta"):
        assert sum(p.numel() for p in Projector(Config()).parameters()) == 4_482_816


def test_image_tokens_and_gradients_equal_the_reference(tiny):
    """Transformers' own pixel shuffle and projector, behind the same patches."""
    tiles = torch.randint(256, (3, 3, 128, 128), dtype=torch.uint8)
    reference = reference_model(tiny, whole=True).requires_grad_(False)
    theirs = reference.model.multi_modal_projector.requires_grad_(True)
    tiny.projector.requires_grad_(True)
    expected = reference.get_image_features(reference_pixels(tiles), -1, "default").pooler_output.flatten(0, 1)
    found, weights = tiny.encode_images(tiles), torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, name in (("norm", "layer_norm"), ("up", "linear_1"), ("out", "linear_2")):
        for kind in ("weight", "bias"):
            torch.testing.assert_close(tiny.projector.get_parameter(f"{ours}.{kind}").grad, theirs.get_parameter(f"{name}.{kind}").grad,
                                       rtol=1e-4, atol=1e-4)
