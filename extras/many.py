"""What are the answers to many questions? A page is read once for all that is asked about it.

    a file, a folder  ->  (question, sources) pairs  ->  those about a page side by side, a batch at a time
                      ->  prompts that branch off their page's prefix  ->  answers, in the order of the questions

How an image is loaded and how a token is chosen it is told by the program, see `answer_many`.
"""
import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from model.chat import describe, without_beginning
from model.errors import InputError, warn
from model.language import KVCache
from model.prompt import PLACEHOLDER, write_conversation, write_page
from model.tokenizer import clean
from model.tiling import tile_page


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
                images = entry.get("images") or entry.get("image") or []
                images = [images] if isinstance(images, str) else images
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
            answered = [json.loads(line) for line in data.splitlines()]
            of_answered = [(line["question"], line.get("images", images)) for line, (_, images) in zip(answered, asked)]
            if len(answered) > len(asked) or of_answered != asked[:len(answered)]:
                raise ValueError("they are not the first of these questions")
            os.truncate(path, len(data))
        else:
            answered = []
        return path.open("a", encoding="utf-8"), len(answered)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: its answers cannot be gone on with ({error}); give another --out") from error


@dataclass(eq=False)
class OpenPage:
    """A page that questions are asked about."""
    key: tuple                                  # what tells pages apart, see `by_page`
    tiles: list[np.ndarray]                     # of each image, uint8 (n, 3, 448, 448)
    cache: KVCache                                # what the model has read of it


def answer_many(model, asked, load_images, generate, max_tiles=12, max_new_tokens=512, batch=1):
    """Yield what `describe` says of the answers to (question, sources) pairs, in their order.

    `load_images`: a source -> its Pillow images. `generate`: (pages, caches=...) -> steps, as `model.generate.generate` with
    its model and settings. `max_tiles`: tiles an image may be cut into. `max_new_tokens`: of `generate`'s settings, the longest
    answer. `batch`: questions answered at once.
    A question whose image cannot be read, or that the model has no positions for, is named on standard error and gets
    {"question", "error"} in place of its answer; the others are answered.
    """
    order, results, told, page = by_page(asked), {}, 0, None
    for start in range(0, len(order), batch):
        ready = []                                          # (page, number, tokens of its prompt alone)
        for key, number in order[start:start + batch]:
            question = asked[number][0]
            try:
                if page is None or page.key != key:         # else the batch before has read it
                    page = open_page(model, key, load_images, max_tiles)
                ready.append((page, number, len(write_prompt(model, page.tiles, [question], max_new_tokens).ids)))
            except InputError as error:
                reason = " ".join(str(error).split())
                warn(f"{', '.join(key[0]) or question[:60]}: {reason}; not answered")
                results[number] = {"question": question, "error": reason}
        together = [(page, [(asked[number][0], length) for _, number, length in group])
                    for page, group in itertools.groupby(ready, key=lambda place: place[0])]
        answers = answer_batch(model, together, generate, max_new_tokens) if together else []
        results |= {number: answer for (_, number, _), answer in zip(ready, answers)}
        while told in results:
            yield results.pop(told)
            told += 1


def by_page(asked):
    """The (page, number) of all questions, pages in the order of their first question, all questions of one side by side.

    A question that says where its images go has a prefix, and so a page, of its own.

    >>> by_page([("A?", ["a.png"]), ("B?", ["b.png"]), ("C?", ["a.png"]), ("<image> D?", ["a.png"])])
    [((('a.png',), None), 0), ((('a.png',), None), 2), ((('b.png',), None), 1), ((('a.png',), 3), 3)]
    """
    pages = {}
    for number, (question, sources) in enumerate(asked):
        own = number if sources and PLACEHOLDER in question else None
        pages.setdefault((tuple(sources), own), []).append(number)
    return [(page, number) for page, numbers in pages.items() for number in numbers]


def open_page(model, key, load_images, max_tiles):
    config = model.config
    tiles = [tile_page(image, max_tiles, config.vision.tile_pixels, config.thumbnail)
             for source in key[0] for image in load_images(source)]
    return OpenPage(key, tiles, KVCache(config.language, 0, model.device, model.dtype))


def answer_batch(model, together, generate, max_new_tokens):
    """(page, [(question, tokens of its prompt alone), ...]) pairs -> what `describe` says of each answer."""
    pages = [unread(model, page, [question for question, _ in asked], max_new_tokens) for page, asked in together]
    started, steps, times = time.perf_counter(), [], []     # times: seconds to each step
    for step in generate(pages, caches=[page.cache for page, _ in together]):
        steps.append(step)
        times.append(time.perf_counter() - started)
    questions = [(page.tiles, *question) for page, asked in together for question in asked]
    for (tiles, question, length), column in zip(questions, zip(*steps), strict=True):
        tokens = [token for token in column if token is not None]
        n = len(tokens)
        speed = (n - 1) / (times[n - 1] - times[0]) if n > 1 else None
        yield describe(model, question, tokens, [len(t) for t in tiles], length, times[0], speed)


def unread(model, page, questions, max_new_tokens):
    """The (tiles, prompt) of questions about a page, without the prefix if that was read for the batch before."""
    prompt = write_prompt(model, page.tiles, questions, max_new_tokens)
    read = prompt.branches.count(0) if len(page.cache.branches) else 0
    page.cache.crop(read)
    tiles = np.concatenate(page.tiles) if page.tiles and not read else []
    return tiles, without_beginning(prompt, read)


def write_prompt(model, tiles, questions, max_new_tokens):
    """The prompt of questions about one page, to be answered. Raises InputError for what the model has no positions for."""
    counts, size, most = [len(t) for t in tiles], model.config.tokens_per_tile, model.config.language.max_positions
    if tiles and PLACEHOLDER in questions[0]:
        prompt = write_conversation(model.tokenizer, size, counts, [(questions[0], None)])
    else:
        prompt, _ = write_page(model.tokenizer, size, counts, [[(question, None)] for question in questions])
    longest = max(prompt.positions) + 1
    if longest + max_new_tokens > most:
        raise InputError(f"{longest} tokens of prompt and {max_new_tokens} of answer exceed the model's {most}; "
                         "ask with fewer tiles, images or words, or for a shorter answer")
    return prompt
