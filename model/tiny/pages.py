"""Documents drawn with Pillow and its built-in fonts: small invoices, receipts, forms and letters, seeded and endless.

    python -m model.tiny.pages DIR N [--domain negative] [--seed 0]     N pages as PNG, questions in questions.jsonl

Every character stands in a cell of 16 x 16 pixels, the area of one image token of the tiny model. A *domain* is the
look of a page; the embedded model was trained on `plain` pages, the others are for runs that begin with it.

    TOTAL                 What is the total?   $41.07
    $41.07                What is the date?    03/11/98
    DATE
    03/11/98
"""
import argparse
import functools
import io
import itertools
import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 16                                                       # pixels a character
SHAPES = ((8, 8), (16, 8), (16, 16))                            # columns x rows of characters: 1, 2 or 4 tiles
READ = "Read the page."                                         # asked in training only, of pages of one tile

LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
SYLLABLES = ("ba be bo da de do fa fi go ha ka ke la le lo ma mi mo na ne no pa ra re ri ro sa se so ta te ti va vo"
             ).split()


# ------------------------------------------------------------------------------------------------ what a page says

def pattern(text):
    """A value drawn from a pattern: # a digit, @ a capital letter, anything else itself."""
    return lambda draw: "".join(draw.choice({"#": DIGITS, "@": LETTERS}.get(c, c)) for c in text)


def name(draw):
    return "".join(draw.choice(SYLLABLES) for _ in range(draw.randint(2, 3))).capitalize()


FIELDS = {                                                      # label -> how its value is drawn, 8 characters at most
    "total": pattern("$##.##"), "tax": pattern("$#.##"), "paid": pattern("$##.##"), "due": pattern("$###"),
    "date": pattern("##/##/##"), "time": pattern("##:##"), "number": pattern("@@-###"), "phone": pattern("###-####"),
    "order": pattern("#####"), "page": pattern("##"), "room": pattern("@##"), "code": pattern("@@@@@"),
    "name": name, "city": name, "from": name, "to": name, "client": name, "street": name,
}
KINDS = {                                                       # title -> the fields it may have
    "INVOICE": ("number", "date", "client", "total", "tax", "due", "order", "city"),
    "RECEIPT": ("total", "tax", "paid", "date", "time", "number", "phone", "code"),
    "FORM": ("name", "phone", "city", "street", "room", "code", "date", "number"),
    "LETTER": ("from", "to", "date", "city", "page", "name", "street", "phone"),
}


def held_out(value):
    """Whether a value is kept for validation and tests: one in eight, never seen in training."""
    return zlib.crc32(value.encode()) % 8 == 0


def write_page(draw, domain, shape, unseen):
    """Words on a page: ([(column, row, lines of text), ...], [(question, answer), ...])."""
    columns, rows = shape
    blocks, questions = [], []
    title = draw.choice(list(KINDS))
    first_row = 0
    if rows > 8:                                                # large pages have a title
        blocks.append((0, 0, [title]))
        first_row = 2
    slots = list(itertools.product(range(0, columns, 8), range(first_row, rows, 2)))
    labels = draw.sample(KINDS[title], min(len(slots), draw.randint(3, 6)))
    for label, (column, row) in zip(labels, draw.sample(slots, len(labels))):
        value = FIELDS[label](draw)
        while held_out(value) != unseen:
            value = FIELDS[label](draw)
        blocks.append((column, row, [label.upper(), value]))
        questions.append((f"What is the {label}?", value))
    if not unseen and shape == SHAPES[0]:
        lines = {row + i: text for _, row, texts in blocks for i, text in enumerate(texts)}
        read = sorted(lines) if domain in LOOSE else range(rows)
        questions.append((READ, "".join(lines.get(row, "").ljust(8) for row in read)))
    return blocks, questions


# ------------------------------------------------------------------------------------------------ what it looks like

@functools.cache
def glyph(character, domain):
    """One character in its cell, dark on light."""
    font = ImageFont.load_default_imagefont() if domain == "bitmap" else ImageFont.load_default(size=15)
    cell = Image.new("L", (CELL, CELL), 255)
    if domain == "bitmap":
        left, top, right, bottom = font.getbbox(character)
        place = (CELL - right + left) // 2, (CELL - bottom + top) // 2
        ImageDraw.Draw(cell).text(place, character, fill=0, font=font)
    else:
        ImageDraw.Draw(cell).text((CELL / 2, CELL / 2), character, fill=0, font=font, anchor="mm")
    if domain == "mirrored":
        cell = ImageOps.mirror(cell)
    if domain == "slanted":
        slant = 1, 0.5, -CELL / 4, 0, 1, 0
        cell = cell.transform(cell.size, Image.Transform.AFFINE, slant, Image.Resampling.BILINEAR, fillcolor=255)
    return cell


FINISH = {                                                      # domains that change the whole page
    "negative": ImageOps.invert,
    "blueprint": lambda page: ImageOps.colorize(page, (214, 228, 255), (24, 58, 140)),
}
LOOSE = ("moved", "spaced", "printed")                         # domains off the grid: see `scatter`
DOMAINS = ("plain", "negative", "bitmap", "mirrored", "slanted", "blueprint", *LOOSE)


def draw_page(draw, domain="plain", shape=None, unseen=True):
    """One document -> (Pillow image, [(question, answer), ...]). `draw`: a random.Random; `unseen`: held-out values."""
    shape = shape or draw.choice(SHAPES)
    blocks, questions = write_page(draw, domain, shape, unseen)
    page = Image.new("L", (shape[0] * CELL, shape[1] * CELL), 255)
    if domain in LOOSE:
        scatter(draw, page, blocks, domain)
    else:
        for column, row, texts in blocks:
            for i, text in enumerate(texts):
                for j, character in enumerate(text):
                    page.paste(glyph(character, domain), ((column + j) * CELL, (row + i) * CELL))
    return FINISH.get(domain, lambda image: image)(page), questions


def scatter(draw, page, blocks, domain):
    """Set each block anywhere in its column of 8 cells: cells as they were if `moved`, of 12 to 16 pixels if `spaced`,
    letters with their own widths if `printed`."""
    pen, printed = ImageDraw.Draw(page), domain == "printed"
    for left in range(0, page.width, 8 * CELL):
        column = sorted((row, texts) for x, row, texts in blocks if x * CELL == left)
        sizes = [15 if domain == "moved" else draw.randint(11, 15) for _ in column]
        free = page.height - sum((size + 1) * len(texts) for size, (_, texts) in zip(sizes, column))
        y = last = 0
        for size, (_, texts), gap in zip(sizes, column, sorted(draw.randint(0, free) for _ in column)):
            font = ImageFont.load_default(size=size)
            y, last = y + gap - last, gap
            width = max(int(font.getlength(text)) + 1 if printed else (size + 1) * len(text) for text in texts)
            x = left + draw.randint(0, 8 * CELL - width)
            for text in texts:
                for j, piece in enumerate([text] if printed else text):
                    place = x if printed else x + (j + 0.5) * (size + 1)
                    pen.text((place, y + 0.8 * size), piece, fill=0, font=font, anchor="ls" if printed else "ms")
                y += size + 1


@dataclass(frozen=True)
class DrawnFile:
    """The PNG file of a page of SyntheticRows, drawn when `bytes()` asks for it: skipping a page costs nothing."""
    rows: "SyntheticRows"
    page: int

    def __bytes__(self):
        file = io.BytesIO()
        draw_page(*self.rows.drawn(self.page), unseen=self.rows.unseen)[0].save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class SyntheticRows:
    """Rows in DocumentVQA's columns, as many as are asked for. Splits share neither a page nor a value.

    `domains`: names, comma-separated, each page in one of them. `tiles`: most tiles of a page, 1, 2 or 4.
    Row 8 n is the first of page n: a page has at most 7 rows, so reading can begin at any of them without counting.
    """
    split: str
    seed: int = 0
    domains: str = "plain"
    tiles: int = 4

    @property
    def unseen(self):
        return self.split != "train"

    def drawn(self, page):
        """(random generator, domain, shape): what a page is drawn with."""
        draw = random.Random(f"{self.split} {self.seed} {page}")
        domain = draw.choice(self.domains.split(","))
        return draw, domain, draw.choice([shape for shape in SHAPES if shape[0] * shape[1] <= 64 * self.tiles])

    def numbered(self, start=0):
        """(number, row) of the rows from number `start` on."""
        for page in itertools.count(start // 8):
            for i, (question, answer) in enumerate(write_page(*self.drawn(page), self.unseen)[1]):
                if page * 8 + i >= start:
                    yield page * 8 + i, {"question": question, "answers": [answer], "instruction": "", "docId": page,
                                         "ucsf_document_page_no": "1",
                                         "image": {"bytes": DrawnFile(self, page), "path": None}}

    def __iter__(self):
        return (row for _, row in self.numbered())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pages and questions.jsonl go")
    parser.add_argument("count", type=int, help="number of pages")
    parser.add_argument("--domain", choices=DOMAINS, default="plain", help="look of the pages (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pages (%(default)s)")
    settings = parser.parse_args()
    settings.folder.mkdir(parents=True, exist_ok=True)
    with open(settings.folder / "questions.jsonl", "w", encoding="utf-8") as file:
        for index in range(settings.count):
            page, questions = draw_page(random.Random(f"written {settings.seed} {index}"), settings.domain)
            page.save(settings.folder / f"{index}.png")
            for question, answer in questions:
                file.write(json.dumps({"question": question, "images": [f"{index}.png"], "answer": answer}) + "\n")
    print(f"{settings.count} pages in {settings.folder}, their questions and answers in questions.jsonl")


if __name__ == "__main__":
    main()
