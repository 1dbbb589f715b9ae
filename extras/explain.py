"""Follow one page and one question through the model, with the numbers of this run: a page to read in a browser.

    page -> grid and thumbnail -> patches -> image tokens -> token ids, branches -> tokens in the loss -> the answer

One self-contained HTML file: pictures are embedded, nothing is fetched. See `python infer.py --explain OUT.html`; the
same pictures illustrate the README (tests/draw_explain.py).
"""
import base64
import html
import io
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image, ImageDraw

from extras import pictures as palette
from extras.pictures import as_image, attention, draw_attention, draw_tiles, visible
from model.chat import Chat, Picture
from model.prompt import IGNORE_INDEX, IMAGE_TOKEN, PLACEHOLDER, Prompt, write_page
from model.tokenizer import special_id

LIKELIEST = 5                           # tokens shown of each distribution
# of prompt.SYSTEM, for readers without Chinese and machines without a Chinese font
TRANSLATION = ("You are Shusheng, a multimodal large model developed by Shanghai AI Laboratory and SenseTime; your "
               "English name is InternVL, and you are a helpful and harmless AI assistant.")
STYLE = f"""
body {{ font: 16px/1.5 {palette.FONT}; max-width: 52em; margin: 2em auto; padding: 0 1em; color: #222;
       background: #fff }}
h2 {{ margin: 2em 0 0 }}
img, svg {{ border: 1px solid #bbb; max-width: 100%; height: auto }}
code {{ background: {palette.TEXT}; padding: 0 .2em; white-space: nowrap }}
small, .where {{ color: {palette.GRAY} }}
.where {{ margin: 0; font-size: 14px }}
.tokens {{ border-left: 3px solid #bbb; padding-left: .6em; margin: .6em 0 }}
.token {{ display: inline-block; max-width: 100%; box-sizing: border-box; white-space: pre-wrap;
         overflow-wrap: anywhere; font: 13px/1.5 {palette.MONO}; border: 1px solid #ccc; border-radius: 3px;
         padding: 0 3px; margin: 1px }}
.prefix {{ background: {palette.PREFIX} }} .image {{ background: {palette.IMAGE} }}
.branch {{ background: {palette.TEXT} }}
.loss {{ background: {palette.LOSS}; border-color: {palette.RIGHT} }}
"""


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
    run = follow(model, image, question, max_tiles, max_new_tokens)
    drawn = pictures(run)
    text = "".join([introduction(run, question), *see(run, drawn, max_tiles), *read(run), *answer(run, drawn)])
    head = f"""<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>
<title>{html.escape(question)}</title><style>{STYLE}</style>"""
    return f"<!DOCTYPE html><html lang='en'>{head}{text}</html>\n", run.chat.turns[0].answer


@torch.no_grad()
def follow(model, image, question, max_tiles=12, max_new_tokens=64):
    """Ask, then run the question once more with its answer, as in training."""
    chat = model.chat(max_tiles=max_tiles, max_new_tokens=max_new_tokens)
    chat.ask(question, image)
    [turn], [picture] = chat.turns, chat.pictures
    head, placeholder, rest = turn.question.partition(PLACEHOLDER)
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [len(picture.tiles)], [[(rest, turn.answer)]],
                           question_start=head + placeholder)
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
    seen = token_colors(picture.tokens[run.tile * tokens:(run.tile + 1) * tokens], grid // model.config.shuffle)
    return {"page": ruled(picture.image, *picture.grid), "tiles": draw_tiles([picture], tokens), "patches": patches,
            "tokens": seen.resize(patches.size, Image.Resampling.NEAREST), "looked": draw_attention(run.chat),
            "answer": draw_answer(run)}


def ruled(image, columns, rows):
    """The image with the lines of a grid drawn over it."""
    scale = max(1, 420 // min(image.size))
    image = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, thick = ImageDraw.Draw(image), max(1, image.width // 500) if columns < 16 else 1
    for i in range(1, columns):
        x = i * image.width // columns
        pen.line((x, 0, x, image.height), fill=palette.WRONG, width=thick)
    for i in range(1, rows):
        y = i * image.height // rows
        pen.line((0, y, image.width, y), fill=palette.WRONG, width=thick)
    return image


def token_colors(tokens, side):
    """Image tokens (side * side, D) -> one pixel each: its three strongest principal components as red, green, blue."""
    x = tokens.float().cpu() - tokens.float().cpu().mean(0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    strongest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    x = x @ (directions * strongest.sign()).T       # the sign is arbitrary: here the largest entry is positive
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0)).clamp_min(1e-9)
    return Image.fromarray((255 * x).byte().reshape(side, side, 3).numpy())


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


# ------------------------------------------------------------------------------------------------------ the page

def section(title, files, *text):
    return f"<h2>{title}</h2><p class='where'>{files}</p>" + "".join(text)


def shape(*sizes):
    return "<code>(" + ", ".join(map(str, sizes)) + ")</code>"


def embedded(image, name, width=420):
    """An <img> with the PNG inside, at most `width` wide on the page and twice as many pixels in the file."""
    if image.width > 2 * width:
        image = image.resize((2 * width, max(1, round(2 * width * image.height / image.width))))
    file = io.BytesIO()
    image.save(file, "PNG")
    content = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{name}' width='{width}' src='data:image/png;base64,{content}'>"


def count(number, thing):
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def introduction(run, question):
    model, picture = run.chat.model, run.picture
    config, n = model.config, len(picture.tiles)
    return f"""<h1>One page, followed</h1>
<p>A vision-language model turns a page into <i>tokens</i>, vectors of one width, and writes its answer one token after
another. This page shows what it did with one image and one question. All numbers are from this run.</p>
<p><b>{html.escape(question)}</b> &rarr; <b>{html.escape(run.chat.turns[0].answer)}</b></p>
<p>page of {picture.image.width} x {picture.image.height} pixels &rarr; {count(n, "tile")} &rarr;
{n * config.vision.grid ** 2:,} patches &rarr; {n * config.tokens_per_tile:,} image tokens &rarr;
{len(run.prompt.ids):,} tokens in a row &rarr; {count(len(run.in_loss), "token")} of answer</p>
<p>Model: {sum(p.numel() for p in model.parameters()):,} parameters, computing in {str(model.dtype).split(".")[-1]} on
{model.device.type}.</p>"""


def see(run, drawn, max_tiles):
    """Yield the sections from pixels to image tokens."""
    config, picture = run.chat.model.config, run.picture
    (columns, rows), (width, height), n = picture.grid, picture.image.size, len(picture.tiles)
    size, grid, tokens, number = config.vision.tile_pixels, config.vision.grid, config.tokens_per_tile, run.tile + 1
    seen, side, patch = config.vision.width, grid // config.shuffle, config.vision.patch_pixels
    thumbnail = "; the last one is the whole page, scaled down: the <i>thumbnail</i>" if n > columns * rows else ""
    yield section("1. The page and its grid", "<code>model/tiling.py</code>, choose_grid", f"""
<p>The vision encoder reads squares of {size} x {size} pixels only, so the page is cut. The page has {width} x {height}
pixels; its width is {width / height:.3f} times its height. Of all grids with at most {count(max_tiles, "cell")},
{columns} x {rows} ({columns / rows:.3f}) is nearest. A larger grid of the same ratio is chosen only if the page has
more than half of its pixels. The page is resized to {columns * size} x {rows * size}.</p>""",
                  embedded(drawn["page"], "the page with its grid"))
    yield section(f"2. {count(n, 'tile')}", "<code>model/tiling.py</code>, tile_page", f"""
<p>The tiles are the cells of the grid, row by row{thumbnail}. Their shape is {shape(n, 3, size, size)}: tiles, colors,
rows and columns of pixels, one byte each.</p>""", embedded(drawn["tiles"], "the tiles, numbered", 600))
    yield section(f"3. {grid ** 2:,} patches per tile", "<code>model/vision.py</code>", f"""
<p>The vision encoder cuts each tile into {grid} x {grid} patches of {patch} x {patch} pixels. Attention connects the
patches of a tile, and each patch becomes a vector of {seen:,} numbers: {shape(n, 3, size, size)} &rarr;
{shape(n, grid ** 2, seen)}. The picture shows tile {number}, which the answer looked at most.</p>""",
                  embedded(drawn["patches"], f"tile {number} with its patches"))
    yield section(f"4. {tokens} image tokens per tile", "<code>model/projector.py</code>, the trainable part", f"""
<p>{config.shuffle} x {config.shuffle} neighboring patches are joined, and the projector maps them to the width of the
language model: {shape(n, grid ** 2, seen)} &rarr; {shape(n, tokens, seen * config.shuffle ** 2)} &rarr;
{shape(n, tokens, config.language.width)}. The picture shows the {side} x {side} tokens of tile {number}: the three
strongest principal components of their {config.language.width} numbers as red, green and blue. Tokens of different
color differ for the language model; tokens of equal color may still differ in the other components.</p>""",
                  embedded(drawn["tokens"], f"tile {number}'s image tokens"))


def read(run):
    """Yield the sections about the row of tokens and the loss."""
    prompt, start, width = run.prompt, run.prompt.branches.index(1), run.chat.model.config.language.width
    loss = -run.likely[range(len(run.in_loss)), [prompt.ids[i] for i in run.in_loss]].log().mean().item()
    yield section(f"5. {len(prompt.ids):,} tokens in a row",
                  "<code>model/prompt.py</code>; put together in <code>model/internvl.py</code>", f"""
<p>Text becomes tokens too: each has a number, its id, and the model has a vector of {width} numbers for each id. The
image tokens replace the vectors of the {html.escape(IMAGE_TOKEN)} ids: {shape(len(prompt.ids), width)}. The small
numbers after a token are its id and its position; \u2423 is a space, \u23ce the end of a line. The system sentence is
InternVL2's own. In English: &ldquo;{TRANSLATION}&rdquo;</p>
<p>The model reads the <span class='token prefix'>prefix</span> with the <span class='token image'>image tokens</span>,
positions 0 to {start - 1:,}, once per page:</p>
<div class='tokens'>{token_row(run, 0, start)}</div>
<p>The question is a <span class='token branch'>branch</span>, positions {start:,} to {prompt.positions[-1]:,}. It sees
the prefix and itself. A second question about this page would be a second branch, and would start at position {start:,}
too:</p>
<div class='tokens'>{token_row(run, start, len(prompt.ids))}</div>""")
    yield section("6. The loss", "<code>model/prompt.py</code>, labels; <code>train.py</code>", f"""
<p>As a training example with this answer (the model's own, right or wrong), {len(run.in_loss)} tokens would be in the
loss: the
<span class='token loss'>green</span> ones, the answer and the end of the turn. The other
{len(prompt.ids) - len(run.in_loss):,} are masked. The model predicts each green token from the tokens before it; the
loss is the mean of &minus;log(probability) over them, here {loss:.4f}.</p>""")


def token_row(run, start, stop):
    """A range of the prompt's tokens in their colors; consecutive image tokens become one entry with their number."""
    prompt, image_id, shown = run.prompt, special_id(run.chat.model.tokenizer, IMAGE_TOKEN), []
    for _, places in groupby(range(start, stop), lambda i: -1 if prompt.ids[i] == image_id else i):
        places = list(places)
        i, last = places[0], places[-1]
        kind = ("image" if prompt.ids[i] == image_id else "loss" if prompt.labels[i] != IGNORE_INDEX
                else "branch" if prompt.branches[i] else "prefix")
        text, where = written(run, prompt.ids[i], None), f"{prompt.positions[i]}"
        if last > i:
            text, where = f"{text} x {last - i + 1:,}", f"{where}-{prompt.positions[last]}"
        shown.append(f"<span class='token {kind}'>{text} <small>{prompt.ids[i]}, {where}</small></span>")
    return "".join(shown)


def answer(run, drawn):
    """Yield the sections about the answer's tokens and their attention."""
    language, a, n = run.chat.model.config.language, len(run.in_loss), len(run.picture.tiles)
    names, undrawn = [f"tile {i + 1}" for i in range(n)], ""
    if n > run.picture.grid[0] * run.picture.grid[1]:
        names[-1], undrawn = "thumbnail", "; the thumbnail is not drawn"
    shares = ", ".join(f"{name} {percent(look)}" for name, look in zip(names, run.looked.tolist()))
    where = "<code>model/language.py</code>, <code>model/generate.py</code>"
    yield section("7. The answer, token by token", where, f"""
<p>In each of {language.layers} blocks, every token attends to the tokens it may see and adds what it finds. The head
then turns the vector at each of the {count(a, "position")} before an answer token into a probability for each of
{language.vocabulary:,} tokens: {shape(a, language.width)} &rarr; {shape(a, language.vocabulary)}. The {LIKELIEST} most
likely are shown, the token of the answer in green. Greedy decoding takes the first one, appends it and goes on until
the end of the turn or until the answer has its maximum length.</p>""", drawn["answer"])
    yield section("8. Attention", "<code>extras/pictures.py</code>", f"""
<p>Each token of the answer attends to all tokens before it. {percent(run.looked.sum().item())} of this attention (the
mean over heads, layers and answer tokens) went to image tokens: {shares}. Red marks the places with most
attention{undrawn}. Attention shows where the model looked, not why it gave this answer.</p>""",
                  embedded(drawn["looked"], "the page, red where the answer looked"))
