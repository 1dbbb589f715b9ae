"""What does a run write, and from where does it resume?

    settings.json   metrics.jsonl -> curve.png   samples.jsonl -> samples.md, samples.png   skipped.jsonl   checkpoints/

A line of metrics.jsonl, samples.jsonl and skipped.jsonl belongs to a step; resuming drops those after the checkpoint.
"""
import contextlib
import hashlib
import json
import secrets
import shlex
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError

from data import image_bytes
from extras.cli import as_flag, count
from extras.sources import Mixture, is_synthetic, named_parts
from model import checkpoint, lora
from model.checkpoint import CHECKPOINTS, INDEX, SETTINGS, WEIGHTS, latest_checkpoint, step_of, write_text
from model.errors import InputError, warn
from model.images import fetch
from model.names import official_name, part_of

METRICS, SAMPLES, SKIPPED = "metrics.jsonl", "samples.jsonl", "skipped.jsonl"
NOT_KEPT = ("resume", "export", "format", "push_to_hub", "tiny", "allow_changed", "untyped")      # no settings of a run
MADE_OF = ("base_fingerprint", "data_fingerprint", "eval_data_fingerprint", "validation_pages")     # see `compare`
WRITTEN = (SETTINGS, METRICS, SAMPLES, SKIPPED, WEIGHTS)                  # files that are replaced as a whole
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOWN_PAGES = 4                                                         # validation pages in samples.md and samples.png


def keep_whole(parameter, tensor):
    """What a process holds of a parameter's tensor: all of it. With --shard: `split_as` in distributed.py."""
    return tensor


class RunFolder:
    """The folder of a run, and how far the run is.

    `state`, which every checkpoint holds: the steps done; epoch, block and pages of the block that are done (data.py's
    `resume`); pages done in this epoch; rows and questions used in all.
    """

    def __init__(self, args):
        self.path, self.args = Path(args.out), args
        if args.resume and not hasattr(args, "run_id"):
            raise InputError(f"{self.path}: a run of an earlier version, without fingerprints; begin a new one with "
                             f"--model {self.path}")
        args.run_id = getattr(args, "run_id", secrets.token_hex(8))
        self.state = dict.fromkeys(("step", "epoch", "block", "index", "rows", "pages", "questions"), 0)
        self.saved = 0                  # step of the newest checkpoint
        self.whole = True               # no optimizer step is half done
        self.losses = {}                # step -> validation loss
        self.micro_batches = []         # examples of the step that runs, for messages

    def compare(self, key, found, what):
        """Note in the settings what the run is made of; returns whether it changed. Needs --allow-changed if it did."""
        changed = getattr(self.args, key, found) != found
        if changed and not self.args.allow_changed:
            raise InputError(f"{self.path}: the {what} is not what the run began with; bring that back, or continue "
                             "with what is there: --allow-changed")
        if changed:
            warn(f"the {what} is not what the run began with")
        setattr(self.args, key, found)
        return changed

    def compare_data(self, rows, held_out, pages):
        """The same for the training rows, the validation rows and the validation pages, whose images are read now."""
        args = self.args
        self.compare("data_fingerprint", data_fingerprint(args.data, rows, args.domain), f"data {args.data}")
        if args.eval_every and args.eval_data:
            found = data_fingerprint(args.eval_data, held_out, args.domain)
            self.compare("eval_data_fingerprint", found, f"validation data {args.eval_data}")
        hashes = ",".join(keep_images(page, args.allow_private) for page in pages)
        if args.eval_every and self.compare("validation_pages", hashes, "set of validation pages"):
            warn(f"validation begins anew; {METRICS} and {SAMPLES} lose what they say about the pages before")
            self.losses = {}
            keep_lines(self.path / METRICS, lambda line: "val_loss" not in line)

    def restore(self, model, optimizer, split_as=keep_whole):
        """Load the newest checkpoint, if there is one, and drop what the files say about later steps."""
        for half in (*self.path.glob("*.part"), *self.path.glob(f"{CHECKPOINTS}/*.part")):
            if checkpoint.is_left_behind(half) and (half.stem in WRITTEN or step_of(half.stem) is not None):
                shutil.rmtree(half, ignore_errors=True)
        newest = latest_checkpoint(self.path)
        if newest:
            state = restore_checkpoint(newest, model, optimizer, split_as)
            if state.keys() != self.state.keys():
                raise InputError(f"{newest}: written by another version of train.py; finish the run with that one")
            self.state, self.saved = state, state["step"]
            print(f"resumed after step {state['step']}")
        step, place = self.state["step"], position(self.state)
        lines = keep_lines(self.path / METRICS, lambda line: line["step"] <= step)
        self.losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        keep_lines(self.path / SAMPLES, lambda line: line["step"] in self.losses)
        keep_lines(self.path / SKIPPED, lambda line: position(line) <= place)

    def skip_log(self):
        """What is skipped from here on, added to what was skipped before."""
        return SkipLog(self.path / SKIPPED, self.state["epoch"], self.state["pages"])

    def begin(self):
        """Write the settings, once model and data are there; of a resumed run print what changes, `save` writes it."""
        kept = self.settings = {key: value for key, value in vars(self.args).items() if key not in NOT_KEPT}
        if self.args.resume:
            before = checkpoint.read_settings(self.path)
            for key in [key for key in kept if key in before and key not in MADE_OF]:
                if kept[key] != before[key] and str(kept[key]) != str(before[key]):
                    print(f"changed: {as_flag(key, before[key])} -> {as_flag(key, kept[key])}")
        else:
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
            if hasattr(signal, "SIGCHLD"):              # by which torch would report the dead worker again,
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)                   # while the checkpoint is written
            raise InputError(f"a worker process was killed ({str(error).splitlines()[0]}), perhaps for its "
                             "memory or a full /dev/shm; lower --workers or --max-tiles, then continue with --resume "
                             f"{self.path}") from error
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
        save_checkpoint(path, model, optimizer, self.state, self.args.run_id)
        write_text(self.path / SETTINGS, json.dumps(self.settings, indent=2) + "\n")
        keep_newest(self.path, self.args.keep, self.losses, self.args.run_id)
        for name in (WEIGHTS, INDEX):
            (self.path / name).unlink(missing_ok=True)          # of an earlier end of this run: the checkpoint is newer

    def finish(self, model, first, skips):
        """Write the model, at the end of a run that began after step `first`."""
        step = self.state["step"]
        if step == 0 or step == first and checkpoint.has_weights(self.path):
            raise InputError(f"{self.path}: nothing to do after step {step} ({skips}); raise --steps or --epochs, "
                             "or look at --data")
        model.save_pretrained(self.path)


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
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path):
    """The objects of a jsonl file, without a half line at its end; none without a file. Raises InputError."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.is_file() else []
        if not all(type(line.get("step", line.get("epoch"))) is int for line in lines):
            raise ValueError("a line without a step")
        return lines
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); repair it, or remove it") from error


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
    PAGE, TOO_LONG, UNANSWERED, VALIDATION = (
        "page", "questions too long", "questions without an answer", "pages with an image of --eval-data")

    def __init__(self, path=None, epoch=0, read=0):
        self.path, self.lines, self.epoch, self.read = path, read_lines(path) if path else [], epoch, read
        self.cut, self.validation = 0, set()

    def leave_out(self, pages, dataset):
        """Count and skip pages that have an image of these validation pages; the workers of `dataset` hash images."""
        from extras.formats import content_hash
        self.images_of = lambda page: {x if isinstance(x, float) else content_hash(x) for x in page.images}
        self.validation, dataset.image_key = set().union(*map(self.images_of, pages)), content_hash

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
        if self.validation and self.validation & self.images_of(page):
            self.add(page, self.VALIDATION, 1, "validated on, so not trained on")
            return False
        if page.unanswered:
            self.add(page, self.UNANSWERED, page.unanswered, "no answer, or an empty one")
        if example.error:
            self.add(page, self.PAGE, 1, example.error)
            warn(f"page {page.name}: {example.error}; skipped")
            self.check_limit(at_end=False)
        elif example.too_long:
            first = f"the first: {example.too_long[0][:200]!r}"
            self.add(page, self.TOO_LONG, len(example.too_long), f"--max-length or the model's positions; {first}")
            warn(f"page {page.name}: {len(example.too_long)} of its questions do not fit --max-length or the model's "
                 f"positions and are skipped, {first}")
        return not example.error

    def check_limit(self, at_end=True):
        """Raise InputError if too many pages of the epoch cannot be used: all of them, or several and more than 1 %.

        Before its end only where 100 pages were read, or the first five cannot be used.
        """
        lines = [line for line in self.lines if line["left_out"] in (self.PAGE, self.VALIDATION)
                 and line["epoch"] == self.epoch]
        skipped = sum(line["left_out"] == self.PAGE for line in lines)
        judged = at_end or self.read >= 100 or self.read == 5 == skipped
        if judged and skipped > max(1, self.read // 100) or at_end and len(lines) == self.read > 0:
            raise InputError(f"{len(lines)} of {self.read} pages cannot be used, and 1 % is the limit; the last is "
                             f"page {lines[-1]['page']}: {lines[-1]['reason']}")

    def __str__(self):
        cut = f"; {count(self.cut, 'page')} split in two by the edge of a block, since this start" if self.cut else ""
        left_out = f", {self.count(self.VALIDATION)} {self.VALIDATION}" if self.validation else ""
        return (f"skipped: {count(self.count(self.PAGE), 'page')}, {count(self.count(self.TOO_LONG), 'question')} "
                f"too long, {self.count(self.UNANSWERED)} without an answer{left_out}{cut}")


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


# ------------------------------------------------------------------------------------------------ what a run is made of

def data_fingerprint(data, rows, domains):
    """A hash, 16 hex digits, of what the `rows` of `data` come from; reads no image.

    Of the text of files; of parquet files the names and sizes, on the Hub their addresses, which hold the commit; of
    drawn pages the domains; of a mixture also the weights.
    """
    from extras.formats import read_file
    found = []
    for name, weight in named_parts(data):
        found += [weight, *([name, domains] if is_synthetic(name) else ())]
        if Path(name).is_file():                        # the file itself, and those that it names if it is a mixture
            found += [Path(name).read_bytes(), *(part.digest for part in read_file(name))]
    for source, *_ in rows.parts if isinstance(rows, Mixture) else [(rows,)]:
        for path in map(Path, getattr(source, "files", ())):
            found += [path.name, path.stat().st_size] if path.exists() else [str(path)]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def keep_images(page, allow_private):
    """Replace the images of a page by their bytes; returns a hash of these and of the questions.

    One that cannot be read becomes an empty file, so that its page is skipped every time.
    """
    total = hashlib.sha256(repr((page.questions, page.instruction, page.accepted)).encode())
    for i, image in enumerate(page.images):
        try:
            is_address = isinstance(image, str) and image.startswith(("http://", "https://"))
            page.images[i] = fetch(image, allow_private) if is_address else bytes(image_bytes({"image": image}))
        except (InputError, OSError) as error:
            page.images[i] = warn(f"page {page.name}: {error}") or b""
        total.update(page.images[i])
    return total.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, optimizer, state, run_id=""):
    """Write the trained and drawn tensors, the optimizer's state of each by its name, and `state` (plain JSON values).

    Raises InputError where it cannot be written; an older file of this name then stays as it was.
    """
    tensors, state = dict(checkpoint_tensors(model, optimizer)), json.dumps(state)
    metadata = {"state": state, "sha256": checkpoint.checksum(tensors, tensors.get, state), "run_id": run_id}
    metadata |= {"lora_scale": str(adapter.scale) for adapter in lora.adapters(model).values()}     # all have the same
    try:
        path.parent.mkdir(exist_ok=True)
        checkpoint.write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); the checkpoints before it are whole: make room, then "
                         f"continue with --resume {path.parent.parent}") from error


def checkpoint_tensors(model, optimizer):
    """Yield (name, tensor on the CPU) of a checkpoint; what is split over several ranks is gathered on each."""
    parameters = stored_parameters(model)
    tensors = {f"model.{name}": parameter for name, parameter in parameters.items()}
    tensors |= {f"optimizer.{kind}.{name}": value for name, parameter in parameters.items()
                for kind, value in optimizer.state.get(parameter, {}).items()}
    for name, tensor in tensors.items():
        yield name, getattr(tensor.detach(), "full_tensor", tensor.detach)().cpu().contiguous()


def restore_checkpoint(path, model, optimizer, split_as=keep_whole):
    """Copy a checkpoint's tensors into a model and the state of its optimizer; returns the `state` saved with them.

    `split_as(parameter, tensor)`: the part of a whole tensor that this process holds, see `keep_whole`.
    Raises InputError for a file that is damaged or not of this model with these trained parts.
    """
    parameters = stored_parameters(model)
    held, saved, state, scale = checkpoint.read_checkpoint(path, parameters)
    split = {name: split_as(parameters[name], tensor) for name, tensor in held.items() if name in parameters}
    lora.lay_over(model, held | split, scale, path)
    for key, tensor in saved.items():
        kind, _, name = key.partition(".")
        if name not in parameters or tensor.shape != (() if kind == "step" else parameters[name].shape):
            raise InputError(f"{path}: {kind} of {name} {tuple(tensor.shape)} is not of this model")
        on_cpu = kind == "step" and not optimizer.defaults["fused"]         # where AdamW counts its steps
        tensor = tensor if kind == "step" else split_as(parameters[name], tensor)
        optimizer.state[parameters[name]][kind] = tensor if on_cpu else tensor.to(parameters[name].device)
    return state


def stored_parameters(model):
    """{official name: parameter} of what the base model does not hold: trainable, or of a part that was drawn."""
    return {official_name(name): parameter for name, parameter in model.named_parameters()
            if parameter.requires_grad or part_of(name) in model.drawn}


def keep_newest(run, count, losses, run_id):
    """Delete a run's checkpoints but the newest `count` and the one with the lowest of the `losses`, {step: loss}."""
    ours = {step: path for step, path in checkpoint.checkpoints(run).items() if checkpoint.run_of(path) == run_id}
    best = min(ours.keys() & losses.keys(), key=losses.get, default=None)
    for step in list(ours)[:-count]:
        if step != best:
            ours[step].unlink()
