"""Which settings has a run, and where do they come from? Flags, over a recipe, over the run that goes on, over defaults."""
import argparse
import os
from datetime import datetime
from pathlib import Path

import torch

from extras.cli import OneLineParser, float_in, int_in
from extras.recipes import LR, RECIPES, TINY_LR
from extras.sources import is_synthetic, named_parts
from model.checkpoint import read_settings
from model.lora import TARGETS
from model.tiny.pages import DOMAINS

PARTS = ("projector", "lora", "llm", "vision")
TINY = dict(model="tiny", data="synthetic", domain="negative", steps=400, warmup=0.05, eval_every=50, eval_pages=48,
            device="cpu", workers=0)                                    # what --tiny sets
# flags that a run cannot change half-way: what trains, and which page comes next
FIXED = ("train", "lora_rank", "lora_alpha", "lora_targets", "from_scratch", "seed", "shuffle", "look_ahead", "group_by_length")


def parse_settings(description=None):
    """The settings of train.py, from the command line: a namespace with the flags' names, none left to be decided."""
    parser = OneLineParser(description=description, usage="%(prog)s [FLAG ...]")
    for add_flags in (add_data_flags, add_lora_flags, add_length_flags, add_optimizer_flags, add_file_flags, add_machine_flags):
        add_flags(parser)
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
    if not settings.export and (settings.push_to_hub or settings.format != "official"):
        parser.error("--format and --push-to-hub say what becomes of --export RUN FOLDER; give that too")
    if settings.resume:
        refuse_another_run(parser, settings)
    settings.lr = choose_rates(parser, settings)
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


# ------------------------------------------------------------------------------------------------------------------ flags

def add_switch(group, flag, help, default=False):
    """--flag and --no-flag."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_data_flags(parser):
    group = parser.add_argument_group("model and data")
    flag = group.add_argument
    flag("--tiny", action="store_true", help="small model, drawn pages, CPU: sets the defaults of other flags")
    flag("--model", default="OpenGVLab/InternVL2-1B", help="Hub id, local folder, or tiny (%(default)s)")
    add_switch(group, "--from-scratch", "random weights in the shape that --model describes")
    flag("--data", default="zhangfaen/DocumentVQA",
         help="Hub id, folder in Hub layout, file (.json, .jsonl), or synthetic; several: a.jsonl=2,b.jsonl (%(default)s)")
    flag("--eval-data", metavar="DATA",
         help="to validate on (the validation split of --data; of a file one page in 20, which is then not trained on)")
    flag("--domain", type=domain_names, default="plain", help="what synthetic pages look like, comma-separated (%(default)s)")
    flag("--train", type=part_names, default="projector",
         help="parts that train, comma-separated: projector, lora, llm, vision, or all but lora (%(default)s)")
    flag("--recipe", choices=RECIPES, help="set the flags as a published recipe does; those typed beside it win")
    flag("--max-tiles", type=int_in(1, 128), default=12,
         help="tiles a page may be cut into, thumbnail not counted (%(default)s)")
    flag("--max-length", type=int_in(1), default=8192,
         help="tokens of a question with its page; longer ones are left out (%(default)s)")
    add_switch(group, "--shuffle", "pages in seeded order, or in file order", default=True)
    add_switch(group, "--allow-private", "fetch images from addresses of a private network too")
    add_switch(group, "--group-by-length", "micro-batches of pages of like size")
    flag("--look-ahead", type=int_in(1), default=512,
         help="rows over which a page's questions are gathered (%(default)s)")


def add_lora_flags(parser):
    flag = parser.add_argument_group("LoRA, with --train lora").add_argument
    flag("--lora-rank", type=int_in(1), default=16, help="width between the two matrices (%(default)s)")
    flag("--lora-alpha", type=float_in(1e-6, 1e6), default=32.0,
         help="what they add is multiplied by alpha / rank (%(default)s)")
    flag("--lora-dropout", type=float_in(0, 0.999), default=0.05, help="of what they read, while training (%(default)s)")
    flag("--lora-targets", type=target_names, default="llm",
         help="layers that get them, comma-separated: " + ", ".join(TARGETS) + " (%(default)s)")


def add_length_flags(parser):
    flag = parser.add_argument_group("batch and length of the run").add_argument
    flag("--batch-pages", type=int_in(1), default=1, help="pages in a micro-batch (%(default)s)")
    flag("--accumulate", type=int_in(1), default=8, help="micro-batches in an optimizer step (%(default)s)")
    flag("--steps", type=int_in(1), help="optimizer steps; with --epochs, the first one reached")
    flag("--epochs", type=int_in(1), help="times through the data (1 if --steps is not given)")


def add_optimizer_flags(parser):
    flag = parser.add_argument_group("optimizer: AdamW, beta1 0.9").add_argument
    flag("--lr", type=learning_rates, metavar="RATE|PART=RATE,...",
         help="highest learning rate, or one a part (" + ", ".join(f"{part}={rate:g}" for part, rate in LR.items()) + ")")
    flag("--beta2", type=float_in(0, 0.999999), default=0.999, help="how slowly the mean of squares moves (%(default)s)")
    flag("--schedule", choices=("constant", "linear", "cosine"), default="cosine", help="how it falls (%(default)s)")
    flag("--warmup", type=float_in(0, 1), default=0.03, help="fraction of the run in which it rises (%(default)s)")
    flag("--weight-decay", type=float_in(0, 1000), default=0.01,
         help="of matrices, not of biases and norms; 0: none (%(default)s)")
    flag("--clip", type=float_in(0, 1e9), default=1.0, help="largest norm of the gradient; 0: no clipping (%(default)s)")


def add_file_flags(parser):
    flag = parser.add_argument_group("evaluation and files").add_argument
    flag("--eval-every", type=int_in(0), default=200, help="steps between validations; 0: none (%(default)s)")
    flag("--eval-pages", type=int_in(1), default=64, help="pages of the validation set, always the same (%(default)s)")
    flag("--save-every", type=int_in(0), default=200, help="steps between checkpoints; 0: only at the end (%(default)s)")
    flag("--keep", type=int_in(1), default=5, help="newest checkpoints to keep, beside the best validated (%(default)s)")
    flag("--out", help="run folder (runs/ and the time of day)")
    flag("--resume", metavar="RUN", help="go on from a run folder, with its settings")
    flag("--export", nargs=2, metavar=("RUN", "FOLDER"), help="write a run's model as a model folder, and end")
    flag("--format", choices=("official", "transformers", "native", "peft"), default="official",
         help="layout of the folder: official, transformers' own (also called native), or the adapter alone (%(default)s)")
    flag("--push-to-hub", metavar="REPO", help="upload what --export wrote to this repository of the Hub")


def add_machine_flags(parser):
    group = parser.add_argument_group("machine")
    flag = group.add_argument
    flag("--device", help="cuda, cpu, ... (a GPU if there is one)")
    flag("--dtype", choices=("float32", "bfloat16"), help="of frozen weights and activations (bfloat16 on a GPU, else float32)")
    flag("--seed", type=int_in(0), default=0, help="of the pages' order and of random weights (%(default)s)")
    flag("--workers", type=int_in(0), default=min(4, os.cpu_count() or 1),
         help="processes that decode and tile pages (%(default)s)")
    add_switch(group, "--checkpoint-activations",
               "keep a block's input alone and run it again in the backward pass: less memory, a third more work")
    add_switch(group, "--compile", "compile the blocks with torch.compile")


# ----------------------------------------------------------------------------------------------------------------- values

def part_names(text):
    """'all' -> 'projector,llm,vision'."""
    text = "projector,llm,vision" if text == "all" else text
    for part in text.split(","):
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is no part of the model; expected {', '.join(PARTS)}, or all")
    return text


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


def learning_rates(text):
    """'4e-5' -> 4e-5; 'projector=1e-3,lora=1e-4' -> {'projector': 1e-3, 'lora': 1e-4}."""
    if "=" not in text:
        return float_in(0, 1000)(text)
    rates = [entry.split("=") for entry in text.split(",")]
    return {part: float_in(0, 1000)(rate) for parts, rate in rates for part in part_names(parts).split(",")}


def choose_rates(parser, settings):
    """The highest learning rate: a number, or {part: number} where the parts that train differ in it."""
    if isinstance(settings.lr, float):
        return settings.lr
    trained, typed = settings.train.split(","), settings.lr or {}
    if not typed.keys() <= set(trained):
        parser.error(f"--lr: a rate for {', '.join(typed)}, but --train {settings.train}")
    rates = (TINY_LR if settings.tiny else LR) | typed
    rates = {part: rates[part] for part in trained}
    return rates if len(set(rates.values())) > 1 else min(rates.values())


def refuse_another_run(parser, settings):
    """A run goes on in its own folder, trains what it trained, and sees its pages in the order it began with."""
    if settings.out != settings.resume:
        parser.error(f"--out {settings.out}: --resume goes on in its own folder; to begin another run from it, use "
                     f"--model {settings.resume}")
    kept = read_settings(settings.resume)
    for key in FIXED:
        if getattr(settings, key) != kept.get(key, getattr(settings, key)):
            parser.error(f"--{key.replace('_', '-')} {getattr(settings, key)}: not what the run trains with; "
                         f"to change that, begin a run with --model {settings.resume}")
    held_out = [bool(eval_every) and not eval_data for eval_every, eval_data in
                ((settings.eval_every, settings.eval_data), (kept.get("eval_every", 1), kept.get("eval_data")))]
    if held_out[0] != held_out[1] and any(Path(name).is_file() for name, _ in named_parts(settings.data)):
        parser.error("--eval-every or --eval-data: pages of the file that were held out would be trained on, or the reverse; "
                     f"to change that, begin a run with --model {settings.resume}")


def whole_paths(data):
    """'a.jsonl=2,owner/name' -> the same with the whole path of each file, so that a run can be used from any folder."""
    parts = [(name if is_synthetic(name) or not Path(name).exists() else str(Path(name).resolve()), weight)
             for name, weight in named_parts(data)]
    return ",".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in parts)
