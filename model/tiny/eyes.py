"""Teaches a new vision encoder and projector to see letters, before there is a language model to read them.

    python -m model.tiny.eyes OUT [--model FOLDER] [--tile 128] [--steps 15000]       run it again to resume

Every image token is asked which characters have their middle in it, by a linear head that is thrown away at the end;
the decoder is not run and stays as drawn. OUT becomes a model folder of FOLDER's shape with tiles of that many pixels.
"""
import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import InternVL
from model.checkpoint import BESIDE_WEIGHTS, CONFIG, atomic_replace, copy_files, write_text
from model.tiling import tile_page
from model.tiny.pages import write_page

SLOTS, CLASSES = 3, 128                         # characters of a token that are asked for; ASCII, a space for none


def write_shape(model, out, tile):
    """Write a model's config.json, with tiles of `tile` pixels, and its tokenizer into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    copy_files(model, out, BESIDE_WEIGHTS)
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    config["force_image_size"] = config["vision_config"]["image_size"] = tile
    write_text(out / CONFIG, json.dumps(config, indent=2) + "\n")


def examples(name, pages, tile):
    """-> uint8 tiles (pages, 3, S, S), the characters in their image tokens (pages * tokens, SLOTS)."""
    draws = [random.Random(f"{name} {page}") for page in range(pages)]
    sheets = [write_page(draw, "lines", (tile, tile), unseen=False)[0] for draw in draws]
    tiles = [torch.from_numpy(tile_page(sheet.draw(), 1, tile)) for sheet in sheets]
    return torch.cat(tiles), torch.tensor([[ord(c) for c in cell] for sheet in sheets for cell in sheet.cells(SLOTS)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tiny", help="whose shape and tokenizer (the embedded one's)")
    for flag, value in dict(tile=128, steps=15000, batch_pages=4, seed=0, save_every=1000, lr=3e-3).items():
        parser.add_argument(f"--{flag.replace('_', '-')}", type=type(value), default=value, help="(%(default)s)")
    settings = parser.parse_args()
    write_shape(InternVL.from_scratch(settings.model, device="cpu"), settings.out, settings.tile)
    model, saved = InternVL.from_scratch(settings.out, settings.seed, "cpu"), settings.out / "eyes.pt"
    torch.manual_seed(settings.seed)
    head = nn.Linear(model.config.language.width, SLOTS * CLASSES)
    parts = nn.ModuleDict({"vision": model.vision, "projector": model.projector, "head": head}).requires_grad_()
    optimizer = torch.optim.AdamW(parts.parameters(), betas=(0.9, 0.98))
    begin, right, asked = 0, 0, 0
    if saved.exists():
        begin, weights, moments = torch.load(saved, weights_only=True)
        parts.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    for step in range(begin, settings.steps):
        tiles, labels = examples(f"eyes {settings.seed} {step}", settings.batch_pages, settings.tile)
        seen = model.encode_images(tiles)                                                 # (tokens, D)
        logits = head(F.rms_norm(seen, seen.shape[-1:])).unflatten(1, (SLOTS, CLASSES))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        for group in optimizer.param_groups:            # rises over 200 steps, falls to 0 over the last third
            group["lr"] = settings.lr * min(1, (step + 1) / 200, 3 * (settings.steps - step) / settings.steps)
        optimizer.step()
        found = (logits.argmax(-1) == labels)[labels != ord(" ")]
        right, asked = right + found.sum().item(), asked + len(found)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            print(f"step {step + 1} | loss {loss.item():.3f} | right {right / asked:.3f}", flush=True)
            right = asked = 0
            with atomic_replace(saved) as beside:
                torch.save([step + 1, parts.state_dict(), optimizer.state_dict()], beside)
    model.save_pretrained(settings.out)


if __name__ == "__main__":
    main()
