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


def test_normalising_is_exact_for_every_value():
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(normalize(tiles, torch.float32), reference_pixels(tiles))


def test_parameters_are_304012288():
    with torch.device("meta"):
        assert sum(p.numel() for p in VisionEncoder(VisionConfig()).parameters()) == 304_012_288
