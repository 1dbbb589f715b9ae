"""Documents drawn with Pillow: letters, invoices, receipts, forms and tables in proportional type, seeded and endless.

    python -m model.tiny.pages DIR N [--domain worn] [--seed 0]     N pages as PNG, their questions in questions.jsonl

What stands on a page, in words of words.toml, is decided first (a `Sheet`), then it is drawn. A *domain* is what pages
look like. The embedded model was trained on the first four of DOMAINS; the others are for training on something new.

Fonts: Aileron (CC0) comes inside Pillow; DejaVu (Bitstream Vera's license), STIX (SIL Open Font License) and Computer
Modern (BaKoMa's license) inside matplotlib. All may be passed on; nothing but drawing pages needs them.
"""
import argparse
import collections
import functools
import io
import itertools
import json
import random
import re
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from model.images import compressed

TILE, CELL = 256, 16                                    # pixels a side of a tile, and of what one image token covers
TYPE = (12, 24)                                         # pixels of the smallest and the largest type
SHAPES = ((TILE, TILE), (2 * TILE, TILE), (TILE, 2 * TILE), (2 * TILE, 2 * TILE))       # pages of 1, 2, 2 and 4 tiles
READ = "Read the page."                                 # asked in training, and of pages without fields
ASKED = ("What is the {}?", "{}?", "Find the {}.", "Tell me the {}.")   # of any field; each has one of its own besides
TEXTS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
FONTS, UNSEEN_FONTS, FIELDS, COLUMNS, KINDS = (TEXTS[key] for key in ("fonts", "unseen", "fields", "columns", "kinds"))
HOLLOW = str.maketrans("0123456789", "𝟘𝟙𝟚𝟛𝟜𝟝𝟞𝟟𝟠𝟡")    # digits in which a stroke is two thin lines: blackboard bold
FORMS = TEXTS["values"] | {kind: words.split() for kind, words in TEXTS["words"].items()}


# ----------------------------------------------------------------------------------------------------- what a page says

def write_value(draw, kind):
    """A value of a kind that words.toml knows."""
    if kind in ("first", "last", "place", "firm") and draw.random() < 0.34:
        kind = "coined"                                 # a name that nobody has
    form = re.sub(r"[#^~*]", lambda sign: draw.choice(TEXTS["signs"][sign[0]]), draw.choice(FORMS[kind]))
    text = re.sub(r"{(\w+)}", lambda part: write_value(draw, part[1]), form)
    case = {"coined": [str.capitalize], "email": [str.lower], "word": [str] * 3 + [str.capitalize, str.upper]}
    return draw.choice(case.get(kind, [str]))(text)


def held_out(value):
    """Whether a value is kept for validation and tests: one in eight, never seen in training."""
    return zlib.crc32(value.encode()) % 8 == 0


def value_of(draw, kind, unseen):                       # a held-out value if `unseen`, else one for training
    return next(value for value in iter(lambda: write_value(draw, kind), None) if held_out(value) == unseen)


# ----------------------------------------------------------------------------------------------------- where it stands

@functools.cache
def font_of(name, size):
    if not (file := (FONTS | UNSEEN_FONTS)[name]):
        return ImageFont.load_default(size=size)
    import matplotlib
    path = f"{matplotlib.get_data_path()}/fonts/ttf/{file}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def advance(character, font, size):
    return font_of(font, size).getlength(character)


def width_of(text, font, size):
    """Pixels that a text is wide, kerning apart. Ten times as fast as `getlength` of the whole."""
    return sum(advance(character, font, size) for character in text)


class Sheet:
    """The layout of a page: runs of text (x, baseline, text, font name, font size), ruled lines, gray areas."""

    def __init__(self, size):
        self.width, self.height = size
        self.runs, self.rules, self.areas = [], [], []

    def put(self, x, y, text, font, size, align=0):
        """Text whose line begins at height y, with its left edge, middle or right edge (0, 0.5, 1) at x."""
        left = x - align * width_of(text, font, size)
        self.runs.append((round(left), round(y + 0.95 * size), text, font, size))

    def draw(self):
        page = Image.new("L", (self.width, self.height), 255)
        pen = ImageDraw.Draw(page)
        for box in self.areas:
            pen.rectangle(box, fill=225)
        for line in self.rules:
            pen.line(line, fill=0)
        for x, y, text, font, size in self.runs:
            pen.text((x, y), text, fill=0, font=font_of(font, size), anchor="ls")
        return page

    def text(self):
        """The page's text in reading order: runs by baseline, those of one baseline joined."""
        runs = sorted((y, x, text) for x, y, text, *_ in self.runs)
        return "\n".join(" ".join(text for *_, text in row) for _, row in itertools.groupby(runs, lambda run: run[0]))

    def cells(self, slots=3):
        """Of a page of one tile: the first `slots` characters whose middle lies in each image token, " " for none."""
        found = collections.defaultdict(str)
        for x, y, text, font, size in sorted(self.runs):
            for character in text:
                wide = advance(character, font, size)
                found[(y - 0.33 * size) // CELL, (x + wide / 2) // CELL] += character.strip()
                x += wide
        places = itertools.product(range(self.height // CELL), range(self.width // CELL))
        return [found[place][:slots].ljust(slots) for place in places]


def line_of(piece, room, font, size):
    """As many pieces, each drawn by `piece()`, as there is room for: a line of text."""
    line = ""
    while width_of(longer := f"{line} {piece()}".strip(), font, size) < room:
        line = longer
    return line


def write_lines(draw, sheet, value, fonts, sizes):
    """Lines of anything below one another, each in a font and a size of its own."""
    y, lines = 0, []
    while y + 1.25 * (size := draw.randint(*sizes)) <= sheet.height:
        font, share = draw.choice(fonts), draw.choice((1, 1, draw.random()))    # two in three over the whole width
        if line := line_of(lambda: value("anything"), share * (sheet.width - 4), font, size):
            lines.append((y, line, font, size))
            y += int(1.25 * size)
    for (y, line, font, size), gap in zip(lines, sorted(draw.randint(0, sheet.height - y) for _ in lines)):
        free = sheet.width - 1 - width_of(line, font, size)
        sheet.put(draw.randint(1, max(1, int(free))), y + gap, line, font, size)


class Document:
    """Writes a letter, invoice, receipt, form, order or report on a sheet: blocks below one another, each a method that
    takes its edges and where it begins, and returns where it ends. `facts`: {label: (value, a question of its own)}.
    """

    def __init__(self, draw, sheet, value, fonts, sizes):
        self.draw, self.sheet, self.value, self.facts = draw, sheet, value, {}
        title, (blocks, labels) = draw.choice(list(KINDS.items()))
        self.labels, self.items = draw.sample(labels, len(labels)), draw.sample(FORMS["item"], len(FORMS["item"]))
        self.size, font = draw.randint(*sizes), draw.choice(fonts)
        bold = font + "-bold" if font + "-bold" in fonts else font
        self.fonts = font, draw.choice((font, bold, bold, draw.choice(fonts)))              # of the text, of the labels
        self.step, self.colon = round(self.size * draw.uniform(1.2, 1.5)), draw.choice(("", "", ":"))
        self.case = draw.choice((str.capitalize, str.capitalize, str.title, str.upper, str))
        left, self.bottom = draw.randint(2, max(3, sheet.width // 20)), sheet.height - 1
        right, y, start = sheet.width - left, draw.randint(1, left), draw.randrange(len(blocks))
        if sheet.height > 9 * self.size and draw.random() < 0.8:
            y = self.head(left, right, y, title)
        if title == "LETTER" and self.wide(closing := "Sincerely, " + value("person")) < right - left:
            self.bottom -= self.step
            self.put(left, self.bottom, closing)
            self.put(left, y, f"Dear {value('first')},")
            y += self.step
        for block in itertools.chain(blocks[start:], itertools.cycle(blocks)):  # small pages too show every kind
            if y + self.step > self.bottom or len(self.facts) > 40:
                break
            most = (right - left) // (9 if block == "below" else 12) // self.size if block != "table" else 1
            count = draw.randint(1, max(1, min(4 if block == "below" else 2, most)))     # of such blocks side by side
            wide = (right - left) / count
            edges = [(left + i * wide, left + (i + 1) * wide - (count > 1) * self.size) for i in range(count)]
            y = max(getattr(self, block)(*both, y) for both in edges) + draw.choice((0, 4, draw.randint(0, self.size)))

    def wide(self, text, label=False):
        return width_of(text, self.fonts[label], self.size)

    def put(self, x, y, text, label=False, align=0):
        self.sheet.put(x, y, text, self.fonts[label], self.size, align)

    def rule(self, left, right, *heights):
        self.sheet.rules += [(left, y, right, y) for y in heights]

    def head(self, left, right, y, title):
        """The title, sometimes a name above it: large, at the left or in the middle."""
        large, align = min(28, round(self.size * self.draw.uniform(1.0, 1.6))), self.draw.choice((0, 0.5))
        for text in (self.value("company"), self.case(title.lower()))[self.draw.random() < 0.6:]:
            if width_of(text, self.fonts[1], large) < right - left:
                self.sheet.put(left + align * (right - left), y, text, self.fonts[1], large, align)
                y += round(1.3 * large)
        self.rule(left, right, *[y] * (self.draw.random() < 0.4))
        return y + 3

    def text(self, left, right, y):
        """One to four lines of running text."""
        for i in range(min(self.draw.randint(1, 4), (self.bottom - y) // self.step)):
            line = line_of(lambda: write_value(self.draw, "prose"), right - left, self.fonts[0], self.size)
            self.put(left, y + i * self.step, line if i else line.capitalize())
        return y + (i + 1) * self.step

    def pairs(self, left, right, y, style="tab"):
        """Labels with their values behind them or at a tab, on ruled lines (boxes), at the right edge, or below."""
        size, step, below = self.size, self.step, style == "below"
        tab = left + (right - left) * self.draw.choice((0, self.draw.uniform(0.35, 0.6)))
        ruled = style == "edge" and self.draw.random() < 0.4
        for _ in range(1 if below else self.draw.randint(1, 4)):
            if not self.labels or y + (1 + below) * step + 2 > self.bottom:
                break
            label = self.labels.pop()
            kind, own = FIELDS[label]
            if self.draw.random() < 0.12:               # any word may be a label
                label, own = write_value(self.draw, "plain"), None
                kind = self.draw.choice(("amount", "date", "person", "jumble"))
            shown, value = self.case(label) + self.colon, self.value(kind)
            ends = left + self.wide(shown, True), right - self.wide(value)
            fits = left <= ends[1] and ends[0] <= right and (below or ends[0] + size / 2 <= ends[1])
            if label in self.facts or not fits:
                continue
            self.facts[label] = value, own
            self.put(left, y, shown, True)
            y += below * step
            beside = tab if ends[0] + size / 3 < tab < ends[1] else ends[0] + size / 2
            x = left if below else ends[1] if style == "edge" else beside
            self.put(x, y, value)
            if style == "boxes":
                self.rule(x - 2, right, y + 1.2 * size)
            y += step + 2 * ruled
            self.rule(left, right, *[y - 2] * ruled)
            if below and kind in ("person", "company") and self.draw.random() < 0.3:        # an address
                for line in (self.value("street"), self.value("place")):
                    if y + step <= self.bottom and self.wide(line) < right - left:
                        self.put(left, y, line)
                        y += step
        return y

    below, edge = functools.partialmethod(pairs, style="below"), functools.partialmethod(pairs, style="edge")
    boxes = functools.partialmethod(pairs, style="boxes")

    def table(self, left, right, y):
        """Items in rows, as many numbers of each as there is room for: "What is the price of the pens?"."""
        rows = min(self.draw.randint(2, 5), (self.bottom - y - 2) // self.step - 1)
        goods = [self.case(self.draw.choice(("item", "article", "goods"))), *(self.items.pop() for _ in range(rows))]
        x, edges, columns = right - 3, [left, right], []
        room = x - left - 3 - max(self.wide(text, text == goods[0]) for text in goods)
        for head in self.draw.sample(list(COLUMNS), self.draw.randint(1, 3)):
            texts = [self.case(head), *(self.value(COLUMNS[head][0]) for _ in goods[1:])]
            wide = max(self.wide(text, text == texts[0]) for text in texts) + self.size
            if wide < room:
                room -= wide
                columns.append((head, texts, wide))
        if rows < 1 or not columns:
            return self.pairs(left, right, y)
        lines, gap = [y + i * self.step for i in range(rows + 2)], room / len(columns) * self.draw.random()
        for line, text in zip(lines, goods):
            self.put(left + 3, line, text, line == y)
        for head, texts, wide in columns:               # from the right
            for line, text in zip(lines, texts):
                self.put(x, line, text, line == y, 1)
            for item, text in zip(goods[1:], texts[1:]):
                self.facts[f"{head} of the {item}"] = text, COLUMNS[head][1].format(item)
            x -= wide + gap
            edges.append(x + self.size / 2)
        look = self.draw.choice(("plain", "ruled", "grid", "shaded"))
        self.rule(left, right, *{"ruled": (*lines[:2], lines[-1]), "grid": lines}.get(look, ()))
        self.sheet.rules += [(edge, y, edge, lines[-1]) for edge in edges] * (look == "grid")
        self.sheet.areas += [(left, y, right, y + self.step - 1)] * (look == "shaded")
        return lines[-1] + 3


# --------------------------------------------------------------------------------------------------- what it looks like

def worn(draw, page):
    """As a scan or a photo leaves it: smaller, ink spread or thinned, a slight turn, blur, gray paper, noise, JPEG."""
    if draw.random() < 0.4:
        small = page.resize([round(side * draw.uniform(0.85, 1)) for side in page.size], Image.Resampling.BICUBIC)
        page = Image.new("L", page.size, 255)
        page.paste(small, [draw.randint(0, room - side) for room, side in zip(page.size, small.size)])
    if draw.random() < 0.3:
        ink = page.filter(draw.choice((ImageFilter.MinFilter, ImageFilter.MaxFilter))(3))
        page = Image.blend(page, ink, draw.uniform(0.1, 0.5))
    if draw.random() < 0.3:
        page = page.rotate(draw.uniform(-0.7, 0.7), Image.Resampling.BILINEAR, fillcolor=255)
    if draw.random() < 0.4:
        page = page.filter(ImageFilter.GaussianBlur(draw.uniform(0.2, 0.7)))
    low, high = (draw.randint(0, 90), draw.randint(215, 255)) if draw.random() < 0.6 else (0, 255)
    pixels = np.asarray(page, np.float32) * ((high - low) / 255) + low
    if draw.random() < 0.4:
        noise = np.random.default_rng(draw.getrandbits(32))
        pixels += noise.standard_normal(pixels.shape, np.float32) * draw.uniform(2, 14)
    page = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return compressed(page, draw.randint(40, 95)) if draw.random() < 0.3 else page


FINISH = {                                              # domains that change the whole page
    "worn": worn,
    "negative": lambda draw, page: ImageOps.invert(page),
}
DOMAINS = ("plain", "lines", "slips", "worn", "italics", "hollow", "negative")


def write_page(draw, domain, shape, unseen, sizes=None):
    """What stands on a page, and what is asked about it: (Sheet, [(question, answer), ...])."""
    fonts = {"italics": list(UNSEEN_FONTS), "hollow": ["sans", "sans-bold"]}.get(domain, list(FONTS))
    sizes = sizes or {"slips": (12, 16), "hollow": (22, 24)}.get(domain, TYPE)
    shape = (128, 128) if domain == "slips" else shape  # a first, smaller tile: see README.md
    only_lines = domain == "lines" or domain in ("slips", "worn") and draw.random() < 0.4
    sheet, facts, questions, value = Sheet(shape), [], [], functools.partial(value_of, draw, unseen=unseen)
    if only_lines:
        write_lines(draw, sheet, value, fonts, sizes)
    while not only_lines and not facts:
        sheet = Sheet(shape)
        facts = Document(draw, sheet, value, fonts, sizes).facts.items()
        facts = [fact for fact in facts if domain != "hollow" or re.search(r"\d\d\.\d\d", fact[1][0])]   # amounts only
    for label, (value, own) in draw.sample(facts, min(6, len(facts))):
        question = draw.choice((*ASKED, *[own or ASKED[0]] * 2)).format(label)          # its own is the hardest
        questions.append((question[0].upper() + question[1:], value))
    if only_lines or not unseen and draw.random() < 0.5:
        questions.append((READ, sheet.text()))
    if domain == "hollow":
        sheet.runs = [(x, y, text.translate(HOLLOW), *type) for x, y, text, *type in sheet.runs]
    return sheet, questions


def draw_page(draw, domain="plain", shape=None, unseen=True, sizes=None):
    """One document -> (Pillow image, [(question, answer), ...]).

    `draw`: a random.Random; `unseen`: its values are held out; `sizes`: the smallest and the largest type, in pixels.
    """
    sheet, questions = write_page(draw, domain, shape or draw.choice(SHAPES), unseen, sizes)
    return FINISH.get(domain, lambda draw, page: page)(draw, sheet.draw()), questions


@dataclass(frozen=True)
class DrawnFile:
    """The PNG file of a page of SyntheticRows, drawn when `bytes()` asks for it: passing over one costs no drawing."""
    rows: "SyntheticRows"
    page: int

    def __bytes__(self):
        file = io.BytesIO()
        draw_page(*self.rows.drawn(self.page))[0].save(file, "PNG")
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

    def drawn(self, page):
        """What a page is drawn with: a random generator, domain, shape, whether its values are held out."""
        draw = random.Random(f"{self.split} {self.seed} {page}")
        # as many pages of one tile as of two and of four
        shapes = [s for s in SHAPES[:1] + SHAPES + SHAPES[3:] if s[0] * s[1] <= TILE ** 2 * self.tiles]
        return draw, draw.choice(self.domains.split(",")), draw.choice(shapes), self.split != "train"

    def numbered(self, start=0):
        """(number, row) of the rows from number `start` on."""
        for page in itertools.count(start // 8):
            for i, (question, answer) in enumerate(write_page(*self.drawn(page))[1]):
                if page * 8 + i >= start:
                    image = {"bytes": DrawnFile(self, page), "path": None}
                    yield page * 8 + i, {"question": question, "answers": [answer], "instruction": "", "docId": page,
                                         "ucsf_document_page_no": "1", "image": image}

    def __iter__(self):
        return (row for _, row in self.numbered())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--domain", choices=DOMAINS, default="plain")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    settings.folder.mkdir(parents=True, exist_ok=True)
    with open(settings.folder / "questions.jsonl", "w", encoding="utf-8") as file:
        for index in range(settings.count):
            page, questions = draw_page(random.Random(f"written {settings.seed} {index}"), settings.domain)
            page.save(settings.folder / f"{index}.png")
            lines = [{"question": asked, "images": [f"{index}.png"], "answer": answer} for asked, answer in questions]
            file.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"{settings.count} pages in {settings.folder}, their questions and answers in questions.jsonl")


if __name__ == "__main__":
    main()
