"""Ask InternVL2 about a page.

    python infer.py --model runs/my-run --image receipt.png "What is the total amount?"
    python infer.py --image a.png --image b.png "What differs between the two pages?"
    python infer.py --video clip.mp4 "What happens?"                         8 frames; pip install av, not for a GIF
    python infer.py --web                                                    the same in a browser
    python infer.py --image https://example.com/page.jpg                     no question: a chat
    python infer.py --questions questions.jsonl --batch 8 > answers.jsonl    {"question", "images"} per line
    python infer.py --folder scans --out answers.jsonl "What is the date?"   about every image; repeat it to resume
    python infer.py --evaluate DATA --predictions predictions.json           a whole split, with its scores

The answer goes to standard output, everything else to standard error. An "<image>" in the question says where an image
belongs; without any, the images come first, one per line.
"""
import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from extras.cli import ANSWER_SETTINGS, SCORES, OneLineParser, add_row_flags, float_in, int_in, run
from extras.video import load_images, read_video
from model import InputError, InternVL
from model.checkpoint import BESIDE_WEIGHTS, CHECKPOINTS, INDEX, SETTINGS, SHARDS, WEIGHTS, settings_of
from model.errors import warn
from model.tokenizer import clean

# in the folder of --model
MODEL_FILES = (WEIGHTS, INDEX, SHARDS, SETTINGS, *BESIDE_WEIGHTS, "adapter_*", f"{CHECKPOINTS}/*")

# ------------------------------------------------------------------------------------------------------------ arguments

def parse_arguments():
    parser = OneLineParser(description=__doc__, usage="%(prog)s [FLAG ...] [QUESTION]")
    add_input_flags(parser.add_argument_group("one question"))
    add_mode_flags(parser.add_argument_group("other ways to ask (choose one)"))
    add_file_flags(parser.add_argument_group("many questions"))
    add_answer_flags(parser.add_argument_group("the answer"))
    add_machine_flags(parser.add_argument_group("machine"))
    arguments, more = parser.parse_known_args()
    if arguments.tiny:
        parser.set_defaults(model="tiny", device="cpu")
    if arguments.evaluate:                                              # as the run does, unless they are typed
        parser.set_defaults(**{name: settings_of(arguments.model).get(name) for name in ("instruction", "columns")})
    arguments, more = parser.parse_known_args()
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}" if more[0].startswith("-")
                     else "give one QUESTION, in quotes, or use --questions FILE")
    for wrong, message in conflicts(arguments):
        if wrong:
            parser.error(message)
    return arguments


def add_input_flags(group):
    group.add_argument("question", nargs="?", type=clean,
                       help="the question; without it: a chat, or one question per line of standard input")
    group.add_argument("--model", default="OpenGVLab/InternVL2-1B",
                       help="Hub id, model, run or adapter folder, or checkpoint (%(default)s)")
    group.add_argument("--tiny", action="store_true", help="the embedded model, on the CPU")
    group.add_argument("--allow-changed", action="store_true", help="read a run although its base model has changed")
    group.add_argument("--image", action="append", default=[], metavar="PATH|URL",
                       help="an image, a PDF (scan.pdf#2: its second page) or - for standard input; repeatable")
    group.add_argument("--video", metavar="PATH", help="a video (needs the package av), or an animated GIF, WebP, PNG")
    group.add_argument("--frames", type=int_in(1, 999), default=8, help="frames of the video, one tile each (8)")
    group.add_argument("--span", type=float_in(0, 1e9), nargs=2, metavar=("FROM", "TO"), help="seconds to show (all)")
    group.add_argument("--allow-private", action="store_true", help="fetch images from private networks too")


def add_mode_flags(group):
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--questions", metavar="FILE.jsonl",
                       help='answer many: {"question": ..., "images": [...]} per line; one that fails gets an "error"')
    modes.add_argument("--folder", metavar="DIR", help="ask QUESTION about every image and PDF in a folder")
    modes.add_argument("--evaluate", metavar="DATA",
                       help="answer and score a whole split: Hub id, local folder in Hub layout, or file")
    modes.add_argument("--web", action="store_true", help="chat in a browser, on this machine only")
    modes.add_argument("--explain", metavar="FILE.html",
                       help="follow the image and the question through the model, step by step, on one HTML page")


def add_file_flags(group):
    group.add_argument("--out", metavar="FILE.jsonl",
                       help="file for the answers of --questions or --folder; the answers in it are kept")
    group.add_argument("--split", help="split for --evaluate (validation; of a file, everything)")
    add_row_flags(group.add_argument)
    group.add_argument("--predictions", metavar="FILE.json",
                       help="file for the answers of --evaluate in DocVQA's format; the answers in it are kept")
    group.add_argument("--batch", type=int_in(1), default=1, help="pages answered at once (%(default)s)")
    group.add_argument("--overwrite", action="store_true", help="replace files that exist; keep no answer in them")


def add_answer_flags(group):
    group.add_argument("--system", metavar="TEXT", type=clean, help="text of the system turn (the model's own)")
    for name, default, text in (
            ("max_tiles", None, "most tiles per image, thumbnail not counted (as in the model's training)"),
            ("max_new_tokens", 512, "longest answer, in tokens"), ("temperature", 0.0, "0: the most likely token"),
            ("top_p", 1.0, "sample from the likeliest tokens that sum to this"), ("seed", 0, "seed for sampling"),
            ("repetition_penalty", None, "above 1: less likely repeats (1.0; XComposer2: 1.005)")):
        group.add_argument(f"--{name.replace('_', '-')}", type=ANSWER_SETTINGS[name], default=default,
                           help=text + " (%(default)s)" * (default is not None))
    group.add_argument("--json", action="store_true", help="print a JSON object: the answer, its tokens, timings")
    group.add_argument("--show", metavar="FILE.png", help="draw the tiles of the first image")
    group.add_argument("--attend", metavar="FILE.png", help="draw where the answer looked on the images")


def add_machine_flags(group):
    group.add_argument("--device", help="cuda, cpu, ... (a GPU if there is one)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights (bfloat16 on a GPU, else float32)")
    group.add_argument("--int8", action="store_true", help="8-bit weights: least memory, faster with bfloat16 on a CPU")
    group.add_argument("--port", type=int_in(0, 65535), default=7860, help="for --web; 0: any free port (%(default)s)")


def conflicts(flags):
    """(whether flags contradict each other, what to do instead) pairs."""
    asked, pictures = flags.question is not None, bool(flags.image or flags.video)
    drawn = flags.show or flags.attend
    return (
        (asked and not flags.question.strip(), "the question is empty; write what you want to know"),
        ((flags.questions or flags.evaluate or flags.web) and (asked or pictures),
         "--questions, --evaluate and --web have their own questions and images; give no QUESTION, --image or --video"),
        (flags.folder and (not asked or pictures),
         "--folder asks one QUESTION about the images in a folder; give one, and no --image or --video"),
        (flags.explain and not (asked and len(flags.image) == 1), "--explain is for a QUESTION about one --image"),
        (flags.explain and (drawn or flags.json or flags.video or flags.temperature),
         "--explain follows the most likely answer; give no --show, --attend, --json, --video or --temperature"),
        ("RANK" in os.environ and not flags.evaluate, "torchrun is for --evaluate; start it without torchrun"),
        (drawn and not (asked and pictures), "--show and --attend are for a QUESTION about an --image or a --video"),
        ("-" in flags.image and not asked, "--image - reads the image from standard input; give a QUESTION beside it"),
        (flags.out and not (flags.questions or flags.folder), "--out is for the answers of --questions or --folder"),
        (not flags.evaluate and {flags.predictions, flags.split, flags.instruction, flags.columns} != {None},
          "--predictions, --split, --instruction and --columns belong to --evaluate DATA"),
    )


# ---------------------------------------------------------------------------------------------------------------- files

def check_outputs(flags, images=()):
    """Raise InputError for a file to be written that exists, unless it continues or --overwrite replaces it.

    None may be an input, or two of them the same file. `images`: those that questions are about.
    """
    continued = [flags.out, flags.predictions, flags.predictions and flags.predictions + SCORES]
    outputs = [name for name in (*continued, flags.show, flags.attend, flags.explain) if name]
    if outputs:
        from extras.outputs import new_file
        from extras.sources import named_parts
        data = [name for name, _ in named_parts(flags.evaluate)] if flags.evaluate else []
        read = [*images, *flags.image, *data, *filter(None, (flags.model, flags.video, flags.questions))]
        if flags.overwrite:                                 # otherwise a file that is not ours is refused in any case
            read += [file for pattern in MODEL_FILES for file in Path(flags.model).glob(pattern)]
            read += [file for name in data for file in Path(name).glob("**/*")]
        for name in outputs:
            read.append(new_file(name, flags.overwrite, read, resume=name in continued))


@contextlib.contextmanager
def held(name, overwrite, *suffixes):
    """Hold a file of answers for this process alone; `overwrite` removes it, and NAME + suffix. Yields its path."""
    from extras.outputs import lock
    with lock(name) if name else contextlib.nullcontext():
        for suffix in ("", *suffixes) if name and overwrite else ():
            Path(name + suffix).unlink(missing_ok=True)
        yield name and Path(name)


# ------------------------------------------------------------------------------------------------ the model, a question

def load_model(arguments):
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    late = arguments.int8 and device.startswith("cuda")         # only the small weights need to fit into the GPU
    dtype = arguments.dtype or ("bfloat16" if late else None)
    model = InternVL.from_pretrained(arguments.model, "cpu" if late else device, dtype,
                                     allow_changed=arguments.allow_changed)
    arguments.max_tiles = arguments.max_tiles or model.config.max_tiles
    if arguments.system is not None:
        model.config = replace(model.config, template=replace(model.config.template, system=arguments.system))
    if arguments.int8:
        from extras.int8 import to_int8
        to_int8(model).to(device)
    return model


def settings(arguments):
    """The settings of an answer."""
    return {name: getattr(arguments, name) for name in ANSWER_SETTINGS}


def open_chat(arguments):
    """A chat that has been shown the images and frames."""
    # read before the model is loaded: a wrong path is reported at once
    images = [image for source in arguments.image for image in load_images(source, arguments.allow_private)]
    frames = read_video(arguments.video, arguments.frames, arguments.span) if arguments.video else []
    chat = load_model(arguments).chat(**settings(arguments))
    for image in images:
        chat.add_image(image)
    chat.add_video(frames)
    return chat


def answer(arguments):
    """Print the answer to one QUESTION, as it comes, and draw the pictures of --show and --attend."""
    from extras.chat_cli import answer_one
    chat = open_chat(arguments)
    if arguments.show:
        from extras.pictures import draw_tiles, save_picture
        save_picture(draw_tiles(chat.pictures[:1], chat.model.config.tokens_per_tile), arguments.show)
    answer_one(chat, arguments.question, arguments.json)
    if arguments.attend:
        from extras.pictures import draw_attention, save_picture
        save_picture(draw_attention(chat), arguments.attend)


# ---------------------------------------------------------------------------------------------------------- other modes

def answer_many(arguments):
    from extras.evaluate import answer_questions, folder_questions, read_questions
    asked = (folder_questions(arguments.folder, arguments.question) if arguments.folder
             else read_questions(Path(arguments.questions)))
    check_outputs(arguments, [image for _, images in asked for image in images])
    model = load_model(arguments)
    with held(arguments.out, arguments.overwrite) as path:
        answer_questions(model, asked, path, arguments.batch, arguments.allow_private, **settings(arguments))


def evaluate(arguments):
    from extras.evaluate import evaluate_rows
    from extras.score import print_scores
    from extras.sources import is_synthetic, open_rows
    if is_synthetic(arguments.evaluate):
        raise InputError("synthetic pages have no end; draw some with python -m model.tiny.pages FOLDER N, "
                         "then give --evaluate FOLDER/questions.jsonl")
    ranks = None
    if "RANK" in os.environ:                                # torchrun started this process: rank 0 reads and writes
        from extras import distributed as ranks
        ranks.check_device(arguments.device)
    helps = bool(ranks and ranks.RANK)
    rows = [] if helps else open_rows(arguments.evaluate, arguments.split or "validation", 0, "plain",
                                      bool(arguments.split), arguments.columns, answered=False)
    of_files = [part for part, *_ in getattr(rows, "parts", [(rows,)]) if isinstance(part, list)]
    check_outputs(arguments, [image for part in of_files for row in part for image in row.get("images", ())])
    run_of = settings_of(arguments.model)
    if (run_of and arguments.split == "validation" and os.path.isfile(arguments.evaluate)
            and (run_of.get("eval_data") or not run_of.get("eval_every"))):
        warn(f"{arguments.model} held no pages out: these may have been trained on")
    model = load_model(arguments)
    made_with = {name: getattr(arguments, name)
                 for name in ("model", "evaluate", "split", "instruction", "columns", *ANSWER_SETTINGS, "int8")}
    made_with["dtype"] = str(model.dtype).split(".")[-1]
    with held(None if helps else arguments.predictions, arguments.overwrite, SCORES) as path:
        answers, table = evaluate_rows(model, rows, made_with, path, arguments.batch, arguments.allow_private, ranks)
    if arguments.json:
        print(json.dumps(table, ensure_ascii=False))
    else:
        print_scores(answers, table, made_with)


def explain(arguments):
    """Write the page for the browser; print the answer, which is greedy."""
    from extras.explain import explain
    image = load_images(arguments.image[0], arguments.allow_private)[0]
    model = load_model(arguments)
    text, likeliest = explain(model, image, arguments.question, arguments.max_tiles, arguments.max_new_tokens)
    try:
        Path(arguments.explain).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{arguments.explain}: cannot be written ({error.strerror}); expected a name like out.html "
                         "in a folder that exists") from error
    print(likeliest)


def main():
    arguments = parse_arguments()
    check_outputs(arguments)
    if arguments.questions or arguments.folder:
        answer_many(arguments)
    elif arguments.evaluate:
        evaluate(arguments)
    elif arguments.explain:
        explain(arguments)
    elif arguments.web:
        from extras.web import serve
        serve(load_model(arguments), arguments.port, settings(arguments))
    elif arguments.question is None:
        from extras.chat_cli import ChatShell
        ChatShell(open_chat(arguments), arguments.allow_private, arguments.json).run()
    else:
        answer(arguments)


if __name__ == "__main__":
    if "RANK" in os.environ:
        from extras.distributed import run_together as run
    run(main)
