"""How are many questions answered? All questions of a page share its prefix; several pages are answered at once.

    --questions, --folder   typed questions     -+                                      +- a line of JSON per question
    --evaluate              rows of a data set  -+- pages -> examples -> answer_batch  -+- predictions and their scores
    validation (train.py)   pages held out      -+                                      +- metrics and samples

They differ only in where questions come from and answers go. A command that is repeated keeps the answers of its file:
one fingerprint says which weights and settings made them all, a key says what each one is the answer to.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import Example, Page, PageDataset, load_examples, page_blocks
from extras.cli import SCORES
from extras.formats import entries, images_of, locate, read_text, shown
from extras.score import score_table
from extras.video import load_images
from model.chat import describe
from model.checkpoint import checksum, write_text
from model.errors import InputError, warn
from model.generate import generate
from model.prompt import OTHER_PLACE, PLACEHOLDER
from model.tokenizer import TOKENIZER_FILES, clean

GENERATION = ("max_new_tokens", "temperature", "top_p", "seed", "repetition_penalty")   # the settings of `generate`
LINE_BEGIN = b'{"fingerprint": "'                                       # of a line of answers


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
    so does one that leaves no positions for its answer; every page with an error is printed once. Raises InputError for
    an answer as long as all positions, and for logits that are not finite.
    """
    most, answers, prompts, asked = model.config.language.max_positions, [], [], []
    if max_new_tokens >= most:
        raise InputError(f"{max_new_tokens} tokens of answer leave no room for a question in the model's {most} "
                         "positions; ask for a shorter answer")
    writer = PageDataset(model, max_length=most - max_new_tokens)
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
        try:
            generated = list(timed(model, prompts, image_tokens=image_tokens, max_new_tokens=max_new_tokens,
                                   **settings))
        except InputError as error:
            raise InputError(f"{', '.join(dict.fromkeys(one.page.name for one, *_ in asked))}: {error}") from error
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

def made_with(model, **settings):
    """The fingerprint of a file of answers, a text: a hash of the model's content, and the settings.

    Hashed are all weights, as they are in memory, configuration and tokenizer: 2 s for a billion weights of two bytes.
    """
    tensors, files = model.state_dict(), [model.folder / name for name in TOKENIZER_FILES]
    rest = repr(model.config).encode() + b"".join(file.read_bytes() for file in files if file.is_file())
    content = checksum(tensors, lambda name: tensors[name].cpu(), hashlib.sha256(rest).hexdigest())[:16]
    settings |= {"dtype": str(model.dtype).split(".")[-1], "device": model.device.type}
    return " ".join([f"model={content}", *(f"{name}={value!r}" for name, value in settings.items())])


def read_earlier(path, read, mark):
    """The answers by key that `read(path, mark)` finds in the file of a repeated command. Raises InputError."""
    try:
        return read(path, mark) if path else {}
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be resumed ({reason}); choose another file, or replace it with --overwrite"
                         ) from error


def check_fingerprint(path, found, wanted):
    """Raise InputError if the answers of a file were made with other weights or settings than now."""
    changed = [part for part in found.split() if part not in wanted.split()]
    if found != wanted:
        raise InputError(f"{path}: was started with {' '.join(changed)}; repeat that, choose another file, or replace "
                         "it with --overwrite")


def page_keys(page, content):
    """A key for each question of a page, None if an image is not there: a hash of all that its answer depends on."""
    images, keys, before = [content(image) for image in page.images], [], []
    for i, question in enumerate(page.questions):
        before = before if i in page.follows else []
        all_of_it = [images, page.system, page.history, page.question_start, page.instruction, page.max_tiles,
                     page.augment and page.name, before, question]
        keys.append(None if None in images else hashlib.sha256(json.dumps(all_of_it).encode()).hexdigest()[:16])
        before = [*before, (question, page.answers[i])]
    return keys


def content_of(image):
    """The hash of an image's file, and its suffix, as in scan.pdf#2; an address as it is; None if there is no file."""
    if not isinstance(image, str):
        return hashlib.sha256(bytes(image)).hexdigest()
    path = image if os.path.isfile(image) else image.rpartition("#")[0]
    with contextlib.suppress(OSError), open(path if os.path.isfile(path) else "", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() + Path(image).suffix
    return image if "://" in image else None


def print_counts(lines, kept, dropped):
    """Print in one line what became of all questions, and of the earlier answers that nobody asks for any more."""
    failed = sum(bool(line.get("error")) for line in lines)
    warn(f"{len(lines)} questions: {len(lines) - kept - failed} answered now, {kept} kept, {failed} not answered"
         + (f"; {dropped} earlier answers dropped" if dropped else ""))
    ids = Counter(line["questionId"] for line in lines if "questionId" in line)
    if repeated := [name for name, count in ids.items() if count > 1]:
        warn(f"{len(repeated)} ids stand at more than one question; the first is {repeated[0]}")


def write_json(path, *values, indent=2):
    """Write values, if there is a path, one after another; the file is whole or stays as it was. Raises InputError."""
    try:
        if path:
            write_text(path, "".join(json.dumps(value, indent=indent, ensure_ascii=False) + "\n" for value in values))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); fix that, then try again") from error


# ------------------------------------------------------------------------------------------------ --questions, --folder

def read_questions(path):
    """The (question, images) pairs of JSON lines or a JSON list. Raises InputError that names the line or the entry."""
    try:
        text = read_text(path)
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
    if not asked:
        raise InputError(f'{path}: no questions; expected lines like {{"question": "...", "images": ["..."]}}')
    return asked


def folder_questions(folder, question):
    """(question, images) pairs: the same question about every image and PDF of a folder, sorted by name."""
    suffixes = {*Image.registered_extensions(), ".pdf"}
    try:
        found = sorted(Path(folder).iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error}); expected a folder of images") from error
    paths = [path for path in found if path.suffix.lower() in suffixes]
    if not paths:
        raise InputError(f"{folder}: no images among its {len(found)} files; expected a folder of images")
    if len(paths) < len(found):
        warn(f"{folder}: {len(found) - len(paths)} of {len(found)} files are no images and are left out")
    return [(question, [str(path)]) for path in paths]


def question_pages(asked):
    """(number, question, images) triples -> pages, in the order of their first question; their `ids` are the numbers.

    Questions about the same images share a page, except that one with an "<image>" has a prefix of its own.

    >>> [page.ids for page in question_pages([(0, "A?", ["a"]), (1, "B?", ["b"]), (2, "C?", ["a"])])]
    [[0, 2], [1]]
    """
    pages, open_pages = [], {}
    for number, question, images in asked:
        question = question.replace(OTHER_PLACE, PLACEHOLDER)
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

    `path`: the file; its answers are kept, errors are tried again, what nobody asks any more is dropped; each line has
    a `fingerprint` and a `key`. `batch`: pages answered at once. `max_tiles`: of an image. `settings`: as of
    `generate`. A question that cannot be answered gets {"question", "error"}.
    Raises InputError for a file of other weights or settings.
    """
    mark, content = path and made_with(model, max_tiles=max_tiles, **settings), functools.cache(content_of)
    earlier = read_earlier(path, read_answers, mark)
    keys = [page_keys(Page("", images, [question], [""]), content)[0] if path else None for question, images in asked]
    lines = {number: earlier[key] | {"images": asked[number][1]} for number, key in enumerate(keys) if key in earlier}
    waiting = deque(number for number in range(len(asked)) if number not in lines)
    kept, pages = len(lines), question_pages((number, *asked[number]) for number in waiting)
    examples = make_examples(model, pages, QuestionDataset(model, max_tiles, None, allow_private))
    with path.open("a", encoding="utf-8") if path else contextlib.nullcontext() as file:
        if path:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)           # an interruption may leave half a line
        for one in answer(model, examples, batch, **settings):
            number = one.page.ids[one.index]
            question, images = asked[number]
            line = {"fingerprint": mark, "key": keys[number]} if path else {}
            line |= one.report or {"question": question, "error": one.error}
            lines[number] = line | {"question": question, "images": images}
            while waiting and waiting[0] in lines:              # questions about other pages may come before it
                print(json.dumps(lines[waiting.popleft()], ensure_ascii=False), file=file, flush=True)
    write_json(path, *(lines[number] for number in range(len(asked))), indent=None)
    print_counts(lines.values(), kept, len(earlier.keys() - set(keys)))


def read_answers(path, mark):
    """{key: line} of the answers, not the errors, in a file with this fingerprint. Raises InputError."""
    *lines, half = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if half[:len(LINE_BEGIN)] != LINE_BEGIN[:len(half)]:
        raise ValueError("its last line is no half line of this program")
    kept = {}
    for line in map(json.loads, lines):
        check_fingerprint(path, line["fingerprint"], mark)
        if "error" not in line and line["key"]:
            kept[line["key"]] = line
    return kept


# ----------------------------------------------------------------------------------------------------------- --evaluate

def evaluate_rows(model, rows, settings, path=None, batch=1, allow_private=False, ranks=None):
    """Answer and score all questions of some rows -> (a dict per question, as `score_table` takes them; its table).

    `settings`: {flag: value} of everything that the answers depend on. `path`: the challenge's predictions, written at
    the end. NAME.scores.json beside them has fingerprint, settings, scores, and each answer by its key: those are kept.
    `batch`: pages answered at once. The answer to a question that cannot be answered is empty.
    Raises InputError for predictions of other weights or settings, and where there are no rows.
    """
    generation, lines, waiting = {name: settings.get(name) for name in GENERATION}, [], deque()
    instruction = settings.get("instruction")
    mark = path and made_with(model, max_tiles=settings["max_tiles"], instruction=instruction, **generation)
    earlier = read_earlier(path, read_predictions, mark)

    def write(earlier, **scores):
        answers = {line["key"]: line["answer"] for line in lines
                   if line["key"] and line["answer"] is not None and line["error"] is None}
        write_json(path and scores_file(path),
                   {"fingerprint": mark, "settings": settings, "answers": earlier | answers, **scores})
        return answers.keys()

    blocks = page_blocks(rows, shuffle=False, answered=False, instruction=instruction)
    pages = unanswered(blocks, earlier, lines, waiting)
    dataset = PageDataset(model, settings["max_tiles"], None, allow_private)
    make, reply = partial(make_examples, model), partial(answer, model, batch=batch, **generation)
    with tqdm(unit=" questions", file=sys.stderr) as bar:
        for one in ranks.answers(pages, dataset, batch, make, reply) if ranks else reply(make(pages, dataset)):
            line = waiting.popleft()
            if line["answer"] is None:
                line["answer"], line["error"] = one.text, one.error
            if one.index + 1 == len(one.page.questions):
                write(earlier)
                bar.update(len(lines) - len(waiting) - bar.n)
    table = score_table(lines)
    write_json(path, [{key: line[key] for key in ("questionId", "answer")} for line in lines])
    asked = write({}, scores=table, not_answered=sum(line["error"] is not None for line in lines))
    print_counts(lines, sum(line["key"] in earlier for line in lines), len(earlier.keys() - asked))
    return lines, table


def unanswered(blocks, earlier, lines, waiting):
    """Yield those pages of `blocks` with questions that have no answer yet, to be answered as a whole.

    Every question becomes a dict in `lines`, and those of the yielded pages also in `waiting`.
    """
    for page in itertools.chain.from_iterable(blocks):
        of_page = [{"questionId": page.ids[i], "answer": earlier.get(key), "expected": page.accepted[i],
                    "types": page.types[i], "key": key, "error": None}
                   for i, key in enumerate(page_keys(page, content_of))]
        lines.extend(of_page)
        if any(line["answer"] is None for line in of_page):
            waiting.extend(of_page)
            yield page


def scores_file(path):
    return path.with_name(path.name + SCORES)


def read_predictions(path, mark):
    """{key: answer} of predictions with this fingerprint, none if there is no such file. Raises InputError."""
    if not path.exists() and not scores_file(path).exists():
        return {}
    record = json.loads(scores_file(path).read_text(encoding="utf-8"))
    check_fingerprint(scores_file(path), record["fingerprint"], mark)
    predictions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if not {line["answer"] for line in predictions} <= {"", *record["answers"].values()}:
        raise ValueError(f"{scores_file(path).name} does not know all of its answers")
    return record["answers"]
