"""How is a page cut into tiles? A pure function from a Pillow image to bytes, shared by training and inference.

    page 1000 x 700  ->  grid 3 x 2  ->  6 tiles of 448 x 448, row by row, and the whole page once more as a thumbnail

Source: InternVL 1.5 (arXiv 2404.16821), section "Dynamic High-Resolution"; official `dynamic_preprocess`.
Pixel values are those of Pillow 13; earlier releases resize some small pages in another order of passes.
"""
import io
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from einops import rearrange, repeat
from PIL import Image, ImageOps

from model.errors import InputError

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")      # none that starts other programs


def read_image(source, name="it"):
    """Decode a page -> Pillow image of mode 1, L or RGB.

    `source`: path of an image file, or its bytes, or what `bytes()` makes them of.

    As a viewer shows it: turned as its EXIF says, transparent parts white, 16 bits a channel scaled to 8; of an animation the
    first picture. Raises InputError for what Pillow cannot read, 32 bits a channel and more than 89 million pixels.
    """
    try:
        if not isinstance(source, (str, Path)):
            source = io.BytesIO(bytes(source))
        elif Path(source).exists() and not Path(source).is_file():
            raise OSError("not a file")                                 # a pipe would never end
        Image.init()                    # or formats that no one opened yet are unknown
        with warnings.catch_warnings(action="ignore"):                  # about metadata that is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=FORMATS)
            image.load()                # Image.open reads the header only; a truncated file fails here
            return as_shown(image)
    except (OSError, ValueError, SyntaxError, RuntimeError, MemoryError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:
        raise InputError(f"cannot read {name} as an image ({error or type(error).__name__})") from error


def grey_if_it_is(image):
    """A page as one channel (L) where all three would be equal, else as RGB.

    Most scans are grey, whatever they are stored as. Pillow resizes channels independently, so one channel, repeated when it
    is cut, gives the same bytes at a third of the work.
    """
    if image.mode in ("1", "L"):
        return image.convert("L")
    image = image.convert("RGB")
    red, green, blue = image.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else image


def as_shown(image):
    """A decoded image in mode 1, L or RGB, the way a viewer shows it."""
    shown = image
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a channel; expected 8 or 16")
    if image.mode.startswith("I;16"):
        shown = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))      # Pillow's own conversion cuts off at 255
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        shown = Image.new("RGB", image.size, "white")
        shown.paste(image, mask=image.getchannel("A"))
    elif image.mode not in ("1", "L", "RGB"):
        shown = image.convert("RGB")
    shown.info = image.info                                             # with the EXIF
    try:
        return ImageOps.exif_transpose(shown)
    except Exception:                   # what broken EXIF leads to in Pillow has no common class; the page stays as it is
        return shown


def image_size(source):
    """(width, height) of a page, from its file's header; None where that cannot be told without a network or at all."""
    if isinstance(source, str) and not Path(source).is_file():
        return None
    try:
        with Image.open(source if isinstance(source, str) else io.BytesIO(bytes(source))) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError):
        return None


def compressed(image, quality):
    """The image after it was stored as a JPEG of this quality, 1 to 100: the official code's augmentation."""
    file = io.BytesIO()
    image.convert("L" if image.mode in ("1", "L") else "RGB").save(file, "JPEG", quality=quality)
    return read_image(file.getvalue())


@lru_cache
def grids(max_tiles):
    """All (columns, rows) with at most `max_tiles` cells, smallest area first."""
    all_grids = [(columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1)]
    return sorted(all_grids, key=lambda grid: grid[0] * grid[1])


def choose_grid(width, height, max_tiles=12, tile_pixels=448):
    """The (columns, rows) whose aspect ratio is nearest to the page's.

    Among equal ratios (1x1, 2x2, 3x3) a larger grid wins only if the page has over half of that grid's pixels.

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


def tile_page(image, max_tiles=12, tile_pixels=448, thumbnail=True):
    """Cut a page into tiles.

    `image`: Pillow image of any mode and size. `max_tiles`: most tiles of the grid, thumbnail not counted.
    Returns uint8 (tiles, 3, tile_pixels, tile_pixels), RGB, row by row, the thumbnail last if there is more than one tile.
    """
    image = grey_if_it_is(image)
    columns, rows = choose_grid(*image.size, max_tiles, tile_pixels)
    whole = image.resize((columns * tile_pixels, rows * tile_pixels), Image.Resampling.BICUBIC)
    pixels = np.asarray(whole).reshape(rows * tile_pixels, columns * tile_pixels, -1)
    tiles = rearrange(pixels, "(r h) (c w) rgb -> (r c) rgb h w", r=rows, c=columns)
    if thumbnail and len(tiles) > 1:
        small = np.asarray(image.resize((tile_pixels, tile_pixels), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, rearrange(small.reshape(tile_pixels, tile_pixels, -1), "h w rgb -> 1 rgb h w")])
    if tiles.shape[1] == 1:
        tiles = repeat(tiles, "n 1 h w -> n 3 h w")
    return np.ascontiguousarray(tiles)
