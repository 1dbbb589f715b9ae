"""What happens to one page and one question, with the real numbers of this run, as a page to read in a browser.

    page -> grid and thumbnail -> patches -> image tokens -> token ids and branches -> what is learned -> the answer, token by token

One self-contained HTML file: pictures are embedded, nothing is fetched. See `python infer.py --explain OUT.html`.
"""
import base64
import html
import io

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from model.generate import generate
from model.prompt import IMAGE_TOKEN, NOT_LEARNED, page_prompt, special_id
from model.tiling import choose_grid, tile_page

LIKELIEST = 5                           # tokens shown of each distribution
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
h2 { margin-top: 2em } img { border: 1px solid #bbb; margin: 2px; max-width: 100% } code { background: #f2f2f2; padding: 0 .2em }
.token { display: inline-block; font: 13px monospace; border: 1px solid #ccc; border-radius: 3px; padding: 0 3px; margin: 1px; white-space: pre }
.prefix { background: #eef3fb } .image { background: #fdf1d6 } .branch { background: #f3f3f3 } .learned { background: #d5f0d5; border-color: #4a4 }
small { color: #666 } table { border-collapse: collapse } td { padding: .1em .6em; font: 14px monospace; white-space: pre }
.bar { background: #4a90d9; height: .8em; display: inline-block }"""


def explain(model, image, question, max_tiles=12, max_new_tokens=64):
    """A Pillow image and a question about it -> (HTML text, the greedy answer)."""
    config, size = model.config, model.config.vision.tile_pixels
    columns, rows = choose_grid(*image.size, max_tiles, size)
    tiles = torch.from_numpy(tile_page(image, max_tiles, size, config.thumbnail))
    tokens = decode_greedily(model, tiles, question, max_new_tokens)
    answer = model.tokenizer.decode(tokens, skip_special_tokens=True)
    prompt, _ = page_prompt(model.tokenizer, config.tokens_per_tile, [len(tiles)], [question], [answer])
    with torch.no_grad():
        batch = model.pack([(tiles, prompt)])
        batch.image_tokens = model.see(batch.tiles)
        likely = model.language.head(model.read(batch, places=batch.answer_places)).float().softmax(-1)      # (A, V)
    grid, side = config.vision.grid, config.vision.grid // config.shuffle
    width, height = image.size
    parts = [
        f"<h1>One page, one question</h1><p><b>{html.escape(question)}</b> &rarr; <b>{html.escape(answer)}</b></p>"
        f"<p>Model: {sum(p.numel() for p in model.parameters()):,} parameters, computing in {str(model.dtype).split('.')[-1]} on {model.device.type}.</p>",
        f"<h2>1. The page and its grid</h2><p>{width} x {height} pixels, width to height {width / height:.3f}. Of all grids with at most "
        f"{max_tiles} cells, {columns} x {rows} ({columns / rows:.3f}) is nearest, so the page is resized to {columns * size} x "
        f"{rows * size} and cut.</p>" + picture(ruled(image, columns, rows), "the page with its grid"),
        f"<h2>2. {count(len(tiles), 'tile')} of {size} x {size}</h2><p>Row by row" + (", the whole page as a thumbnail last" if len(tiles) > columns * rows else "")
        + f": uint8 ({len(tiles)}, 3, {size}, {size}).</p>" + "".join(picture(tile_image(tile), f"tile {i}", 140) for i, tile in enumerate(tiles)),
        f"<h2>3. {grid ** 2:,} patches a tile</h2><p>Squares of {config.vision.patch_pixels} pixels. The vision encoder makes a vector of "
        f"{config.vision.width} of each: ({len(tiles)}, {grid ** 2}, {config.vision.width}).</p>"
        + picture(ruled(tile_image(tiles[0]), grid, grid), "the first tile with its patches", 420),
        f"<h2>4. {config.tokens_per_tile} image tokens a tile</h2><p>Four neighbouring patches become one token and the projector brings it to the "
        f"decoder's width: ({len(tiles)}, {config.tokens_per_tile}, {config.language.width}). Here the first tile's {side} x {side} tokens, coloured by their "
        "three strongest directions: alike means alike to the decoder.</p>"
        + picture(token_colours(batch.image_tokens[:config.tokens_per_tile], side), "the first tile's image tokens", 420),
        f"<h2>5. {len(prompt.ids):,} tokens in a row</h2><p>The <span class='token prefix'>prefix</span> holds the system turn and the "
        "<span class='token image'>image tokens</span>; the question is a <span class='token branch'>branch</span> behind it. Other questions about this page "
        "would be further branches, at the same positions. Small: token id, position.</p>" + token_row(model, prompt),
        f"<h2>6. What would be learned</h2><p>If this were a training example with this answer: the {sum(l != NOT_LEARNED for l in prompt.labels)} "
        "<span class='token learned'>green</span> tokens above, the answer and the end of the turn, and nothing else. Each is predicted from "
        "the one before it.</p>",
        f"<h2>7. The answer, token by token</h2><p>The {LIKELIEST} likeliest tokens at each place; greedy decoding takes the first.</p>"
        + distributions(model, likely, batch.targets)]
    return (f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{html.escape(question)}</title><style>{STYLE}</style>"
            + "".join(parts) + "</html>\n"), answer


def decode_greedily(model, tiles, question, most):
    prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [question])
    return [step[0] for step in generate(model, [(tiles, prompt)], most)]


def count(number, thing):
    return f"{number} {thing}" + ("" if number == 1 else "s")


def picture(image, name, width=600):
    """An <img> that holds its own PNG, shrunk to `width` if it is wider, enlarged without smoothing if it is much smaller."""
    if image.width > width:
        image = image.resize((width, max(1, round(width * image.height / image.width))))
    file = io.BytesIO()
    image.save(file, "PNG")
    shown = max(image.width, min(width, 4 * image.width))
    return f"<img alt='{name}' width='{shown}' style='image-rendering: pixelated' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def tile_image(tile):
    return Image.fromarray(rearrange(tile.numpy(), "rgb h w -> h w rgb"))


def ruled(image, columns, rows):
    """The image with the lines of a grid."""
    scale = max(1, 420 // min(image.size))
    image = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, thick = ImageDraw.Draw(image), max(1, image.width // 500) if columns < 20 else 1
    for i in range(1, columns):
        pen.line((i * image.width // columns, 0, i * image.width // columns, image.height), fill=(220, 40, 40), width=thick)
    for i in range(1, rows):
        pen.line((0, i * image.height // rows, image.width, i * image.height // rows), fill=(220, 40, 40), width=thick)
    return image


def token_colours(tokens, side):
    """Image tokens (side * side, D) as pixels: their three strongest principal directions as red, green and blue."""
    x = tokens.float().cpu() - tokens.float().cpu().mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:3].T
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0)).clamp_min(1e-9)
    return Image.fromarray((255 * x).byte().reshape(side, side, 3).numpy().astype(np.uint8)).resize((side * 16, side * 16), Image.Resampling.NEAREST)


def token_row(model, prompt):
    """The prompt's tokens in their colours; a run of image tokens is told by its length."""
    image_id, shown, i = special_id(model.tokenizer, IMAGE_TOKEN), [], 0
    while i < len(prompt.ids):
        stop = i + 1
        while prompt.ids[i] == image_id and stop < len(prompt.ids) and prompt.ids[stop] == image_id:
            stop += 1
        kind = ("image" if prompt.ids[i] == image_id else "learned" if prompt.labels[i] != NOT_LEARNED else "branch" if prompt.branches[i] else "prefix")
        text, where = model.tokenizer.decode([prompt.ids[i]]), str(prompt.positions[i])
        if stop > i + 1:
            text, where = f"{text} x {stop - i:,}", f"{where}-{prompt.positions[stop - 1]}"
        shown.append(f"<span class='token {kind}'>{html.escape(text).replace(chr(10), '&#9166;')} <small>{prompt.ids[i]}, {where}</small></span>")
        i = stop
    return "".join(shown)


def distributions(model, likely, targets):
    rows = []
    for probability, target in zip(likely, targets.tolist()):
        best, ids = probability.topk(LIKELIEST)
        for place, (p, token) in enumerate(zip(best.tolist(), ids.tolist())):
            text = html.escape(model.tokenizer.decode([token])).replace("\n", "&#9166;")
            text = f"<b>{text}</b>" if token == target else text
            rows.append(f"<tr><td>{text}</td><td>{100 * p:5.1f} %</td><td><span class='bar' style='width:{200 * p:.0f}px'></span></td></tr>")
        rows.append("<tr><td colspan='3'>&nbsp;</td></tr>")
    return f"<table>{''.join(rows)}</table>"
