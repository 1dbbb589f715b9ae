"""What does the model see, and where does it look? Pictures drawn with Pillow, and an example printed token by token.

Source of `attention`: "MLLMs Know Where to Look" (arXiv 2502.17422), section 3, answer-to-token attention. It shows
where the model looked, not why it gave its answer.
"""
import itertools
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import torch
from einops import rearrange, reduce
from PIL import Image, ImageDraw, ImageFont

from extras.cli import count
from model.errors import InputError
from model.images import load_image
from model.language import Row, page_cos_sin, page_mask
from model.prompt import IMAGE_TOKEN
from model.tiling import choose_grid

# one palette for all pictures: fills for tokens of the prefix, of images, of plain text and in the loss; then lines
PREFIX, IMAGE, TEXT, LOSS = "#c9dcf2", "#fde3ae", "#f2f2f2", "#c8e9c8"
RIGHT, WRONG, GRAY = "#2e8b3d", "#d03030", "#555555"
FONT, MONO = "DejaVu Sans, system-ui, sans-serif", "DejaVu Sans Mono, monospace"        # as matplotlib, if it is there
EDGE = 24                               # pixels around a tile of 128, more around larger ones


def save_picture(picture, path):
    """Write a Pillow image to a file. Raises InputError."""
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); expected a name like out.png "
                         "in a folder that exists") from error


# ---------------------------------------------------------------------------------------------------------------- tiles

def draw_tiles(pictures, tokens_per_tile):
    """Draw images below each other as they are cut -> RGB Pillow image: numbered tiles, the thumbnail beside them.

    `pictures`: each with `tiles`, uint8 (n, 3, S, S), and `grid`, (columns, rows), as in `Chat.pictures`.
    """
    return stack([draw_grid(picture.tiles, *picture.grid, tokens_per_tile) for picture in pictures])


def draw_grid(tiles, columns, rows, tokens_per_tile):
    size, count, thumbnail = tiles.shape[-1], columns * rows, len(tiles) > columns * rows
    scale = max(1, size // 128)
    edge, cell = EDGE * scale, size + EDGE * scale
    text = (f"{columns} x {rows} tile{'s' * (count > 1)}{' and a thumbnail' if thumbnail else ''}, "
            f"{len(tiles)} x {tokens_per_tile} = {len(tiles) * tokens_per_tile:,} tokens")
    font = ImageFont.load_default(size=14 * scale)
    width = max((columns + thumbnail) * cell + edge, round(font.getlength(text)) + 2 * edge)
    canvas = Image.new("RGB", (width, rows * cell + 2 * edge), "white")
    draw = ImageDraw.Draw(canvas)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns) if i < count else (0, columns)
        x, y = edge + column * cell, edge + row * cell
        canvas.paste(as_image(tile), (x, y))
        draw.rectangle((x - 1, y - 1, x + size, y + size), outline=WRONG)
        draw.text((x, y - 19 * scale), "thumbnail" if i >= count else str(i + 1), fill=WRONG, font=font)
    draw.text((edge, rows * cell + edge), text, fill="black", font=font)
    return canvas


def stack(images):
    """RGB images below each other."""
    canvas = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (0, sum(image.height for image in images[:i])))
    return canvas


def as_image(tile):
    """A uint8 tile (3, S, S), array or tensor, as a Pillow image."""
    return Image.fromarray(np.asarray(rearrange(tile, "rgb h w -> h w rgb")))


# ------------------------------------------------------------------------------------------------------------- examples

def show_example(example, dataset, file):
    """Print the tokens of an example of a PageDataset, question by question; save the picture of its tiles as `file`.

    Tokens in the loss stand in [], on a terminal also in green.
    """
    page, prompt, tokenizer, most = example.page, example.prompt, dataset.tokenizer, dataset.tiles_of_each(example.page)
    image_tokens = sum(prompt.images)
    print(f"{page.name}: images {len(page.images)}, tiles {len(example.tiles)}, questions {len(page.questions)}")
    if len(example.tiles):
        sizes = [load_image(image, dataset.allow_private).size for image in page.images]
        pictures = [SimpleNamespace(tiles=tiles, grid=choose_grid(*size, most, tiles.shape[-1]))
                    for size, tiles in zip(sizes, example.tiles.split(example.tile_counts))]
        save_picture(draw_tiles(pictures, image_tokens // len(example.tiles)), file)
        print(f"tiles: {file}")
    last = max(prompt.branches)
    kind = "question" if last == len(example.kept_questions) else "conversation"
    for branch in range(last + 1):
        at = [i for i, b in enumerate(prompt.branches) if b == branch]
        in_loss = sum(prompt.labels[i] >= 0 for i in at)
        print(f"\n{f'{kind} {branch} of {last}' if branch else 'prefix, shared by all questions'}: "
              f"{count(len(at), 'token')} from position {prompt.positions[at[0]]}, {in_loss} in the loss")
        print("|".join(runs_of_tokens(prompt, at, tokenizer)))
    print(f"\n{len(prompt.ids)} tokens, {image_tokens} of them from images, {example.answer_tokens} in the loss"
          + (f"; {count(len(example.too_long), 'question')} left out: too long" if example.too_long else ""))


def runs_of_tokens(prompt, at, tokenizer):
    """Yield the tokens at the indices `at` of a prompt as text: a piece for each run of image tokens, of tokens in the
    loss, and of masked ones."""
    begin, end = ("\033[1;32m[", "]\033[0m") if sys.stdout.isatty() else ("[", "]")
    kinds = itertools.groupby(at, key=lambda i: (prompt.images[i], prompt.labels[i] >= 0))
    for (is_image, in_loss), run in kinds:
        ids = [prompt.ids[i] for i in run]
        text = f"{IMAGE_TOKEN} x {len(ids)}" if is_image else "|".join(texts_of_tokens(ids, tokenizer))
        yield begin + text + end if in_loss else text


def texts_of_tokens(ids, tokenizer):
    """Yield the text of each token; tokens that hold parts of one character are joined."""
    pending = []
    for i, index in enumerate(ids, 1):
        pending.append(index)
        text = tokenizer.decode(pending)
        if i == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield visible(text)
            pending = []


def visible(text):
    """Text with a sign for the end of a line, and one for characters that a terminal would obey or not show."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c
                   for c in text.replace("\n", "\u23ce"))


# ------------------------------------------------------------------------------------------------------------ attention

def token_grid(model):
    """(rows, columns) of the image tokens over a tile; (1, 1) if the projector gives them no places."""
    return getattr(model.projector, "token_grid", (1, 1))


def draw_attention(chat):
    """Draw where the last answer looked -> RGB Pillow image: the conversation's images below each other."""
    weights = attention(chat)
    per_tile, (height, width), maps, start = chat.model.config.tokens_per_tile, token_grid(chat.model), [], 0
    for picture in chat.pictures:
        columns, rows = picture.grid
        cells = weights[start:start + columns * rows * per_tile]
        start += len(picture.tiles) * per_tile
        heat = reduce(cells, "(r c h w n) -> (r h) (c w)", "sum", r=rows, c=columns, h=height, w=width).numpy()
        mask = Image.fromarray(np.uint8((heat / max(heat.max(), 1e-12)) ** 0.5 * 200))          # red where it is hot
        page, red = picture.image.convert("RGB"), Image.new("RGB", picture.image.size, (255, 40, 0))
        maps.append(Image.composite(red, page, mask.resize(page.size, Image.Resampling.BICUBIC)))
    return stack(maps)


@torch.inference_mode()
def attention(chat):
    """The attention of the last answer's tokens to the image tokens of the conversation -> float32 (n,), on the CPU.

    Mean over heads, layers and answer tokens. The tokens that predicted the answer are run once more over the keys in
    the cache, with the attention weights written out.
    """
    model, cache, count = chat.model, chat.cache, len(chat.report["tokens"])
    language, stop = model.language, len(chat.held)
    start = stop - count                                    # an answer token is predicted by the one before it
    ids = torch.tensor(chat.held[start:stop], device=model.device)
    positions = torch.arange(start, stop, device=model.device)
    places = [i for i, key in enumerate(chat.held) if not isinstance(key, int)]
    later = torch.arange(stop, device=model.device) > positions[:, None]
    x, total = language.embedding(ids).to(model.dtype), 0
    cache.crop(start)
    page = page_mask(torch.zeros(count, dtype=torch.long, device=model.device), cache, (count, 0))
    row = Row(*page_cos_sin(positions, model.config.language, [page], model.dtype), [page], None)
    for layer, block in enumerate(language.blocks):
        query, _, _ = block.attention.project(block.attention_norm(x), row)
        keys = cache.keys[layer, :, :stop].repeat_interleave(query.shape[0] // cache.keys.shape[1], dim=0)  # (H, L, d)
        weight = query.float() @ keys.float().mT / row.cos.shape[-1] ** 0.5
        total = total + weight.masked_fill(later, -torch.inf).softmax(dim=-1).mean(dim=(0, 1))              # (L,)
        x = block(x, row)
    cache.branches = page.key_branches
    return total[places].cpu() / len(language.blocks)
