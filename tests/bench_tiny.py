"""What the embedded model reads: the tables in model/tiny/README.md.

    python tests/bench_tiny.py layouts [--model tiny]           exact match a layout, on the right page and on the wrong one
    python tests/bench_tiny.py domains [--steps 800]            projector-only training on every domain, and what it forgets
    python tests/bench_tiny.py modes --steps 250                trainable parts, compared on one domain; runs into runs/modes
    python tests/bench_tiny.py beyond                           pages off the grid that the base was made on, read as it is

All pages are of the split "test": neither they nor their values occur in training. Not collected by pytest.
"""
import argparse
import functools
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
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
from model.tiny.pages import DOMAINS, LOOSE, SHAPES, draw_page


def answers(model, tiles, questions):
    prompt, _ = write_page(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [[(q, None)] for q in questions])
    columns = zip(*generate(model, [(tiles, prompt)], 16))
    return [model.tokenizer.decode([t for t in column if t is not None], skip_special_tokens=True).strip() for column in columns]


def score(model, domain, shape, questions, change=lambda page: page, wording="{}"):
    """(exact match, ANLS, exact match with the page before it instead, number of questions)."""
    right, close, wrong, count, before = 0.0, 0.0, 0.0, 0, None
    for index in itertools.count():
        page, asked = draw_page(random.Random(f"test {index}"), domain, shape)
        tiles = tile_page(change(page), tile_pixels=model.config.vision.tile_pixels)
        texts, truths = zip(*((wording.format(question, label=question.split()[-1][:-1]), truth) for question, truth in asked))
        for answer, truth in zip(answers(model, tiles, texts), truths):
            right, close, count = right + exact_match(answer, [truth]), close + anls(answer, [truth]), count + 1
        if before is not None:
            wrong += sum(exact_match(answer, [truth]) for answer, truth in zip(answers(model, before, texts), truths))
        before = tiles
        if count >= questions:
            return right / count, close / count, wrong / count, count


def layouts(settings):
    model = InternVL.from_pretrained(settings.model, "cpu")
    print("| tiles | questions | exact match | ANLS | exact match, wrong page |\n|---|---|---|---|---|")
    for shape, tiles in zip(SHAPES, ("1", "2 + thumbnail", "4 + thumbnail")):
        right, close, wrong, count = score(model, "plain", shape, settings.questions)
        print(f"| {tiles} | {count} | {right:.3f} | {close:.3f} | {wrong:.3f} |", flush=True)


def train(domain, steps, seed, out):
    """Projector-only training -> (measures at the quarter and at the end, seconds of the training steps)."""
    subprocess.run([sys.executable, ROOT / "train.py", "--tiny", "--domain", domain, "--steps", str(steps), "--eval-every", str(steps // 4),
                    "--seed", str(seed), "--eval-pages", "100", "--out", out], check=True, capture_output=True)
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return ([line for line in lines if "val_loss" in line],
            sum(line["questions"] / line["questions_per_second"] for line in lines if "train_loss" in line))


def domains(settings):
    print(f"| trained on | exact match before | at step {settings.steps // 4} | at step {settings.steps} | val loss before → after "
          "| plain pages afterwards | seconds of training |\n|---|---|---|---|---|---|---|")
    base = InternVL.from_pretrained("tiny", "cpu")
    print(f"| nothing | | | | | {score(base, 'plain', None, settings.questions)[0]:.2f} | |", flush=True)
    for domain in [domain for domain in DOMAINS if domain not in ("plain", *LOOSE)] + ["negative,plain"]:
        with tempfile.TemporaryDirectory() as folder:
            measured, seconds = train(domain, settings.steps, settings.seed, f"{folder}/run")
            kept = score(InternVL.from_pretrained(f"{folder}/run", "cpu"), "plain", None, settings.questions)[0]
        first, quarter, *_, last = measured
        print(f"| {domain} | {first['exact_match']:.2f} | {quarter['exact_match']:.2f} | {last['exact_match']:.2f} | "
              f"{first['val_loss']:.2f} → {last['val_loss']:.3f} | {kept:.2f} | {seconds:.0f} |", flush=True)


MODES = {                               # trainable parts -> their flags; the learning rates are train.py's defaults for --tiny
    "projector": "projector",
    "LoRA on the LLM": "lora",
    "projector and LoRA on the LLM": "projector,lora",
    "everything": "all",
}


def modes(settings):
    """Each mode three times a domain, from runs that are there already or made now: a table, and the curves in assets/modes.png."""
    pyplot = plotting()
    figure, all_axes = pyplot.subplots(1, len(settings.domain), figsize=(6 * len(settings.domain), 4), sharey=True, squeeze=False, layout="constrained")
    for domain, axes in zip(settings.domain, all_axes[0]):
        print(f"\n| {domain}, {settings.steps} steps | parameters | val loss | exact match | ANLS | seconds of training | peak memory, GB |\n|---|---|---|---|---|---|---|")
        for color, (mode, train) in zip(("tab:red", "tab:blue", "tab:green", "tab:grey"), MODES.items()):
            ends = []
            for seed in range(3):
                out = Path("runs/modes", f"{domain}-{train}-{seed}")
                if not (out / "model.safetensors").exists():
                    subprocess.run([sys.executable, ROOT / "train.py", "--tiny", "--train", train, "--domain", domain, "--steps", str(settings.steps), "--seed",
                                    str(seed), "--eval-every", "50", "--eval-pages", "32", "--save-every", "0", "--out", out], check=True, capture_output=True)
                lines = read_lines(out / "metrics.jsonl")
                measured, steps = ([line for line in lines if key in line] for key in ("val_loss", "train_loss"))
                axes.plot([line["step"] for line in measured], [line["val_loss"] for line in measured], color=color, marker=".", linewidth=1,
                          label=None if seed else mode)
                [checkpoint] = (out / "checkpoints").iterdir()
                with safe_open(checkpoint, framework="pt") as file:
                    count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys() if name.startswith("model."))
                ends.append((measured[-1]["val_loss"], measured[-1]["exact_match"], measured[-1]["anls"],
                             sum(line["questions"] / line["questions_per_second"] for line in steps), max(line["peak_gb"] for line in steps)))
            cells = [" ".join(f"{value:{form}}" for value in column) for column, form in zip(zip(*ends), (".3f", ".2f", ".2f", ".0f", ".2f"))]
            print(f"| {mode} | {count:,} | " + " | ".join(cells) + " |", flush=True)
        axes.set(xlabel="step", title=f"{domain} pages, three seeds", yscale="log")
        axes.grid(alpha=0.3)
    all_axes[0, 0].set_ylabel("validation loss per answer token")
    all_axes[0, 0].legend()
    figure.savefig(ROOT / "assets" / "modes.png", dpi=110)


def sized(size):
    """Draw every character at another size, in the same cells."""
    @functools.cache
    def glyph(character, domain):
        cell = Image.new("L", (pages.CELL, pages.CELL), 255)
        ImageDraw.Draw(cell).text((8, 8), character, fill=0, font=ImageFont.load_default(size=size), anchor="mm")
        return cell
    return glyph


def beyond(settings):
    model = InternVL.from_pretrained(settings.model, "cpu")
    changes = {f"moved {n} pixels right and down": functools.partial(ImageChops.offset, xoffset=n, yoffset=n) for n in (1, 2, 4)}
    changes |= {
        "noise, deviation 40 of 255": lambda page: ImageChops.add(page, Image.effect_noise(page.size, 80), offset=-128),
        "blurred, radius 1": lambda page: page.filter(ImageFilter.GaussianBlur(1)),
        "faded to half the contrast": lambda page: page.point(lambda value: 128 + value // 2),
        "turned by 1 degree": lambda page: page.rotate(1, Image.Resampling.BILINEAR, fillcolor=255),
        "10 % larger than its tiles": lambda page: page.resize((int(page.width * 1.1), int(page.height * 1.1))),
        "lines ruled under every row": ruled,
    }
    print("| pages of 1 tile, as they come | exact match | ANLS |\n|---|---|---|")
    original = pages.glyph
    for name, change in changes.items():
        right, close, *_ = score(model, "plain", SHAPES[0], settings.questions, change)
        print(f"| {name} | {right:.2f} | {close:.2f} |", flush=True)
    for size in (11, 13, 14, 16):
        pages.glyph = sized(size)
        right, close, *_ = score(model, "plain", SHAPES[0], settings.questions)
        print(f"| characters of {size} pixels instead of 15 | {right:.2f} | {close:.2f} |", flush=True)
    pages.glyph = original
    for domain in LOOSE:
        right, close, *_ = score(model, domain, SHAPES[0], settings.questions)
        print(f"| domain {domain} | {right:.2f} | {close:.2f} |", flush=True)
    for wording in ("{label}?", "Find the {label}.", "What is the {label} on this page?"):
        right, close, *_ = score(model, "plain", SHAPES[0], settings.questions, wording=wording)
        print(f"| asked \"{wording.format(label='total')}\" | {right:.2f} | {close:.2f} |", flush=True)
    right, close, *_ = score(model, "plain", (24, 16), settings.questions)
    print(f"| 6 tiles and a thumbnail | {right:.2f} | {close:.2f} |", flush=True)
    if settings.data:
        found = [(answer, page.accepted[i]) for page in group_rows_into_pages(open_rows(settings.data, "validation"))
                 for i, answer in enumerate(answers(model, tile_page(load_image(page.images[0]), tile_pixels=128), page.questions))]
        right, close = (sum(measure(*pair) for pair in found) / len(found) for measure in (exact_match, anls))
        print(f"| real scans ({len(found)} questions) | {right:.2f} | {close:.2f} |", flush=True)


def ruled(page):
    page = page.copy()
    for y in range(pages.CELL - 1, page.height, pages.CELL):
        ImageDraw.Draw(page).line((0, y, page.width, y), fill=0)
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("layouts", "domains", "modes", "beyond"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="real scans in DocumentVQA's layout, for the last row of the table beyond")
    parser.add_argument("--domain", choices=DOMAINS, nargs="+", default=["negative"], help="of modes")
    settings = parser.parse_args()
    started = time.perf_counter()
    globals()[settings.table](settings)
    print(f"{time.perf_counter() - started:.0f} s")
