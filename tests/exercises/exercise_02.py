"""2. How many tokens does a page cost?

A page of 1700 x 2200 pixels is read before any word of a question. Count what it puts into the row: every tile, and the
thumbnail, and `<img>` and `</img>` around them.

Hint: a tile is 448 / 14 = 32 patches wide; the projector makes one token of 2 x 2 patches. A page of one tile has no
thumbnail. See `choose_grid` in model/tiling.py and `tokens_per_tile` in model/config.py.
"""
from model.tiling import choose_grid  # noqa: F401  you will want it


def page_tokens(width, height, max_tiles=12):
    """Tokens between the user's header and the question: <img>, image tokens, </img>."""
    raise NotImplementedError("write me")


def test_a_letter_page_costs_twice_an_a4_page():
    assert page_tokens(1700, 2200) == 13 * 256 + 2 and page_tokens(1654, 2339) == 7 * 256 + 2


def test_it_is_what_the_prompt_holds():
    import numpy as np
    from PIL import Image

    from model.checkpoint import TINY
    from model.prompt import write_page
    from model.tiling import tile_page
    from model.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(TINY)
    bare = len(write_page(tokenizer, 256, [0], [])[0].ids)                     # with <img></img>, without a tile
    for size in ((400, 400), (1000, 700), (300, 900), (900, 910)):
        tiles = tile_page(Image.fromarray(np.zeros(size[::-1], np.uint8)))
        assert page_tokens(*size) == len(write_page(tokenizer, 256, [len(tiles)], [])[0].ids) - bare + 2
