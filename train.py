"""How does the loss go down? Fine-tune InternVL2's projector on the questions people asked about scanned documents.

    python train.py                                     InternVL2-1B on DocumentVQA, both streamed from the Hub, one GPU
    python train.py --tiny                              the same code on a small model and drawn pages: offline, on a CPU
    python train.py --model FOLDER --data FOLDER        local files in the Hub's layout

Vision encoder and language model are frozen. A step is one optimizer update on batch-pages x accumulate pages; its loss
is the sum of the answer tokens' negative log-likelihood over the whole step, divided by their number.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from data import (INSTRUCTION, Examples, PageStream, count_rows, is_synthetic, load_examples, load_image, named_parts,
                  open_rows)
from model import InputError, InternVL
from model.checkpoint import (CHECKPOINTS, CONFIG, SETTINGS, WEIGHTS, export_adapter, keep_newest, latest_checkpoint,
                              load_checkpoint, read_settings, save_checkpoint, write_text)
from model.errors import OneLineParser, real_number, run, warn, whole_number
from model.generate import generate
from model.lora import TARGETS, add_adapters
from model.memory import peak_gb, step_gb
from model.score import anls, exact_match
from model.tiny.pages import DOMAINS

PARTS = ("projector", "lora", "llm", "vision")
TINY = dict(model="tiny", data="synthetic", domain="negative", steps=400, warmup=0.05, eval_every=50, eval_pages=48,
            device="cpu", workers=0)
# Highest learning rates. The official second fine-tuning of InternVL2-1B opens projector and LLM, or LoRA, at 4e-5; its
# domain adaptation, the one that opens the vision encoder, takes 1e-5. The embedded model's (TINY_LR) were
# tried: with its LLM or vision encoder at 5e-4 and more it had not learned to read negatives after 250 steps.
LR = {"projector": 4e-5, "lora": 4e-5, "llm": 4e-5, "vision": 1e-5}
TINY_LR = {"projector": 5e-3, "lora": 5e-4, "llm": 2e-4, "vision": 2e-4}
# Published recipes: where they are from, what they set. They count questions in a step, we count pages: DocumentVQA has 3.87
# questions a page. None sets drop path (0.1 in the official full run) or groups by length, as the originals do.
OFFICIAL = dict(max_tiles=6, max_length=4096, schedule="cosine", warmup=0.03, weight_decay=0.01, beta2=0.999, clip=1.0,
                batch_pages=1, checkpoint_activations=True)
RECIPES = {
    "official-full": ("InternVL 2.0 second fine-tuning of 1B, full: 128 questions a step",
                      OFFICIAL | dict(train="projector,llm", lr=4e-5, accumulate=32)),
    "official-lora": ("InternVL 2.0 second fine-tuning of 1B, LoRA: 16 questions a step",
                      OFFICIAL | dict(train="lora", lr=4e-5, accumulate=4, lora_rank=16, lora_alpha=32, lora_dropout=0.05, lora_targets="llm")),
    "xtuner-lora": ("XTuner's InternVL2 LoRA with the learning rate and batch of its FoodieQA tutorial: 8 questions a step",
                    OFFICIAL | dict(train="projector,lora", lr=3e-5, accumulate=2, weight_decay=0.05, max_tiles=12, max_length=8192,
                                    lora_rank=128, lora_alpha=256, lora_dropout=0.05, lora_targets="llm")),
    "ms-swift-lora": ("ms-swift's defaults for LoRA, on query, key and value: 16 questions a step",
                      OFFICIAL | dict(train="lora", lr=1e-4, accumulate=4, warmup=0.05, weight_decay=0.1, beta2=0.95, max_tiles=12,
                                      lora_rank=8, lora_alpha=32, lora_dropout=0.05, lora_targets="qkv")),
    "paddlemix-llm": ("PaddleMIX's second fine-tuning of 1B, LLM and projector open: 128 questions a step",
                      OFFICIAL | dict(train="projector,llm", lr=4e-5, accumulate=32)),
}
RESHAPING = ("train", "lora_rank", "lora_alpha", "lora_targets")        # flags that a run cannot change half-way
CARD = ("data", "domain", "train", "recipe", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "steps", "epochs", "batch_pages",
        "accumulate", "lr", "schedule", "warmup", "weight_decay", "max_tiles", "seed")      # settings told in a model card
METRICS, SAMPLES, SKIPPED = "metrics.jsonl", "samples.jsonl", "skipped.jsonl"
SHOWN_PAGES, LONGEST_ANSWER = 4, 64     # validation pages in samples.md and samples.png; tokens of a validation's answer


# --------------------------------------------------------------------------------------------------------------- settings

def parse_settings():
    parser = OneLineParser(description=__doc__)
    data = parser.add_argument_group("model and data")
    data.add_argument("--tiny", action="store_true", help="small model, drawn pages, CPU: sets the defaults of other flags")
    data.add_argument("--model", default="OpenGVLab/InternVL2-1B", help="Hub id, local folder, or tiny (%(default)s)")
    data.add_argument("--from-scratch", action=argparse.BooleanOptionalAction, default=False, help="random weights in the shape that --model describes")
    data.add_argument("--data", default="zhangfaen/DocumentVQA", help="Hub id, local folder in Hub layout, file (.json, .jsonl), or synthetic; several: a.jsonl=2,b.jsonl (%(default)s)")
    data.add_argument("--eval-data", metavar="DATA", help="to validate on (the validation split of --data; of a file one page in 20, which is then not trained on)")
    data.add_argument("--domain", type=domain_names, default="plain", help="what synthetic pages look like, comma-separated (%(default)s)")
    data.add_argument("--train", type=part_names, default="projector", help="parts that train, comma-separated: projector, lora, llm, vision, or all but lora (%(default)s)")
    data.add_argument("--recipe", choices=RECIPES, help="set the flags as a published recipe does; those typed beside it win")
    data.add_argument("--max-tiles", type=whole_number(1, 128), default=12, help="tiles a page may be cut into, thumbnail not counted (%(default)s)")
    data.add_argument("--max-length", type=whole_number(1), default=8192, help="tokens of a question with its page; longer ones are left out (%(default)s)")
    data.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True, help="pages in seeded order, or in file order")
    data.add_argument("--allow-private", action=argparse.BooleanOptionalAction, default=False, help="fetch images from addresses of a private network too")
    data.add_argument("--group-by-length", action=argparse.BooleanOptionalAction, default=False, help="micro-batches of pages of like size")
    data.add_argument("--look-ahead", type=whole_number(1), default=512, help="rows over which a page's questions are gathered (%(default)s)")
    lora = parser.add_argument_group("LoRA, with --train lora")
    lora.add_argument("--lora-rank", type=whole_number(1), default=16, help="width between the two matrices (%(default)s)")
    lora.add_argument("--lora-alpha", type=real_number(1e-6, 1e6), default=32.0, help="what they add is multiplied by alpha / rank (%(default)s)")
    lora.add_argument("--lora-dropout", type=real_number(0, 0.999), default=0.05, help="of what they read, while training (%(default)s)")
    lora.add_argument("--lora-targets", type=target_names, default="llm", help="layers that get them, comma-separated: " + ", ".join(TARGETS) + " (%(default)s)")
    batch = parser.add_argument_group("batch and length of the run")
    batch.add_argument("--batch-pages", type=whole_number(1), default=1, help="pages in a micro-batch (%(default)s)")
    batch.add_argument("--accumulate", type=whole_number(1), default=8, help="micro-batches in an optimizer step (%(default)s)")
    batch.add_argument("--steps", type=whole_number(1), help="optimizer steps; with --epochs, the first one reached")
    batch.add_argument("--epochs", type=whole_number(1), help="times through the data (1 if --steps is not given)")
    optimizer = parser.add_argument_group("optimizer: AdamW, beta1 0.9")
    optimizer.add_argument("--lr", type=learning_rates, metavar="RATE|PART=RATE,...",
                           help="highest learning rate, or one a part (" + ", ".join(f"{part}={rate:g}" for part, rate in LR.items()) + ")")
    optimizer.add_argument("--beta2", type=real_number(0, 0.999999), default=0.999, help="how slowly the mean of squares moves (%(default)s)")
    optimizer.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="cosine", help="how it falls (%(default)s)")
    optimizer.add_argument("--warmup", type=real_number(0, 1), default=0.03, help="fraction of the run in which it rises (%(default)s)")
    optimizer.add_argument("--weight-decay", type=real_number(0, 1000), default=0.01, help="of matrices, not of biases and norms; 0: none (%(default)s)")
    optimizer.add_argument("--clip", type=real_number(0, 1e9), default=1.0, help="largest norm of the gradient; 0: no clipping (%(default)s)")
    log = parser.add_argument_group("evaluation and files")
    log.add_argument("--eval-every", type=whole_number(0), default=200, help="steps between validations; 0: none (%(default)s)")
    log.add_argument("--eval-pages", type=whole_number(1), default=64, help="pages of the validation set, always the same (%(default)s)")
    log.add_argument("--save-every", type=whole_number(0), default=200, help="steps between checkpoints; 0: only at the end (%(default)s)")
    log.add_argument("--keep", type=whole_number(1), default=5, help="newest checkpoints to keep, beside the best validated (%(default)s)")
    log.add_argument("--out", help="run folder (runs/ and the time of day)")
    log.add_argument("--resume", metavar="RUN", help="go on from a run folder, with its settings")
    log.add_argument("--export", nargs=2, metavar=("RUN", "FOLDER"), help="write a run's model as a model folder, and end")
    log.add_argument("--format", choices=("official", "native", "peft"), default="official",
                     help="of the folder: the official layout, transformers' own, or the adapter alone (%(default)s)")
    log.add_argument("--push-to-hub", metavar="REPO", help="upload what --export wrote to this repository of the Hub")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, cpu, ... (a GPU if there is one)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="of frozen weights and activations (bfloat16 on a GPU, else float32)")
    machine.add_argument("--seed", type=whole_number(0), default=0, help="of the pages' order and of random weights (%(default)s)")
    machine.add_argument("--workers", type=whole_number(0), default=min(4, os.cpu_count() or 1), help="processes that decode and tile pages (%(default)s)")
    machine.add_argument("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
                         help="keep a block's input alone and run it again in the backward pass: less memory, a third more work")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the blocks with torch.compile")

    settings = parser.parse_args()
    if settings.resume:
        kept = read_settings(settings.resume) | {"out": settings.resume}
        parser.set_defaults(**{key: str(value) if type(value) in (int, float) else value     # checked as if it were typed
                               for key, value in kept.items()})
    elif settings.tiny:
        parser.set_defaults(**TINY)
    if settings.recipe:
        parser.set_defaults(**RECIPES[settings.recipe][1])
    settings = parser.parse_args()
    if settings.resume and settings.out != settings.resume:
        parser.error(f"--out {settings.out}: --resume goes on in its own folder; to begin another run from it, use --model {settings.resume}")
    for key in RESHAPING if settings.resume else ():
        if getattr(settings, key) != read_settings(settings.resume).get(key, getattr(settings, key)):
            parser.error(f"--{key.replace('_', '-')} {getattr(settings, key)}: not what the run trains; to train other parts, "
                         f"begin a run with --model {settings.resume}")
    if isinstance(settings.lr, dict) and not settings.lr.keys() <= set(settings.train.split(",")):
        parser.error(f"--lr: a rate for {', '.join(settings.lr)}, but --train {settings.train}")
    if not isinstance(settings.lr, float):
        rates = (TINY_LR if settings.tiny else LR) | (settings.lr or {})
        settings.lr = {part: rates[part] for part in settings.train.split(",")}
        settings.lr = settings.lr if len(set(settings.lr.values())) > 1 else min(settings.lr.values())
    if not settings.steps and not settings.epochs:
        settings.epochs = 1
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings.dtype = settings.dtype or ("bfloat16" if settings.device.startswith("cuda") else "float32")
    settings.out = settings.out or f"runs/{datetime.now():%Y%m%d-%H%M%S}"
    if settings.model != "tiny" and Path(settings.model).exists():      # the run can be used from any folder
        settings.model = str(Path(settings.model).resolve())
    settings.data = whole_paths(settings.data)
    settings.eval_data = settings.eval_data and whole_paths(settings.eval_data)
    return settings


def whole_paths(data):
    """'a.jsonl=2,owner/name' -> '/home/me/a.jsonl=2.0,owner/name'."""
    parts = [(name if is_synthetic(name) or not Path(name).exists() else str(Path(name).resolve()), weight)
             for name, weight in named_parts(data)]
    return ",".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in parts)


def part_names(text):
    """'all' -> 'projector,llm,vision'."""
    text = "projector,llm,vision" if text == "all" else text
    for part in text.split(","):
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is no part of the model; expected {', '.join(PARTS)}, or all")
    return text


def learning_rates(text):
    """'4e-5' -> 4e-5; 'projector=1e-3,lora=1e-4' -> {'projector': 1e-3, 'lora': 1e-4}."""
    if "=" not in text:
        return real_number(0, 1000)(text)
    rates = dict(entry.split("=") for entry in text.split(","))
    return {part_names(part): real_number(0, 1000)(rate) for part, rate in rates.items()}


def target_names(text):
    for target in text.split(","):
        if target not in TARGETS:
            raise argparse.ArgumentTypeError(f"{target!r} is no set of layers; expected {', '.join(TARGETS)}")
    return text


def domain_names(text):
    for domain in text.split(","):
        if domain not in DOMAINS:
            raise argparse.ArgumentTypeError(f"{domain!r} is no domain; expected {', '.join(DOMAINS)}")
    return text


def open_run(settings):
    """Make the run folder. Raises InputError for one that holds a run or a model already."""
    folder = Path(settings.out)
    if not settings.resume and any((folder / name).exists() for name in (SETTINGS, WEIGHTS, CONFIG)):
        raise InputError(f"{folder}: holds a run or a model already; choose another --out, or go on with --resume {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
    return folder


# -------------------------------------------------------------------------------------------------------- model, optimizer

def part_parameters(model):
    """{part: its parameters}; adapters are the part lora, whatever layer they sit on."""
    parts, part_of = {part: [] for part in PARTS}, {"projector": "projector", "language": "llm", "vision": "vision"}
    for name, parameter in model.named_parameters():
        parts["lora" if ".adapter." in name else part_of[name.split(".")[0]]].append(parameter)
    return parts


def choose_parts(model, train):
    """Let the named parts train, in float32; the rest stays frozen. Adapters are there before (see lora.py)."""
    for part, parameters in part_parameters(model).items():
        for parameter in parameters if part in train.split(",") else ():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def highest_rate(settings, part):
    return settings.lr[part] if isinstance(settings.lr, dict) else settings.lr


def print_parts(model, settings):
    print(f"{'part':<10} {'parameters':>12}  {'trains':<7} {'dtype':<9} learning rate")
    for part, parameters in part_parameters(model).items():
        trains, dtypes = part in settings.train.split(","), sorted({str(p.dtype).split(".")[-1] for p in parameters})
        if parameters:
            print(f"{part:<10} {sum(p.numel() for p in parameters):>12,}  {'yes' if trains else 'frozen':<7} {'/'.join(dtypes):<9} "
                  f"{highest_rate(settings, part) if trains else '-'}")


def make_optimizer(model, settings):
    """AdamW over what trains, each part with its highest learning rate; decay for matrices only."""
    groups = []
    for part, parameters in part_parameters(model).items():
        trained = [p for p in parameters if p.requires_grad]
        for group, decay in (([p for p in trained if p.ndim > 1], settings.weight_decay), ([p for p in trained if p.ndim <= 1], 0.0)):
            if group:
                rate = highest_rate(settings, part)
                groups.append({"params": group, "weight_decay": decay, "lr": rate, "highest": rate})
    return torch.optim.AdamW(groups, betas=(0.9, settings.beta2), eps=1e-8, fused=settings.device.startswith("cuda"))


def share_of_rate(fraction, settings):
    """Which share of the highest learning rate holds when `fraction` of the run, 0 to 1, is done."""
    if fraction < settings.warmup:
        return fraction / settings.warmup
    fraction = (fraction - settings.warmup) / max(1 - settings.warmup, 1e-9)
    return {"constant": 1.0, "linear": 1 - fraction, "cosine": (1 + math.cos(math.pi * fraction)) / 2}[settings.schedule]


# ------------------------------------------------------------------------------------------------------------------- steps

class Skips:
    """Counts and names what is left out; stops the run when more than 1 % of an epoch's pages cannot be used.

    `path`: a jsonl file that gets a line for each, and tells what was left out before.
    """
    PAGE, TOO_LONG, UNANSWERED = "page", "questions too long", "questions without an answer"

    def __init__(self, path=None):
        self.path, self.lines = path, read_lines(path) if path else []

    def add(self, page, what, count, reason):
        self.lines.append({"epoch": page.epoch, "index": page.index, "page": page.name, "left_out": what, "count": count,
                           "reason": reason})
        if self.path:
            append_line(self.path, self.lines[-1])

    def count(self, what):
        return sum(line["count"] for line in self.lines if line["left_out"] == what)

    def keep(self, examples):
        """Yield those examples of an epoch that can be used."""
        skipped, last = None, ""
        for example in examples:
            page, read = example.page, example.page.index + 1
            if skipped is None:
                skipped = sum(line["epoch"] == page.epoch and line["left_out"] == self.PAGE for line in self.lines)
            if page.unanswered:
                self.add(page, self.UNANSWERED, page.unanswered, "no answer, or an empty one")
            if example.problem:
                self.add(page, self.PAGE, 1, example.problem)
                skipped, last = skipped + 1, f"page {page.name}: {example.problem}"
                warn(f"{last}; skipped")
                if read >= 100 or skipped == read == 5:
                    self.judge(read, skipped, last)
                continue
            if example.too_long:
                self.add(page, self.TOO_LONG, len(example.too_long), f"--max-length; the first: {example.too_long[0][:200]!r}")
                warn(f"page {page.name}: {len(example.too_long)} of its questions do not fit --max-length and are "
                     f"skipped, the first: {example.too_long[0][:200]!r}")
            yield example
        if skipped:
            self.judge(read, skipped, last)

    @staticmethod
    def judge(read, skipped, last):
        if skipped > max(1, read // 100) or skipped == read:
            raise InputError(f"{skipped} of {read} pages cannot be used, and 1 % is the limit; the last is {last}")


def chunks(items, size):
    """[1, 2, 3, 4, 5], 2 -> [1, 2], [3, 4], [5]."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def training_steps(loader, skips, settings):
    """Yield the examples of one step after another; what is left over at the end of an epoch is a step of its own."""
    for _, examples in itertools.groupby(loader, key=lambda example: example.page.epoch):
        yield from chunks(skips.keep(examples), settings.batch_pages * settings.accumulate)


def accumulate_gradients(model, examples, batch_pages):
    """Add up the gradient of one step, micro-batch after micro-batch. Returns the step's loss, a float32 scalar.

    Every micro-batch's summed loss is divided by the answer tokens of the whole step, so a token weighs the same whatever
    micro-batch it is in: 1 x 16, 4 x 4 and 16 x 1 pages give the same gradient, and the logged loss is the whole step's.
    """
    model.train()
    tokens = sum(example.answer_tokens for example in examples)
    step_loss = torch.zeros((), device=model.device)
    for micro_batch in chunks(examples, batch_pages):
        with memory_told(micro_batch):
            loss = model.loss(model.pack([(example.tiles, example.prompt) for example in micro_batch])) / tokens
            if loss.requires_grad:              # not so where only the projector trains, and no page has an image
                loss.backward()                 # adds to .grad; the micro-batch's activations are freed here
            step_loss += loss.detach()
    return step_loss


@contextlib.contextmanager
def memory_told(examples):
    """Tell the end of memory, on any device, in one line that says which pages it came with and what to turn."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        pages = ", ".join(f"{example.page.name} ({len(example.tiles)} tiles)" for example in examples)
        raise InputError(f"out of memory with {sum(len(example.tiles) for example in examples)} tiles in a micro-batch, pages "
                         f"{pages}; lower --max-tiles or --batch-pages ({str(error)[:100] or 'MemoryError'})") from error


# -------------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, examples):
    """Validate on some examples -> (measures, answers).

    measures: val_loss, the mean negative log-likelihood of all answer tokens in nats; exact_match and anls of the greedy
    answers, 0 to 1. answers: one dict a question. All questions of a page are answered from one prefix.
    """
    model.eval()
    total, tokens, answers = 0.0, 0, []
    prompts = Examples(model, max_length=None)
    for example in examples:
        page, tiles = example.page, example.tiles
        batch = model.pack([(tiles, example.prompt)])
        if len(tiles):
            batch.image_tokens = model.see(batch.tiles)                 # seen once for the loss and for the answers
        total += model.loss(batch).item()
        tokens += example.answer_tokens
        prompt, _ = prompts.write(page, example.tile_counts, asked=example.kept)
        with torch.compiler.set_stance("force_eager"):          # --compile is for the steps: their shapes are few
            columns = list(zip(*generate(model, [(tiles, prompt)], LONGEST_ANSWER, image_tokens=batch.image_tokens)))
        for i, ids in zip(example.kept, columns):
            answer = model.tokenizer.decode([token for token in ids if token is not None], skip_special_tokens=True).strip()
            answers.append({"page": page.name, "question": page.questions[i], "answer": answer, "expected": page.accepted[i]})
    def mean(score):
        return sum(score(line["answer"], line["expected"]) for line in answers) / len(answers)
    return {"val_loss": total / tokens, "exact_match": mean(exact_match), "anls": mean(anls)}, answers


def write_samples(folder, step, answers):
    """Add one validation's answers about the first pages to samples.jsonl; write them all as tables into samples.md."""
    append_line(folder / SAMPLES, {"step": step, "answers": answers})
    tables = []
    for sample in read_lines(folder / SAMPLES):
        tables += [f"\n## Step {sample['step']}\n", "| page | question | answer | expected |", "|---|---|---|---|"]
        for line in sample["answers"]:
            cells = line["page"], line["question"].removesuffix(INSTRUCTION), line["answer"], " / ".join(line["expected"])
            tables.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    (folder / "samples.md").write_text("\n".join(tables) + "\n", encoding="utf-8")


def draw_samples(folder, pages):
    """Draw samples.png: pages with their questions, the first and the latest answers (green or red) and the truth.

    The first page is also saved on its own, page.png, to be asked.
    """
    pyplot = plotting()
    for image in next((page.images for page in pages if page.images), [])[:1]:
        load_image(image, True).save(folder / "page.png")
    samples = read_lines(folder / SAMPLES)
    before, after = samples[0], samples[-1]
    figure, rows = pyplot.subplots(len(pages), 2, figsize=(11, 2.4 * len(pages)), width_ratios=(1, 3), squeeze=False, layout="constrained")
    columns = ((0.0, 34, "question"), (0.34, 20, f"answer at step {before['step']}"), (0.57, 20, f"at step {after['step']}"),
               (0.8, 18, "truth"))                              # where a column begins, the characters it has room for
    for page, (left, right) in zip(pages, rows):
        left.set(xticks=[], yticks=[])
        for image in page.images[:1]:
            left.imshow(load_image(image, True).convert("RGB"))
        right.axis("off")
        lines = [(a, b) for a, b in zip(before["answers"], after["answers"]) if a["page"] == page.name]
        for x, _, text in columns:
            right.text(x, 1, text, va="top", fontsize=8, color="grey")
        for i, (a, b) in enumerate(lines, 1):
            y = 1 - i / (len(lines) + 1)
            cells = a["question"].removesuffix(INSTRUCTION), a["answer"], b["answer"], a["expected"][0]
            colors = "black", *("green" if exact_match(line["answer"], line["expected"]) else "red" for line in (a, b)), "black"
            for (x, room, _), text, color in zip(columns, cells, colors):
                shown = text if len(text) <= room else text[:room - 1] + "…"
                right.text(x, y, shown, va="top", fontsize=9, color=color, parse_math=False)
    with warnings.catch_warnings(action="ignore"):              # characters that the font lacks: samples.md has them all
        figure.savefig(folder / "samples.png", dpi=110)
    pyplot.close(figure)


def draw_curve(folder):
    """Redraw curve.png from metrics.jsonl: training and validation loss over steps and, on a second axis, the answers' ANLS."""
    pyplot = plotting()
    lines = read_lines(folder / METRICS)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("train_loss", dict(color="tab:blue", alpha=0.5, linewidth=1)), ("val_loss", dict(color="tab:red", marker="o"))):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label={"train_loss": "training", "val_loss": "validation"}[key], **style)
    axes.set(xlabel="step", ylabel="loss per answer token (nats)")
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
    axes.grid(alpha=0.3)
    scored = [(line["step"], line["anls"]) for line in lines if "anls" in line]
    if scored:
        right = axes.twinx()
        axes.plot([], [], color="tab:green", marker="s", linestyle="--", label="ANLS of its answers")       # its line in the legend
        right.plot(*zip(*scored), color="tab:green", marker="s", linestyle="--")
        right.set(ylabel="ANLS", ylim=(0, 1.05))
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)


def what_next(folder):
    """What to look at and to type when a run has ended."""
    samples = read_lines(folder / SAMPLES)
    if not samples:
        return f'next: python infer.py --model {folder} --image PAGE "QUESTION"'
    question = samples[-1]["answers"][0]["question"].removesuffix(INSTRUCTION).strip()
    return (f"next: look at {folder}/curve.png and {folder}/samples.png, then ask its first page a question:\n"
            f'python infer.py --model {folder} --image {folder}/page.png "{question}"')


def plotting():
    import matplotlib
    matplotlib.use("Agg")                       # draws into files, needs no screen
    from matplotlib import pyplot
    return pyplot


def append_line(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_lines(path):
    """The objects of a jsonl file, none if there is no such file; a last line cut short by a crash does not count."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def keep_lines(path, wanted):
    """Drop the lines of a jsonl file that are not `wanted`; returns the others."""
    lines = [line for line in read_lines(path) if wanted(line)]
    if path.exists():
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return lines


# -------------------------------------------------------------------------------------------------------------------- main

def load_model(settings):
    """The model with its parts frozen or set to train; prints the table of parts."""
    if settings.from_scratch:
        model = InternVL.from_scratch(settings.model, settings.seed, settings.device, settings.dtype)
    else:
        model = InternVL.from_pretrained(settings.model, settings.device, settings.dtype)
    if "lora" in settings.train.split(","):
        add_adapters(model, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_targets, settings.seed)
    choose_parts(model, settings.train)
    print_parts(model, settings)
    model.vision.recompute = model.language.recompute = settings.checkpoint_activations
    if settings.compile:
        for block in [*model.vision.blocks, *model.language.blocks]:
            block.compile(dynamic=True)
    return model


def begin(folder, settings, model, optimizer):
    """Write the settings. Returns where the run stands, at its latest checkpoint or at step 0, and the {step: loss} of the
    validations up to there; what its files tell of later is dropped.
    """
    kept = {key: value for key, value in vars(settings).items() if key not in ("resume", "export", "format", "push_to_hub", "tiny")}
    if isinstance(settings.lr, dict):                                # as it is typed
        kept["lr"] = ",".join(f"{part}={rate}" for part, rate in settings.lr.items())
    write_text(folder / SETTINGS, json.dumps(kept, indent=2) + "\n")
    for half in (*folder.rglob("*.part"), *folder.rglob(".tmp*")):      # ours and safetensors', of a process killed while it wrote
        half.unlink()
    state = {"step": 0, "epoch": 0, "index": 0, "refill": [0, 0], "rows": 0, "questions": 0, "split_pages": 0}
    checkpoint = latest_checkpoint(folder)
    if checkpoint:
        saved = load_checkpoint(checkpoint, model, optimizer)
        if saved.keys() != state.keys():
            raise InputError(f"{checkpoint}: of another version of train.py; finish the run with that one")
        state = saved
        print(f"going on after step {state['step']}")
    lines = keep_lines(folder / METRICS, lambda line: line["step"] <= state["step"])
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    keep_lines(folder / SAMPLES, lambda line: line["step"] in losses)
    keep_lines(folder / SKIPPED, lambda line: (line["epoch"], line["index"]) < (state["epoch"], state["index"]))
    return state, losses


class Interruptions:
    """Ctrl-C and SIGTERM end the program at once, but for what is `deferred`: that is finished first. A second does not wait.

    The exit status is the usual one of a program ended by a signal: 130 and 143.
    """

    def __init__(self):
        self.deferring, self.came = False, None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, _):
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        self.came = number
        warn(f"{signal.Signals(number).name}: {'the step is finished and ' if self.deferring else ''}the run is saved; "
             "a second one stops at once")
        if not self.deferring:
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def deferred(self):
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.came:
            raise SystemExit(128 + self.came)


@contextlib.contextmanager
def told_in_one_line(folder):
    """Tell in one line what a run can meet beside its data: a folder that cannot be written, a worker that was killed."""
    try:
        yield
    except OSError as error:
        advice = (f"its checkpoints are as they were: make room, then go on with --resume {folder}" if folder.exists()
                  else "it is gone")
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); {advice}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(f"a worker process was ended from outside ({str(error).splitlines()[0]}), perhaps for its memory; "
                         f"lower --workers or --max-tiles, then go on with --resume {folder}") from error


def export(run_folder, target, layout, repository=None):
    """Write a run's (or a checkpoint's) model as a model folder with a model card; upload it to a Hub repository if one is named."""
    if layout == "peft":
        export_adapter(run_folder, target)
    else:
        InternVL.from_pretrained(run_folder, "cpu", "float32").save_pretrained(target, layout)
    run_folder = Path(run_folder)
    write_card(run_folder.parent.parent if run_folder.suffix == ".safetensors" else run_folder, Path(target))
    print(f"wrote {target}")
    if repository:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        try:
            HfApi().create_repo(repository, exist_ok=True)
            print("uploaded", HfApi().upload_folder(repo_id=repository, folder_path=target))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"{repository}: cannot be uploaded ({error}); log in with 'hf auth login', or upload {target} yourself") from error


def write_card(run, folder):
    """Write README.md, the model card: base, data, settings, score and curve of a run."""
    if not (run / SETTINGS).exists():                           # a model folder exported anew: nothing is known of its training
        return
    settings, measured = read_settings(run), [line for line in read_lines(run / METRICS) if "val_loss" in line]
    settings |= {key: ",".join(Path(part).name if os.path.isabs(part) else part for part in settings[key].split(","))
                 for key in ("model", "data")}                  # no folders of this machine
    told = {key: settings[key] for key in CARD if settings.get(key) is not None}
    card = [f"---\nbase_model: {settings['model']}\npipeline_tag: image-text-to-text\n---\n", f"# {settings['model']}, fine-tuned\n",
            "| setting | value |\n|---|---|", *(f"| {key} | {value} |" for key, value in told.items())]
    if measured:
        names = [name for name in measured[-1] if name != "step"]
        card += ["", f"| step | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|",
                 *(f"| {line['step']} | " + " | ".join(f"{line[name]:.4f}" for name in names) + " |" for line in (measured[0], measured[-1]))]
        shutil.copyfile(run / "curve.png", folder / "curve.png")
        card += ["\n![training and validation loss](curve.png)"]
    (folder / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")


def main():
    settings = parse_settings()
    if settings.export:
        return export(*settings.export, settings.format, settings.push_to_hub)
    folder = open_run(settings)
    print(json.dumps(vars(settings)))
    if settings.recipe:
        source, sets = RECIPES[settings.recipe]
        print(f"recipe {settings.recipe} ({source}) sets " + " ".join(f"--{key.replace('_', '-')} {value}" for key, value in sets.items()))

    # the model and its data, then where the run stands
    model = load_model(settings)
    needed = step_gb(model, settings.max_tiles, settings.batch_pages)
    print(f"memory that a step of pages of {settings.max_tiles} tiles needs: {sum(needed.values()):.2f} GB ("
          + ", ".join(f"{what} {gb:.2f}" for what, gb in needed.items()) + ")")
    optimizer = make_optimizer(model, settings)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    hold_out = bool(settings.eval_every) and not settings.eval_data     # of files
    rows = open_rows(settings.data, "train", settings.seed, settings.domain, hold_out)
    all_rows = settings.epochs * count_rows(settings.data, "train", hold_out) if settings.epochs else math.inf
    held_out = None
    if settings.eval_every:
        held_out = open_rows(settings.eval_data or settings.data, "validation", domains=settings.domain, hold_out=hold_out)
    with told_in_one_line(folder):
        state, losses = begin(folder, settings, model, optimizer)
    first = step = saved = state["step"]
    skips = Skips(folder / SKIPPED)

    # pages to train on, and the fixed ones to validate on
    examples = Examples(model, settings.max_tiles, settings.max_length, settings.allow_private)
    stream = PageStream(rows, settings.epochs, settings.shuffle, settings.seed, settings.look_ahead,
                        start=(state["epoch"], state["index"], state["refill"]),
                        group=(examples.size, settings.batch_pages) if settings.group_by_length else None)
    loader = load_examples(stream, examples, settings.workers, pin_memory=settings.device.startswith("cuda"))
    if held_out:
        held_out = PageStream(held_out, epochs=1, shuffle=False, look_ahead=settings.look_ahead).pages()
        held_out = list(itertools.islice(held_out, settings.eval_pages))
        validation = load_examples(held_out, examples, settings.workers)
        iter(validation)                        # its workers are forked now, before a thread begins to read training pages

    def fraction_done(steps, rows):
        """How much of the run lies behind, 0 to 1, by the limit that is nearer."""
        return min(1.0, max(steps / (settings.steps or math.inf), rows / all_rows))

    def log(**line):
        append_line(folder / METRICS, line)

    def validate():
        measures, answers = evaluate(model, Skips().keep(validation))
        names = list(dict.fromkeys(line["page"] for line in answers))[:SHOWN_PAGES]
        keep_lines(folder / SAMPLES, lambda line: line["step"] in losses)   # not those of a validation that was cut short
        write_samples(folder, step, [line for line in answers if line["page"] in names])
        log(step=step, **measures)
        losses[step] = measures["val_loss"]
        draw_samples(folder, [page for page in held_out if page.name in names])
        draw_curve(folder)
        bar.write(f"step {step:>6} | " + " | ".join(f"{name} {value:.4f}" for name, value in measures.items()))

    def save():
        nonlocal saved
        saved = step
        save_checkpoint(folder / CHECKPOINTS / f"step-{step:07d}.safetensors", model, optimizer, state)
        keep_newest(folder, settings.keep, losses)
        (folder / WEIGHTS).unlink(missing_ok=True)          # of an earlier end of this run: this checkpoint is newer

    with (tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}", file=sys.stderr) as bar,
          Interruptions() as interruptions):
        whole = True                                                        # no step is half applied
        try:
            with told_in_one_line(folder):
                steps = training_steps(loader, skips, settings)
                while True:
                    if settings.eval_every and step % settings.eval_every == 0 and step not in losses:
                        validate()
                    if settings.save_every and step % settings.save_every == 0 and step > saved:
                        save()
                    if step == settings.steps:
                        break
                    started = time.perf_counter()
                    pages = next(steps, None)
                    if pages is None:                                       # --epochs are over
                        break
                    data_wait = time.perf_counter() - started
                    with interruptions.deferred():
                        # ------------------------------------------------------------------------------------ a training step
                        rows = sum(example.page.rows for example in pages)
                        share = share_of_rate(fraction_done(step + 0.5, state["rows"] + rows / 2), settings)    # at its middle
                        torch.manual_seed((settings.seed * 1_000_003 + step) % 2 ** 63)     # dropout: a resumed run draws the same
                        loss = accumulate_gradients(model, pages, settings.batch_pages)
                        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip or math.inf)
                        loss, norm = torch.stack([loss, norm]).tolist()     # waits for the device
                        if not math.isfinite(loss + norm):
                            names = ", ".join(example.page.name for example in pages)
                            raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped before the update; "
                                             f"pages {names}; look at them, or lower --lr")
                        for group in optimizer.param_groups:
                            group["lr"] = share * group["highest"]
                        whole = False
                        optimizer.step()
                        optimizer.zero_grad()
                        # ----------------------------------------------------------------------------------------------------
                        step += 1
                        questions = sum(len(example.page.questions) - len(example.too_long) for example in pages)
                        last = pages[-1].page
                        state.update(step=step, epoch=last.epoch, index=last.index + 1, refill=last.refill,
                                     rows=state["rows"] + rows, questions=state["questions"] + questions,
                                     split_pages=state["split_pages"] + sum(example.page.split for example in pages))
                        whole = True
                        speed, memory = questions / (time.perf_counter() - started), peak_gb(settings.device)
                        lr = max(group["lr"] for group in optimizer.param_groups)
                        log(step=step, train_loss=loss, lr=lr, grad_norm=norm, questions=questions,
                            answer_tokens=sum(example.answer_tokens for example in pages), questions_per_second=speed,
                            data_wait=data_wait, peak_gb=memory)
                        bar.set_postfix_str(f"step {step} | train {loss:.4f} | lr {lr:.2e} | {speed:.1f} questions/s | "
                                            f"{memory:.1f} GB", False)
                        bar.update(100 * fraction_done(step, state["rows"]) - bar.n)

                if step == 0 or step == first and (folder / WEIGHTS).exists():
                    raise InputError(f"{folder}: nothing to do after step {step}; raise --steps or --epochs, or look at --data")
                if settings.eval_every and step not in losses:
                    validate()
                save()
        except (InputError, SystemExit) as end:
            if whole and step > saved and folder.exists():
                save()
            if isinstance(end, SystemExit):
                warn(f"stopped after step {step}; go on with --resume {folder}")
            raise
    model.save_pretrained(folder)
    print(f"{step} steps, {state['questions']} questions; left out: {skips.count(skips.PAGE)} pages, "
          f"{skips.count(skips.TOO_LONG)} questions too long, {skips.count(skips.UNANSWERED)} without an answer; "
          f"{state['split_pages']} pages split by the look-ahead; most memory held: {peak_gb(settings.device):.2f} GB")
    print(what_next(folder))


if __name__ == "__main__":
    run(main)
