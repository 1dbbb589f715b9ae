"""InternVL2 in plain PyTorch: tiles of a page become image tokens, which a language model reads with the questions.

Letters in shape comments; README.md beside this file explains the words:

    N  tiles in the batch          L  tokens in the row (several pages, one after another, nothing padded)
    D  width of a layer            P  tokens of a page's prefix (system turn, user header, image tokens)
    H  attention heads             K  key/value heads (K divides H)
    V  vocabulary                  A  answer tokens, those in the loss
"""
from model.errors import InputError
from model.internvl import InternVL
from model.xcomposer2 import XComposer2

__all__ = ["InputError", "InternVL", "XComposer2"]
