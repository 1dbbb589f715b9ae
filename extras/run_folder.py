"""What does a run write, and from where does it resume?

    settings.json   metrics.jsonl -> curve.png   samples.jsonl -> samples.md, samples.png   skipped.jsonl   checkpoints/

A line of metrics.jsonl, samples.jsonl and skipped.jsonl belongs to a step; resuming drops those after the checkpoint.
"""
import contextlib
import json
import shlex
import signal
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from extras.cli import as_flag, count
from model import checkpoint, lora
from model.checkpoint import CHECKPOINTS, CONFIG, INDEX, SETTINGS, WEIGHTS, latest_checkpoint, write_text
from model.errors import InputError, warn
from model.names import official_name

METRICS, SAMPLES, SKIPPED = "metrics.jsonl", "samples.jsonl", "skipped.jsonl"
NOT_KEPT = ("resume", "export", "format", "push_to_hub", "tiny", "untyped")     # not settings of a run
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOWN_PAGES = 4                                                         # validation pages in samples.md and samples.png


class RunFolder:
    """The folder of a run, and how far the run is.

    `state`, which every checkpoint holds: the steps done; epoch, block and pages of the block that are done (data.py's
    `resume`); pages done in this epoch; rows and questions used in all.
    """

    def __init__(self, args):
        self.path, self.args = Path(args.out), args
        if not args.resume and any((self.path / name).exists() for name in (SETTINGS, WEIGHTS, CONFIG)):
            raise InputError(f"{self.path}: holds a run or a model already; choose another --out, or continue it with "
                             f"--resume {self.path}")
        self.state = dict.fromkeys(("step", "epoch", "block", "index", "rows", "pages", "questions"), 0)
        self.saved = 0                  # step of the newest checkpoint
        self.whole = True               # no optimizer step is half done
        self.losses = {}                # step -> validation loss
        self.micro_batches = []         # examples of the step that runs, for messages

    def restore(self, model, optimizer):
        """Load the newest checkpoint, if there is one, and drop what the files say about later steps."""
        for half in (*self.path.rglob("*.part"), *self.path.rglob(".tmp*")):    # of a process killed while it wrote
            half.unlink()
        newest = latest_checkpoint(self.path)
        if newest:
            state = restore_checkpoint(newest, model, optimizer)
            if state.keys() != self.state.keys():
                raise InputError(f"{newest}: written by another version of train.py; finish the run with that one")
            self.state, self.saved = state, state["step"]
            print(f"resumed after step {state['step']}")
        step, place = self.state["step"], position(self.state)
        lines = keep_lines(self.path / METRICS, lambda line: line["step"] <= step)
        self.losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        keep_lines(self.path / SAMPLES, lambda line: line["step"] in self.losses)
        keep_lines(self.path / SKIPPED, lambda line: position(line) <= place)

    def begin(self):
        """Write the settings, once model and data are there; of a resumed run print what changes, `save` writes it."""
        kept = self.settings = {key: value for key, value in vars(self.args).items() if key not in NOT_KEPT}
        if self.args.resume:
            before = checkpoint.read_settings(self.path)
            for key in [key for key in kept if key in before and str(kept[key]) != str(before[key])]:
                print(f"changed: {as_flag(key, before[key])} -> {as_flag(key, kept[key])}")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / SETTINGS, json.dumps(kept, indent=2) + "\n")

    @contextlib.contextmanager
    def ending(self, model, optimizer):
        """Around the loop: errors become one line, and what is not saved is saved. Yields a StopSignal."""
        stop = StopSignal()
        handlers = {number: signal.signal(number, stop.catch) for number in SIGNALS}
        try:
            try:
                yield stop
            except (RuntimeError, MemoryError, OSError, EOFError) as error:
                self.explain(error)
                raise
        except (InputError, SystemExit) as end:
            stop.hold()
            if self.whole and self.state["step"] > self.saved and self.path.exists():
                self.save(model, optimizer)
            if isinstance(end, SystemExit):
                warn(f"stopped after step {self.state['step']}; "
                     f"to continue: python train.py --resume {shlex.quote(str(self.path))}")
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def explain(self, error):
        """Raise InputError, one line, for an error that a run can meet beside its data."""
        if "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError)):
            with contextlib.suppress(RuntimeError):     # torch may report a dead worker again, by a signal:
                time.sleep(0.2)                         # not while the checkpoint is written
            raise InputError(f"a worker process was killed ({str(error).splitlines()[0]}), perhaps for its "
                             f"memory; lower --workers or --max-tiles, then continue with --resume {self.path}"
                             ) from error
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            tiles = [(sum(len(example.tiles) for example in batch), batch) for batch in self.micro_batches]
            most, batch = max(tiles, key=lambda pair: pair[0], default=(0, []))
            pages = ", ".join(f"{example.page.name} ({len(example.tiles)} tiles)" for example in batch)
            raise InputError(f"out of memory with {most} tiles in a micro-batch, pages {pages}; lower --max-tiles or "
                             f"--batch-pages ({str(error)[:100] or 'MemoryError'})") from error
        if isinstance(error, OSError):
            advice = (f"its checkpoints are as they were: make room, then continue with --resume {self.path}"
                      if self.path.exists() else "the folder is gone")
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error}); {advice}") from error

    def count(self, pages, questions):
        """A step is done: note how far the run is, and from where its data resumes."""
        state, (epoch, block, index) = self.state, pages[-1].resume
        state["pages"] = len(pages) + (state["pages"] if epoch == state["epoch"] else 0)
        state.update(epoch=epoch, block=block, index=index, step=state["step"] + 1)
        state["rows"] += sum(page.rows for page in pages)
        state["questions"] += questions
        self.whole = True

    def log(self, bar, **line):
        """Add a line about the step to metrics.jsonl and to the progress bar."""
        append_line(self.path / METRICS, {"step": self.state["step"], **line})
        bar.set_postfix_str(f"step {self.state['step']} | train {line['train_loss']:.4f} | lr {line['lr']:.2e} | "
                            f"{line['questions_per_second']:.1f} questions/s | {line['peak_gb']:.1f} GB", False)

    def log_validation(self, bar, pages, measures, answers):
        """Write the measures, the answers about the first pages, and both pictures. `pages`: the validation pages."""
        from extras import plots
        step, names = self.state["step"], list(dict.fromkeys(line["page"] for line in answers))[:SHOWN_PAGES]
        keep_lines(self.path / SAMPLES, lambda line: line["step"] in self.losses)   # not those of one cut short
        append_line(self.path / SAMPLES, {"step": step, "answers": [line for line in answers if line["page"] in names]})
        append_line(self.path / METRICS, {"step": step, **measures})
        self.losses[step] = measures["val_loss"]
        samples = read_lines(self.path / SAMPLES)
        (self.path / "samples.md").write_text(sample_tables(samples), encoding="utf-8")
        plots.draw_samples(self.path, samples, [page for page in pages if page.name in names])
        plots.draw_curve(self.path, read_lines(self.path / METRICS))
        bar.write(f"step {step:>6} | " + " | ".join(f"{name} {value:.4f}" for name, value in measures.items()))

    def save(self, model, optimizer):
        """Write a checkpoint and the settings; delete old checkpoints."""
        self.saved = step = self.state["step"]
        path = self.path / CHECKPOINTS / f"step-{step:07d}.safetensors"
        save_checkpoint(path, model, optimizer, self.state)
        write_text(self.path / SETTINGS, json.dumps(self.settings, indent=2) + "\n")
        keep_newest(self.path, self.args.keep, self.losses)
        for name in (WEIGHTS, INDEX):
            (self.path / name).unlink(missing_ok=True)          # of an earlier end of this run: the checkpoint is newer


def position(line):
    """Where in the data a state, or a line of skipped.jsonl, stands; compares by order."""
    return line["epoch"], line["block"], line["index"]


class StopSignal:
    """Ctrl-C or SIGTERM raises SystemExit: at once, or after `hold` at the next `allow`. A second one is not caught.

    The exit status is the usual one of a program ended by a signal: 130 and 143.
    """

    number, at_once = 0, True           # the signal that came, if any; whether one ends the run at once

    def catch(self, number, _):
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.number = number
        warn(f"{signal.Signals(number).name}: {'' if self.at_once else 'finishing this step, then '}saving the run; "
             "a second signal stops at once")
        if self.at_once:
            raise SystemExit(128 + number)

    def hold(self):
        """From here on a signal has to wait."""
        self.at_once = False

    def allow(self):
        """From here on a signal ends the run at once, as does one that had to wait."""
        self.at_once = True
        if self.number:
            raise SystemExit(128 + self.number)


# ------------------------------------------------------------------------------------------------------------ lines

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
    """Counts and names what is skipped; stops the run when more than 1 % of an epoch's pages cannot be used.

    `path`: a jsonl file that gets a line for each, and holds those of before. `epoch`, `read`: where the run stands,
    and the pages of this epoch that were read before. `cut`: pages whose first part was in the block before.
    """
    PAGE, TOO_LONG, UNANSWERED = "page", "questions too long", "questions without an answer"

    def __init__(self, path=None, epoch=0, read=0):
        self.path, self.lines, self.epoch, self.read = path, read_lines(path) if path else [], epoch, read
        self.cut = 0

    def add(self, page, what, count, reason):
        epoch, block, index = page.resume
        self.lines.append({"epoch": epoch, "block": block, "index": index, "page": page.name, "left_out": what,
                           "count": count, "reason": reason})
        if self.path:
            append_line(self.path, self.lines[-1])

    def count(self, what):
        lines = {(line["page"], line["reason"], line["count"]) for line in self.lines if line["left_out"] == what}
        return sum(number for _, _, number in lines)            # a page counts once, in however many epochs

    def usable(self, example):
        """Whether an example can be used; notes what of it is skipped."""
        page = example.page
        self.epoch, self.read = page.epoch, self.read + 1 if page.epoch == self.epoch else 1
        self.cut += page.cut
        if page.unanswered:
            self.add(page, self.UNANSWERED, page.unanswered, "no answer, or an empty one")
        if example.error:
            self.add(page, self.PAGE, 1, example.error)
            warn(f"page {page.name}: {example.error}; skipped")
            self.check_limit(at_end=False)
        elif example.too_long:
            first = f"the first: {example.too_long[0][:200]!r}"
            self.add(page, self.TOO_LONG, len(example.too_long), f"--max-length; {first}")
            warn(f"page {page.name}: {len(example.too_long)} of its questions do not fit --max-length and are skipped, "
                 f"{first}")
        return not example.error

    def check_limit(self, at_end=True):
        """Raise InputError if too many pages of the epoch cannot be used: all of them, or several and more than 1 %.

        Before its end only where 100 pages were read, or the first five cannot be used.
        """
        skipped = [line for line in self.lines if line["left_out"] == self.PAGE and line["epoch"] == self.epoch]
        judged = at_end or self.read >= 100 or self.read == 5 == len(skipped)
        if judged and (len(skipped) > max(1, self.read // 100) or len(skipped) == self.read > 0):
            raise InputError(f"{len(skipped)} of {self.read} pages cannot be used, and 1 % is the limit; the last is "
                             f"page {skipped[-1]['page']}: {skipped[-1]['reason']}")

    def __str__(self):
        cut = f"; {count(self.cut, 'page')} split in two by the edge of a block, since this start" if self.cut else ""
        return (f"skipped: {count(self.count(self.PAGE), 'page')}, {count(self.count(self.TOO_LONG), 'question')} "
                f"too long, {self.count(self.UNANSWERED)} without an answer{cut}")


def sample_tables(samples):
    """The text of samples.md: for each validation a table of questions about the first pages."""
    tables = []
    for sample in samples:
        tables += [f"\n## Step {sample['step']}\n", "| page | question | answer | expected |", "|---|---|---|---|"]
        for line in sample["answers"]:
            cells = (line["page"], line["question"], line["answer"], " / ".join(line["expected"]))
            tables.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(tables) + "\n"


def next_steps(folder):
    """What to look at and to type when a run has ended."""
    samples, named = read_lines(folder / SAMPLES), shlex.quote(str(folder))
    if not samples:
        return f'next: python infer.py --model {named} --image PAGE "QUESTION"'
    question = samples[-1]["answers"][0]["question"].strip()
    image = f"--image {named}/page.png " if (folder / "page.png").exists() else ""
    return (f"next: look at {folder}/curve.png and {folder}/samples.png, then ask its first page a question:\n"
            f'python infer.py --model {named} {image}"{question}"')


# ---------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, optimizer, state):
    """Write the trained tensors, the optimizer's state of each by its name, and `state` (plain JSON values).

    Raises InputError where it cannot be written; an older file of this name then stays as it was.
    """
    trained = trained_parameters(model)
    tensors = {f"model.{name}": parameter for name, parameter in trained.items()}
    tensors |= {f"optimizer.{kind}.{name}": value for name, parameter in trained.items()
                for kind, value in optimizer.state[parameter].items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    state = json.dumps(state)
    metadata = {"state": state, "sha256": checkpoint.checksum(tensors, tensors.get, state)}
    metadata |= {"lora_scale": str(adapter.scale) for adapter in lora.adapters(model).values()}     # all have the same
    try:
        path.parent.mkdir(exist_ok=True)
        checkpoint.write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); the checkpoints before it are whole: make room, then "
                         f"continue with --resume {path.parent.parent}") from error


def restore_checkpoint(path, model, optimizer):
    """Copy a checkpoint's tensors into a model and the state of its optimizer; returns the `state` saved with them.

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
    paths = sorted(Path(run, CHECKPOINTS).glob("step-*.safetensors"))
    checkpoints = {int(path.stem.removeprefix("step-")): path for path in paths}
    best = min(checkpoints.keys() & losses.keys(), key=losses.get, default=None)
    for step in list(checkpoints)[:-count]:
        if step != best:
            checkpoints[step].unlink()
