"""What does the model see, and where does it look? Two pictures of a page, drawn with Pillow.

`draw_tiles`: the page as it is cut, its grid, its thumbnail and how many tokens they become.
`draw_attention`: where the answer's tokens looked. Attention of every answer token to the image tokens, averaged over heads,
layers and answer tokens. Source: the answer-to-token attention of "MLLMs Know Where to Look" (arXiv 2502.17422), section 3;
it tells where the model looked, not why it answered what it did.
"""
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from model.language import look_back, rotate, rotation

EDGE, LINE = 24, (220, 30, 30)           # EDGE: pixels around a tile of 128, more around larger ones


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
        canvas.paste(Image.fromarray(rearrange(tile, "rgb h w -> h w rgb")), (x, y))
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
    cos, sin = rotation(positions, model.config.language.head_width, model.config.language.rope_theta, model.dtype)
    later = torch.arange(stop, device=model.device) > positions[:, None]
    x, total = language.embedding(ids).to(model.dtype), 0
    cache.truncate(start)
    page = look_back(torch.zeros(count, dtype=torch.long), cache, model.device)
    for layer, block in enumerate(language.blocks):
        query = rearrange(block.attention.query(block.attention_norm(x)), "l (h d) -> h l d", d=cos.shape[-1])
        keys = cache.keys[layer, :, :stop].repeat_interleave(query.shape[0] // cache.keys.shape[1], dim=0)    # (H, L, d)
        weight = rotate(query, cos, sin).float() @ keys.float().mT / cos.shape[-1] ** 0.5
        total = total + weight.masked_fill(later, -torch.inf).softmax(dim=-1).mean(dim=(0, 1))                # (L,)
        x = block(x, cos, sin, [page])
    cache.branches = page.held
    return total[places].cpu() / len(language.blocks)


def over(image, heat):
    """A page with a heat map (rows, columns) from 0 to 1 over it, red where it is hot."""
    image = image.convert("RGB")
    mask = Image.fromarray(np.uint8(heat ** 0.5 * 200)).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", image.size, (255, 40, 0)), image, mask)
