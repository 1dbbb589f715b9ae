"""The embedded model for the tests of a fork: where another projector does not take its weights, a copy that has this part drawn.

Imported before anything takes `TINY` from model/checkpoint.py. Tests of what the published weights can do are marked `official`.
"""
import atexit
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import InputError, InternVL, checkpoint
from model.names import our_name


@torch.no_grad()
def with_drawn_projector(folder):
    """A model folder with the vision encoder and the language model of `folder`, and a random projector; deleted at the end."""
    model, copy = InternVL.from_scratch(folder, seed=0, device="cpu"), Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for name, tensor in load_file(folder / checkpoint.WEIGHTS).items():
        if (our_name(name) or "").startswith(("vision.", "language.")):
            model.get_parameter(our_name(name)).copy_(tensor)
    model.save_pretrained(copy)
    return copy


PUBLISHED = checkpoint.TINY
try:
    InternVL.from_pretrained("tiny", "cpu")
except (InputError, KeyError):
    checkpoint.TINY = with_drawn_projector(PUBLISHED)
