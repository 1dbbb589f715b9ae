"""What does the model see, and where does it look? Two pictures of a page, drawn with Pillow, and an example in print.

`show_example`: what is learned of a page, token by token, with the tiles of its images.
`draw_tiles`: the page as it is cut, its grid, its thumbnail and how many tokens they become.
`draw_attention`: where the answer's tokens looked. Attention of every answer token to the image tokens, averaged over heads,
layers and answer tokens. Source: the answer-to-token attention of "MLLMs Know Where to Look" (arXiv 2502.17422), section 3;
it tells where the model looked, not why it answered what it did.
"""
import itertools
import sys

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from model.errors import InputError
from model.language import apply_rotary, page_mask, rotary_cos_sin
from model.prompt import IMAGE_TOKEN
from model.tokenizer import special_id

EDGE, LINE = 24, (220, 30, 30)           # EDGE: pixels around a tile of 128, more around larger ones


def save_picture(picture, path):
    """Write a Pillow image; raises InputError where that cannot be."""
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); expected a name like out.png "
                         "in a folder that exists") from error


def show_example(example, tokenizer, file):
    """Print what the model reads of an example (data.py's), branch by branch; save the picture of its tiles as `file`.

    What is learned is green on a terminal, in [] elsewhere.
    """
    page, prompt = example.page, example.prompt
    print(f"{page.name}: images {len(page.images)}, tiles {len(example.tiles)}, questions {len(page.questions)}")
    if len(example.tiles):
        save_picture(line_up(example.tiles, example.tile_counts), file)
        print(f"tiles: {file}, one line an image, the thumbnail last")
    for branch in range(max(prompt.branches) + 1):
        at = [i for i, b in enumerate(prompt.branches) if b == branch]
        learned = sum(prompt.labels[i] >= 0 for i in at)
        print(f"\nbranch {branch}{'' if branch else ' (what all questions share)'}: "
              f"{len(at)} tokens from position {prompt.positions[at[0]]}, {learned} learned")
        print("|".join(runs_of_tokens(prompt, at, tokenizer)))
    print(f"\n{len(prompt.ids)} tokens, {prompt.ids.count(special_id(tokenizer, IMAGE_TOKEN))} of them from images, "
          f"{example.answer_tokens} learned"
          + (f"; {len(example.too_long)} questions left out, they do not fit" if example.too_long else ""))


def runs_of_tokens(prompt, at, tokenizer):
    """The tokens at the places `at` of a prompt as text, a piece for each run of image tokens, of learned and of other ones."""
    begin, end = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    image_id = special_id(tokenizer, IMAGE_TOKEN)
    for (is_image, is_learned), run in itertools.groupby(at, key=lambda i: (prompt.ids[i] == image_id, prompt.labels[i] >= 0)):
        ids = [prompt.ids[i] for i in run]
        text = f"{IMAGE_TOKEN} x {len(ids)}" if is_image else "|".join(texts_of_tokens(ids, tokenizer))
        yield begin + text + end if is_learned else text


def texts_of_tokens(ids, tokenizer):
    """The text of each token; of those that hold a part of a character only, the text of them together."""
    waiting = []
    for i, index in enumerate(ids, 1):
        waiting.append(index)
        text = tokenizer.decode(waiting)
        if i == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text.replace("\n", "⏎")
            waiting = []


def line_up(tiles, counts):
    """uint8 tiles (n, 3, S, S) -> an RGB picture of them, a line an image, which has `counts` tiles."""
    size, gap = tiles.shape[-1], 8
    canvas = Image.new("RGB", (max(counts) * (size + gap) - gap, len(counts) * (size + gap) - gap), "magenta")
    for row, of_image in enumerate(tiles.split(counts)):
        for column, tile in enumerate(of_image):
            canvas.paste(as_image(tile), (column * (size + gap), row * (size + gap)))
    return canvas


def as_image(tile):
    """A uint8 tile (3, S, S), array or tensor, as a Pillow image."""
    return Image.fromarray(np.asarray(rearrange(tile, "rgb h w -> h w rgb")))


def draw_tiles(chat, picture):
    """An RGB picture of a page's tiles, each with its number, and the thumbnail beside them."""
    size, tokens = chat.model.config.vision.tile_pixels, chat.model.config.tokens_per_tile
    columns, rows = picture.grid
    count = columns * rows
    thumbnail = len(picture.tiles) > count
    scale = max(1, size // 128)
    edge = EDGE * scale
    cell = size + edge
    canvas = Image.new("RGB", ((columns + thumbnail) * cell + edge, rows * cell + 2 * edge), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14 * scale)
    for i, tile in enumerate(picture.tiles):
        column, row = (i % columns, i // columns) if i < count else (columns, 0)
        x, y = edge + column * cell, edge + row * cell
        canvas.paste(as_image(tile), (x, y))
        draw.rectangle((x - 1, y - 1, x + size, y + size), outline=LINE)
        draw.text((x, y - 19 * scale), "thumbnail" if i >= count else str(i + 1), fill=LINE, font=font)
    text = (f"{columns} x {rows} tiles{' and a thumbnail' if thumbnail else ''}, "
            f"{len(picture.tiles)} x {tokens} = {len(picture.tiles) * tokens:,} tokens")
    draw.text((edge, rows * cell + edge), text, fill="black", font=font)
    return canvas


def draw_attention(chat):
    """The last answer's look at each picture of the conversation, RGB, one below the other. Nothing is drawn of a thumbnail."""
    looks = attention(chat)
    per_tile, maps, start = chat.model.config.tokens_per_tile, [], 0
    for picture in chat.pictures:
        columns, rows = picture.grid
        look = looks[start:start + columns * rows * per_tile]
        start += len(picture.tiles) * per_tile
        heat = rearrange(look, "(r c h w) -> (r h) (c w)", r=rows, c=columns, h=int(per_tile ** 0.5)).numpy()
        maps.append(over(picture.image, heat / max(heat.max(), 1e-12)))
    canvas = Image.new("RGB", (max(m.width for m in maps), sum(m.height for m in maps)), "white")
    for i, drawn in enumerate(maps):
        canvas.paste(drawn, (0, sum(m.height for m in maps[:i])))
    return canvas


@torch.inference_mode()
def attention(chat):
    """Where the last answer's tokens looked: float32 (image tokens of the conversation,), on the CPU.

    The tokens that chose the answer are read once more over the keys in the cache, with their weights written out.
    """
    model, cache, count = chat.model, chat.cache, len(chat.report["tokens"])
    language, stop = model.language, len(chat.held)
    start = stop - count                                                # the token before the first one chose it
    ids = torch.tensor(chat.held[start:stop], device=model.device)
    positions = torch.arange(start, stop, device=model.device)
    places = [i for i, key in enumerate(chat.held) if not isinstance(key, int)]
    cos, sin = rotary_cos_sin(positions, model.config.language.head_width, model.config.language.rope_theta, model.dtype)
    later = torch.arange(stop, device=model.device) > positions[:, None]
    x, total = language.embedding(ids).to(model.dtype), 0
    cache.crop(start)
    page = page_mask(torch.zeros(count, dtype=torch.long), cache, model.device)
    for layer, block in enumerate(language.blocks):
        query = rearrange(block.attention.query(block.attention_norm(x)), "l (h d) -> h l d", d=cos.shape[-1])
        keys = cache.keys[layer, :, :stop].repeat_interleave(query.shape[0] // cache.keys.shape[1], dim=0)    # (H, L, d)
        weight = apply_rotary(query, cos, sin).float() @ keys.float().mT / cos.shape[-1] ** 0.5
        total = total + weight.masked_fill(later, -torch.inf).softmax(dim=-1).mean(dim=(0, 1))                # (L,)
        x = block(x, cos, sin, [page])
    cache.branches = page.key_branches
    return total[places].cpu() / len(language.blocks)


def over(image, heat):
    """A page with a heat map (rows, columns) from 0 to 1 over it, red where it is hot."""
    image = image.convert("RGB")
    mask = Image.fromarray(np.uint8(heat ** 0.5 * 200)).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", image.size, (255, 40, 0)), image, mask)
