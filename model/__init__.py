"""InternVL2 in plain PyTorch: a page is cut into tiles, seen, projected into words, and read by a language model.

Letters used in shape comments, everywhere:

    N  tiles in the batch          L  tokens in the row (several pages, one after another, nothing padded)
    D  width of a layer            P  tokens of a page's prefix (system turn, user header, image tokens)
    H  attention heads             K  key/value heads (K divides H)
    V  vocabulary                  A  answer tokens, the learned ones

Words used with one meaning: a *page* is an image with all its questions; a *tile* is a square cut out of it; a *patch* is
what the vision encoder's first layer sees of a tile; an *image token* is what the projector makes of 2 x 2 patches; a
*branch* is one question with its answer, attending to the page's prefix and to itself; a *step* is an optimizer update.
"""
from model.errors import InputError
from model.internvl import InternVL

__all__ = ["InputError", "InternVL"]
