"""What does it answer for my page?

    python infer.py --model runs/my-run --image receipt.png "What is the total amount?"
    python infer.py --image a.png --image b.png "What differs between the two pages?"
    python infer.py --video clip.mp4 "What happens?"                              8 frames; needs pip install av, a GIF does not
    python infer.py --web                                                         the same in a browser
    python infer.py --image https://example.com/page.jpg                          no question: a chat
    python infer.py --questions questions.jsonl --batch 8 > answers.jsonl         {"question", "images"} a line
    python infer.py --folder scans --out answers.jsonl "What is the date?"        the same of every image, goes on when repeated
    python infer.py --evaluate DATA --predictions predictions.json                a whole split, with its scores

The answer goes to standard output, everything else to standard error. An "<image>" in the question says where an image
belongs; without any, the images come first, one to a line.
"""
import functools
import json
import os
import sys
from pathlib import Path

from data import PageDataset, group_rows_into_pages, load_examples, open_rows
from extras.chat_cli import SETTINGS, ChatShell, answer_one
from extras.explain import explain
from extras.int8 import to_int8
from extras.many import answer_many, folder_questions, go_on, read_questions
from extras.pictures import draw_attention, draw_tiles, save_picture
from extras.score import SCORES
from extras.split import evaluate
from extras.video import load_images, read_video
from extras.web import serve
from model import InputError, InternVL
from model.errors import OneLineParser, float_in, run, int_in
from model.generate import generate
from model.prompt import clean


# -------------------------------------------------------------------------------------------------------------- arguments

def parse_arguments():
    parser = OneLineParser(description=__doc__, usage="%(prog)s [FLAG ...] [QUESTION]")
    add_asked(parser.add_argument_group("what is asked"))
    add_many(parser.add_argument_group("many questions"))
    add_answer(parser.add_argument_group("how it is answered"))
    add_inside(parser.add_argument_group("what the model sees"))
    add_machine(parser.add_argument_group("machine and browser"))
    if parser.parse_args().tiny:
        parser.set_defaults(model="tiny", device="cpu")
    arguments = parser.parse_args()
    for broken, message in rules(arguments):
        if broken:
            parser.error(message)
    return arguments


def add_asked(group):
    group.add_argument("question", nargs="?", type=clean,
                       help="what to ask; none: a chat, or one question a line from standard input")
    group.add_argument("--model", default="OpenGVLab/InternVL2-1B",
                       help="Hub id, model, run or adapter folder, or checkpoint (%(default)s)")
    group.add_argument("--tiny", action="store_true", help="the embedded model, on the CPU")
    group.add_argument("--image", action="append", default=[], metavar="PATH|URL",
                       help="an image, a PDF (scan.pdf#2: its second page), - for standard input; may be given several times")
    group.add_argument("--video", metavar="PATH", help="a film (needs the package av), or an animated GIF, WebP or PNG")
    group.add_argument("--frames", type=int_in(1), default=8, help="frames seen of a video, one tile each (%(default)s)")
    group.add_argument("--span", type=float_in(0, 1e9), nargs=2, metavar="SECOND", help="part of the video (all of it)")
    group.add_argument("--allow-private", action="store_true", help="fetch images from private networks too")


def add_many(group):
    group.add_argument("--questions", metavar="FILE.jsonl", help='answer many: {"question": ..., "images": [...]} a line; '
                       'one that cannot be answered gets an "error" for its answer')
    group.add_argument("--folder", metavar="DIR", help="ask QUESTION of every image and PDF in a folder, likewise")
    group.add_argument("--out", metavar="FILE.jsonl", help="add their answers to a file, after those it holds already")
    group.add_argument("--evaluate", metavar="DATA",
                       help="answer and score a whole split: Hub id, local folder in Hub layout, or file")
    group.add_argument("--split", help="of --evaluate (validation; of a file: all of it)")
    group.add_argument("--predictions", metavar="FILE.json",
                       help="answers of --evaluate, as the challenge takes them; goes on where it was interrupted")
    group.add_argument("--batch", type=int_in(1), default=1,
                       help="questions, or pages of --evaluate, answered at once (%(default)s)")


def add_answer(group):
    group.add_argument("--max-tiles", type=SETTINGS["max_tiles"], default=12,
                       help="tiles an image may be cut into, thumbnail not counted (%(default)s)")
    group.add_argument("--max-new-tokens", type=SETTINGS["max_new_tokens"], default=512,
                       help="longest answer, in tokens (%(default)s)")
    group.add_argument("--temperature", type=SETTINGS["temperature"], default=0.0,
                       help="0: always the likeliest token (%(default)s)")
    group.add_argument("--top-p", type=SETTINGS["top_p"], default=1.0,
                       help="draw from the likeliest tokens of this probability (%(default)s)")
    group.add_argument("--seed", type=SETTINGS["seed"], default=0, help="of drawn tokens (%(default)s)")
    group.add_argument("--json", action="store_true", help="print an object with the answer, its tokens and timings")


def add_inside(group):
    group.add_argument("--show", metavar="FILE.png", help="draw the first image as it is cut into tiles")
    group.add_argument("--attend", metavar="FILE.png", help="draw where the answer's tokens looked on the images")
    group.add_argument("--explain", metavar="FILE.html",
                       help="write what happened to the image and the question, step by step, to be read in a browser")


def add_machine(group):
    group.add_argument("--device", help="cuda, cpu, ... (a GPU if there is one)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, else float32")
    group.add_argument("--int8", action="store_true", help="weights of a byte: least memory, faster with bfloat16 on a CPU")
    group.add_argument("--web", action="store_true", help="the chat in a browser, for this machine alone")
    group.add_argument("--port", type=int_in(0, 65535), default=7860, help="of --web; 0: a free one (%(default)s)")


def rules(flags):
    """What cannot be asked for together: (whether it is, what to do instead)."""
    asked, pictures = flags.question is not None, bool(flags.image or flags.video)
    one_shot = asked or pictures
    return (
        (flags.questions and one_shot,
         "--questions names the questions and images itself; give no QUESTION and no --image or --video beside it"),
        (flags.folder and (not asked or pictures or flags.questions),
         "--folder asks one QUESTION of the images in a folder; give one, and no --image, --video or --questions"),
        (flags.out and not (flags.questions or flags.folder),
         "--out is for the answers of --questions or --folder"),
        *((path and not Path(path).parent.is_dir(), f"{path}: there is no folder {Path(path or '').parent}; make it first")
          for path in (flags.out, flags.predictions)),
        ((flags.attend or flags.show) and not (asked and pictures),
         "--show and --attend are for a QUESTION about an --image or a --video"),
        (flags.explain and not (asked and len(flags.image) == 1),
         "--explain is for a QUESTION about one --image"),
        (flags.explain and (flags.show or flags.attend or flags.json or flags.video or flags.temperature),
         "--explain tells of one image and its likeliest answer; give no --show, --attend, --json, --video or --temperature"),
        (flags.web and (one_shot or flags.questions),
         "--web takes images and questions in the browser; give none beside it"),
        ("-" in flags.image and not asked,
         "--image - reads the image from standard input; give a QUESTION beside it"),
        (flags.evaluate and (one_shot or flags.questions or flags.folder or flags.web),
         "--evaluate names the questions and images itself; give no QUESTION and no images beside it"),
        ((flags.predictions or flags.split) and not flags.evaluate,
         "--predictions and --split belong to --evaluate DATA"),
        (asked and not flags.question.strip(),
         "the question is empty; write what you want to know"),
    )


# ---------------------------------------------------------------------------------------------------------------- answers

def generate_with(model, arguments):
    """`generate` with its model and settings: (tiles, prompt) pairs and, if there are any, their `caches` -> steps."""
    def steps(pages, **caches):
        return generate(model, pages, arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed,
                        **caches)
    return steps


def answer_file(model, arguments, asked, load):
    """Print one object a line for each of the (question, sources) pairs, or add it to --out."""
    out, done = go_on(Path(arguments.out), asked) if arguments.out else (sys.stdout, 0)
    asked = asked[done:]
    answers = answer_many(model, asked, load, generate_with(model, arguments), arguments.max_tiles, arguments.max_new_tokens,
                          arguments.batch)
    for (_, sources), answer in zip(asked, answers):
        print(json.dumps(answer | {"images": sources}, ensure_ascii=False), file=out, flush=True)


def answer_split(model, arguments):
    """Answer a whole split, print its scores."""
    names = ("model", "evaluate", "split", "max_tiles", "max_new_tokens", "temperature", "top_p", "seed", "int8")
    settings = {name: getattr(arguments, name) for name in names} | {"dtype": str(model.dtype).split(".")[-1]}
    rows = open_rows(arguments.evaluate, arguments.split or "validation", hold_out=bool(arguments.split))
    max_length = model.config.language.max_positions - arguments.max_new_tokens
    examples = PageDataset(model, arguments.max_tiles, max_length, arguments.allow_private)
    workers = min(4, os.cpu_count() or 1) if model.device.type == "cuda" else 0
    load = functools.partial(load_examples, examples=examples, workers=workers)
    path = Path(arguments.predictions) if arguments.predictions else None
    pages = group_rows_into_pages(rows, answered=False)
    answers, table = evaluate(model, pages, load, examples.write, generate_with(model, arguments), settings,
                              arguments.batch, path)
    if arguments.json:
        print(json.dumps(table, ensure_ascii=False))
    else:
        print_scores(answers, table, settings)


def print_scores(answers, table, settings):
    print(f"{len(answers)} questions, {table['all']['questions'] if table else 0} of them with an answer to compare with; "
          + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"{'':<32} questions  " + "  ".join(SCORES))
    for name, row in table.items():
        print(f"{name:<32} {row['questions']:>9}  " + "  ".join(f"{row[score]:>{len(score)}.4f}" for score in SCORES))


def talk(model, arguments, images, frames, settings):
    """A chat about the images and frames, or one QUESTION, with the pictures of --show and --attend."""
    chat = model.chat(**settings)
    for image in images:
        chat.add_image(image)
    chat.add_video(frames)
    if arguments.show:
        save_picture(draw_tiles(chat.pictures[:1], model.config.tokens_per_tile), arguments.show)
    if arguments.question is None:
        return ChatShell(chat, arguments.allow_private, arguments.json).run()
    answer_one(chat, arguments.question, arguments.json)
    if arguments.attend:
        save_picture(draw_attention(chat), arguments.attend)


def explain_to(path, model, image, question, settings):
    """Write the explanation; print the answer, which is greedy."""
    text, answer = explain(model, image, question, settings["max_tiles"], settings["max_new_tokens"])
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); expected a name like out.html "
                         "in a folder that exists") from error
    print(answer)


def main():
    arguments = parse_arguments()
    load = functools.partial(load_images, allow_private=arguments.allow_private)
    # before the model: a wrong path is told at once
    images = [image for source in arguments.image for image in load(source)]
    frames = read_video(arguments.video, arguments.frames, arguments.span) if arguments.video else []
    many = None
    if arguments.questions:
        many = read_questions(Path(arguments.questions))
    elif arguments.folder:
        many = folder_questions(arguments.folder, arguments.question)
    model = InternVL.from_pretrained(arguments.model, arguments.device, arguments.dtype)
    if arguments.int8:
        to_int8(model)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if arguments.evaluate:
        answer_split(model, arguments)
    elif many is not None:
        answer_file(model, arguments, many, load)
    elif arguments.web:
        serve(model, arguments.port, settings)
    elif arguments.explain:
        explain_to(arguments.explain, model, images[0], arguments.question, settings)
    else:
        talk(model, arguments, images, frames, settings)


if __name__ == "__main__":
    run(main)
