"""What happens to one page and one question, with the real numbers of this run, as a page to read in a browser.

    page -> grid and thumbnail -> patches -> image tokens -> token ids, branches -> what is learned -> its answer

One self-contained HTML file: pictures are embedded, nothing is fetched. See `python infer.py --explain OUT.html`; the same
pictures illustrate the README (tests/draw_explain.py).
"""
import base64
import html
import io
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image, ImageDraw

from extras.pictures import as_image, attention, draw_attention, draw_tiles
from model.chat import Chat, Picture
from model.prompt import IGNORE_INDEX, IMAGE_TOKEN, PLACEHOLDER, Prompt, write_page
from model.tokenizer import special_id

LIKELIEST = 5                           # tokens shown of each distribution
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
h2 { margin: 2em 0 0 }
img, svg { border: 1px solid #bbb; max-width: 100%; height: auto }
code { background: #f2f2f2; padding: 0 .2em; white-space: nowrap }
small { color: #666 }
.where { margin: 0; font-size: 14px; color: #555 }
.tokens { border-left: 3px solid #bbb; padding-left: .6em; margin: .6em 0 }
.token { display: inline-block; max-width: 100%; box-sizing: border-box; white-space: pre-wrap; overflow-wrap: anywhere;
         font: 13px/1.5 monospace; border: 1px solid #ccc; border-radius: 3px; padding: 0 3px; margin: 1px }
.prefix { background: #eef3fb } .image { background: #fdf1d6 } .branch { background: #f3f3f3 }
.learned { background: #d5f0d5; border-color: #4a4 }
"""


@dataclass
class Followed:
    """What one page and one question became on their way through the model."""
    chat: Chat                          # that was asked
    picture: Picture                    # the page: its tiles uint8 (n, 3, S, S), its image tokens (n * tokens, D)
    prompt: Prompt                      # as a training example would be written, with the model's answer
    likely: torch.Tensor                # float32 (A, V), on the CPU: the probabilities that chose each token of the answer
    looked: torch.Tensor                # float32 (n,): the share of its attention that the answer gave to each tile

    @property
    def tile(self):
        """The tile, the thumbnail left out, that the answer looked at most."""
        return int(self.looked[:self.picture.grid[0] * self.picture.grid[1]].argmax())

    @property
    def learned(self):
        """Places in the prompt of the answer and the end of its turn."""
        return [i for i, label in enumerate(self.prompt.labels) if label != IGNORE_INDEX]


def explain(model, image, question, max_tiles=12, max_new_tokens=64):
    """A Pillow image and a question about it -> (HTML text, the greedy answer). Raises InputError as `Chat.stream` does."""
    run = follow(model, image, question, max_tiles, max_new_tokens)
    drawn = pictures(run)
    text = "".join([introduction(run, question), *see(run, drawn, max_tiles), *read(run), *answer(run, drawn)])
    head = f"""<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>
<title>{html.escape(question)}</title><style>{STYLE}</style>"""
    return f"<!DOCTYPE html><html lang='en'>{head}{text}</html>\n", run.chat.turns[0].answer


@torch.no_grad()
def follow(model, image, question, max_tiles=12, max_new_tokens=64):
    """Ask, then read the question once more with its answer, as in training."""
    chat = model.chat(max_tiles=max_tiles, max_new_tokens=max_new_tokens)
    chat.ask(question, image)
    [turn], [picture] = chat.turns, chat.pictures
    head, image_place, rest = turn.question.partition(PLACEHOLDER)
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [len(picture.tiles)], [[(rest, turn.answer)]],
                           question_start=head + image_place)
    batch = model.pack([(torch.as_tensor(picture.tiles), prompt)])
    batch.image_tokens = picture.tokens
    likely = model(batch).float().softmax(-1).cpu()
    return Followed(chat, picture, prompt, likely, attention(chat).reshape(len(picture.tiles), -1).sum(1))


# ------------------------------------------------------------------------------------------------------ the pictures

def pictures(run):
    """name -> Pillow image or, of the answer, the text of an SVG file."""
    model, picture = run.chat.model, run.picture
    grid, tokens = model.config.vision.grid, model.config.tokens_per_tile
    patches = ruled(as_image(picture.tiles[run.tile]), grid, grid)
    seen = token_colours(picture.tokens[run.tile * tokens:(run.tile + 1) * tokens], grid // model.config.shuffle)
    return {"page": ruled(picture.image, *picture.grid), "tiles": draw_tiles(run.chat, picture), "patches": patches,
            "tokens": seen.resize(patches.size, Image.Resampling.NEAREST), "looked": draw_attention(run.chat),
            "answer": draw_answer(run)}


def ruled(image, columns, rows):
    """The image with the lines of a grid."""
    scale = max(1, 420 // min(image.size))
    image = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, thick = ImageDraw.Draw(image), max(1, image.width // 500) if columns < 16 else 1
    for i in range(1, columns):
        x = i * image.width // columns
        pen.line((x, 0, x, image.height), fill=(220, 40, 40), width=thick)
    for i in range(1, rows):
        y = i * image.height // rows
        pen.line((0, y, image.width, y), fill=(220, 40, 40), width=thick)
    return image


def token_colours(tokens, side):
    """Image tokens (side * side, D) as pixels: their three strongest principal directions as red, green and blue."""
    x = tokens.float().cpu() - tokens.float().cpu().mean(0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    strongest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    x = x @ (directions * strongest.sign()).T       # a direction's sign is arbitrary: its largest entry is positive here
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0)).clamp_min(1e-9)
    return Image.fromarray((255 * x).byte().reshape(side, side, 3).numpy())


def draw_answer(run, width=420, line=18):
    """The likeliest tokens at each place of the answer, with their probabilities as bars: the text of an SVG file.

    Text, not pixels: tokens may be of any script, and a telephone shows it as sharp as a screen.
    """
    ids, positions = run.prompt.ids, run.prompt.positions
    drawn, y = [], line
    for probability, place in zip(run.likely, run.learned):
        heading = f"position {positions[place]:,}, behind {written(run, ids[place - 1])}"
        drawn.append(f"<text x='8' y='{y}' fill='#666'>{heading}</text>")
        best, likeliest = probability.topk(LIKELIEST)
        for p, token in zip(best.tolist(), likeliest.tolist()):
            y += line
            colour, weight = ("#4a4", "bold") if token == ids[place] else ("#9bb8d8", "normal")
            text = written(run, token)
            drawn.append(f"<text x='112' y='{y}' text-anchor='end' font-weight='{weight}'>{text}</text>"
                         f"<rect x='120' y='{y - 10}' width='{220 * p:.1f}' height='11' fill='{colour}'/>"
                         f"<text class='p' x='{width - 8}' y='{y}' text-anchor='end'>{percent(p)}</text>")
        y += 2 * line
    y -= line // 2 + line
    return (f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{y}' viewBox='0 0 {width} {y}' "
            f"font-family='monospace' font-size='13'><rect width='{width}' height='{y}' fill='white'/>{''.join(drawn)}</svg>")


def percent(p):
    """A probability as text that never rounds to nothing, nor to certainty."""
    return "&lt; 0.1 %" if p < 0.0005 else "&gt; 99.9 %" if p >= 0.9995 else f"{100 * p:.1f} %"


def written(run, token, most=12):
    """A token as text to be seen, for HTML: a line's end and a space have a sign."""
    text = run.chat.model.tokenizer.decode([token]).replace("\n", "\u23ce").replace(" ", "\u2423")
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return html.escape(text if most is None or len(text) <= most else text[:most - 1] + "\u2026")


# ------------------------------------------------------------------------------------------------------ the page

def section(title, files, *text):
    return f"<h2>{title}</h2><p class='where'>{files}</p>" + "".join(text)


def shape(*sizes):
    return "<code>(" + ", ".join(map(str, sizes)) + ")</code>"


def embedded(image, name, width=420):
    """An <img> that holds its own PNG, shrunk to twice `width` if it is wider, shown at most `width` wide."""
    if image.width > 2 * width:
        image = image.resize((2 * width, max(1, round(2 * width * image.height / image.width))))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"<img alt='{name}' width='{width}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def count(number, thing):
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def introduction(run, question):
    model, picture = run.chat.model, run.picture
    config, n = model.config, len(picture.tiles)
    return f"""<h1>One page, followed</h1>
<p>A vision-language model reads a page as a row of <i>tokens</i>, vectors of one width, and writes its answer one token after
another. This is what it did with one page and one question. Every number is of this run.</p>
<p><b>{html.escape(question)}</b> &rarr; <b>{html.escape(run.chat.turns[0].answer)}</b></p>
<p>page of {picture.image.width} x {picture.image.height} pixels &rarr; {count(n, "tile")} &rarr;
{n * config.vision.grid ** 2:,} patches &rarr; {n * config.tokens_per_tile:,} image tokens &rarr;
{len(run.prompt.ids):,} tokens in a row &rarr; {count(len(run.learned), "token")} of answer</p>
<p>Model: {sum(p.numel() for p in model.parameters()):,} parameters, computing in {str(model.dtype).split(".")[-1]} on
{model.device.type}.</p>"""


def see(run, drawn, max_tiles):
    """From pixels to image tokens."""
    config, picture = run.chat.model.config, run.picture
    (columns, rows), (width, height), n = picture.grid, picture.image.size, len(picture.tiles)
    size, grid, tokens, number = config.vision.tile_pixels, config.vision.grid, config.tokens_per_tile, run.tile + 1
    seen, side, patch = config.vision.width, grid // config.shuffle, config.vision.patch_pixels
    thumbnail = "; last comes the whole page once more, small, as a <i>thumbnail</i>" if n > columns * rows else ""
    yield section("1. The page and its grid", "<code>model/tiling.py</code>, choose_grid", f"""
<p>The vision encoder sees squares of {size} x {size} pixels only, so the page is cut. It is {width} x {height} pixels, width to
height {width / height:.3f}. Of all grids with at most {count(max_tiles, "cell")}, {columns} x {rows} ({columns / rows:.3f}) is
nearest (one with more cells of the same ratio only if the page has more than half its pixels): the page is resized to
{columns * size} x {rows * size}.</p>""", embedded(drawn["page"], "the page with its grid"))
    yield section(f"2. {count(n, 'tile')}", "<code>model/tiling.py</code>, tile_page", f"""
<p>The cells, row by row{thumbnail}. The page is now {shape(n, 3, size, size)}: tiles, colours, rows and columns of pixels, each
a byte.</p>""", embedded(drawn["tiles"], "the tiles, numbered", 600))
    yield section(f"3. {grid ** 2:,} patches a tile", "<code>model/vision.py</code>", f"""
<p>The vision encoder cuts a tile into {grid} x {grid} patches of {patch} x {patch} pixels, lets them look at each other and
makes a vector of {seen:,} numbers of each: {shape(n, 3, size, size)} &rarr; {shape(n, grid ** 2, seen)}.
Here is tile {number}, the cell of the grid that the answer looked at most.</p>""",
                  embedded(drawn["patches"], f"tile {number} with its patches"))
    yield section(f"4. {tokens} image tokens a tile", "<code>model/projector.py</code>, the part that is trained", f"""
<p>{config.shuffle} x {config.shuffle} neighbouring patches are put side by side, and the projector brings them to the width of
the language model: {shape(n, grid ** 2, seen)} &rarr; {shape(n, tokens, seen * config.shuffle ** 2)} &rarr;
{shape(n, tokens, config.language.width)}. Below, the {side} x {side} tokens of tile {number}. Their {config.language.width}
numbers cannot be seen, but their three strongest directions can, as red, green and blue: what differs in colour differs for
the language model; equal colours may still differ in the other directions.</p>""",
                  embedded(drawn["tokens"], f"tile {number}'s image tokens"))


def read(run):
    """From image tokens to a row of tokens, and what of it is learned."""
    prompt, start, width = run.prompt, run.prompt.branches.index(1), run.chat.model.config.language.width
    loss = -run.likely[range(len(run.learned)), [prompt.ids[i] for i in run.learned]].log().mean().item()
    yield section(f"5. {len(prompt.ids):,} tokens in a row",
                  "<code>model/prompt.py</code>; put together in <code>model/internvl.py</code>", f"""
<p>Text becomes tokens too: each has a number, its id, and a learned vector of {width} numbers. The image tokens take the places
of the {html.escape(IMAGE_TOKEN)} ids: {shape(len(prompt.ids), width)}. Small, behind each: its id and its position. \u2423 is a
space, \u23ce the end of a line; what the system says is InternVL2's own sentence, in Chinese.</p>
<p>The <span class='token prefix'>prefix</span> with the <span class='token image'>image tokens</span>, positions 0 to
{start - 1:,}, is read once a page:</p>
<div class='tokens'>{token_row(run, 0, start)}</div>
<p>The question is a <span class='token branch'>branch</span>, positions {start:,} to {prompt.positions[-1]:,}. It sees the
prefix and itself. A second question about this page would be a second branch and begin at position {start:,} too:</p>
<div class='tokens'>{token_row(run, start, len(prompt.ids))}</div>""")
    yield section("6. What would be learned", "<code>model/prompt.py</code>, labels; <code>train.py</code>", f"""
<p>If this were a training example with this answer, which is the model's own, right or not: the {len(run.learned)}
<span class='token learned'>green</span> tokens above, the answer and the end of the turn.
The other {len(prompt.ids) - len(run.learned):,} are read, not learned. Each
green token is predicted from what stands before it; the loss is the mean of &minus;log(probability) over them,
here {loss:.4f}.</p>""")


def token_row(run, start, stop):
    """Some of the prompt's tokens in their colours; a run of image tokens is told by its length."""
    prompt, image_id, shown = run.prompt, special_id(run.chat.model.tokenizer, IMAGE_TOKEN), []
    for _, places in groupby(range(start, stop), lambda i: -1 if prompt.ids[i] == image_id else i):
        places = list(places)
        i, last = places[0], places[-1]
        kind = ("image" if prompt.ids[i] == image_id else "learned" if prompt.labels[i] != IGNORE_INDEX
                else "branch" if prompt.branches[i] else "prefix")
        text, where = written(run, prompt.ids[i], None), f"{prompt.positions[i]}"
        if last > i:
            text, where = f"{text} x {last - i + 1:,}", f"{where}-{prompt.positions[last]}"
        shown.append(f"<span class='token {kind}'>{text} <small>{prompt.ids[i]}, {where}</small></span>")
    return "".join(shown)


def answer(run, drawn):
    """The answer, token by token, and where it looked."""
    language, a, n = run.chat.model.config.language, len(run.learned), len(run.picture.tiles)
    names, undrawn = [f"tile {i + 1}" for i in range(n)], ""
    if n > run.picture.grid[0] * run.picture.grid[1]:
        names[-1], undrawn = "thumbnail", "; the thumbnail is not drawn"
    shares = ", ".join(f"{name} {percent(look)}" for name, look in zip(names, run.looked.tolist()))
    yield section("7. The answer, token by token", "<code>model/language.py</code>, <code>model/generate.py</code>", f"""
<p>{language.layers} blocks let each token look back at those it may see, and add what it finds
there. At the end the language model makes a probability for each of its {language.vocabulary:,} tokens, at each of the
{count(a, "place")} where the answer is predicted: {shape(a, language.width)} &rarr; {shape(a, language.vocabulary)}.
The {LIKELIEST} likeliest are shown, what the answer has in green. Greedy decoding takes the first, reads it and goes on until
the end of the turn, or until the answer is as long as it may be.</p>""", drawn["answer"])
    yield section("8. Where it looked", "<code>extras/pictures.py</code>", f"""
<p>Before it chooses, each token of the answer looks at all tokens before it. {percent(run.looked.sum().item())} of this
attention, the mean over heads, layers and tokens of the answer, went to image tokens: {shares}. Red is
where{undrawn}. It tells where the model looked, not why it answered what it did.</p>""",
                  embedded(drawn["looked"], "the page, red where the answer looked"))
