"""What does a run leave behind? The files of a run folder, the pictures drawn of them, and what ends a run in order.

    settings.json  metrics.jsonl -> curve.png  samples.jsonl -> samples.md, samples.png  skipped.jsonl  page.png  checkpoints/
"""
import contextlib
import json
import shlex
import signal
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from extras.score import exact_match
from model import checkpoint, lora
from model.checkpoint import CONFIG, SETTINGS, WEIGHTS, write_text
from model.errors import InputError, warn
from model.names import official_name
from model.prompt import INSTRUCTION

METRICS, SAMPLES, SKIPPED = "metrics.jsonl", "samples.jsonl", "skipped.jsonl"


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


# ------------------------------------------------------------------------------------------------------------------ lines

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


class SkipLog:
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

    def filter(self, examples):
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


# --------------------------------------------------------------------------------------------------------------- pictures

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

    `pages`: (name, Pillow image or None). The first page is also saved on its own, page.png, to be asked.
    """
    pyplot = plotting()
    for image in [image for _, image in pages if image][:1]:
        image.save(folder / "page.png")
    samples = read_lines(folder / SAMPLES)
    before, after = samples[0], samples[-1]
    figure, rows = pyplot.subplots(len(pages), 2, figsize=(11, 2.4 * len(pages)), width_ratios=(1, 3), squeeze=False,
                                   layout="constrained")
    columns = ((0.0, 34, "question"), (0.34, 20, f"answer at step {before['step']}"), (0.57, 20, f"at step {after['step']}"),
               (0.8, 18, "truth"))                              # where a column begins, the characters it has room for
    for (name, image), (left, right) in zip(pages, rows):
        left.set(xticks=[], yticks=[])
        if image:
            left.imshow(image.convert("RGB"))
        right.axis("off")
        lines = [(a, b) for a, b in zip(before["answers"], after["answers"]) if a["page"] == name]
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
    for key, label, style in (("train_loss", "training", dict(color="tab:blue", alpha=0.5, linewidth=1)),
                              ("val_loss", "validation", dict(color="tab:red", marker="o"))):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel="step", ylabel="loss per answer token (nats)")
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
    axes.grid(alpha=0.3)
    scored = [(line["step"], line["anls"]) for line in lines if "anls" in line]
    if scored:
        right = axes.twinx()
        style = dict(color="tab:green", marker="s", linestyle="--")
        axes.plot([], [], label="ANLS of its answers", **style)                 # its line in the legend
        right.plot(*zip(*scored), **style)
        right.set(ylabel="ANLS", ylim=(0, 1.05))
    axes.legend(loc="center right")
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)


def next_steps(folder):
    """What to look at and to type when a run has ended."""
    samples, named = read_lines(folder / SAMPLES), shlex.quote(str(folder))
    if not samples:
        return f'next: python infer.py --model {named} --image PAGE "QUESTION"'
    question = samples[-1]["answers"][0]["question"].removesuffix(INSTRUCTION).strip()
    image = f"--image {named}/page.png " if (folder / "page.png").exists() else ""
    return (f"next: look at {folder}/curve.png and {folder}/samples.png, then ask its first page a question:\n"
            f'python infer.py --model {named} {image}"{question}"')


def plotting():
    import matplotlib
    matplotlib.use("Agg")                       # draws into files, needs no screen
    from matplotlib import pyplot
    return pyplot


# ------------------------------------------------------------------------------------------------------------------- ends

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


@contextlib.contextmanager
def kept_when_it_ends(folder, keep):
    """Call `keep()`, which saves what is not saved and returns the step, before an InputError or a signal ends the run."""
    try:
        yield
    except (InputError, SystemExit) as end:
        step = keep() if folder.exists() else None
        if isinstance(end, SystemExit):
            warn(f"stopped after step {step}; go on with --resume {folder}")
        raise


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


# ---------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, optimizer, state):
    """Write the trained tensors, the optimizer's state of each by its name, and `state` (plain JSON values) into one file.

    Raises InputError where it cannot be written; an older file of this name then stays as it was.
    """
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"model.{name}"] = parameter.detach()
        for kind, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{kind}.{name}"] = value
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    state = json.dumps(state)
    metadata = {"state": state, "sha256": checkpoint.checksum(tensors, tensors.get, state)}
    metadata |= {"lora_scale": str(adapter.scale) for adapter in lora.adapters(model).values()}     # all have the same
    try:
        path.parent.mkdir(exist_ok=True)
        checkpoint.write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); the checkpoints before it are whole: make room, then go on "
                         f"with --resume {path.parent.parent}") from error


def restore_checkpoint(path, model, optimizer):
    """Copy a checkpoint's tensors into a model and into the state of its optimizer; returns the `state` saved with them.

    Raises InputError for a file that is damaged or not of this model with these trained parts.
    """
    parameters = trained_parameters(model)
    trained, saved, state, scale = checkpoint.read_checkpoint(path)
    if missing := sorted(parameters.keys() - trained.keys()):
        raise InputError(f"{path}: lacks {', '.join(missing[:3])}, which this run trains")
    lora.lay_over(model, trained, scale, path)
    for key, tensor in saved.items():
        kind, _, name = key.partition(".")
        if name not in parameters or tensor.shape != (() if kind == "step" else parameters[name].shape):
            raise InputError(f"{path}: {kind} of {name} {tuple(tensor.shape)} is not of this model")
        on_cpu = kind == "step" and not optimizer.defaults["fused"]         # where AdamW counts its steps
        optimizer.state[parameters[name]][kind] = tensor if on_cpu else tensor.to(parameters[name].device)
    return state


def trained_parameters(model):
    """{official name: parameter} of the trainable parameters."""
    return {official_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def keep_newest(run, count, losses):
    """Delete a run's checkpoints but the newest `count` and the one with the lowest of the `losses`, {step: loss}."""
    paths = sorted(Path(run, checkpoint.CHECKPOINTS).glob("step-*.safetensors"))
    checkpoints = {int(path.stem.removeprefix("step-")): path for path in paths}
    best = min(checkpoints.keys() & losses.keys(), key=losses.get, default=None)
    for step in list(checkpoints)[:-count]:
        if step != best:
            checkpoints[step].unlink()
