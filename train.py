"""How does the loss go down? Fine-tune InternVL2's projector on the questions people asked about scanned documents.

    python train.py                                     InternVL2-1B on DocumentVQA, both streamed from the Hub, one GPU
    python train.py --tiny                              the same code on a small model and drawn pages: offline, on a CPU
    python train.py --model FOLDER --data FOLDER        local files in the Hub's layout

Vision encoder and language model are frozen. A step is one optimizer update on batch-pages x accumulate pages; its loss
is the sum of the answer tokens' negative log-likelihood over the whole step, divided by their number.
"""
import argparse
import itertools
import json
import math
import os
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from data import Examples, PageStream, count_rows, is_synthetic, load_examples, load_image, named_parts, open_rows
from model import InputError, InternVL
from model.checkpoint import (CHECKPOINTS, SETTINGS, WEIGHTS, keep_newest, latest_checkpoint, load_checkpoint, read_settings,
                              save_checkpoint, write_text)
from model.errors import OneLineParser, real_number, run, whole_number
from model.generate import generate
from model.lora import TARGETS, add_adapters
from model.memory import peak_gb, step_gb
from model.recipes import LR, RECIPES, TINY_LR
from model.runs import (METRICS, SAMPLES, SKIPPED, Interruptions, Skips, append_line, draw_curve, draw_samples, export, keep_lines,
                        kept_when_it_ends, memory_told, open_run, told_in_one_line, what_next, write_samples)
from model.score import anls, exact_match
from model.tiny.pages import DOMAINS

PARTS = ("projector", "lora", "llm", "vision")
TINY = dict(model="tiny", data="synthetic", domain="negative", steps=400, warmup=0.05, eval_every=50, eval_pages=48,
            device="cpu", workers=0)
RESHAPING = ("train", "lora_rank", "lora_alpha", "lora_targets")        # flags that a run cannot change half-way
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
    """'a.jsonl=2,owner/name' -> the same with the whole path of each file, so that a run can be used from any folder."""
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


def open_splits(settings):
    """-> (rows to train on, how many they are over all epochs, rows to validate on or None)."""
    hold_out = bool(settings.eval_every) and not settings.eval_data         # of files, which have no splits
    rows = open_rows(settings.data, "train", settings.seed, settings.domain, hold_out)
    all_rows = settings.epochs * count_rows(settings.data, "train", hold_out) if settings.epochs else math.inf
    if not settings.eval_every:
        return rows, all_rows, None
    return rows, all_rows, open_rows(settings.eval_data or settings.data, "validation", domains=settings.domain, hold_out=hold_out)


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
    rows, all_rows, held_out = open_splits(settings)
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
        draw_samples(folder, [(page.name, load_image(page.images[0], True) if page.images else None)
                              for page in held_out if page.name in names])
        draw_curve(folder)
        bar.write(f"step {step:>6} | " + " | ".join(f"{name} {value:.4f}" for name, value in measures.items()))

    def save():
        nonlocal saved
        saved = step
        save_checkpoint(folder / CHECKPOINTS / f"step-{step:07d}.safetensors", model, optimizer, state)
        keep_newest(folder, settings.keep, losses)
        (folder / WEIGHTS).unlink(missing_ok=True)          # of an earlier end of this run: this checkpoint is newer

    def keep():
        if whole and step > saved:
            save()
        return step

    whole = True                                                # no step is half applied
    with (tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}", file=sys.stderr) as bar,
          Interruptions() as interruptions, kept_when_it_ends(folder, keep), told_in_one_line(folder)):
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
            if pages is None:                                   # --epochs are over
                break
            data_wait = time.perf_counter() - started
            with interruptions.deferred():
                # -------------------------------------------------------------------------------------------- a training step
                rows = sum(example.page.rows for example in pages)
                share = share_of_rate(fraction_done(step + 0.5, state["rows"] + rows / 2), settings)    # at its middle
                torch.manual_seed((settings.seed * 1_000_003 + step) % 2 ** 63)     # dropout: a resumed run draws the same
                loss = accumulate_gradients(model, pages, settings.batch_pages)
                norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip or math.inf)
                loss, norm = torch.stack([loss, norm]).tolist()                     # waits for the device
                if not math.isfinite(loss + norm):
                    raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped before the update; pages "
                                     f"{', '.join(example.page.name for example in pages)}; look at them, or lower --lr")
                for group in optimizer.param_groups:
                    group["lr"] = share * group["highest"]
                whole = False
                with memory_told(pages):
                    optimizer.step()
                optimizer.zero_grad()
                # ------------------------------------------------------------------------------------------------------------
                step += 1
                questions = sum(len(example.page.questions) - len(example.too_long) for example in pages)
                last = pages[-1].page
                state.update(step=step, epoch=last.epoch, index=last.index + 1, refill=last.refill, rows=state["rows"] + rows,
                             questions=state["questions"] + questions,
                             split_pages=state["split_pages"] + sum(example.page.split for example in pages))
                whole = True
                speed, memory = questions / (time.perf_counter() - started), peak_gb(settings.device)
                lr = max(group["lr"] for group in optimizer.param_groups)
                log(step=step, train_loss=loss, lr=lr, grad_norm=norm, questions=questions,
                    answer_tokens=sum(example.answer_tokens for example in pages), questions_per_second=speed,
                    data_wait=data_wait, peak_gb=memory)
                bar.set_postfix_str(f"step {step} | train {loss:.4f} | lr {lr:.2e} | {speed:.1f} questions/s | {memory:.1f} GB", False)
                bar.update(100 * fraction_done(step, state["rows"]) - bar.n)

        if step == 0 or step == first and (folder / WEIGHTS).exists():
            raise InputError(f"{folder}: nothing to do after step {step}; raise --steps or --epochs, or look at --data")
        if settings.eval_every and step not in losses:
            validate()
        save()
    model.save_pretrained(folder)
    print(f"{step} steps, {state['questions']} questions; left out: {skips.count(skips.PAGE)} pages, "
          f"{skips.count(skips.TOO_LONG)} questions too long, {skips.count(skips.UNANSWERED)} without an answer; "
          f"{state['split_pages']} pages split by the look-ahead; most memory held: {peak_gb(settings.device):.2f} GB")
    print(what_next(folder))


if __name__ == "__main__":
    run(main)
