"""Follow one page and one question through the model, with the numbers of this run: a page to read in a browser.

    page -> grid and thumbnail -> patches -> image tokens -> token ids, branches -> tokens in the loss -> the answer

`python infer.py --explain OUT.html` fills the template explain.html; the page embeds its pictures and fetches nothing.
The same pictures are in model/README.md (tests/draw_explain.py).
"""
import base64
import html
import io
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from string import Template

import torch
from PIL import Image, ImageDraw

from extras import pictures as palette
from extras.cli import count
from extras.pictures import as_image, attention, draw_attention, draw_tiles, token_grid, visible
from model.chat import Chat, Picture
from model.errors import InputError
from model.prompt import IGNORE_INDEX, IMAGE_TOKEN, PLACEHOLDER, Prompt, write_page

LIKELIEST = 5                           # tokens shown of each distribution


@dataclass
class Followed:
    """The intermediate results of one page and one question."""
    chat: Chat                          # after the answer
    picture: Picture                    # the page: its tiles uint8 (n, 3, S, S), its image tokens (n * tokens, D)
    prompt: Prompt                      # a training example with the model's own answer
    likely: torch.Tensor                # float32 (A, V), on the CPU: the probabilities for each token of the answer
    looked: torch.Tensor                # float32 (n,): the share of its attention that the answer gave to each tile

    @property
    def tile(self):
        """The index of the tile with most attention, the thumbnail left out."""
        return int(self.looked[:self.picture.grid[0] * self.picture.grid[1]].argmax())

    @property
    def in_loss(self):
        """Indices in the prompt of the tokens in the loss: the answer and the end of its turn."""
        return [i for i, label in enumerate(self.prompt.labels) if label != IGNORE_INDEX]


def explain(model, image, question, max_tiles=12, max_new_tokens=64):
    """A Pillow image and a question about it -> (HTML text, the greedy answer). Raises InputError."""
    if not model.config.tiled:
        raise InputError("--explain follows InternVL's tiles and pixel shuffle; for this model take --attend FILE.png")
    run = follow(model, image, question, max_tiles, max_new_tokens)
    answer = run.chat.turns[0].answer
    values = {"question": html.escape(question), "answer": html.escape(answer)}
    values |= page_values(run, max_tiles) | answer_values(run)
    values |= {f"{name}_picture": embedded(picture) for name, picture in pictures(run).items()}
    values = {name: f"{value:,}" if isinstance(value, int) else value for name, value in values.items()}
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(vars(palette), **values), answer                 # palette: colors and fonts


@torch.no_grad()
def follow(model, image, question, max_tiles=12, max_new_tokens=64):
    """Ask, then run the question once more with its answer, as in training."""
    chat = model.chat(max_tiles=max_tiles, max_new_tokens=max_new_tokens)
    chat.ask(question, image)
    [turn], [picture] = chat.turns, chat.pictures
    head, placeholder, rest = turn.question.partition(PLACEHOLDER)
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [len(picture.tiles)], [[(rest, turn.answer)]],
                           question_start=head + placeholder, template=model.config.template)
    batch = model.pack([(torch.as_tensor(picture.tiles), prompt)])
    batch.image_tokens = picture.tokens
    likely = model(batch).float().softmax(-1).cpu()
    return Followed(chat, picture, prompt, likely, attention(chat).reshape(len(picture.tiles), -1).sum(1))


# ------------------------------------------------------------------------------------------------------ the pictures

def pictures(run):
    """{name: Pillow image}; "answer" is the text of an SVG file."""
    model, picture = run.chat.model, run.picture
    grid, tokens = model.config.vision.grid, model.config.tokens_per_tile
    patches = ruled(as_image(picture.tiles[run.tile]), grid, grid)
    seen = token_colors(picture.tokens[run.tile * tokens:(run.tile + 1) * tokens], token_grid(model)[0])
    return {"page": ruled(picture.image, *picture.grid), "tiles": draw_tiles([picture], tokens), "patches": patches,
            "tokens": seen.resize(patches.size, Image.Resampling.NEAREST), "looked": draw_attention(run.chat),
            "answer": draw_answer(run)}


def ruled(image, columns, rows):
    """The image with the lines of a grid drawn over it."""
    scale = max(1, 420 // min(image.size))
    image = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, thick = ImageDraw.Draw(image), max(1, image.width // 500) if columns < 16 else 1
    lines = [(x, 0, x, image.height) for x in (i * image.width // columns for i in range(1, columns))]
    lines += [(0, y, image.width, y) for y in (i * image.height // rows for i in range(1, rows))]
    for line in lines:
        pen.line(line, fill=palette.WRONG, width=thick)
    return image


def token_colors(tokens, rows):
    """Image tokens (n, D) -> a pixel each, in `rows`: the three strongest principal components as red, green, blue."""
    x = tokens.float().cpu() - tokens.float().cpu().mean(0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    strongest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    x = x @ (directions * strongest.sign()).T       # the sign is arbitrary: here the largest entry is positive
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0)).clamp_min(1e-9)
    return Image.fromarray((255 * x).byte().reshape(rows, -1, 3).numpy())


def draw_answer(run, width=420, line=18):
    """The most likely tokens at each position of the answer, their probabilities as bars -> the text of an SVG file.

    Text and not pixels: tokens may be in any script, and it is sharp on every screen.
    """
    ids, positions = run.prompt.ids, run.prompt.positions
    drawn, y = [], line
    for probability, place in zip(run.likely, run.in_loss):
        heading = f"position {positions[place]:,}, after {written(run, ids[place - 1])}"
        drawn.append(f"<text x='8' y='{y}' fill='{palette.GRAY}'>{heading}</text>")
        best, likeliest = probability.topk(LIKELIEST)
        for p, token in zip(best.tolist(), likeliest.tolist()):
            y += line
            color, weight = (palette.RIGHT, "bold") if token == ids[place] else (palette.PREFIX, "normal")
            text = written(run, token)
            drawn.append(f"<text x='112' y='{y}' text-anchor='end' font-weight='{weight}'>{text}</text>"
                         f"<rect x='120' y='{y - 10}' width='{220 * p:.1f}' height='11' fill='{color}'/>"
                         f"<text class='p' x='{width - 8}' y='{y}' text-anchor='end'>{percent(p)}</text>")
        y += 2 * line
    y -= line // 2 + line
    return (f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{y}' viewBox='0 0 {width} {y}' "
            f"font-family='{palette.MONO}' font-size='13'><rect width='{width}' height='{y}' fill='white'/>"
            f"{''.join(drawn)}</svg>")


def percent(p):
    """A probability as HTML text, never rounded to 0 or 100 %."""
    return "&lt; 0.1 %" if p < 0.0005 else "&gt; 99.9 %" if p >= 0.9995 else f"{100 * p:.1f} %"


def written(run, token, most=12):
    """A token as HTML text: a space and the end of a line have a sign."""
    text = visible(run.chat.model.tokenizer.decode([token])).replace(" ", "\u2423")
    return html.escape(text if most is None or len(text) <= most else text[:most - 1] + "\u2026")


# --------------------------------------------------------------------------------------------- values of explain.html

def page_values(run, max_tiles):
    """{name: number or text} about the page, its tiles and image tokens, and the model; the shapes of all tensors."""
    model, picture = run.chat.model, run.picture
    config, n, (columns, rows), (width, height) = model.config, len(picture.tiles), picture.grid, picture.image.size
    size, side, tokens = config.vision.tile_pixels, config.vision.grid, config.tokens_per_tile
    seen, d, a = config.vision.width, config.language.width, len(run.in_loss)
    shapes = {"tiles": (n, 3, size, size), "patches": (n, side ** 2, seen), "image_tokens": (n, tokens, d),
              "row": (len(run.prompt.ids), d), "last": (a, d), "logits": (a, config.language.vocabulary)}
    (down, across), kind = token_grid(model), type(model.projector)
    thumbnail = "; the last one is the whole page, scaled down: the <i>thumbnail</i>" if n > columns * rows else ""
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype).split(".")[-1],
        "device": model.device.type, "size": size, "page_width": width, "page_height": height,
        "page_ratio": f"{width / height:.3f}", "cells": count(max_tiles, "cell"), "columns": columns, "rows": rows,
        "grid_ratio": f"{columns / rows:.3f}", "resized": f"{columns * size} x {rows * size}",
        "tiles": count(n, "tile"), "thumbnail": thumbnail, "tile": run.tile + 1, "patches": side ** 2,
        "all_patches": n * side ** 2, "side": side, "patch": config.vision.patch_pixels,
        "vision_width": seen, "image_tokens": tokens, "all_image_tokens": n * tokens, "width": d,
        "projector": html.escape(getattr(model.projector, "summary", f"{kind.__name__} makes image tokens of them")),
        "projector_file": kind.__module__.replace(".", "/") + ".py", "image_token": html.escape(IMAGE_TOKEN),
        "tokens_drawn": f"{across} x {down} tokens" if across * down == tokens else f"{tokens} tokens, in their order,",
        **{f"{name}_shape": str(shape) for name, shape in shapes.items()}}


def answer_values(run):
    """{name: number or text} about the row of tokens, the loss and the answer."""
    prompt, language, a, n = run.prompt, run.chat.model.config.language, len(run.in_loss), len(run.picture.tiles)
    start, total = prompt.branches.index(1), len(prompt.ids)
    loss = -run.likely[range(a), [prompt.ids[i] for i in run.in_loss]].log().mean().item()
    names, undrawn = [f"tile {i + 1}" for i in range(n)], ""
    if n > run.picture.grid[0] * run.picture.grid[1]:
        names[-1], undrawn = "thumbnail", "; the thumbnail is not drawn"
    return {
        "row_tokens": total, "prefix_end": start - 1, "branch_start": start, "branch_end": prompt.positions[-1],
        "prefix": token_row(run, 0, start), "branch": token_row(run, start, total), "in_loss": a, "masked": total - a,
        "loss": f"{loss:.4f}", "answer_tokens": count(a, "token"), "positions": count(a, "position"),
        "layers": language.layers, "vocabulary": language.vocabulary, "likeliest": LIKELIEST, "undrawn": undrawn,
        "looked": percent(run.looked.sum().item()),
        "shares": ", ".join(f"{name} {percent(look)}" for name, look in zip(names, run.looked.tolist()))}


def embedded(picture, most=1200):
    """An SVG text as it is; a Pillow image as the address of a PNG file, at most so many pixels wide."""
    if isinstance(picture, str):
        return picture
    if picture.width > most:
        picture = picture.resize((most, max(1, round(most * picture.height / picture.width))))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def token_row(run, start, stop):
    """A range of the prompt's tokens in their colors; consecutive image tokens become one entry with their number."""
    prompt, shown = run.prompt, []
    for _, places in groupby(range(start, stop), lambda i: -1 if prompt.images[i] else i):
        places = list(places)
        i, last = places[0], places[-1]
        kind = ("image" if prompt.images[i] else "loss" if prompt.labels[i] != IGNORE_INDEX
                else "branch" if prompt.branches[i] else "prefix")
        text, where = written(run, prompt.ids[i], None), f"{prompt.positions[i]}"
        if last > i:
            text, where = f"{text} x {last - i + 1:,}", f"{where}-{prompt.positions[last]}"
        shown.append(f"<span class='token {kind}'>{text} <small>{prompt.ids[i]}, {where}</small></span>")
    return "".join(shown)
