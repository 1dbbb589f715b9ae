"""Makes the tiles of a model twice as wide and high, with what it learned: python -m model.tiny.grow FOLDER OUT

What each place of a tile has learned is laid out four times; a few hundred steps of training tell the four apart. The
decoder learns to follow 64 image tokens in minutes and 256 in hours, so it learns the 64 first.
"""
import sys
from pathlib import Path

import torch

from model import InternVL
from model.tiny.eyes import write_shape


def main(folder, out):
    model = InternVL.from_pretrained(folder, "cpu")
    vision, grid = model.vision, model.config.vision.grid
    first, places = vision.position.split([1, grid ** 2], dim=1)                      # (1, 1, D), (1, grid * grid, D)
    places = places.unflatten(1, (grid, grid)).repeat(1, 2, 2, 1).flatten(1, 2)        # (1, 4 * grid * grid, D)
    vision.position = torch.nn.Parameter(torch.cat([first, places], dim=1))
    model.save_pretrained(out)
    write_shape(model, out, 2 * model.config.vision.tile_pixels)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
