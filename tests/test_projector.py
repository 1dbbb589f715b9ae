"""The projector merges the right patches and is the official MLP."""
import dataclasses

import torch

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
