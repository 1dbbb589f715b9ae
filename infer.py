"""What does it answer for my page?

    python infer.py --model runs/my-run --image receipt.png "What is the total amount?"
    python infer.py --image a.png --image b.png "What differs between the two pages?"
    python infer.py --image https://example.com/page.jpg                          no question: a chat
    python infer.py --questions questions.jsonl --batch 8 > answers.jsonl         {"question", "images"} a line

The answer goes to standard output, everything else to standard error. An "<image>" in the question says where an image
belongs; without any, the images come first, one to a line.
"""
import json
import sys
import time
from pathlib import Path

import numpy as np

from model import InputError, InternVL
from model.errors import OneLineParser, real_number, run, whole_number
from model.generate import generate
from model.network import fetch
from model.prompt import PLACEHOLDER, conversation_prompt
from model.tiling import read_image, tile_page


def parse_arguments():
    parser = OneLineParser(description=__doc__)
    parser.add_argument("question", nargs="?", help="what to ask; none: a chat, or one question a line from standard input")
    parser.add_argument("--tiny", action="store_true", help="the embedded model, on the CPU")
    parser.add_argument("--model", default="OpenGVLab/InternVL2-1B", help="Hub id, model folder, run folder or checkpoint (%(default)s)")
    parser.add_argument("--image", action="append", default=[], metavar="PATH|URL", help="an image; may be given several times")
    parser.add_argument("--allow-private", action="store_true", help="fetch images from private networks too")
    parser.add_argument("--questions", metavar="FILE.jsonl", help='answer many: {"question": ..., "images": [...]} a line')
    parser.add_argument("--batch", type=whole_number(1), default=1, help="questions of --questions answered at once (%(default)s)")
    parser.add_argument("--max-tiles", type=whole_number(1, 128), default=12, help="tiles an image may be cut into, thumbnail not counted (%(default)s)")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=512, help="longest answer (%(default)s)")
    parser.add_argument("--temperature", type=real_number(0, 1000), default=0.0, help="0: always the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=real_number(1e-6, 1), default=1.0, help="draw from the likeliest tokens of this probability (%(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of drawn tokens (%(default)s)")
    parser.add_argument("--device", help="cuda, cpu, ... (a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--json", action="store_true", help="print an object with the answer, its tokens and timings")
    if parser.parse_args().tiny:
        parser.set_defaults(model="tiny", device="cpu")
    arguments = parser.parse_args()
    if arguments.questions and (arguments.question is not None or arguments.image):
        parser.error("--questions names the questions and images itself; give no QUESTION and no --image beside it")
    if arguments.question is not None:
        arguments.question = clean(arguments.question)
    return arguments


def clean(text):
    """Text as the tokenizer takes it: what is not UTF-8 becomes a replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def load_image(source, allow_private=False):
    """A Pillow image from a path or an http(s) address. Raises InputError."""
    if source.startswith(("http://", "https://")):
        return read_image(fetch(source, allow_private), source)
    return read_image(source, source)


def cut_images(model, images, max_tiles):
    """The tiles of each Pillow image, uint8 (n, 3, 448, 448)."""
    config = model.config
    return [tile_page(image, max_tiles, config.vision.tile_pixels, config.thumbnail) for image in images]


def make_prompt(model, tiles, turns, max_new_tokens):
    """Tiles of all images in one array, and the prompt. Raises InputError for what the model has no positions for."""
    prompt = conversation_prompt(model.tokenizer, model.config.tokens_per_tile, [len(t) for t in tiles], turns)
    most = model.config.language.max_positions
    if len(prompt.ids) + max_new_tokens > most:
        raise InputError(f"{len(prompt.ids)} tokens of prompt and {max_new_tokens} of answer exceed the model's {most}; "
                         "lower --max-tiles or --max-new-tokens, or ask with fewer images or words")
    return np.concatenate(tiles) if tiles else [], prompt


def ask(model, arguments, turns, tiles, show=lambda text: None):
    """Answer the last of `turns`, calling `show` with each piece of text as it comes. Returns the object that --json prints."""
    page = make_prompt(model, tiles, turns, arguments.max_new_tokens)
    started, first, tokens, shown = time.perf_counter(), None, [], ""
    for step in generate(model, [page], arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed):
        first = first or time.perf_counter()
        tokens += step
        text = decode(model, tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):          # half a character: wait for the rest of its bytes
            show(text[len(shown):])
            shown = text
    show(decode(model, tokens)[len(shown):])
    finished = time.perf_counter()
    return describe(model, turns[-1][0], tokens, tiles, page, first - started,
                    (len(tokens) - 1) / (finished - first) if len(tokens) > 1 else None)


def decode(model, tokens):
    return model.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def describe(model, question, tokens, tiles, page, prefill_seconds, decode_tokens_per_second):
    return {"question": question, "answer": decode(model, tokens), "tokens": tokens, "tiles": [len(t) for t in tiles],
            "prompt_tokens": len(page[1].ids), "prefill_seconds": prefill_seconds,
            "decode_tokens_per_second": decode_tokens_per_second}


def answer_one(model, arguments, turns, tiles, one_line=False):
    """Ask and print, as the answer comes or, for `one_line`, when it is whole; returns the answer."""
    if arguments.json:
        result = ask(model, arguments, turns, tiles)
        print(json.dumps(result, ensure_ascii=False), flush=True)
    elif one_line:
        result = ask(model, arguments, turns, tiles)
        print(" ".join(result["answer"].split()), flush=True)
    else:
        result = ask(model, arguments, turns, tiles, show=lambda text: print(text, end="", flush=True))
        print(flush=True)
    return result["answer"]


def chat(model, arguments, tiles):
    """Questions from the terminal or, one a line, from standard input; each sees the conversation before it."""
    turns, typed = [], sys.stdin.isatty()
    while True:
        print("> " if typed else "", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        question = clean(line.strip())
        if not question:
            continue
        if not turns and PLACEHOLDER not in question:           # the images keep this place in the turns to come
            question = f"{PLACEHOLDER}\n" * len(tiles) + question
        answer = answer_one(model, arguments, [*turns, (question, None)], tiles, one_line=not typed)
        turns.append((question, answer))


def answer_file(model, arguments):
    """Answer the questions of a jsonl file, --batch at a time; print one object a line, in the file's order."""
    path = Path(arguments.questions)
    asked = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                entry = json.loads(line)
                images = [entry["images"]] if isinstance(entry.get("images"), str) else entry.get("images") or []
                # a path is taken from here or, if there is no such file, from beside the questions
                images = [str(path.parent / i) if "://" not in i and not Path(i).exists() else i for i in images]
                asked.append((clean(entry["question"]), images))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a question ({type(error).__name__}: {error}); expected "
                             '{"question": "...", "images": ["..."]}') from error
    for start in range(0, len(asked), arguments.batch):
        batch = asked[start:start + arguments.batch]
        loaded = [[load_image(image, arguments.allow_private) for image in images] for _, images in batch]
        tiles = [cut_images(model, images, arguments.max_tiles) for images in loaded]
        pages = [make_prompt(model, t, [(question, None)], arguments.max_new_tokens) for t, (question, _) in zip(tiles, batch)]
        started, times = time.perf_counter(), []
        steps = []
        for step in generate(model, pages, arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed):
            steps.append(step)
            times.append(time.perf_counter() - started)
        for (question, _), t, page, column in zip(batch, tiles, pages, zip(*steps)):
            tokens = [token for token in column if token is not None]
            n = len(tokens)
            speed = (n - 1) / (times[n - 1] - times[0]) if n > 1 else None
            print(json.dumps(describe(model, question, tokens, t, page, times[0], speed), ensure_ascii=False), flush=True)


def main():
    arguments = parse_arguments()
    images = [load_image(source, arguments.allow_private) for source in arguments.image]        # before the model: told at once
    model = InternVL.from_pretrained(arguments.model, arguments.device, arguments.dtype)
    if arguments.questions:
        return answer_file(model, arguments)
    tiles = cut_images(model, images, arguments.max_tiles)
    if arguments.question is not None:
        answer_one(model, arguments, [(arguments.question, None)], tiles)
    else:
        chat(model, arguments, tiles)


if __name__ == "__main__":
    run(main)
