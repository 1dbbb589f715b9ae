"""How is a page cut into tiles? A pure function from a Pillow image to bytes, shared by training and inference.

    page 1000 x 700  ->  grid 3 x 2  ->  6 tiles of 448 x 448, row by row, and the whole page once more as a thumbnail

Source: InternVL 1.5 (arXiv 2404.16821), section "Dynamic High-Resolution"; official `dynamic_preprocess`.
Pillow resizes: releases before 13 do so for some small pages in another order of passes, so a few bytes differ.
"""
from functools import lru_cache

import numpy as np
from einops import rearrange, repeat
from PIL import Image


@lru_cache
def grids(max_tiles):
    """All (columns, rows) with at most `max_tiles` cells, smallest area first."""
    all_grids = [(columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1)]
    return sorted(all_grids, key=lambda grid: grid[0] * grid[1])


def choose_grid(width, height, max_tiles=12, tile_pixels=448):
    """Return the (columns, rows) whose aspect ratio is nearest to the page's.

    Among grids that are equally near (1x1 and 2x2; for 3:2 also 1x1 and 2x1) a larger one wins only if the page has
    over half of its pixels.

    >>> choose_grid(1000, 700)
    (3, 2)
    """
    best, best_difference = (1, 1), float("inf")
    for columns, rows in grids(max_tiles):
        difference = abs(width / height - columns / rows)
        enough_pixels = width * height > 0.5 * tile_pixels ** 2 * columns * rows
        if difference < best_difference or (difference == best_difference and enough_pixels):
            best, best_difference = (columns, rows), difference
    return best


def gray_or_rgb(image):
    """A page in mode L if its three channels are equal, else in RGB.

    Most scans are gray, whatever they are stored as. Pillow resizes each channel on its own, so resizing one and
    repeating it gives the same bytes for a third of the work.
    """
    if image.mode in ("1", "L"):
        return image.convert("L")
    image = image.convert("RGB")
    red, green, blue = image.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else image


def tile_page(image, max_tiles=12, tile_pixels=448, thumbnail=True):
    """Cut a page into tiles.

    `image`: Pillow image of any mode and size. `max_tiles`: limit for the grid; the thumbnail is not counted.
    Returns uint8 (tiles, 3, tile_pixels, tile_pixels), RGB, row by row; the thumbnail is last if the grid has more than
    one tile.
    """
    image = gray_or_rgb(image)
    columns, rows = choose_grid(*image.size, max_tiles, tile_pixels)
    whole = image.resize((columns * tile_pixels, rows * tile_pixels), Image.Resampling.BICUBIC)
    pixels = np.asarray(whole).reshape(rows * tile_pixels, columns * tile_pixels, -1)           # 1 or 3 channels
    tiles = rearrange(pixels, "(r h) (c w) rgb -> (r c) rgb h w", r=rows, c=columns)            # (tiles, 1 or 3, S, S)
    if thumbnail and len(tiles) > 1:
        small = np.asarray(image.resize((tile_pixels, tile_pixels), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, rearrange(small.reshape(tile_pixels, tile_pixels, -1), "h w rgb -> 1 rgb h w")])
    if tiles.shape[1] == 1:
        tiles = repeat(tiles, "n 1 h w -> n 3 h w")
    return np.ascontiguousarray(tiles)
