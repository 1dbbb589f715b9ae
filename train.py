"""Fine-tune InternVL2's projector on questions about scanned documents.

    python train.py                                 InternVL2-1B on DocumentVQA, both from the Hub, one GPU
    python train.py --tiny                          the same code on a small model and drawn pages: offline, on a CPU
    python train.py --model FOLDER --data FOLDER    local files in the Hub's layout

By default only the projector is trainable. A step is one optimizer update on batch-pages x accumulate pages; its loss
is the mean of -log(probability) over all answer tokens of these pages.
"""
import itertools
import math
import os
import random
import re
import sys
import time
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import FIRST_BLOCK, PageDataset, chunks, load_examples, page_blocks, prefetch
from extras import recipes
from extras.cli import OneLineParser, add_row_flags, add_switch, as_flag, count, float_in, int_in, names_in, run
from extras.memory import choose_split, peak_gb, print_step
from extras.outputs import lock, new_folder
from extras.run_folder import RunFolder, SkipLog, next_steps
from extras.sources import count_rows, named_parts, open_rows, whole_paths
from model import InputError, InternVL
from model.checkpoint import latest_checkpoint, read_settings
from model.errors import printable, warn
from model.lora import TARGETS, add_adapters
from model.names import official_name, part_of

PARTS = ("projector", "lora", "llm", "vision")
WHOLE = tuple(part for part in PARTS if part != "lora")                # the model without adapters
TINY = dict(model="tiny", data="synthetic:1", domain="hollow", batch_pages=1, accumulate=2, steps=700,
            beta2=0.98, warmup=0.05, eval_every=175, eval_pages=48, device="cpu", workers=0)    # what --tiny sets
# settings that a resumed run cannot change: what is trainable, and which page comes next
FIXED = ("train", "lora_rank", "lora_alpha", "lora_targets", "from_scratch", "init", "seed", "shuffle", "look_ahead",
         "group_by_length", "columns")
LONGEST_ANSWER = 64                     # tokens of an answer in a validation, or more if the right one is longer
PROGRESS = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
EVAL_BLOCK = 512                        # rows of a block of the validation pages


# ------------------------------------------------------------------------------------------------------------ flags

def add_data_flags(parser):
    group = parser.add_argument_group("model and data")
    flag = group.add_argument
    flag("--tiny", action="store_true", help="small model, drawn pages, CPU, larger learning rates; sets "
         + " ".join(f"--{key.replace('_', '-')} {value}" for key, value in TINY.items()))
    flag("--model", default="OpenGVLab/InternVL2-1B", help="Hub id, local folder, or tiny (%(default)s)")
    flag("--init", type=names_in(WHOLE, "part that can be drawn"), metavar="PART[,PART]",
         help="load all other parts, draw these from --seed: " + ", ".join(WHOLE))
    add_switch(group, "--from-scratch", "draw all parts, in the shape that --model describes")
    flag("--data", default="zhangfaen/DocumentVQA", help="Hub id, folder in Hub layout, file (.json, .jsonl), or "
         "synthetic; several: a.jsonl=2,b.jsonl (%(default)s)")
    flag("--eval-data", metavar="DATA", help="validation data (the validation split of --data; for a file one page in "
         "20, which is then not trained on)")
    add_row_flags(flag)
    flag("--domain", default="plain", help="look of synthetic pages, comma-separated (%(default)s)")
    flag("--train", type=part_names, default="projector",
         help="trainable parts, comma-separated: projector, lora, llm, vision, or all but lora (%(default)s)")
    flag("--recipe", choices=recipes.RECIPES, help="set flags as a published recipe does; typed flags win")
    flag("--max-tiles", type=int_in(1, 128), default=12, help="tiles per page, thumbnail not counted (%(default)s)")
    flag("--max-length", type=int_in(1), default=8192,
         help="most tokens of a page with one question; longer questions are skipped (%(default)s)")
    add_switch(group, "--shuffle", "shuffle the pages, or keep the order of the file", default=True)
    add_switch(group, "--allow-private", "fetch images from private networks too")
    add_switch(group, "--group-by-length", "put pages of similar length into a micro-batch")
    flag("--look-ahead", type=int_in(1, 10 ** 6), default=2048, help="rows of a block, shuffled together (%(default)s)")


def add_lora_flags(parser):
    flag = parser.add_argument_group("LoRA, with --train lora").add_argument
    flag("--lora-rank", type=int_in(1, 16_384), default=16, help="width between the two matrices (%(default)s)")
    flag("--lora-alpha", type=float_in(1e-6, 1e6), default=32.0, help="adapters are scaled by alpha/rank (%(default)s)")
    flag("--lora-dropout", type=float_in(0, 0.999), default=0.05, help="dropout on the adapter's input (%(default)s)")
    flag("--lora-targets", type=names_in(TARGETS, "set of layers"), default="llm",
         help="layers with an adapter, comma-separated: " + ", ".join(TARGETS) + " (%(default)s)")


def add_length_flags(parser):
    flag = parser.add_argument_group("batch size and length of the run").add_argument
    flag("--batch-pages", type=int_in(1, 10_000), help="pages in a micro-batch (1; on a GPU 1, 2, 4 or 8, by memory)")
    flag("--accumulate", type=int_in(1, 100_000), help="micro-batches in an optimizer step (8; on a GPU 8 pages)")
    flag("--steps", type=int_in(1), help="optimizer steps; with --epochs, whichever limit comes first")
    flag("--epochs", type=int_in(1), help="passes through the data (1 if --steps is not given)")


def add_optimizer_flags(parser):
    flag = parser.add_argument_group("optimizer: AdamW, beta1 0.9").add_argument
    flag("--lr", type=learning_rates, metavar="RATE|PART=RATE,...",
         help=f"peak learning rate, or one for each part ({recipes.as_text(recipes.LR)}; from 14B on at most 2e-5)")
    flag("--beta2", type=float_in(0, 0.999999), default=0.999, help="AdamW beta2 (%(default)s)")
    flag("--schedule", choices=("constant", "linear", "cosine"), default="cosine", help="after warmup (%(default)s)")
    flag("--warmup", type=float_in(0, 1), default=0.03, help="fraction of the run for the warmup (%(default)s)")
    flag("--weight-decay", type=float_in(0, 1000), help="of matrices, not biases or norms (0.01; 0.05 from 8B on)")
    flag("--clip", type=float_in(0, 1e9), default=1.0, help="largest gradient norm; 0: no clipping (%(default)s)")


def add_file_flags(parser):
    flag = parser.add_argument_group("validation and files").add_argument
    flag("--eval-every", type=int_in(0), default=200, help="steps between validations; 0: none (%(default)s)")
    flag("--eval-pages", type=int_in(1, 10 ** 6), default=64, help="validation pages, always the same (%(default)s)")
    flag("--save-every", type=int_in(0), default=200, help="steps between checkpoints; 0: one at the end (%(default)s)")
    flag("--keep", type=int_in(1), default=5, help="newest checkpoints to keep, and the best saved one (%(default)s)")
    flag("--out", help="run folder (runs/ and the time of day)")
    flag("--resume", metavar="RUN", help="resume the run in this folder, with its settings")
    flag("--allow-changed", action="store_true", help="use a run although its base model or its data changed")
    flag("--export", nargs=2, metavar=("RUN", "FOLDER"), help="write a run's model to a folder; merges LoRA")
    flag("--format", choices=("official", "transformers", "native", "peft"), default="official",
         help="layout of the exported folder; native is the old name of transformers (%(default)s)")
    flag("--push-to-hub", metavar="REPO", help="upload what --export wrote to this repository of the Hub")


def add_machine_flags(parser):
    group = parser.add_argument_group("machine")
    flag = group.add_argument
    flag("--device", help="cuda, cpu, ... (a GPU if there is one)")
    flag("--dtype", choices=("float32", "bfloat16"),
         help="dtype of frozen weights and activations (bfloat16 on a GPU, else float32)")
    flag("--seed", type=int_in(0, 2 ** 63 - 1), default=0, help="of page order and random weights (%(default)s)")
    flag("--workers", type=int_in(0, 1000), default=min(4, os.cpu_count() or 1),
         help="processes that decode and tile pages (%(default)s)")
    add_switch(group, "--checkpoint-activations", "recompute activations in backward: less memory, a third more work")
    add_switch(group, "--compile", "compile the blocks with torch.compile")
    add_switch(group, "--shard", "split the weights over the GPUs, for models that one cannot hold; needs torchrun")


def parse_args():
    """The settings of a run, under the flags' names: flags, over a recipe, over a resumed run's, over defaults."""
    parser = OneLineParser(description=__doc__, usage="%(prog)s [FLAG ...]")
    for add_flags in (add_data_flags, add_lora_flags, add_length_flags, add_optimizer_flags, add_file_flags,
                      add_machine_flags):
        add_flags(parser)
    args = parser.parse_args()
    if args.resume:
        kept = read_settings(args.resume) | {"out": args.resume}
        parser.check_stored(kept, f"{args.resume}/settings.json")
        parser.set_defaults(**{key: str(value) if type(value) in (int, float) else value    # checked as if typed
                               for key, value in kept.items()})
    elif args.tiny:
        parser.set_defaults(**TINY)
    if args.recipe:
        parser.set_defaults(**recipes.RECIPES[args.recipe][1])
    args = parser.parse_args()
    if args.export and "RANK" in os.environ:
        parser.error("--export is for one process; start it without torchrun")
    if args.shard and "RANK" not in os.environ:
        parser.error("--shard splits the weights over processes: start it with torchrun, or give --no-shard")
    if not args.export and (args.push_to_hub or args.format != "official"):
        parser.error("--format and --push-to-hub belong to --export RUN FOLDER; give that too")
    if args.resume:
        refuse_another_run(parser, args, kept)
    args.init = part_names("all") if args.from_scratch else args.init
    args.lr = choose_rates(parser, args, rates_of(kept["lr"]) if args.resume and "lr" in kept else None)
    args.epochs = args.epochs or (None if args.steps else 1)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.model != "tiny" and Path(args.model).exists():              # the run can be used from any folder
        args.model = str(Path(args.model).resolve())
    args.data, args.eval_data = whole_paths(args.data), args.eval_data and whole_paths(args.eval_data)
    return args


def part_names(text):
    """'all' -> 'projector,llm,vision'."""
    return names_in(PARTS, "part of the model", "or all")(",".join(WHOLE) if text == "all" else text)


def learning_rates(text):
    """'4e-5' -> 4e-5; 'projector=1e-3,lora=1e-4' -> {'projector': 1e-3, 'lora': 1e-4}."""
    if "=" not in text:
        return float_in(0, 1000)(text)
    rates = [entry.split("=") for entry in text.split(",")]
    return {part: float_in(0, 1000)(rate) for parts, rate in rates for part in part_names(parts).split(",")}


def choose_rates(parser, args, before):
    """--lr as a number, or where parts differ as 'projector=1e-3,lora=1e-4'; `before`: the rates of a resumed run."""
    if isinstance(args.lr, float):
        return args.lr
    trained, typed = args.train.split(","), args.lr or {}
    if not typed.keys() <= set(trained):
        parser.error(f"--lr gives a rate for {', '.join(typed)}, but --train is {args.train}")
    rates = (before or (recipes.TINY_LR if args.tiny else recipes.LR)) | typed
    args.untyped = [] if before or args.tiny else [part for part in trained if part not in typed]
    if len({rates[part] for part in trained}) == 1:
        return rates[trained[0]]
    return recipes.as_text({part: rates[part] for part in trained})


def refuse_another_run(parser, args, kept):
    """A resumed run stays in its folder, trains the same parts, and sees its pages in the order it began with."""
    advice = f"; to change it, begin a new run with --model {args.resume}"
    if args.out != args.resume:
        parser.error(f"--out {args.out}: --resume continues in its own folder" + advice)
    for key in (*FIXED, *(("batch_pages", "max_tiles", "instruction") if args.group_by_length else ())):
        if getattr(args, key) != kept.get(key, getattr(args, key)):
            parser.error(f"--{key.replace('_', '-')} {getattr(args, key)}: the run began with another value" + advice)
    if holds_out(vars(args)) != holds_out(kept) and any(Path(name).is_file() for name, _ in named_parts(args.data)):
        parser.error("--eval-every or --eval-data: the run would train on pages that it held out for validation, or "
                     "the reverse" + advice)


def holds_out(settings):
    """Whether validation pages are held out of --data, if that is a file."""
    return bool(settings.get("eval_every", 1)) and not settings.get("eval_data")


# ------------------------------------------------------------------------------------------------- model, optimizer

def load_model(args, ranks=None):
    """The model with its parts frozen or trainable, and with --shard split over the ranks of torchrun."""
    seed = None if latest_checkpoint(args.out) else args.seed               # a checkpoint holds what was drawn
    parts, device = args.init.split(",") if args.init else (), "cpu" if args.shard else args.device
    model = InternVL.from_pretrained(args.model, device, args.dtype, parts, seed, args.allow_changed)
    model.config = replace(model.config, max_tiles=args.max_tiles)       # written with the model
    if "lora" in args.train.split(","):
        add_adapters(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets, args.seed)
    ranks.shard(model, args.train, choose_parts) if args.shard else choose_parts(model, args.train)
    model.vision.gradient_checkpointing = model.language.gradient_checkpointing = args.checkpoint_activations
    if args.compile:
        # each number of pages in a micro-batch needs graphs of its own; beyond 8 torch would stop compiling
        torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 256, True
        for block in [*model.vision.blocks, *model.language.blocks]:
            block.compile(dynamic=True)
    return model


def part_parameters(model):
    """{part: its parameters}; adapters are the part lora, whatever layer they belong to."""
    parts = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        parts["lora" if ".adapter." in name else part_of(name)].append(parameter)
    return parts


def choose_parts(model, train, only=None):
    """Make the named parts trainable, in float32; the others stay frozen. `only`: a set of parameters to look at."""
    for part, parameters in part_parameters(model).items():
        for parameter in parameters if part in train.split(",") else ():
            if only is None or parameter in only and not parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)


def rates_of(lr):
    """{part: peak learning rate}. `lr`: a number or text like 'projector=1e-3,lora=1e-4'."""
    rates = learning_rates(str(lr))
    return rates if isinstance(rates, dict) else dict.fromkeys(PARTS, rates)


def make_optimizer(model, args):
    """AdamW over the trainable parameters, by part; no weight decay for biases, norms and scales."""
    groups = []
    for part, parameters in part_parameters(model).items():
        for matrices, decay in ((True, args.weight_decay), (False, 0.0)):
            if group := [p for p in parameters if p.requires_grad and (p.ndim > 1) == matrices]:
                rate = rates_of(args.lr)[part]
                groups.append({"params": group, "weight_decay": decay, "lr": rate, "peak_lr": rate})
    return torch.optim.AdamW(groups, betas=(0.9, args.beta2), eps=1e-8, fused=args.device.startswith("cuda"))


def lr_factor(progress, args):
    """The learning rate as a share of its peak, when `progress` of the run, 0 to 1, is done."""
    if progress < args.warmup:
        return progress / args.warmup
    progress = (progress - args.warmup) / max(1 - args.warmup, 1e-9)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[args.schedule]


def print_run(args, model, ranks=None):
    """The first lines of a run: the model, the data, what is trainable, and the memory of a step."""
    if args.recipe and not args.resume:
        source, sets = recipes.RECIPES[args.recipe]
        flags = " ".join(as_flag(*flag) for flag in sets.items() if getattr(args, flag[0]) == flag[1])  # not typed ones
        print(f"recipe {args.recipe} ({source}) sets {flags}")
    settings = f"{args.out}/settings.json"
    print(printable(f"model {args.model}, data {args.data}, trainable: {args.train}; all settings: {settings}"))
    print(f"{'part':<10} {'parameters':>12}  {'':<9} {'dtype':<9} peak learning rate")
    for part, parameters in part_parameters(model).items():
        trainable, dtypes = part in args.train.split(","), sorted({str(p.dtype).split(".")[-1] for p in parameters})
        if parameters:
            print(f"{part:<10} {sum(p.numel() for p in parameters):>12,}  {'trainable' if trainable else 'frozen':<9} "
                  f"{'/'.join(dtypes):<9} {rates_of(args.lr)[part] if trainable else '-'}")
    if model.drawn and not latest_checkpoint(args.out):
        drawn = [official_name(name) for name in model.state_dict() if part_of(name) in model.drawn]
        drawn = dict.fromkeys(re.sub(r"(layers)\.\d+", r"\1.#", name) for name in drawn)       # #: of every block
        print(f"drawn from --seed {args.seed}: {', '.join(drawn)}")
    print_step(args, model, ranks)


# ------------------------------------------------------------------------------------------------------------- data

def training_steps(loader, skips, args):
    """Yield for each step all its pages, in the order of the stream, and its micro-batches, lists of examples.

    A skipped page leaves its micro-batch shorter. The pages left over at the end of an epoch are a step of their own.
    """
    for _, of_epoch in itertools.groupby(loader, key=lambda example: example.page.epoch):
        for examples in chunks(of_epoch, args.batch_pages * args.accumulate):
            micro_batches = [list(filter(skips.usable, chunk)) for chunk in chunks(examples, args.batch_pages)]
            if any(micro_batches):
                yield [example.page for example in examples], list(filter(None, micro_batches))
        skips.check_limit()


def open_pages(args, dataset, run):
    """-> (validation pages, blocks of pages from where the run stands on, rows in all epochs)."""
    state, hold_out = run.state, holds_out(vars(args))
    rows = open_rows(args.data, "train", args.seed, args.domain, hold_out, args.columns)
    all_rows = args.epochs * count_rows(rows, args.data) if args.epochs else math.inf
    held_out, pages = [], []
    if args.eval_every:
        held_out = open_rows(args.eval_data or args.data, "validation", 0, args.domain, hold_out, args.columns)
        blocks = page_blocks(held_out, shuffle=False, block_rows=EVAL_BLOCK, instruction=args.instruction)
        pages = list(itertools.islice(itertools.chain.from_iterable(blocks), args.eval_pages))
    run.compare_data(rows, held_out, pages)                     # keeps the pages' images: the same every time
    print(f"reading {printable(args.data)} from epoch {state['epoch']}, block {state['block']} "
          f"({args.look_ahead:,} rows in a block, {min(FIRST_BLOCK, args.look_ahead):,} in the first)")
    blocks = page_blocks(rows, args.epochs, args.seed, args.shuffle, args.look_ahead,
                         (state["epoch"], state["block"], state["index"]),
                         (dataset.size, args.batch_pages) if args.group_by_length else None,
                         instruction=args.instruction)
    return pages, blocks, all_rows


def open_data(args, model, run, skips, ranks):
    """-> (validation pages, a loader of their examples, steps from where the run stands on, rows in all epochs)."""
    dataset = PageDataset(model, args.max_tiles, args.max_length, args.allow_private)
    read = partial(open_pages, args, dataset, run)
    pages, blocks, all_rows = ranks.read_pages(read, run) if ranks else read()
    if args.eval_every:
        skips.leave_out(pages if args.eval_data else [], dataset)
    validation = load_examples(ranks.pages_of_this_rank(pages) if ranks else pages, dataset, args.workers)
    iter(validation)                        # its workers are forked now, before a thread reads training rows
    loader = (ranks.load_examples(blocks, dataset, args) if ranks else
              load_examples(prefetch(blocks), dataset, args.workers, pin_memory=args.device.startswith("cuda")))
    return pages, validation, training_steps(loader, skips, args), all_rows


# ------------------------------------------------------------------------------------------------------- validation

@torch.no_grad()
def validate(model, examples):
    """Yield (example, its loss, the answers to its questions, how many could not be answered)."""
    from extras.evaluate import answer_batch
    for example in examples:
        if example.error:
            yield example, 0.0, [], 0
            continue
        page, tiles = example.page, example.tiles
        batch = model.pack([(tiles, example.prompt)])
        if len(tiles):
            batch.image_tokens = model.encode_images(batch.tiles)       # once for the loss and for the answers
        loss = answer_loss(model(batch), batch.targets).item()
        if not math.isfinite(loss):
            raise InputError(f"validation page {page.name}: loss {loss}; look at the page, or lower --lr")
        longest = int(batch.branches[0][batch.answer_index.cpu() + 1].bincount().max())
        with torch.compiler.set_stance("force_eager"):          # decoding changes its shapes at every token
            answered = answer_batch(model, [example], batch.image_tokens, max_new_tokens=max(LONGEST_ANSWER, longest))
        answers = [{"page": page.name, "question": page.questions[one.index], "answer": one.text,
                    "expected": page.accepted[one.index]} for one in answered]
        yield example, loss, answers, sum(bool(one.error) for one in answered)


def evaluate(model, examples, ranks=None):
    """Validate on some examples -> (measures, answers).

    measures: val_loss, the mean of -log(probability) over all answer tokens; exact_match and anls of the
    greedy answers, 0 to 1. answers: one dict per question.
    """
    from extras.score import anls, exact_match
    model.eval()
    total, tokens, answers, failed, skips = 0.0, 0, [], 0, SkipLog()
    validated = validate(model, examples)
    for example, loss, of_page, not_answered in ranks.merged(validated) if ranks else validated:
        if skips.usable(example):
            total, tokens, answers = total + loss, tokens + example.answer_tokens, answers + of_page
            failed += not_answered
    skips.check_limit()
    if skips.lines or failed:
        warn(f"validation: {skips}; {failed} questions not answered, which counts as wrong")
    scores = {score.__name__: sum(score(line["answer"], line["expected"]) for line in answers) / len(answers)
              for score in (exact_match, anls)}
    return {"val_loss": total / tokens, **scores}, answers


# --------------------------------------------------------------------------------------------------------- training

def answer_loss(logits, targets):
    """Sum, in float32, of the answer tokens' negative log-likelihood. `logits` (A, V), `targets` int64 (A,)."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def check_step(step, loss, norm, examples, trained, args):
    """Raise InputError for a loss or gradient that is not finite; warn where there is no gradient at all."""
    if not math.isfinite(loss + norm):
        raise InputError(f"step {step}: loss {loss}, gradient norm {norm}; stopped before the update; pages "
                         f"{', '.join(example.page.name for example in examples)}; look at them, or lower --lr")
    if all(p.grad is None for p in trained):
        warn(f"step {step}: no page has an image, so --train {args.train} has no gradient")


def forward_backward(model, micro_batches, tokens, seed):
    """Add the gradients of a step's micro-batches to `.grad`; returns its loss. `tokens`: answer tokens of the step."""
    step_loss = torch.zeros((), device=model.device)
    for micro_batch in micro_batches:
        draw = random.Random(f"{seed} {micro_batch[0].page.resume}")
        torch.manual_seed(draw.getrandbits(63))                         # dropout: a resumed run draws the same
        batch = model.pack([(example.tiles, example.prompt) for example in micro_batch])
        loss = answer_loss(model(batch), batch.targets) / tokens
        if loss.requires_grad:                                          # False: projector only, and no image
            loss.backward()                                             # adds to .grad; frees the activations
        step_loss += loss.detach()
    return step_loss


def train(args, run, model, optimizer, data, bar, stop, ranks):
    """Validate, save, and take one optimizer step after another, until --steps or --epochs are over."""
    pages, validation, steps, all_rows = data
    step_of = ranks.of_this_rank(forward_backward, args.accumulate) if ranks else forward_backward
    clip = ranks.clip_grad_norm if ranks else torch.nn.utils.clip_grad_norm_
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    while True:
        stop.allow()                                            # a signal ends a validation or a wait for pages
        step = run.state["step"]
        last = args.steps is not None and step >= args.steps
        if args.eval_every and step not in run.losses and (last or step % args.eval_every == 0):
            run.log_validation(bar, pages, *evaluate(model, validation, ranks))
        stop.hold()                                             # but not a checkpoint, nor a step
        if step > run.saved and (last or args.save_every and step % args.save_every == 0):
            run.save(model, optimizer)
        stop.allow()
        if last:
            break
        started = time.perf_counter()
        ready = next(steps, None)
        if ready is None:                                       # --epochs are over: validate, save, end
            args.steps = step
            continue
        stop.hold()
        data_wait = time.perf_counter() - started
        step_pages, run.micro_batches = ready
        examples = list(itertools.chain(*run.micro_batches))
        rows = run.state["rows"] + sum(page.rows for page in step_pages) / 2       # in the middle of the step
        progress = max((step + 0.5) / (args.steps or math.inf), rows / all_rows)

        # ------------------------------------------------------------------------------------- one optimizer step
        model.train()
        tokens = sum(example.answer_tokens for example in examples)     # of the whole step: every token weighs the same
        step_loss = step_of(model, run.micro_batches, tokens, args.seed)
        if ranks:
            ranks.sum_gradients(trained, step_loss)
        norm = clip(trained, args.clip or math.inf)
        loss, norm = torch.stack([step_loss, norm]).tolist()            # waits for the device
        check_step(step + 1, loss, norm, examples, trained, args)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(progress, args)
        run.whole = False                                               # a step that is half applied is not saved
        optimizer.step()
        optimizer.zero_grad()
        # --------------------------------------------------------------------------------------------------------

        questions = sum(len(example.kept_questions) for example in examples)
        run.count(step_pages, questions)
        run.log(bar, train_loss=loss, lr=max(group["lr"] for group in optimizer.param_groups), grad_norm=norm,
                questions=questions, answer_tokens=tokens, data_wait=data_wait, peak_gb=peak_gb(args.device),
                questions_per_second=questions / (time.perf_counter() - started))
        bar.update(100 * min(1, max((step + 1) / (args.steps or math.inf), run.state["rows"] / all_rows)) - bar.n)


def main():
    args = parse_args()
    if args.export:
        from extras.export import export
        return export(*args.export, args.format, args.push_to_hub, args.allow_changed)
    ranks = None
    if "RANK" in os.environ:                                # torchrun started several processes, or one
        from extras import distributed as ranks
        ranks.check_device(args.device)
    folder = (lock(args.out) if args.resume else
              new_folder(args.out or f"runs/{datetime.now():%Y%m%d-%H%M%S}", free=not args.out))
    with ranks.on_rank_0(folder) if ranks else folder as folder:
        args.out = str(folder)
        fit(args, ranks)


def fit(args, ranks):
    """Train, in a folder that is locked; on several `ranks`, the module of that name, or in one process."""
    run = ranks.RankFolder(args) if ranks else RunFolder(args)
    if all(Path(name).is_file() for name, _ in named_parts(args.data)):
        open_rows(args.data, "train", hold_out=False)       # a malformed row is refused before a model is loaded
    model = load_model(args, ranks)
    run.compare("base_fingerprint", model.fingerprint, f"base model {args.model}")
    recipes.fit_to_size(args, rates_of(args.lr), sum(parameter.numel() for parameter in model.parameters()))
    choose_split(args, model)
    if ranks:
        ranks.share_settings(args)
    print_run(args, model, ranks)
    optimizer = make_optimizer(model, args)
    with (tqdm(total=100, bar_format=PROGRESS, file=sys.stderr) as bar, run.ending(model, optimizer) as stop):
        run.restore(model, optimizer)
        first, skips = run.state["step"], run.skip_log()
        data = open_data(args, model, run, skips, ranks)
        run.begin()
        train(args, run, model, optimizer, data, bar, stop, ranks)
        run.finish(model, first, skips)
    print(f"{count(run.state['step'], 'step')}, {count(run.state['questions'], 'question')}; {skips}; "
          f"peak memory: {peak_gb(args.device):.2f} GB")
    print(next_steps(run.path))


if __name__ == "__main__":
    if "RANK" in os.environ:
        from extras.distributed import run_together as run
    run(main)
