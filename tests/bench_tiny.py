"""What the embedded model reads: the tables in model/tiny/README.md.

    python tests/bench_tiny.py reads [--model tiny]             held-out values by layout, font, size, wording; the wrong page
    python tests/bench_tiny.py beyond [--data FOLDER]           pages unlike those it was made on, an HTML invoice, real scans
    python tests/bench_tiny.py first                            the first run, `train.py --tiny`, with three seeds
    python tests/bench_tiny.py modes                            trainable parts, compared on pages that it does not read

All pages are of the split "test": neither they nor their values occur in training. Not collected by pytest.
"""
import argparse
import functools
import itertools
import math
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageChops, ImageFilter
from safetensors import safe_open

from data import group_rows_into_pages
from extras.plots import plotting
from extras.run_folder import read_lines
from extras.score import anls, exact_match
from extras.sources import open_rows
from model import InternVL
from model.generate import generate
from model.images import load_image
from model.prompt import write_page
from model.tiling import tile_page
from model.tiny import pages
from model.tiny.pages import ASKED, DOMAINS, FINISH, READ, SHAPES, Document, Sheet, draw_page, value_of

UNREAD = "hollow", "negative"           # domains that the embedded model was not trained on, and of which it reads almost nothing
INVOICE = {                             # what is asked about assets/invoice.png, drawn from invoice.html by a browser: chromium
    "What is the number?": "73120",     # --headless --hide-scrollbars --window-size=256,256 --screenshot=invoice.png invoice.html
    "What is the date?": "March 5, 2024", "When is it due?": "April 4, 2024", "What is the bill to?": "Laura Fischer",
    "What is the phone?": "555-0142", "What is the price of the pens?": "$18.50", "What is the price of the paper?": "$42.00",
    "What is the delivery?": "$7.25", "What is the tax?": "$5.42", "What is the total?": "$73.17",
}


def answers(model, tiles, questions):
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [[(q, None)] for q in questions])
    columns = zip(*generate(model, [(tiles, prompt)], 40))
    return [model.tokenizer.decode([t for t in column if t is not None], skip_special_tokens=True).strip() for column in columns]


def asked_of(draw, shape, sizes, wording, fonts):
    """A plain page whose three questions have one wording -> (its Sheet, [(question, answer), ...])."""
    facts = {}
    while not facts:
        sheet = Sheet(shape)
        facts = Document(draw, sheet, functools.partial(value_of, draw, unseen=True), list(fonts), sizes).facts
    questions = [((own if wording == "its own" else wording).format(label), value) for label, (value, own)
                 in draw.sample(list(facts.items()), min(3, len(facts))) if own or wording != "its own"]
    return sheet, [(question[0].upper() + question[1:], value) for question, value in questions]


def score(model, domain, shape, questions, change=lambda page: page, wording=None, sizes=pages.TYPE, fonts=pages.FONTS):
    """(exact match, ANLS, exact match with the page before it instead, number of questions).

    `wording`: of every question, None for any that the domain asks.
    """
    right, close, wrong, count, before = 0.0, 0.0, 0.0, 0, None
    for index in itertools.count():
        draw = random.Random(f"test {index}")
        if wording or fonts != pages.FONTS:
            sheet, asked = asked_of(draw, shape or draw.choice(SHAPES), sizes, wording or ASKED[0], fonts)
            page = FINISH.get(domain, lambda draw, page: page)(draw, sheet.draw())
        else:
            page, asked = draw_page(draw, domain, shape, sizes=sizes)
        asked = [turn for turn in asked if turn[0] != READ]
        if not asked:
            continue
        tiles = tile_page(change(page), tile_pixels=model.config.vision.tile_pixels)
        texts, truths = zip(*asked)
        for answer, truth in zip(answers(model, tiles, texts), truths):
            right, close, count = right + exact_match(answer, [truth]), close + anls(answer, [truth]), count + 1
        if before is not None:
            wrong += sum(exact_match(answer, [truth]) for answer, truth in zip(answers(model, before, texts), truths))
        before = tiles
        if count >= questions:
            return right / count, close / count, wrong / count, count


def reads(settings):
    model, (low, high), one = InternVL.from_pretrained(settings.model, "cpu"), pages.TYPE, SHAPES[0]
    rows = {"1 tile": {}, "2 tiles and a thumbnail": dict(shape=SHAPES[1]), "4 tiles and a thumbnail": dict(shape=SHAPES[3]),
            "1 tile, in the two held-out fonts": dict(fonts=pages.UNSEEN_FONTS)}
    rows |= {f"1 tile, type of {sizes[0]} to {sizes[1]} pixels": dict(sizes=sizes) for sizes in ((low, 14), (15, 18), (19, high))}
    rows |= {f"1 tile, {name}": dict(wording=wording) for name, wording in
             [(f'"{wording.format("total")}"', wording) for wording in ASKED] + [('its own question, "How much is it in all?"', "its own")]}
    rows |= {f"1 tile, domain `{domain}`": dict(domain=domain) for domain in ("worn", *UNREAD)}
    print("| pages | questions | exact match | ANLS | exact match, wrong page |\n|---|---|---|---|---|")
    for name, more in rows.items():
        right, close, wrong, count = score(model, **{"domain": "plain", "shape": one, "questions": settings.questions} | more)
        print(f"| {name} | {count} | {right:.3f} | {close:.3f} | {wrong:.3f} |", flush=True)


def train(out, *flags):
    """A run of train.py, if its folder is not there yet -> (lines of its steps, lines of its validations)."""
    if not (out / "model.safetensors").exists():
        subprocess.run([sys.executable, ROOT / "train.py", *map(str, flags), "--save-every", "0", "--out", out], check=True, capture_output=True)
    lines = read_lines(out / "metrics.jsonl")
    return [[line for line in lines if key in line] for key in ("train_loss", "val_loss")]


def seconds(steps):
    return sum(line["questions"] / line["questions_per_second"] for line in steps)


def first(settings):
    print("| seed | exact match before | halfway | at the end | val loss before → after | plain pages afterwards | seconds of training |\n"
          "|---|---|---|---|---|---|---|")
    for seed in range(3):
        out = settings.runs / f"first-{seed}"
        steps, measured = train(out, "--tiny", "--seed", seed)
        kept = score(InternVL.from_pretrained(out, "cpu"), "plain", SHAPES[0], settings.questions)[0]
        right = " | ".join(f"{measured[i]['exact_match']:.2f}" for i in (0, len(measured) // 2, -1))
        print(f"| {seed} | {right} | {measured[0]['val_loss']:.2f} → {measured[-1]['val_loss']:.2f} | {kept:.2f} | {seconds(steps):.0f} |", flush=True)


MODES = {                               # trainable parts -> their flags; the learning rates are those of --tiny
    "projector": "projector",
    "LoRA on the LLM": "lora",
    "projector and LoRA on the LLM": "projector,lora",
    "everything": "all",
}


def modes(settings):
    """Each mode three times on a domain: a table, and the curves in assets/modes.png."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    print(f"| trainable | parameters | val loss, three seeds | exact match | ANLS | {pages.TYPE[0]} to {pages.TYPE[1]} pixels, plain pages, afterwards | "
          "seconds of training | peak memory, GB |\n|---|---|---|---|---|---|---|---|")
    for color, (mode, train_flag) in zip(("tab:red", "tab:blue", "tab:green", "tab:grey"), MODES.items()):
        ends = []
        for seed in range(3):
            out = settings.runs / f"{settings.domain}-{train_flag}-{seed}"
            steps, measured = train(out, "--tiny", "--batch-pages", 2, "--accumulate", 1, "--domain", settings.domain, "--train", train_flag,
                                    "--steps", settings.steps, "--eval-every", 100, "--seed", seed)
            axes.plot([line["step"] for line in measured], [line["val_loss"] for line in measured], color=color, marker=".", linewidth=1,
                      label=None if seed else mode)
            [checkpoint] = (out / "checkpoints").iterdir()
            with safe_open(checkpoint, framework="pt") as file:
                count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys() if name.startswith("model."))
            kept = score(InternVL.from_pretrained(out, "cpu"), "plain", SHAPES[0], 100)[0]
            ends.append((*(measured[-1][key] for key in ("val_loss", "exact_match", "anls")), kept, seconds(steps), max(line["peak_gb"] for line in steps)))
        cells = [" ".join(f"{value:{form}}" for value in column) for column, form in zip(zip(*ends), (".2f", ".2f", ".2f", ".2f", ".0f", ".2f"))]
        print(f"| {mode} | {count:,} | " + " | ".join(cells) + " |", flush=True)
    axes.set(xlabel="step", title=f"{settings.domain} pages, three seeds", ylabel="validation loss per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "assets" / "modes.png", dpi=110)


def beyond(settings):
    model = InternVL.from_pretrained(settings.model, "cpu")
    changes = {
        "noise, deviation 40 of 255": lambda page: ImageChops.add(page, Image.effect_noise(page.size, 80), offset=-128),
        "blurred, radius 1": lambda page: page.filter(ImageFilter.GaussianBlur(1)),
        "faded to half the contrast": lambda page: page.point(lambda value: 128 + value // 2),
        "turned by 1 degree": lambda page: page.rotate(1, Image.Resampling.BILINEAR, fillcolor=255),
        "10 % larger than its tile": lambda page: page.resize((int(page.width * 1.1), int(page.height * 1.1))),
    }
    print("| pages of 1 tile, as they come | exact match | ANLS |\n|---|---|---|")
    for name, change in changes.items():
        right, close, *_ = score(model, "plain", SHAPES[0], settings.questions, change)
        print(f"| {name} | {right:.2f} | {close:.2f} |", flush=True)
    for size in (10, 11, 12, 14, 16, 18, 20, 24, 28):
        right, close, *_ = score(model, "plain", SHAPES[0], settings.questions, sizes=(size, size))
        print(f"| type of {size} pixels | {right:.2f} | {close:.2f} |", flush=True)
    asked = answers(model, tile_page(load_image(ROOT / "assets/invoice.png"), tile_pixels=model.config.vision.tile_pixels), list(INVOICE))
    right, close = (sum(map(measure, asked, ([answer] for answer in INVOICE.values()))) / len(INVOICE) for measure in (exact_match, anls))
    print(f"| an HTML invoice, printed by a browser ({len(INVOICE)} questions) | {right:.2f} | {close:.2f} |", flush=True)
    for wording in ("What does it say for {}?", "Which is the {}?", "{}", "What is the {} on this page?"):
        right, close, *_ = score(model, "plain", SHAPES[0], settings.questions, wording=wording)
        print(f"| asked \"{wording.format('total')}\" | {right:.2f} | {close:.2f} |", flush=True)
    right, close, *_ = score(model, "plain", (3 * pages.TILE, 2 * pages.TILE), settings.questions)
    print(f"| 6 tiles and a thumbnail | {right:.2f} | {close:.2f} |", flush=True)
    if settings.data:
        found = [(answer, page.accepted[i]) for page in group_rows_into_pages(open_rows(settings.data, "validation"))
                 for i, answer in enumerate(answers(model, tile_page(load_image(page.images[0]), tile_pixels=model.config.vision.tile_pixels), page.questions))]
        right, close = (sum(measure(*pair) for pair in found) / len(found) for measure in (exact_match, anls))
        print(f"| real scans ({len(found)} questions) | {right:.2f} | {close:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("reads", "beyond", "first", "modes"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--steps", type=int, default=400, help="of modes")
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"), help="folder of the runs of first and modes; those that are there are not repeated")
    parser.add_argument("--data", help="real scans in DocumentVQA's layout, for the last row of the table beyond")
    parser.add_argument("--domain", choices=DOMAINS, default=UNREAD[0], help="of modes")
    settings = parser.parse_args()
    started = time.perf_counter()
    globals()[settings.table](settings)
    print(f"{time.perf_counter() - started:.0f} s")
