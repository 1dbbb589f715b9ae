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
import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import Examples, gather, load_examples, load_image, open_rows
from model import InputError, InternVL
from model.chat import decode, describe, without_beginning
from model.errors import OneLineParser, real_number, run, whole_number
from model.explain import explain
from model.generate import generate
from model.int8 import to_int8
from model.language import Cache
from model.prompt import PLACEHOLDER, conversation_prompt, page_prompt
from model.score import SCORES, score_table
from model.show import draw_attention, draw_tiles
from model.tiling import read_image, tile_page
from model.video import read_video
from model.web import Server

SETTINGS = {                                    # of an answer, each with its type
    "max_tiles": whole_number(1, 128), "max_new_tokens": whole_number(1), "temperature": real_number(0, 1000),
    "top_p": real_number(1e-6, 1), "seed": whole_number(0)}
COMMANDS = """/image PATH|URL          show an image with the next question
/video PATH              show a video with it
/undo                    take the last question back; its images wait for the next one
/clear                   forget everything, images too
/settings [NAME VALUE]   see or change """ + ", ".join(SETTINGS)
PDF_DPI, PDF_PAGES = 200, 40                    # resolution that pages are drawn at, as of the scans in DocumentVQA
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")       # what an answer must not send to a terminal: it could be an order


def parse_arguments():
    parser = OneLineParser(description=__doc__)
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("question", nargs="?", help="what to ask; none: a chat, or one question a line from standard input")
    asked.add_argument("--model", default="OpenGVLab/InternVL2-1B", help="Hub id, model, run or adapter folder, or checkpoint (%(default)s)")
    asked.add_argument("--tiny", action="store_true", help="the embedded model, on the CPU")
    asked.add_argument("--image", action="append", default=[], metavar="PATH|URL",
                       help="an image, a PDF (scan.pdf#2: its second page), - for standard input; may be given several times")
    asked.add_argument("--video", metavar="PATH", help="a film (needs the package av), or an animated GIF, WebP or PNG")
    asked.add_argument("--frames", type=whole_number(1), default=8, help="frames seen of a video, one tile each (%(default)s)")
    asked.add_argument("--span", type=real_number(0, 1e9), nargs=2, metavar="SECOND", help="part of the video (all of it)")
    asked.add_argument("--allow-private", action="store_true", help="fetch images from private networks too")
    many = parser.add_argument_group("many questions")
    many.add_argument("--questions", metavar="FILE.jsonl", help='answer many: {"question": ..., "images": [...]} a line')
    many.add_argument("--folder", metavar="DIR", help="ask QUESTION of every image and PDF in a folder")
    many.add_argument("--out", metavar="FILE.jsonl", help="add their answers to a file, after those it holds already")
    many.add_argument("--evaluate", metavar="DATA", help="answer and score a whole split: Hub id, local folder in Hub layout, or file")
    many.add_argument("--split", help="of --evaluate (validation; of a file: all of it)")
    many.add_argument("--predictions", metavar="FILE.json", help="answers of --evaluate, as the challenge takes them; goes on where it was interrupted")
    many.add_argument("--batch", type=whole_number(1), default=1, help="questions of --questions or --folder, or pages of --evaluate, answered at once (%(default)s)")
    answer = parser.add_argument_group("how it is answered")
    answer.add_argument("--max-tiles", type=SETTINGS["max_tiles"], default=12, help="tiles an image may be cut into, thumbnail not counted (%(default)s)")
    answer.add_argument("--max-new-tokens", type=SETTINGS["max_new_tokens"], default=512, help="longest answer (%(default)s)")
    answer.add_argument("--temperature", type=SETTINGS["temperature"], default=0.0, help="0: always the likeliest token (%(default)s)")
    answer.add_argument("--top-p", type=SETTINGS["top_p"], default=1.0, help="draw from the likeliest tokens of this probability (%(default)s)")
    answer.add_argument("--seed", type=SETTINGS["seed"], default=0, help="of drawn tokens (%(default)s)")
    answer.add_argument("--json", action="store_true", help="print an object with the answer, its tokens and timings")
    inside = parser.add_argument_group("what the model sees")
    inside.add_argument("--show", metavar="FILE.png", help="draw the first image as it is cut into tiles")
    inside.add_argument("--attend", metavar="FILE.png", help="draw where the answer's tokens looked on the images")
    inside.add_argument("--explain", metavar="FILE.html", help="write what happened to the image and the question, step by step, to be read in a browser")
    machine = parser.add_argument_group("machine and browser")
    machine.add_argument("--device", help="cuda, cpu, ... (a GPU if there is one)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, else float32")
    machine.add_argument("--int8", action="store_true", help="weights of a byte: least memory, faster with bfloat16 on a CPU")
    machine.add_argument("--web", action="store_true", help="the chat in a browser, for this machine alone")
    machine.add_argument("--port", type=whole_number(0, 65535), default=7860, help="of --web; 0: a free one (%(default)s)")
    if parser.parse_args().tiny:
        parser.set_defaults(model="tiny", device="cpu")
    arguments = parser.parse_args()
    if arguments.questions and (arguments.question is not None or arguments.image or arguments.video):
        parser.error("--questions names the questions and images itself; give no QUESTION and no --image or --video beside it")
    if arguments.folder and (arguments.question is None or arguments.image or arguments.video or arguments.questions):
        parser.error("--folder asks one QUESTION of the images in a folder; give one, and no --image, --video or --questions")
    if arguments.out and not (arguments.questions or arguments.folder):
        parser.error("--out is for the answers of --questions or --folder")
    pictures = bool(arguments.image or arguments.video) and arguments.question is not None
    if (arguments.attend or arguments.show) and not pictures:
        parser.error("--show and --attend are for a QUESTION about an --image or a --video")
    if arguments.explain and (len(arguments.image) != 1 or arguments.question is None):
        parser.error("--explain is for a QUESTION about one --image")
    if arguments.web and (arguments.question is not None or arguments.image or arguments.video or arguments.questions):
        parser.error("--web takes images and questions in the browser; give none beside it")
    if "-" in arguments.image and arguments.question is None:
        parser.error("--image - reads the image from standard input; give a QUESTION beside it")
    if arguments.evaluate and (arguments.question is not None or arguments.image or arguments.video or arguments.questions
                               or arguments.folder or arguments.web):
        parser.error("--evaluate names the questions and images itself; give no QUESTION and no images beside it")
    if not arguments.evaluate and (arguments.predictions or arguments.split):
        parser.error("--predictions and --split belong to --evaluate DATA")
    if arguments.question is not None:
        arguments.question = clean(arguments.question)
        if not arguments.question.strip():
            parser.error("the question is empty; write what you want to know")
    return arguments


def clean(text):
    """Text as the tokenizer takes it: what is not UTF-8 becomes a replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def load_images(source, allow_private=False):
    """The Pillow images behind a path, an address, - for standard input, or a PDF's pages. Raises InputError."""
    if source == "-":
        return [read_image(sys.stdin.buffer.read(), "standard input")]
    path, _, number = source.rpartition("#") if re.search(r"\.pdf#\d+$", source, re.IGNORECASE) else (source, "", "")
    if "://" in source or not path.lower().endswith(".pdf"):
        return [load_image(source, allow_private)]
    try:
        import pypdfium2
    except ImportError as error:
        raise InputError(f"{source}: reading PDF needs the package pypdfium2: pip install pypdfium2") from error
    try:
        with pypdfium2.PdfDocument(path) as document:
            pages = [int(number) - 1] if number else range(len(document))
            if len(pages) > PDF_PAGES:
                raise InputError(f"{source}: {len(pages)} pages, at most {PDF_PAGES} at once; choose one with {source}#1")
            return [document[page].render(scale=PDF_DPI / 72).to_pil().convert("RGB") for page in pages]
    except (OSError, IndexError, pypdfium2.PdfiumError) as error:
        raise InputError(f"{source}: cannot be read as a PDF, or has no such page ({error})") from error


def answer_one(chat, question, as_json=False, one_line=False):
    """Ask and print, as the answer comes or, for `as_json` and `one_line`, when it is whole."""
    with contextlib.closing(chat.stream(question)) as pieces:
        for text in pieces:
            if not (as_json or one_line):
                print(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text, end="", flush=True)
    if as_json:
        print(json.dumps(chat.report, ensure_ascii=False), flush=True)
    else:
        print(" ".join(chat.report["answer"].split()) if one_line else "", flush=True)


def converse(chat, as_json=False, allow_private=False):
    """Questions from the terminal or, one a line, from standard input; each sees the conversation before it."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):              # not on Windows, whose terminal has a history of its own
            import readline                                 # noqa: F401: input() then has arrow keys and a history
        tell(f"{pictures_shown(chat)}Ask; /help tells the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    while (line := next_line(typed)) is not None:
        try:
            if re.match(r"/[a-z]+(\s|$)", line):
                tell(obey(chat, line, allow_private))
            elif line:
                answer_one(chat, line, as_json, one_line=not typed)
                if typed:
                    tell(how_it_went(chat))
        except InputError as error:
            if not typed:
                raise
            tell(" ".join(str(error).split()))
        except KeyboardInterrupt:
            if not typed:
                raise
            tell("\n(stopped)")


def tell(text):
    print(text, file=sys.stderr, flush=True)


def next_line(typed):
    """The next line, or None at the end. Ctrl-C at the prompt gives up the line, not the chat."""
    try:
        if typed and sys.stdout.isatty():
            return clean(input("> ").strip())
        print("> " if typed else "", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return clean(line.strip()) if line else None
    except EOFError:
        tell("")
        return None
    except KeyboardInterrupt:
        if not typed:
            raise
        tell("")
        return ""


def obey(chat, line, allow_private):
    """Do what a /command says; returns what there is to tell. Raises InputError."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/image" and rest:
        for image in load_images(rest, allow_private):
            chat.add_image(image)
        return pictures_shown(chat).rstrip()
    if command == "/video" and rest:
        chat.add_video(read_video(rest))
        return pictures_shown(chat).rstrip()
    if command == "/undo":
        chat.undo()
        return f"taken back; {len(chat.turns)} before it" + ("; its images wait for the next question" if chat.waiting else "")
    if command == "/clear":
        chat.clear()
        return "all forgotten, images too"
    if command == "/settings":
        if rest:
            change_setting(chat, *rest.partition(" ")[::2])
        return ", ".join(f"{name} {value}" for name, value in (chat.settings | {"max_tiles": chat.max_tiles}).items())
    if command == "/help":
        return COMMANDS
    raise InputError(f"{line}: not a command; there are {', '.join(re.findall('^/.*?(?=  )', COMMANDS, re.MULTILINE))}")


def change_setting(chat, name, value):
    try:
        value = SETTINGS[name](value.strip())
    except KeyError as error:
        raise InputError(f"{name}: no setting; there are {', '.join(SETTINGS)}") from error
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{name}: {error}; give a number, like /settings {name} 1") from error
    if name == "max_tiles":
        chat.max_tiles = value
    else:
        chat.settings[name] = value


def pictures_shown(chat):
    """A line for each picture that waits for the next question."""
    first = len(chat.pictures) - len(chat.waiting) + 1
    return "".join(f"image {i}: {picture.image.width} x {picture.image.height} pixels, {len(picture.tiles)} tiles\n"
                   for i, picture in enumerate(chat.waiting, first))


def how_it_went(chat):
    report = chat.report
    speed = report["decode_tokens_per_second"]
    return (f"[{sum(report['tiles'])} tiles, {report['prompt_tokens']:,} tokens, {chat.read:,} of them new; first token after "
            f"{report['prefill_seconds']:.2f} s" + (f", then {speed:.1f} a second]" if speed else "]"))


def read_questions(path):
    """The (question, images) of a jsonl file. Raises InputError that names the line."""
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
                if not entry["question"].strip():
                    raise ValueError("the question is empty")
                asked.append((clean(entry["question"]), images))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a question ({type(error).__name__}: {error}); expected "
                             '{"question": "...", "images": ["..."]}') from error
    return asked


def folder_questions(folder, question):
    """The same question about every image and PDF of a folder, by name."""
    suffixes = {*Image.registered_extensions(), ".pdf"}
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error}); expected a folder of images") from error
    return [(question, [str(path)]) for path in paths]


def go_on(path, asked):
    """A file of answers to be added to, and how many of the questions it answers already."""
    try:
        if path.exists():                                   # an interrupted run may leave half a line
            data = path.read_bytes()
            data = data[:data.rfind(b"\n") + 1]
            answered = [json.loads(line)["question"] for line in data.splitlines()]
            if answered != [question for question, _ in asked[:len(answered)]]:
                raise ValueError("they are not the first of these questions")
            os.truncate(path, len(data))
        else:
            answered = []
        return path.open("a", encoding="utf-8"), len(answered)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: its answers cannot be gone on with ({error}); give another --out") from error


def answer_many(model, arguments, asked, name_images):
    """Answer (question, sources) pairs, --batch at a time, and print one object a line, in their order.

    A page is read once for all questions about it: they are brought together, and branch off its prefix. A question that
    says where its images go has a prefix of its own.
    """
    out, done = go_on(Path(arguments.out), asked) if arguments.out else (sys.stdout, 0)
    page_of = [(tuple(sources), i if sources and PLACEHOLDER in question else None) for i, (question, sources) in enumerate(asked)]
    first = {page: i for i, page in reversed(list(enumerate(page_of)))}
    order = sorted(range(done, len(asked)), key=lambda i: first[page_of[i]])
    held, results = None, {}
    for start in range(0, len(order), arguments.batch):
        pages, caches, tiles_of = [], [], []
        for page, group in itertools.groupby(order[start:start + arguments.batch], key=page_of.__getitem__):
            if held is None or held[0] != page:
                images = [image for source in page[0] for image in load_images(source, arguments.allow_private)]
                tiles = cut_images(model, images, arguments.max_tiles)
                held = page, tiles, Cache(model.config.language, 0, model.device, model.dtype)
            _, tiles, cache = held
            group = list(group)
            prompt = write_page(model, tiles, [asked[i][0] for i in group], arguments.max_new_tokens)
            prefix = prompt.branches.count(0) if page[1] is None and len(cache.branches) else 0     # read in the batch before
            cache.truncate(prefix)
            pages.append(([] if prefix else np.concatenate(tiles) if tiles else [], without_beginning(prompt, prefix)))
            caches.append(cache)
            tiles_of += [tiles] * len(group)
        times, steps, started = [], [], time.perf_counter()
        for step in generate(model, pages, arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed,
                             caches=caches):
            steps.append(step)
            times.append(time.perf_counter() - started)
        for i, tiles, column in zip(order[start:], tiles_of, zip(*steps)):
            tokens = [token for token in column if token is not None]
            n = len(tokens)
            speed = (n - 1) / (times[n - 1] - times[0]) if n > 1 else None
            length = len(write_page(model, tiles, [asked[i][0]], arguments.max_new_tokens).ids)
            results[i] = describe(model, asked[i][0], tokens, [len(t) for t in tiles], length, times[0], speed)
            if name_images:
                results[i]["images"] = asked[i][1]
        while done in results:
            print(json.dumps(results.pop(done), ensure_ascii=False), file=out, flush=True)
            done += 1


def cut_images(model, images, max_tiles):
    """The tiles of each Pillow image, uint8 (n, 3, 448, 448)."""
    config = model.config
    return [tile_page(image, max_tiles, config.vision.tile_pixels, config.thumbnail) for image in images]


def write_page(model, tiles, questions, max_new_tokens):
    """The prompt of questions about one page, to be answered. Raises InputError for what the model has no positions for."""
    counts, size, most = [len(t) for t in tiles], model.config.tokens_per_tile, model.config.language.max_positions
    if tiles and PLACEHOLDER in questions[0]:
        prompt = conversation_prompt(model.tokenizer, size, counts, [(questions[0], None)])
    else:
        prompt, _ = page_prompt(model.tokenizer, size, counts, questions)
    longest = max(prompt.positions) + 1
    if longest + max_new_tokens > most:
        raise InputError(f"{longest} tokens of prompt and {max_new_tokens} of answer exceed the model's {most}; "
                         "ask with fewer tiles, images or words, or for a shorter answer")
    return prompt


def browse(model, port, settings):
    try:
        server = Server(model, port, **settings)
    except OSError as error:
        raise InputError(f"--port {port}: cannot be listened on ({error}); give another one, or 0 for a free one") from error
    tell(f"http://127.0.0.1:{server.server_port}   Ctrl-C ends")
    server.serve_forever()


def explain_to(path, model, image, question, settings):
    """Write the explanation; print the answer, which is greedy."""
    text, answer = explain(model, image, question, settings["max_tiles"], settings["max_new_tokens"])
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); expected a name like out.html in a folder that exists") from error
    print(answer)


def save_picture(picture, path):
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error}); expected a name like out.png in a folder that exists") from error


def evaluate(model, arguments):
    """Answer a whole split, --batch pages at once and all questions of a page from one prefix; print the scores.

    Data of the challenge's test split, without answers, is answered and not scored. A page that cannot be read or does not
    fit is named, and its answers are empty.
    """
    path = Path(arguments.predictions) if arguments.predictions else None
    settings = {name: getattr(arguments, name) for name in ("model", "evaluate", "split", "max_tiles", "max_new_tokens", "temperature",
                                                            "top_p", "seed", "int8")} | {"dtype": str(model.dtype).split(".")[-1]}
    rows = open_rows(arguments.evaluate, arguments.split or "validation", hold_out=bool(arguments.split))
    known, answers = earlier_answers(path, settings) if path else [], []
    examples = Examples(model, arguments.max_tiles, model.config.language.max_positions - arguments.max_new_tokens, arguments.allow_private)

    def note(page, texts):
        answers.extend({"questionId": page.ids[i], "answer": text, "expected": page.accepted[i], "types": page.types[i]}
                       for i, text in enumerate(texts))

    def open_pages():
        for page in gather(rows, answered=False):
            before = known[len(answers):len(answers) + len(page.questions)]
            if [line["questionId"] for line in before] != page.ids[:len(before)]:
                raise InputError(f"{path}: its questions are not those of {arguments.evaluate}; choose another --predictions")
            if len(before) == len(page.questions):
                note(page, [line["answer"] for line in before])
            else:
                known.clear()                                   # a page is answered whole or not at all
                yield page

    with tqdm(unit=" questions", file=sys.stderr) as bar:
        loader = iter(load_examples(open_pages(), examples, workers=min(4, os.cpu_count() or 1) if model.device.type == "cuda" else 0))
        while batch := list(itertools.islice(loader, arguments.batch)):
            for example in batch:
                if example.problem or example.too_long:
                    bar.write(f"{example.page.name}: {example.problem or 'questions that do not fit'}; answered by nothing", file=sys.stderr)
            asked = [(example, example.kept) for example in batch if not example.problem]
            prompts = [(example.tiles, examples.write(example.page, example.tile_counts, kept)[0]) for example, kept in asked]
            steps = list(generate(model, prompts, arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)) if prompts else []
            texts = iter([decode(model, [token for token in column if token is not None]) for column in zip(*steps)])
            for example in batch:
                kept = [] if example.problem else example.kept
                note(example.page, [next(texts) if i in kept else "" for i in range(len(example.page.questions))])
            if path:
                write_predictions(path, answers)
            bar.update(len(answers) - bar.n)
    if not answers:
        raise InputError(f"{arguments.evaluate}: holds no questions")
    table = score_table(answers)
    if path:
        beside(path).write_text(json.dumps({"settings": settings, "scores": table}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.json:
        return print(json.dumps(table, ensure_ascii=False))
    print(f"{len(answers)} questions, {table['all']['questions'] if table else 0} of them with an answer to compare with; "
          + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"{'':<32} questions  " + "  ".join(SCORES))
    for name, row in table.items():
        print(f"{name:<32} {row['questions']:>9}  " + "  ".join(f"{row[score]:>{len(score)}.4f}" for score in SCORES))


def beside(path):
    """predictions.json -> predictions.scores.json, with what the predictions were made by and their scores."""
    return path.with_suffix(".scores.json")


def earlier_answers(path, settings):
    """The predictions that an interrupted evaluation has written. Raises InputError if they were made in another way."""
    try:
        if path.exists():
            kept = json.loads(beside(path).read_text(encoding="utf-8"))["settings"]
            changed = [f"--{name.replace('_', '-')} {kept.get(name)}" for name in settings if kept.get(name) != settings[name]]
            if changed:
                raise InputError(f"{path}: begun with {', '.join(changed)}; go on with that, or choose another --predictions")
            return json.loads(path.read_text(encoding="utf-8"))
        beside(path).write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return []
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be gone on with ({type(error).__name__}: {error}); choose another --predictions") from error


def write_predictions(path, answers):
    """The challenge's submission format, a line a question; written aside and renamed, so that the file is always whole."""
    lines = [json.dumps({"questionId": line["questionId"], "answer": line["answer"]}, ensure_ascii=False) for line in answers]
    new = path.with_name(path.name + ".new")
    new.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    new.replace(path)


def main():
    arguments = parse_arguments()
    # before the model: a wrong path is told at once
    images = [image for source in arguments.image for image in load_images(source, arguments.allow_private)]
    frames = read_video(arguments.video, arguments.frames, arguments.span) if arguments.video else []
    many = None
    if arguments.questions:
        many = read_questions(Path(arguments.questions))
    elif arguments.folder:
        many = folder_questions(arguments.folder, arguments.question)
    model = InternVL.from_pretrained(arguments.model, arguments.device, arguments.dtype)
    if arguments.int8:
        to_int8(model)
    if arguments.evaluate:
        return evaluate(model, arguments)
    if many is not None:
        return answer_many(model, arguments, many, name_images=bool(arguments.folder))
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if arguments.web:
        return browse(model, arguments.port, settings)
    if arguments.explain:
        return explain_to(arguments.explain, model, images[0], arguments.question, settings)
    chat = model.chat(**settings)
    for image in images:
        chat.add_image(image)
    chat.add_video(frames)
    if arguments.show:
        save_picture(draw_tiles(chat, chat.pictures[0]), arguments.show)
    if arguments.question is not None:
        answer_one(chat, arguments.question, arguments.json)
        if arguments.attend:
            save_picture(draw_attention(chat), arguments.attend)
    else:
        converse(chat, arguments.json, arguments.allow_private)


if __name__ == "__main__":
    run(main)
