"""How are many questions answered? All questions of a page share its prefix; several pages are answered at once.

    --questions, --folder   typed questions     -+                                      +- a line of JSON per question
    --evaluate              rows of a data set  -+- pages -> examples -> answer_batch  -+- predictions and their scores
    validation (train.py)   pages held out      -+                                      +- metrics and samples

They differ only in where questions come from and answers go. An interrupted command skips, when it is repeated, the
questions that its file answers already.
"""
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
from extras.score import score_table
from extras.video import load_images
from model.chat import describe
from model.checkpoint import write_text
from model.errors import InputError, warn
from model.generate import generate
from model.prompt import PLACEHOLDER, clean

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


def answer(model, examples, batch=1, **settings):
    """Yield an Answer to every question of some examples, in order; `batch` pages are answered at once.

    `examples`: an iterable of data.py's examples. `settings`: see `answer_batch`.
    """
    examples = iter(examples)
    while together := list(itertools.islice(examples, batch)):
        yield from answer_batch(model, together, **settings)


def answer_batch(model, examples, image_tokens=None, max_new_tokens=512, **settings):
    """Answer all questions of some examples at once -> a list with an Answer to each question that an example keeps.

    `image_tokens`: (256 N, D) of all tiles, if `model.encode_images` was called already. `settings`: as of `generate`.
    Each question gets the answer that it would get alone. All questions of an example with an error get that error, and
    so does one that leaves no positions for its answer; every error of a page is printed once.
    """
    most, answers, prompts, asked = model.config.language.max_positions, [], [], []
    writer = PageDataset(model, max_length=max(1, most - max_new_tokens))
    too_long = (f"its prompt and {max_new_tokens} tokens of answer exceed the model's {most} positions; "
                "ask with fewer tiles, images or words, or for a shorter answer")
    for example in examples:
        page, kept = example.page, [] if example.error else example.kept_questions
        prompt, left_out = writer.write(page, example.tile_counts, kept) if kept else (None, [])
        errors = dict.fromkeys(range(len(page.questions)) if example.error else left_out, example.error or too_long)
        for error in dict.fromkeys(errors.values()):
            warn(f"{page.name}: {' '.join(error.split())}; not answered")
        of_page = [Answer(page, i, errors.get(i)) for i in (errors if example.error else kept)]
        answers += of_page
        fitting = [one for one in of_page if not one.error]
        if fitting:
            prompts.append((example.tiles, prompt))
            tokens = Counter(prompt.branches)                           # of the prefix (0) and of each branch
            asked += [(one, example.tile_counts, tokens[0] + tokens[i]) for i, one in enumerate(fitting, 1)]
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


def make_examples(model, pages, dataset):
    """The examples of some pages, made by worker processes where a GPU would wait for them."""
    return load_examples(pages, dataset, workers=min(4, os.cpu_count() or 1) if model.device.type == "cuda" else 0)


# --------------------------------------------------------------------------------------------------------------- resume

class AnswerFile:
    """Where answers go, in the order of their questions; `path` None: to no file. The answers that the file holds are
    `earlier` until they are taken. Raises InputError for a file that cannot be resumed.
    """

    def __init__(self, path):
        self.path = path
        try:
            self.earlier = deque(self.read() if path else ())
        except InputError:
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: cannot be resumed ({reason}); choose another file") from error

    def take(self, **question):
        """The earlier answer to the next question, None after the last. Raises InputError if it answers another one."""
        if self.earlier and any(self.earlier[0].get(key) != value for key, value in question.items()):
            self.all_taken()
        return self.earlier.popleft() if self.earlier else None

    def all_taken(self):
        """Raises InputError for earlier answers that are left: they are to other questions."""
        if self.earlier:
            raise InputError(f"{self.path}: its answers are not to the first of these questions; choose another file")


class Lines(AnswerFile):
    """A line of JSON per question, in a file or on standard output."""
    file = None

    def read(self):
        self.file = self.path.open("a", encoding="utf-8")
        data = self.path.read_bytes()
        self.size = data.rfind(b"\n") + 1               # an interrupted run may leave half a line
        return [dict(json.loads(line)) for line in data[:self.size].splitlines()]

    def all_taken(self):
        super().all_taken()
        if self.file:
            self.file.truncate(self.size)

    def write(self, line):
        print(json.dumps(line, ensure_ascii=False), file=self.file, flush=True)


class Predictions(AnswerFile):
    """The challenge's list of {"questionId", "answer"}; NAME.scores.json beside it has the settings and the scores."""

    def __init__(self, path, settings):
        self.settings, self.beside = settings, path and path.with_suffix(".scores.json")
        super().__init__(path)
        if not self.earlier:
            self.write_scores({"settings": settings})

    def read(self):
        if not self.path.exists():
            return []
        before = json.loads(self.beside.read_text(encoding="utf-8"))["settings"]
        changed = " ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name, value in self.settings.items()
                           if before.get(name) != value)
        if changed:
            raise InputError(f"{self.path}: was begun with {changed}; repeat that, or choose another --predictions")
        return [{key: line[key] for key in PREDICTION} for line in json.loads(self.path.read_text(encoding="utf-8"))]

    def write(self, lines):
        lines = [json.dumps({key: line[key] for key in PREDICTION}, ensure_ascii=False) for line in lines]
        self.replace(self.path, "[\n" + ",\n".join(lines) + "\n]")

    def write_scores(self, scores):
        self.replace(self.beside, json.dumps(scores, indent=2, ensure_ascii=False))

    def replace(self, path, text):
        try:
            if path:
                write_text(path, text + "\n")                           # as a whole: no interruption leaves half a file
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); mend that, then try again") from error


# ------------------------------------------------------------------------------------------------ --questions, --folder

def read_questions(path):
    """The (question, images) pairs of a jsonl file. Raises InputError that names the line."""
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
                # a path is relative to this folder or, if there is no such file, to that of the questions
                images = [str(path.parent / i) if "://" not in i and not Path(i).exists() else i for i in images]
                if not entry["question"].strip():
                    raise ValueError("the question is empty")
                asked.append((clean(entry["question"]), images))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a question ({type(error).__name__}: {error}); expected "
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
        head, questions = None, page.questions
        if images and PLACEHOLDER in questions[0]:                      # then all questions of the page are the same
            *before, rest = questions[0].split(PLACEHOLDER, len(images))
            if len(before) < len(images):
                raise InputError(f"{len(images)} images, but {len(before)} {PLACEHOLDER} in the question: "
                                 "write one for each image, or none")
            head, questions = "".join(text + PLACEHOLDER for text in before), [rest] * len(questions)
        tiles = self.max_tiles * max(1, len(images))                    # of all images together
        return replace(page, images=images, questions=questions, head=head, max_tiles=tiles)


def answer_questions(model, asked, path=None, max_tiles=12, batch=1, allow_private=False, **settings):
    """Write a line of JSON per (question, images) pair, in their order, to a file or to standard output.

    `path`: the file; questions that it answers are skipped. `max_tiles`: of each image. `batch`: pages answered at
    once. `settings`: as of `generate`. A question that cannot be answered gets {"question", "error"}.
    Raises InputError for a file that answers other questions.
    """
    out, written = Lines(path), {}
    waiting = deque(number for number, (question, images) in enumerate(asked)
                    if out.take(question=question, images=images) is None)
    out.all_taken()
    pages = question_pages((number, *asked[number]) for number in waiting)
    examples = make_examples(model, pages, QuestionDataset(model, max_tiles, None, allow_private))
    for one in answer(model, examples, batch, **settings):
        number = one.page.ids[one.index]
        question, images = asked[number]
        line = one.report or {"question": question, "error": one.error}
        written[number] = line | {"question": question, "images": images}
        while waiting and waiting[0] in written:                        # questions about other pages may come before it
            out.write(written.pop(waiting.popleft()))


# ----------------------------------------------------------------------------------------------------------- --evaluate

def evaluate_rows(model, rows, settings, path=None, batch=1, allow_private=False):
    """Answer and score all questions of some rows -> (a dict per question, as `score_table` takes them; its table).

    `settings`: {flag: value} of everything that the answers depend on. `path`: the predictions; questions that they
    answer are skipped. `batch`: pages answered at once. The answer to a question that cannot be answered is empty.
    Raises InputError for predictions of other settings or questions, and where there are no rows.
    """
    out, lines = Predictions(path, settings), []

    def add(page, i, text):
        lines.append({"questionId": page.ids[i], "answer": text, "expected": page.accepted[i], "types": page.types[i]})

    def unanswered():
        for page in itertools.chain.from_iterable(page_blocks(rows, shuffle=False, answered=False)):
            earlier = [out.take(questionId=name) for name in page.ids]
            if None in earlier:                                         # a page is answered as a whole
                yield page
            else:
                for i, line in enumerate(earlier):
                    add(page, i, line["answer"])

    examples = make_examples(model, unanswered(), PageDataset(model, settings["max_tiles"], None, allow_private))
    with tqdm(unit=" questions", file=sys.stderr) as bar:
        for one in answer(model, examples, batch, **{name: settings[name] for name in GENERATION}):
            add(one.page, one.index, one.text)
            if one.index + 1 == len(one.page.questions):
                out.write(lines)
                bar.update(len(lines) - bar.n)
    out.all_taken()
    table = score_table(lines)
    out.write_scores({"settings": settings, "scores": table})
    return lines, table
