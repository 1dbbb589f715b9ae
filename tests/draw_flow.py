"""Draws assets/flow.png, the picture in the README: a page on its way to the loss, with the shapes of InternVL2-1B.

    python tests/draw_flow.py

Tiles are cut by model/tiling.py and tokens counted by the same configuration that the model is built from.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont

from extras.pictures import IMAGE, LOSS, PREFIX, TEXT
from model.config import Config
from model.tiling import choose_grid, tile_page

FROZEN, TRAINABLE, IN_LOSS, PLAIN = PREFIX, IMAGE, LOSS, TEXT           # the colors of all pictures


def draw_letter():
    """A made-up page of 1000 x 700 pixels."""
    page = Image.new("RGB", (1000, 700), "white")
    draw = ImageDraw.Draw(page)
    lines = [("INVOICE             No. 4711", 58), ("January 8, 1993", 40), ("", 30), ("To: W. Jones, 12 Mill Road", 40), ("", 30),
             ("2 typewriter ribbons                      7.50", 40), ("1 box of paper                             12.00", 40), ("TOTAL                                $19.50", 58)]
    y = 50
    for text, size in lines:
        draw.text((60, y), text, fill="black", font=ImageFont.load_default(size=size))
        y += int(size * 1.5) + 8
    return page


def main():
    config, page = Config(), draw_letter()
    columns, rows = choose_grid(*page.size)
    tiles = tile_page(page)
    n, patches, width = len(tiles), config.vision.grid ** 2, config.vision.width
    tokens, text_width = config.tokens_per_tile, config.language.width

    figure, axes = pyplot.subplots(figsize=(14, 7.2))
    axes.axis("off")

    def box(x, y, w, h, text, color, size=10):
        axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.1,rounding_size=0.8", facecolor=color, edgecolor="#555555"))
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)

    def arrow(x, y, to_x, to_y):
        axes.add_patch(FancyArrowPatch((x, y), (to_x, to_y), arrowstyle="-|>", mutation_scale=14, color="#555555"))

    def picture(image, x, y, w, h):
        axes.imshow(image, extent=(x, x + w, y, y + h), aspect="auto", zorder=2)
        axes.plot([x, x + w, x + w, x, x], [y, y, y + h, y + h, y], color="#555555", linewidth=0.8, zorder=3)

    def label(x, y, text, size=10, **more):
        axes.text(x, y, text, ha="center", va="center", fontsize=size, **more)

    # the page and its tiles
    picture(page, 1, 44, 28, 19.6)
    for i in range(1, columns):
        axes.plot([1 + 28 * i / columns] * 2, [44, 63.6], color="tab:red", linewidth=1.2, zorder=3)
    for i in range(1, rows):
        axes.plot([1, 29], [44 + 19.6 * i / rows] * 2, color="tab:red", linewidth=1.2, zorder=3)
    label(15, 67, f"page {page.width} x {page.height}: grid {columns} x {rows}", 11, weight="bold")
    arrow(30, 54, 33.5, 54)
    for i, tile in enumerate(tiles):
        row, column = (i // columns, i % columns) if i < n - 1 else (0.5, columns + 0.25)
        picture(tile.transpose(1, 2, 0), 34 + column * 8.9, 54.6 - row * 8.9, 8.3, 8.3)
    label(52, 67, f"{n} tiles, the last is the whole page\nuint8 ({n}, 3, 448, 448)", 10)
    arrow(71.5, 54, 75, 54)

    # seen and projected
    box(76, 47, 22, 14, f"vision encoder\nInternViT, 24 blocks\nfrozen\n({n}, {patches}, {width})", FROZEN)
    arrow(99, 54, 102.5, 54)
    box(103.5, 47, 28, 14, f"projector\n2 x 2 patches → 1 token\ntrainable: 4,482,816 weights\n({n}, {tokens}, {text_width})", TRAINABLE)
    label(87, 64.5, "model/vision.py", 9, family="monospace")
    label(117.5, 64.5, "model/projector.py", 9, family="monospace")
    label(15, 41.6, "model/tiling.py", 9, family="monospace")

    # the row of tokens
    prefix = 38 + 3 + 1 + tokens * n + 1                        # system turn, user header, <img>, image tokens, </img>
    label(77, 40, "one row of tokens per page: the prefix once, every question a branch of it", 10)
    label(127, 37.4, "model/prompt.py", 9, family="monospace")
    box(2, 27, 19, 7, "system turn,\nuser header", PLAIN)
    box(22, 27, 34, 7, f"<img> {tokens * n:,} image tokens </img>", TRAINABLE)
    box(58, 27, 24, 7, "What is the date?", PLAIN)
    box(82.6, 27, 18, 7, "January 8, 1993", IN_LOSS)
    box(103, 27, 20, 7, "What is the total?", PLAIN)
    box(123.6, 27, 12, 7, "$19.50", IN_LOSS)
    axes.plot([117.5, 117.5, 39], [46.6, 37.4, 37.4], color="#555555", linewidth=1.2)
    arrow(39, 37.7, 39, 34.3)
    for x, w, text in ((2, 54, f"prefix: positions 0 … {prefix - 1:,}"), (58, 42.6, f"branch 1: positions {prefix:,} …"),
                       (103, 32.6, f"branch 2: positions {prefix:,} …")):
        axes.plot([x, x + w], [25.4, 25.4], color="#555555", linewidth=1)
        label(x + w / 2, 23.6, text, 9)

    # read, and the loss
    for x in (29, 79, 119):
        arrow(x, 22, x, 18.5)
    box(2, 10, 133.6, 8, f"language model: Qwen2, 24 blocks, frozen    (tokens, {text_width})    "
        "a branch sees the prefix and itself    (model/language.py)", FROZEN, 11)
    for x in (91.6, 129.6):
        arrow(x, 9.6, x, 6.4)
    label(91, 3.4, f"head: logits (answer tokens, {config.language.vocabulary:,}), only where the loss is taken  →  loss "
          "= sum over the step / its answer tokens", 9.5)
    for x, color, text in ((4, FROZEN, "frozen"), (14, TRAINABLE, "trainable"), (26, IN_LOSS, "in the loss")):
        box(x, 2.4, 2.4, 2.4, "", color)
        axes.text(x + 3.4, 3.6, text, va="center", fontsize=9)

    axes.set(xlim=(0, 137), ylim=(0, 70))
    out = Path(__file__).parent.parent / "assets" / "flow.png"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=100, bbox_inches="tight")
    print(out.name, out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
