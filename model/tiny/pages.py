"""Documents drawn with Pillow and its built-in font: small invoices, receipts, forms and letters, seeded and endless.

Every character stands in a cell of 16 x 16 pixels, which is what one image token of the tiny model covers:

    TOTAL                 What is the total?   $41.07
      $41.07              What is the date?    03/11/98
    DATE
      03/11/98
"""
import io
import itertools
import random

from PIL import Image, ImageDraw, ImageFont

CELL = 16                                                       # pixels a character
SHAPES = ((8, 8), (16, 8), (16, 16))                            # columns x rows of characters: 1, 2 or 4 tiles of 128 pixels

LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
SYLLABLES = "ba be bo da de do fa fi go ha ka ke la le lo ma mi mo na ne no pa ra re ri ro sa se so ta te ti va vo".split()


def pattern(text):
    """A value drawn from a pattern: # a digit, @ a capital letter, anything else itself."""
    return lambda draw: "".join(draw.choice({"#": DIGITS, "@": LETTERS}.get(c, c)) for c in text)


def name(draw):
    return "".join(draw.choice(SYLLABLES) for _ in range(draw.randint(2, 3))).capitalize()


FIELDS = {                                                      # what a document says: label -> how its value is drawn
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


def draw_page(draw, font):
    """One document -> (grey Pillow image, [(question, answer), ...]). `draw`: a random.Random."""
    columns, rows = draw.choice(SHAPES)
    image = Image.new("L", (columns * CELL, rows * CELL), 255)
    canvas = ImageDraw.Draw(image)

    def write(text, column, row):
        for i, character in enumerate(text):
            canvas.text(((column + i + 0.5) * CELL, (row + 0.5) * CELL), character, fill=0, font=font, anchor="mm")

    title = draw.choice(list(KINDS))
    slots = list(itertools.product(range(0, columns, 8), range(0 if rows == 8 else 2, rows, 2)))
    if rows > 8:
        write(title, 0, 0)
    fields = draw.sample(KINDS[title], min(len(slots), draw.randint(3, 6)))
    questions = []
    for label, (column, row) in zip(fields, sorted(draw.sample(slots, len(fields)))):
        value = FIELDS[label](draw)
        write(label.upper(), column, row)
        write(value, column, row + 1)
        questions.append((f"What is the {label}?", value))
    return image, questions


class SyntheticRows:
    """Rows in DocumentVQA's columns, as many as are asked for. Splits never share a page."""

    def __init__(self, split, seed=0):
        self.split, self.seed = split, seed

    def __iter__(self):
        font = ImageFont.load_default(size=15)
        for index in itertools.count():
            image, questions = draw_page(random.Random(f"{self.split} {self.seed} {index}"), font)
            file = io.BytesIO()
            image.save(file, "PNG")
            for question, answer in questions:
                yield {"question": question, "answers": [answer], "image": {"bytes": file.getvalue(), "path": None},
                       "docId": index, "ucsf_document_page_no": "1"}
