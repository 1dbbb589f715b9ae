"""How are many questions answered? All questions of a page share its prefix; several pages are answered at once.

    --questions, --folder   typed questions     -+                                      +- a line of JSON per question
    --evaluate              rows of a data set  -+- pages -> examples -> answer_batch  -+- predictions and their scores
    validation (train.py)   pages held out      -+                                      +- metrics and samples

They differ only in where questions come from and answers go. A command that is repeated skips what its file answers.
"""
import contextlib
import itertools
import json
import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import Example, Page, PageDataset, load_examples, page_blocks
from extras.cli import as_flag
from extras.formats import entries, images_of, locate, shown
from extras.score import score_table
from extras.video import load_images
from model.chat import describe
from model.checkpoint import write_text
from model.errors import InputError, warn
from model.generate import generate
from model.prompt import PLACEHOLDER
from model.tokenizer import clean

GENERATION = ("max_new_tokens", "temperature", "top_p", "seed")         # the settings of `generate`
PREDICTION = ("questionId", "answer")                                   # the keys of a prediction


# --------------------------------------------------------------------------------------------------------------- answer

@dataclass
class Answer:
    """The answer to one question of a page, or the error that prevented it."""
    page: Page
    index: int                          # of the question in its page
    error: str | None = None
    report: dict | None = None          # what `infer.py --json` prints: the answer, its token ids, timings

    @property
    def text(self):
        return self.report["answer"] if self.report else ""


def make_examples(model, pages, dataset):
    """The examples of some pages, made by worker processes if a GPU would wait for them."""
    return load_examples(pages, dataset, workers=min(4, os.cpu_count() or 1) if model.device.type == "cuda" else 0)


def answer(model, examples, batch=1, **settings):
    """Yield an Answer to every question of some examples, in order; `batch` pages are answered at once.

    `examples`: an iterable. `settings`: as of `answer_batch`.
    """
    examples = iter(examples)
    while together := list(itertools.islice(examples, batch)):
        yield from answer_batch(model, together, **settings)


def answer_batch(model, examples, image_tokens=None, max_new_tokens=512, **settings):
    """Answer all questions of some examples at once -> a list with an Answer to each question that an example keeps.

    `image_tokens`: (256 N, D) of all tiles, if `model.encode_images` was called already. `settings`: as of `generate`.
    Each question gets the answer that it would get alone. All questions of an example with an error get that error, and
    so does one that leaves no positions for its answer; every page with an error is printed once.
    """
    most, answers, prompts, asked = model.config.language.max_positions, [], [], []
    writer = PageDataset(model, max_length=max(1, most - max_new_tokens))
    too_long = (f"its prompt and {max_new_tokens} tokens of answer exceed the model's {most} positions; "
                "ask with fewer tiles, images or words, or for a shorter answer")
    for example in examples:
        page, error = example.page, example.error or too_long
        kept = range(len(page.questions)) if example.error else example.kept_questions
        prompt, failed = (None, kept) if example.error else writer.write(page, example.tile_counts, kept)
        of_page = [Answer(page, i, error if i in failed else None) for i in kept]
        answers += of_page
        if failed:
            warn(f"{page.name}: {' '.join(error.split())}; not answered")
        if len(failed) < len(kept):
            prompts.append((example.tiles, prompt))
            tokens = Counter(prompt.branches)                           # of the prefix (0) and of each branch
            answered = [one for one in of_page if not one.error]
            asked += [(one, example.tile_counts, tokens[0] + tokens[i]) for i, one in enumerate(answered, 1)]
    if prompts:
        generated = timed(model, prompts, image_tokens=image_tokens, max_new_tokens=max_new_tokens, **settings)
        for (one, tiles, length), (ids, *seconds) in zip(asked, generated, strict=True):
            one.report = describe(model, one.page.questions[one.index], ids, tiles, length, *seconds)
    return answers


def timed(model, prompts, **settings):
    """(token ids, seconds to the first token, tokens per second after it) of each question in (tiles, prompt) pairs."""
    started, steps, times = time.perf_counter(), [], []
    for step in generate(model, prompts, **settings):
        steps.append(step)
        times.append(time.perf_counter() - started)
    for column in zip(*steps):
        ids = [token for token in column if token is not None]
        last = len(ids) - 1
        yield ids, times[0], last / (times[last] - times[0]) if last else None


# --------------------------------------------------------------------------------------------------------------- resume

def read_earlier(path, read):
    """The answers of an interrupted command: the dicts that `read(path)` returns. Raises InputError."""
    try:
        return read(path) if path else []
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be resumed ({reason}); choose another file") from error


def check_earlier(path, earlier, asked):
    """Raises InputError unless the dicts `earlier` hold all values of the first of the dicts `asked`."""
    if len(earlier) > len(asked) or any(
            line | question != line for line, question in zip(earlier, asked)):
        raise InputError(f"{path}: answers other questions than these; choose another file")


def read_lines(path):
    """The objects of a jsonl file without the half line that an interruption may leave; the file is made if need be."""
    path.touch()
    return [dict(json.loads(line)) for line in path.read_bytes().split(b"\n")[:-1]]


def write_json(path, value):
    """Write a file, if there is a path, whole or not at all. Raises InputError."""
    try:
        if path:
            write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); fix that, then try again") from error


# ------------------------------------------------------------------------------------------------ --questions, --folder

def read_questions(path):
    """The (question, images) pairs of JSON lines or a JSON list. Raises InputError that names the line or the entry."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    asked = []
    for place, entry in entries(path, text):
        try:
            images = images_of(entry)
            images = [locate(image, path.parent) for image in ([images] if isinstance(images, str) else images)]
            if not entry.get("question", "").strip():
                raise ValueError(f'no "question" in {shown(entry)}; rows for training go to --evaluate')
            asked.append((clean(entry["question"]), images))
        except (ValueError, TypeError, AttributeError) as error:
            reason = next((e for e in (entry, error) if isinstance(e, ValueError)), None) or shown(entry)
            raise InputError(f"{place}: not a question ({reason}); expected "
                             '{"question": "...", "images": ["..."]}') from error
    return asked


def folder_questions(folder, question):
    """(question, images) pairs: the same question about every image and PDF of a folder, sorted by name."""
    suffixes = {*Image.registered_extensions(), ".pdf"}
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error}); expected a folder of images") from error
    return [(question, [str(path)]) for path in paths]


def question_pages(asked):
    """(number, question, images) triples -> pages, in the order of their first question; their `ids` are the numbers.

    Questions about the same images share a page, except that one with an "<image>" has a prefix of its own.

    >>> [page.ids for page in question_pages([(0, "A?", ["a"]), (1, "B?", ["b"]), (2, "C?", ["a"])])]
    [[0, 2], [1]]
    """
    pages, open_pages = [], {}
    for number, question, images in asked:
        key = *images, question if images and PLACEHOLDER in question else None
        if key not in open_pages or open_pages[key].full:
            open_pages[key] = Page(", ".join(images) or question[:60], images)
            pages.append(open_pages[key])
        page = open_pages[key]
        page.questions.append(question)
        page.answers.append("")
        page.ids.append(number)
    return pages


class QuestionDataset(PageDataset):
    """Makes examples of `question_pages`: an image may be a PDF of several, an "<image>" in a question places one."""

    def __getitem__(self, page):
        try:
            example = super().__getitem__(self.opened(page))
        except InputError as error:
            return Example(page, error=str(error))
        example.page.images = page.images                               # the decoded ones are not needed any more
        return example

    def opened(self, page):
        """The page with its images decoded, `max_tiles` for each of them, and with the text that surrounds them."""
        images = [image for source in page.images for image in load_images(source, self.allow_private)]
        question_start, questions = None, page.questions
        if images and PLACEHOLDER in questions[0]:                      # then all questions of the page are the same
            *before, rest = questions[0].split(PLACEHOLDER, len(images))
            if len(before) < len(images):
                raise InputError(f"{len(images)} images, but {len(before)} {PLACEHOLDER} in the question: "
                                 "write one for each image, or none")
            question_start, questions = "".join(text + PLACEHOLDER for text in before), [rest] * len(questions)
        tiles = self.max_tiles * max(1, len(images))                    # of all images together
        return replace(page, images=images, questions=questions, question_start=question_start, max_tiles=tiles)


def answer_questions(model, asked, path=None, batch=1, allow_private=False, max_tiles=12, **settings):
    """Write a line of JSON per (question, images) pair, in their order, to a file or to standard output.

    `path`: the file; questions that it answers are skipped. `batch`: pages answered at once. `max_tiles`: of an image.
    `settings`: as of `generate`. A question that cannot be answered gets {"question", "error"}.
    Raises InputError for a file that answers other questions.
    """
    earlier = read_earlier(path, read_lines)
    check_earlier(path, earlier, [{"question": question, "images": images} for question, images in asked])
    waiting = deque(range(len(earlier), len(asked)))
    pages = question_pages((number, *asked[number]) for number in waiting)
    examples, written = make_examples(model, pages, QuestionDataset(model, max_tiles, None, allow_private)), {}
    with path.open("a", encoding="utf-8") if path else contextlib.nullcontext() as file:
        if path:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)           # an interruption may leave half a line
        for one in answer(model, examples, batch, **settings):
            number = one.page.ids[one.index]
            question, images = asked[number]
            line = one.report or {"question": question, "error": one.error}
            written[number] = line | {"question": question, "images": images}
            while waiting and waiting[0] in written:            # questions about other pages may come before it
                print(json.dumps(written.pop(waiting.popleft()), ensure_ascii=False), file=file, flush=True)


# ----------------------------------------------------------------------------------------------------------- --evaluate

def evaluate_rows(model, rows, settings, path=None, batch=1, allow_private=False):
    """Answer and score all questions of some rows -> (a dict per question, as `score_table` takes them; its table).

    `settings`: {flag: value} of everything that the answers depend on. `path`: the challenge's predictions; questions
    that they answer are skipped; NAME.scores.json beside it gets settings and scores. `batch`: pages answered at once.
    The answer to a question that cannot be answered is empty.
    Raises InputError for predictions of other settings or questions, and where there are no rows.
    """
    scores_path = path and path.with_suffix(".scores.json")
    asked = {"answered": False, "instruction": settings.get("instruction")}
    earlier, lines = read_earlier(path, lambda path: read_predictions(path, scores_path, settings)), []
    if not earlier:
        write_json(scores_path, {"settings": settings})

    def unanswered():
        """Yield the pages with questions that have no answer yet; add the answers to the others to `lines`."""
        left = earlier
        for page in itertools.chain.from_iterable(page_blocks(rows, shuffle=False, **asked)):
            found, left = left[:len(page.ids)], left[len(page.ids):]
            check_earlier(path, found, [{"questionId": name} for name in page.ids])
            if len(found) < len(page.ids):                              # a page is answered as a whole
                yield page
            else:
                lines.extend(scored_line(page, i, line["answer"]) for i, line in enumerate(found))
        check_earlier(path, left, [])

    examples = make_examples(model, unanswered(), PageDataset(model, settings["max_tiles"], None, allow_private))
    with tqdm(unit=" questions", file=sys.stderr) as bar:
        for one in answer(model, examples, batch, **{name: settings[name] for name in GENERATION}):
            lines.append(scored_line(one.page, one.index, one.text))
            if one.index + 1 == len(one.page.questions):
                write_json(path, [{key: line[key] for key in PREDICTION} for line in lines])
                bar.update(len(lines) - bar.n)
    table = score_table(lines)
    write_json(scores_path, {"settings": settings, "scores": table})
    return lines, table


def read_predictions(path, scores_path, settings):
    """The predictions in a file, if there is one. Raises InputError if they were made with other settings."""
    if not path.exists():
        return []
    before = json.loads(scores_path.read_text(encoding="utf-8"))["settings"]
    changed = " ".join(as_flag(name, before.get(name)) for name, value in settings.items() if before.get(name) != value)
    if changed:
        raise InputError(f"{path}: was started with {changed}; repeat that, or choose another --predictions")
    return [{key: line[key] for key in PREDICTION} for line in json.loads(path.read_text(encoding="utf-8"))]


def scored_line(page, i, text):
    """One question of a page with its answer, as `score_table` takes it."""
    return {"questionId": page.ids[i], "answer": text, "expected": page.accepted[i], "types": page.types[i]}
