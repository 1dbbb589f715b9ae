"""The vision encoder is transformers' InternVisionModel."""
import torch
from reference import reference_model, reference_pixels

from model.config import VisionConfig
from model.vision import VisionEncoder, normalize


def test_patches_equal_the_reference(tiny):
    tiles = torch.randint(256, (3, 3, 128, 128), dtype=torch.uint8)
    reference = reference_model(tiny).model.vision_tower
    with torch.no_grad():
        expected = reference(reference_pixels(tiles)).last_hidden_state[:, 1:]
        torch.testing.assert_close(tiny.vision(tiles, torch.float32), expected, rtol=1e-5, atol=1e-5)


def test_normalizing_is_exact_for_every_value():
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(normalize(tiles, torch.float32), reference_pixels(tiles))


def test_layer_scale_multiplies_both_branches_of_a_block():
    block = VisionEncoder(VisionConfig(width=32, layers=1, heads=2, mlp_width=48, tile_pixels=8, patch_pixels=4)).blocks[0]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        for on, off in ((block.layer_scale_1, block.layer_scale_2), (block.layer_scale_2, block.layer_scale_1)):
            on.fill_(1), off.zero_()
            one = block(x) - x
            on.fill_(0.5)
            torch.testing.assert_close(block(x) - x, one / 2)                   # a branch is as large as its scale
            on.zero_()
            assert torch.equal(block(x), x)


def test_parameters_are_304012288():
    with torch.device("meta"):
        assert sum(p.numel() for p in VisionEncoder(VisionConfig()).parameters()) == 304_012_288
