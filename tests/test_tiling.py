"""Tiles are the reference's, byte for byte, under the same Pillow."""
import random

import numpy as np
import PIL
import pytest
import torch
from conftest import real
from PIL import Image, ImageDraw
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from model.images import load_image
from model.tiling import choose_grid, tile_page
from model.vision import IMAGENET_MEAN, IMAGENET_STD, normalize

# golden vectors: width, height: grid for at most 1, 6, 12 and 18 tiles
GRIDS = {
    (1000, 700): ((1, 1), (3, 2), (3, 2), (3, 2)), (448, 448): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (300, 900): ((1, 1), (1, 3), (1, 3), (1, 3)), (2481, 3508): ((1, 1), (2, 3), (2, 3), (2, 3)),
    (1, 1): ((1, 1), (1, 1), (1, 1), (1, 1)), (5000, 100): ((1, 1), (6, 1), (12, 1), (18, 1)),
    (640, 480): ((1, 1), (3, 2), (4, 3), (4, 3)), (1654, 2339): ((1, 1), (2, 3), (2, 3), (2, 3)),
    (3508, 2481): ((1, 1), (3, 2), (4, 3), (4, 3)), (896, 448): ((1, 1), (2, 1), (2, 1), (2, 1)),
    (449, 448): ((1, 1), (1, 1), (1, 1), (1, 1)), (1344, 896): ((1, 1), (3, 2), (3, 2), (3, 2)),
    (800, 600): ((1, 1), (3, 2), (4, 3), (4, 3)), (1920, 1080): ((1, 1), (2, 1), (4, 2), (5, 3)),
    (1700, 2200): ((1, 1), (2, 3), (3, 4), (3, 4)),
}
# grid for at most 12 and 6 tiles where two grids have exactly the page's ratio
TIES = {
    (633, 633): ((1, 1), (1, 1)), (634, 634): ((2, 2), (2, 2)), (896, 896): ((2, 2), (2, 2)), (950, 950): ((2, 2), (2, 2)),
    (951, 951): ((3, 3), (2, 2)), (1000, 1000): ((3, 3), (2, 2)), (1267, 633): ((2, 1), (2, 1)),
    (1268, 634): ((4, 2), (2, 1)), (700, 1400): ((2, 4), (1, 2)), (448, 1344): ((1, 3), (1, 3)), (10, 30): ((1, 3), (1, 3)),
}


def reference_pixels(images, max_tiles):
    """float (tiles, 3, 448, 448) from transformers' image processor, Pillow backend."""
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD,
                                         crop_to_patches=True, min_patches=1, max_patches=max_tiles, do_convert_rgb=True)
    return torch.from_numpy(np.stack(processor(images, return_tensors="np")["pixel_values"]))


def test_grids_are_those_of_the_fact_sheet():
    for size, grids in GRIDS.items():
        assert tuple(choose_grid(*size, most) for most in (1, 6, 12, 18)) == grids, size
    for size, grids in TIES.items():
        assert tuple(choose_grid(*size, most) for most in (12, 6)) == grids, size


def test_grids_equal_the_reference_on_4000_random_sizes():
    draw, checked = random.Random(0), 0
    while checked < 4000:
        width = int(8000 ** draw.random())
        height = draw.choice([int(8000 ** draw.random()), width, 2 * width, max(1, width // 2)])
        if max(width, height) <= 8000 and max(width, height) <= 200 * min(width, height):
            most = draw.choice((1, 2, 6, 12, 18, 24, 40))
            assert choose_grid(width, height, most) == get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
            checked += 1


# other releases of Pillow may resize with other passes or rounding; the tests against the reference hold under any of them
@pytest.mark.skipif(PIL.__version__.split(".")[0] != "13", reason="these numbers are those of Pillow 13")
def test_pixels_are_those_of_the_fact_sheet():
    x, y = np.meshgrid(np.arange(1000), np.arange(700))
    page = Image.fromarray(np.stack([x * 255 // 999, y * 255 // 699, (x + y) % 256], -1).astype(np.uint8))
    pixels = normalize(torch.from_numpy(tile_page(page, 12)), torch.float32)
    assert pixels.shape == (7, 3, 448, 448)
    assert pixels.mean().item() == pytest.approx(0.22193092, abs=1e-6) and pixels.std().item() == pytest.approx(1.28667533, abs=1e-6)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([-2.1179039, -2.0357141, -1.8044444], abs=1e-6)
    assert pixels[6, :, 223, 223].tolist() == pytest.approx([0.05693974, 0.18767506, -0.42753804], abs=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "LA"])
def test_pixels_equal_the_reference_in_every_mode(mode):
    draw = random.Random(mode)
    for _ in range(4):
        size = draw.randint(1, 1500), draw.randint(1, 1500)
        page = Image.effect_noise(size, 90).convert("RGB")
        ImageDraw.Draw(page).ellipse((0, 0, *size), fill=(draw.randrange(256), 80, 200))
        page = page.convert(mode)
        most = draw.choice((1, 4, 12))
        ours = normalize(torch.from_numpy(tile_page(page, most)), torch.float32)
        torch.testing.assert_close(ours, reference_pixels([page.convert("RGB")], most), rtol=0, atol=1e-6)


def test_pixels_equal_the_reference_on_real_receipts():
    from data import group_rows_into_pages
    from extras.sources import open_rows
    for page, _ in zip(group_rows_into_pages(open_rows(str(real("receipts")), "validation")), range(6)):
        image = load_image(page.images[0])
        ours = normalize(torch.from_numpy(tile_page(image, 12)), torch.float32)
        torch.testing.assert_close(ours, reference_pixels([image.convert("RGB")], 12), rtol=0, atol=1e-6)


def test_pixels_equal_the_reference_on_photos():
    image = load_image(real("examples") / "image1.jpg")
    ours = normalize(torch.from_numpy(tile_page(image, 12)), torch.float32)
    torch.testing.assert_close(ours, reference_pixels([image], 12), rtol=0, atol=1e-6)


def test_tiles_come_row_by_row_and_the_thumbnail_last():
    page = Image.new("RGB", (3 * 448, 2 * 448))
    for i in range(6):
        page.paste((i * 40, 0, 0), (i % 3 * 448, i // 3 * 448, (i % 3 + 1) * 448, (i // 3 + 1) * 448))
    tiles = tile_page(page, 12)
    assert [tile[0, 224, 224] for tile in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    assert len(tiles) == 7 and len(np.unique(tiles[6, 0])) >= 6
    assert len(tile_page(page, 12, thumbnail=False)) == 6 and len(tile_page(page, 1)) == 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_a_gray_page_in_any_mode_is_cut_as_one_channel_with_equal_bytes(mode, monkeypatch):
    gray = Image.effect_noise((900, 700), 80)
    page = gray.convert("RGB").convert(mode)
    cut = tile_page(page)
    monkeypatch.setattr("model.tiling.gray_or_rgb", lambda image: image.convert("RGB"))
    assert (cut == tile_page(page)).all()
    tinted = Image.merge("RGB", (gray, gray, gray.point(lambda value: value ^ (value == 7))))
    monkeypatch.undo()
    assert (tile_page(tinted)[:, 2] != tile_page(tinted)[:, 0]).any()               # one other value makes it a color page
