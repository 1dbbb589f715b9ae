"""How does the loss go down? Fine-tune InternVL2's projector on the questions people asked about scanned documents.

    python train.py                                     InternVL2-1B on DocumentVQA, both streamed from the Hub, one GPU
    python train.py --tiny                              the same code on a small model and drawn pages: offline, on a CPU
    python train.py --model FOLDER --data FOLDER        local files in the Hub's layout

Vision encoder and language model are frozen. A step is one optimizer update on batch-pages x accumulate pages; its loss
is the sum of the answer tokens' negative log-likelihood over the whole step, divided by their number.
"""
import itertools
import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import PageDataset, PageStream, count_rows, load_examples, load_image, open_rows
from extras.cli import run
from extras.export import export
from extras.memory import peak_gb, step_gb
from extras.recipes import RECIPES
from extras.run_folder import (METRICS, SAMPLES, SKIPPED, Interruptions, SkipLog, append_line, draw_curve, draw_samples,
                               keep_lines, keep_newest, kept_when_it_ends, memory_told, next_steps, open_run,
                               restore_checkpoint, save_checkpoint, told_in_one_line, write_samples)
from extras.score import anls, exact_match
from extras.settings import PARTS, parse_settings
from model import InputError, InternVL
from model.checkpoint import CHECKPOINTS, SETTINGS, WEIGHTS, latest_checkpoint, write_text
from model.errors import warn
from model.generate import generate
from model.lora import add_adapters

NOT_KEPT = ("resume", "export", "format", "push_to_hub", "tiny")         # flags that are no settings of a run
SHOWN_PAGES, LONGEST_ANSWER = 4, 64     # validation pages in samples.md and samples.png; tokens of a validation's answer


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
            print(f"{part:<10} {sum(p.numel() for p in parameters):>12,}  {'yes' if trains else 'frozen':<7} "
                  f"{'/'.join(dtypes):<9} {highest_rate(settings, part) if trains else '-'}")


def make_optimizer(model, settings):
    """AdamW over what trains, each part with its highest learning rate; decay for matrices only."""
    groups = []
    for part, parameters in part_parameters(model).items():
        trained = [p for p in parameters if p.requires_grad]
        matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        for group, decay in ((matrices, settings.weight_decay), (others, 0.0)):
            if group:
                rate = highest_rate(settings, part)
                groups.append({"params": group, "weight_decay": decay, "lr": rate, "highest": rate})
    return torch.optim.AdamW(groups, betas=(0.9, settings.beta2), eps=1e-8, fused=settings.device.startswith("cuda"))


def lr_factor(fraction, settings):
    """Which share of the highest learning rate holds when `fraction` of the run, 0 to 1, is done."""
    if fraction < settings.warmup:
        return fraction / settings.warmup
    fraction = (fraction - settings.warmup) / max(1 - settings.warmup, 1e-9)
    return {"constant": 1.0, "linear": 1 - fraction, "cosine": (1 + math.cos(math.pi * fraction)) / 2}[settings.schedule]


# ------------------------------------------------------------------------------------------------------------------- steps

def chunks(items, size):
    """[1, 2, 3, 4, 5], 2 -> [1, 2], [3, 4], [5]."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def training_steps(loader, skips, settings):
    """Yield the examples of one step after another; what is left over at the end of an epoch is a step of its own."""
    for _, examples in itertools.groupby(loader, key=lambda example: example.page.epoch):
        yield from chunks(skips.filter(examples), settings.batch_pages * settings.accumulate)


def answer_loss(logits, targets):
    """Sum, in float32, of the answer tokens' negative log-likelihood. `logits` (A, V), `targets` int64 (A,)."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


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
            batch = model.pack([(example.tiles, example.prompt) for example in micro_batch])
            loss = answer_loss(model(batch), batch.targets) / tokens
            if loss.requires_grad:              # not so where only the projector trains, and no page has an image
                loss.backward()                 # adds to .grad; the micro-batch's activations are freed here
            step_loss += loss.detach()
    return step_loss


# -------------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, examples):
    """Validate on some examples -> (measures, answers).

    measures: val_loss, the mean negative log-likelihood of all answer tokens in nats; exact_match and anls of the greedy
    answers, 0 to 1. answers: one dict a question. All questions of a page are answered from one prefix.
    """
    model.eval()
    total, tokens, answers = 0.0, 0, []
    prompts = PageDataset(model, max_length=None)
    for example in examples:
        page, tiles = example.page, example.tiles
        batch = model.pack([(tiles, example.prompt)])
        if len(tiles):
            batch.image_tokens = model.encode_images(batch.tiles)                 # seen once for the loss and for the answers
        total += F.cross_entropy(model(batch).float(), batch.targets, reduction="sum").item()
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


# ------------------------------------------------------------------------------------------------- what a run begins with

def load_model(settings):
    """The model with its parts frozen or set to train; prints the table of parts."""
    if settings.from_scratch:
        model = InternVL.from_scratch(settings.model, settings.seed, settings.device, settings.dtype)
    else:
        model = InternVL.from_pretrained(settings.model, settings.device, settings.dtype)
    if "lora" in settings.train.split(","):
        add_adapters(model, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_targets,
                     settings.seed)
    choose_parts(model, settings.train)
    print_parts(model, settings)
    model.vision.gradient_checkpointing = model.language.gradient_checkpointing = settings.checkpoint_activations
    if settings.compile:
        for block in [*model.vision.blocks, *model.language.blocks]:
            block.compile(dynamic=True)
    return model


def open_splits(settings):
    """-> (rows to train on, how many they are over all epochs, rows to validate on or None)."""
    hold_out = bool(settings.eval_every) and not settings.eval_data         # of files, which have no splits
    rows = open_rows(settings.data, "train", settings.seed, settings.domain, hold_out)
    all_rows = settings.epochs * count_rows(settings.data, "train", hold_out) if settings.epochs else math.inf
    if not settings.eval_every:
        return rows, all_rows, None
    validated = settings.eval_data or settings.data
    return rows, all_rows, open_rows(validated, "validation", domains=settings.domain, hold_out=hold_out)


def begin(folder, settings, model, optimizer):
    """Write the settings. Returns where the run stands, at its latest checkpoint or at step 0, and the {step: loss} of the
    validations up to there; what its files tell of later is dropped.
    """
    kept = {key: value for key, value in vars(settings).items() if key not in NOT_KEPT}
    if isinstance(settings.lr, dict):                                # as it is typed
        kept["lr"] = ",".join(f"{part}={rate}" for part, rate in settings.lr.items())
    for half in (*folder.rglob("*.part"), *folder.rglob(".tmp*")):      # of a process killed while it wrote
        half.unlink()
    state = {"step": 0, "epoch": 0, "index": 0, "refill": [0, 0], "rows": 0, "questions": 0, "split_pages": 0}
    checkpoint = latest_checkpoint(folder)
    if checkpoint:
        saved = restore_checkpoint(checkpoint, model, optimizer)
        if saved.keys() != state.keys():
            raise InputError(f"{checkpoint}: of another version of train.py; finish the run with that one")
        state = saved
        print(f"going on after step {state['step']}")
    write_text(folder / SETTINGS, json.dumps(kept, indent=2) + "\n")        # not before the checkpoint is known to fit them
    lines = keep_lines(folder / METRICS, lambda line: line["step"] <= state["step"])
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    keep_lines(folder / SAMPLES, lambda line: line["step"] in losses)
    keep_lines(folder / SKIPPED, lambda line: (line["epoch"], line["index"]) < (state["epoch"], state["index"]))
    return state, losses


# --------------------------------------------------------------------------------------------------------------- the run

class Training:
    """A run: its folder, the model and its optimizer, and how far they are."""

    def __init__(self, settings):
        self.settings, self.folder = settings, open_run(settings)
        print(json.dumps(vars(settings)))
        if settings.recipe and not settings.resume:
            source, sets = RECIPES[settings.recipe]
            told = " ".join(f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}") for key, value in sets.items()
                            if getattr(settings, key) == value)                         # else it gave way to what was typed
            print(f"recipe {settings.recipe} ({source}) sets {told}")
        self.model = load_model(settings)
        needed = step_gb(self.model, settings.max_tiles, settings.batch_pages)
        print(f"memory that a step of pages of {settings.max_tiles} tiles needs: {sum(needed.values()):.2f} GB ("
              + ", ".join(f"{what} {gb:.2f}" for what, gb in needed.items()) + ")")
        self.optimizer = make_optimizer(self.model, settings)
        rows, self.all_rows, held_out = open_splits(settings)
        with told_in_one_line(self.folder):
            self.state, self.losses = begin(self.folder, settings, self.model, self.optimizer)
        self.first = self.saved = self.state["step"]
        self.whole = True                       # no step is half applied
        self.skips = SkipLog(self.folder / SKIPPED)
        self.open_pages(rows, held_out)

    def open_pages(self, rows, held_out):
        """The steps' examples from where the run stands on, and the fixed pages to validate on."""
        settings, state = self.settings, self.state
        examples = PageDataset(self.model, settings.max_tiles, settings.max_length, settings.allow_private)
        stream = PageStream(rows, settings.epochs, settings.shuffle, settings.seed, settings.look_ahead,
                            start=(state["epoch"], state["index"], state["refill"]),
                            group=(examples.size, settings.batch_pages) if settings.group_by_length else None)
        loader = load_examples(stream, examples, settings.workers, pin_memory=settings.device.startswith("cuda"))
        if held_out:
            pages = PageStream(held_out, epochs=1, shuffle=False, look_ahead=settings.look_ahead).pages()
            self.held_out = list(itertools.islice(pages, settings.eval_pages))
            self.validation = load_examples(self.held_out, examples, settings.workers)
            iter(self.validation)               # its workers are forked now, before a thread begins to read training pages
        self.steps = training_steps(loader, self.skips, settings)

    def train(self, bar, interruptions):
        """Step after step, with validations and checkpoints between them, until --steps or --epochs are over."""
        settings, state = self.settings, self.state
        while True:
            step = state["step"]
            if settings.eval_every and step % settings.eval_every == 0 and step not in self.losses:
                self.validate(bar)
            if settings.save_every and step % settings.save_every == 0 and step > self.saved:
                with interruptions.deferred():
                    self.save()
            if settings.steps and step >= settings.steps:
                break
            started = time.perf_counter()
            examples = next(self.steps, None)
            if examples is None:                                # --epochs are over
                break
            data_wait = time.perf_counter() - started
            with interruptions.deferred():
                loss, norm = self.take_step(examples)
                self.count(examples)
                self.log(examples, loss, norm, data_wait, time.perf_counter() - started, bar)
        if state["step"] == 0 or state["step"] == self.first and (self.folder / WEIGHTS).exists():
            raise InputError(f"{self.folder}: nothing to do after step {step}; raise --steps or --epochs, or look at --data")
        if settings.eval_every and step not in self.losses:
            self.validate(bar)
        with interruptions.deferred():
            self.save()

    def take_step(self, examples):
        """One optimizer step -> its loss and the norm of its gradient, before clipping."""
        settings, step = self.settings, self.state["step"]
        middle = self.fraction_done(0.5, sum(example.page.rows for example in examples) / 2)
        share = lr_factor(middle, settings)
        torch.manual_seed((settings.seed * 1_000_003 + step) % 2 ** 63)         # dropout: a resumed run draws the same
        loss = accumulate_gradients(self.model, examples, settings.batch_pages)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in trained):
            warn(f"step {step + 1}: no page has an image, so there is nothing that --train {settings.train} can learn")
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip or math.inf)
        loss, norm = torch.stack([loss, norm]).tolist()                         # waits for the device
        if not math.isfinite(loss + norm):
            raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped before the update; pages "
                             f"{', '.join(example.page.name for example in examples)}; look at them, or lower --lr")
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["highest"]
        self.whole = False
        with memory_told(examples):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def count(self, examples):
        """The step is done: note how far the run is, and from which row on its data goes on."""
        state, last = self.state, examples[-1].page
        state.update(step=state["step"] + 1, epoch=last.epoch, index=last.index + 1, refill=last.refill,
                     rows=state["rows"] + sum(example.page.rows for example in examples),
                     questions=state["questions"] + sum(len(example.kept) for example in examples),
                     split_pages=state["split_pages"] + sum(example.page.split for example in examples))
        self.whole = True

    def log(self, examples, loss, norm, data_wait, seconds, bar):
        """A line in metrics.jsonl, and the bar."""
        step, memory = self.state["step"], peak_gb(self.settings.device)
        questions, tokens = sum(len(one.kept) for one in examples), sum(one.answer_tokens for one in examples)
        speed, lr = questions / seconds, max(group["lr"] for group in self.optimizer.param_groups)
        append_line(self.folder / METRICS, dict(
            step=step, train_loss=loss, lr=lr, grad_norm=norm, questions=questions, answer_tokens=tokens,
            questions_per_second=speed, data_wait=data_wait, peak_gb=memory))
        bar.set_postfix_str(f"step {step} | train {loss:.4f} | lr {lr:.2e} | {speed:.1f} questions/s | {memory:.1f} GB", False)
        bar.update(100 * self.fraction_done() - bar.n)

    def validate(self, bar):
        """Measure on the fixed pages; write the line, the samples and both pictures."""
        folder, step = self.folder, self.state["step"]
        measures, answers = evaluate(self.model, SkipLog().filter(self.validation))
        names = list(dict.fromkeys(line["page"] for line in answers))[:SHOWN_PAGES]
        keep_lines(folder / SAMPLES, lambda line: line["step"] in self.losses)      # not those of one that was cut short
        write_samples(folder, step, [line for line in answers if line["page"] in names])
        append_line(folder / METRICS, {"step": step, **measures})
        self.losses[step] = measures["val_loss"]
        draw_samples(folder, [(page.name, load_image(page.images[0], True) if page.images else None)
                              for page in self.held_out if page.name in names])
        draw_curve(folder)
        bar.write(f"step {step:>6} | " + " | ".join(f"{name} {value:.4f}" for name, value in measures.items()))

    def fraction_done(self, more_steps=0.0, more_rows=0.0):
        """How much of the run lies behind, 0 to 1, by the limit that is nearer."""
        steps, rows = self.state["step"] + more_steps, self.state["rows"] + more_rows
        return min(1.0, max(steps / (self.settings.steps or math.inf), rows / self.all_rows))

    def save(self):
        self.saved = step = self.state["step"]
        save_checkpoint(self.folder / CHECKPOINTS / f"step-{step:07d}.safetensors", self.model, self.optimizer, self.state)
        keep_newest(self.folder, self.settings.keep, self.losses)
        (self.folder / WEIGHTS).unlink(missing_ok=True)         # of an earlier end of this run: this checkpoint is newer

    def keep(self):
        """Save what is not saved, unless a step is half applied. Returns the step."""
        if self.whole and self.state["step"] > self.saved:
            self.save()
        return self.state["step"]


def main():
    settings = parse_settings(__doc__)
    if settings.export:
        return export(*settings.export, settings.format, settings.push_to_hub)
    training = Training(settings)
    folder, state, skips = training.folder, training.state, training.skips
    with (tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}", file=sys.stderr) as bar,
          Interruptions() as interruptions, kept_when_it_ends(folder, training.keep), told_in_one_line(folder)):
        training.train(bar, interruptions)
    training.model.save_pretrained(folder)
    print(f"{state['step']} steps, {state['questions']} questions; left out: {skips.count(skips.PAGE)} pages, "
          f"{skips.count(skips.TOO_LONG)} questions too long, {skips.count(skips.UNANSWERED)} without an answer; "
          f"{state['split_pages']} pages split by the look-ahead; most memory of the process: "
          f"{peak_gb(settings.device):.2f} GB")
    print(next_steps(folder))


if __name__ == "__main__":
    run(main)
