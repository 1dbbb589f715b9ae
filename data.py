"""How does a row, of the Hub or of a file of yours, become an example?

    rows of DocumentVQA (one a question)  ->  pages (one image, all its questions)  ->  seeded order  ->  tiles and tokens
    or of a file  streamed, not decoded       gathered over a bounded look-ahead         a buffer         in worker processes

    python data.py check FILE...                is every row of these files right? file:line and the reason where not
    python data.py show FILE N                  the N-th example, counted from 0, as the model sees it: tiles and tokens

Rows are read once, in the main process; a DataLoader hands whole pages to its workers, which decode, tile and tokenise.
Where a page comes in the order depends on the seed and the epoch alone, never on the number of workers. Every page knows from
which row on the pages after it can be made again (`refill`), so going on in the middle reads no row before that one.
"""
import hashlib
import itertools
import queue
import random
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from extras.formats import read_file
from extras.pictures import show_example
from extras.sources import count_rows, named_parts, numbered, open_rows  # noqa: F401: some only for those who train
from model import InputError
from model.checkpoint import CONFIG, find, load_tokenizer
from model.config import Config
from model.errors import OneLineParser, run, int_in
from model.images import compressed, image_size, load_image
from model.prompt import INSTRUCTION, Prompt, write_page
from model.tiling import choose_grid, tile_page

MOST_QUESTIONS, MOST_CHARACTERS = 64, 16_384    # of one page: attention among its questions grows with their square
SHUFFLE_PAGES = 512                     # pages among which the next one is drawn: about 100 MB of undecoded scans
GROUPED = 50                            # micro-batches that are formed at a time when pages are grouped by their length


# ------------------------------------------------------------------------------------------------------------------ pages

@dataclass
class Page:
    """One image, sometimes several or none, with all that is asked about it."""
    name: str                                                   # document and page number, or file and line
    images: list                                                # each as `load_image` takes it
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)            # the one that is learned of each question,
    accepted: list[list[str]] = field(default_factory=list)     # and all that count as right
    follows: set[int] = field(default_factory=set)              # the questions that go on in the conversation of the one before
    ids: list = field(default_factory=list)                     # of the questions, in files of predictions
    types: list[list[str]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)             # of the questions: file:line, or their ids if from no file
    rows: int = 0                                               # of the data set that this page came from,
    unanswered: int = 0                                         # of them without an answer
    split: bool = field(default=False, compare=False)           # a part of it came before, since reading (again) began
    epoch: int = 0
    index: int = 0                                              # place in the epoch's order
    refill: tuple = (0, 0)                                      # where to begin again to have this page and those after it
    system: str | None = None                                   # as in `write_page`
    opening: list = field(default_factory=list)
    head: str | None = None
    max_tiles: int | None = None                                # if another than --max-tiles
    augment: bool = False                                       # compress its images anew, as JPEG, in each epoch

    @property
    def full(self):
        return len(self.questions) >= MOST_QUESTIONS or sum(map(len, self.questions)) >= MOST_CHARACTERS


def group_rows_into_pages(rows, look_ahead=512, refill=(0, 0), answered=True):
    """Bring the rows of a page together; yield pages in the order of their first row.

    A row joins a page whose first row lies fewer than `look_ahead` rows before it, so no more than `look_ahead` rows are
    held. A page spread wider, or with more questions than one row can hold, becomes several, marked as `split`.

    `refill` says where to begin: (pages before, row, *rows to pass over). A page's own is what yields it and all after it
    again; the rows to pass over lie behind its first one, but are of pages before it. Questions without an answer are left out
    if they are to be `answered`.

    >>> [page.questions for page in group_rows_into_pages([row("a", 1), row("b", 2), row("a", 3)])]
    [[1, 3], [2]]
    """
    count, start, *taken = refill
    waiting, places, seen, taken = {}, {}, set(), set(taken)    # first row -> (page, its key, its rows), oldest first

    def oldest():
        nonlocal count, taken
        first = next(iter(waiting))
        page, key, of_page = waiting.pop(first)
        if places[key] == first:
            del places[key]
        taken = {number for number in taken if number > first}
        page.refill = (count, first, *sorted(taken))
        taken.update(of_page)
        count += 1
        return page

    for number, row in numbered(rows, start):
        if number in taken:
            seen.add(hash(page_key(row)))
            continue
        while waiting and number - next(iter(waiting)) >= look_ahead:
            yield oldest()
        key = page_key(row)
        if key not in places or waiting[places[key]][0].full:
            waiting[number] = new_page(row, split=hash(key) in seen), key, []
            places[key] = number
            seen.add(hash(key))
        page, _, of_page = waiting[places[key]]
        of_page.append(number)
        add_row(page, row, answered)
    while waiting:
        yield oldest()


def page_key(row):
    """What tells pages apart: document and page number, or the image's bytes where a row does not have both.

    Of a row from a file: its images and system turn; a conversation with images inside, or without any, is a page of its own.
    """
    part = row.get("part", ())
    if "turns" in row:
        return part, *((row["images"], row["system"]) if row["images"] and not row["head"] else (row["place"],))
    if row.get("docId") is not None and row.get("ucsf_document_page_no") is not None:
        return part, row["docId"], row["ucsf_document_page_no"]
    return part, hashlib.sha1(image_bytes(row)).hexdigest()


def new_page(row, split=False):
    if "turns" in row:
        return Page(row["place"], list(row["images"]), split=split, system=row["system"], opening=row["opening"],
                    head=row["head"], max_tiles=row.get("max_tiles"), augment=row.get("augment", False))
    return Page("/".join(map(str, page_key(row)[1:])), [image_bytes(row)], split=split)


def image_bytes(row):
    """The image file of a row; empty, so that the page is named and skipped, where there is none."""
    image = row["image"]
    image = {"bytes": image} if isinstance(image, bytes) else {"path": image} if isinstance(image, str) else image
    if not isinstance(image, dict):
        return b""
    content, path = image.get("bytes"), image.get("path")
    if content is None and isinstance(path, str) and Path(path).is_file():
        content = Path(path).read_bytes()
    return content if hasattr(content, "__bytes__") else b""


def add_row(page, row, answered=True):
    """Add a row's question, or its conversation, to its page; the first of its answers is to be learned, as written."""
    page.rows += 1
    if "turns" in row:
        return add_conversation(page, row)
    question, answers = row["question"] or "", row["answers"] or []
    answers = [answer for answer in ([answers] if isinstance(answers, str) else answers) if answer is not None]
    if not isinstance(question, str) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"page {page.name}: question {row['question']!r}, answers {row['answers']!r}; "
                         "expected text and a list of texts")
    accepted = [plain(answer) for answer in answers] if question and answers and answers[0] else []
    page.unanswered += not accepted
    if accepted or not answered:
        name = f"{page.name}/{page.rows}" if row.get("questionId") is None else row["questionId"]
        add_question(page, plain(question) + ("" if row.get("as_written") else INSTRUCTION), accepted[0] if accepted else "",
                     accepted, name, row.get("question_types"), place=name)


def add_conversation(page, row):
    several, name = len(row["turns"]) > 1, row["place"] if row["questionId"] is None else row["questionId"]
    for number, (question, answer) in enumerate(row["turns"]):
        add_question(page, question, answer, row["accepted"] or [answer], f"{name}/{number + 1}" if several else name,
                     row["question_types"], row["place"], follows=number > 0)


def add_question(page, question, answer, accepted, name, types, place, follows=False):
    if follows:
        page.follows.add(len(page.questions))
    page.questions.append(question)
    page.answers.append(answer)
    page.accepted.append(accepted)
    page.ids.append(name)
    page.types.append([types] if isinstance(types, str) else [str(kind) for kind in types or []])
    page.places.append(place)


def plain(text):
    """Text as the tokenizer takes it: half a character, as JSON can hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


# ------------------------------------------------------------------------------------------------------------------ order

def shuffled(pages, seed, buffer=SHUFFLE_PAGES):
    """Yield pages in an order drawn from `seed`, each out of the next `buffer` ones."""
    draw, held = random.Random(seed), []
    for page in pages:
        held.append(page)
        if len(held) > buffer:
            place = draw.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()
    draw.shuffle(held)
    yield from held


def grouped(pages, size, count, seed):
    """Yield pages such that each `count` that follow one another, a micro-batch, are of like `size(page)`.

    50 micro-batches at a time are formed of the pages that come next, and put into an order drawn from `seed`; a None has no
    size.
    """
    draw, pages = random.Random(seed), iter(pages)
    while window := sorted(itertools.islice(pages, GROUPED * count), key=lambda page: page and size(page) or 0):
        full = len(window) - len(window) % count                # what is left over stays at the end
        batches = [window[i:i + count] for i in range(0, full, count)]
        draw.shuffle(batches)
        yield from itertools.chain(*batches, window[full:])


class PageStream:
    """Pages epoch after epoch, each with its epoch, its index there and its refill point.

    `start`: (epoch, index, refill) of the page to begin at; the refill is that of the page before it, or of any earlier one.
    `group`: (size, count) of `grouped`.
    """

    def __init__(self, rows, epochs=None, shuffle=True, seed=0, look_ahead=512, start=(0, 0, (0, 0)), group=None):
        self.rows, self.epochs, self.shuffle, self.seed = rows, epochs, shuffle, seed
        self.look_ahead, self.start, self.group = look_ahead, start, group

    def __iter__(self):
        return ahead(self.pages(), depth=16)

    def pages(self):
        first_epoch, begin, refill = self.start
        for epoch in itertools.count(first_epoch):
            if epoch == self.epochs:
                return
            index, waiting = -1, {}                             # gathered and not yet handed out, oldest first
            pages = self.gathered(refill, waiting)
            if self.shuffle:
                pages = shuffled(pages, f"{self.seed} {epoch}")
            if self.group:
                pages = grouped(pages, *self.group, f"{self.seed} {epoch}")
            window, used = GROUPED * self.group[1] if self.group else 1, []
            try:
                for index, page in enumerate(pages):
                    if page is None:                            # handed out before `start`, as are those below `begin`
                        continue
                    oldest = next(iter(waiting.values()))
                    used.append(page.refill[:2])
                    if (index + 1) % window == 0:               # pages that are grouped are needed together to be so again
                        for key in used:
                            del waiting[key]
                        used = []
                    if index >= begin:
                        page.epoch, page.index, page.refill = epoch, index, oldest
                        yield page
            except InputError:
                raise
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"the rows after page {index + 1} cannot be read ({type(error).__name__}: {error}); "
                                 "look at the data or the network, then go on with --resume") from error
            if index < 0:
                raise InputError("the data holds no rows; expected at least one question about one page")
            begin, refill = 0, (0, 0)

    def gathered(self, refill, waiting):
        """The epoch's pages in file order; None stands for each of those before `refill`, which nobody will see again."""
        yield from itertools.repeat(None, refill[0])
        for page in group_rows_into_pages(self.rows, self.look_ahead, refill):
            waiting[page.refill[:2]] = page.refill
            yield page


def ahead(items, depth):
    """Iterate `items` in a thread, up to `depth` in advance, so that reading rows from a network stops nobody."""
    ready, end = queue.Queue(depth), object()

    def fill():
        try:
            for item in items:
                ready.put((item, None))
            ready.put((end, None))
        except BaseException as error:                          # told where the items are used, not lost in the thread
            ready.put((end, error))

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item, error = ready.get()
        if error:
            raise error
        if item is end:
            return
        yield item


# --------------------------------------------------------------------------------------------------------------- examples

@dataclass
class Example:
    """A page as the model reads it, or the `problem` that keeps it from being read."""
    page: Page
    tiles: torch.Tensor | None = None                           # uint8 (n, 3, 448, 448)
    prompt: Prompt | None = None
    too_long: list[str] = field(default_factory=list)           # questions left out,
    kept: list[int] = field(default_factory=list)               # and the indices of the others
    tile_counts: list[int] = field(default_factory=list)        # of each image
    problem: str | None = None

    @property
    def answer_tokens(self):
        return sum(label >= 0 for label in self.prompt.labels)

    def pin_memory(self):
        self.tiles = self.tiles if self.tiles is None else self.tiles.pin_memory()
        return self


class PageDataset(Dataset):
    """Turns a page into an example: decoded, tiled, tokenised. What a DataLoader's workers do."""

    def __init__(self, model, max_tiles=12, max_length=8192, allow_private=False):
        self.tokenizer, self.config = model.tokenizer, model.config
        self.max_tiles, self.max_length, self.allow_private = max_tiles, max_length, allow_private

    def __getitem__(self, page):
        if not page.questions:
            return Example(page, problem=f"none of its {page.rows} questions has an answer "
                                         "(DocumentVQA's test split has none: train on another split)")
        tile_pixels, draw = self.config.vision.tile_pixels, random.Random(f"{page.name} {page.epoch}")
        try:
            images = [load_image(image, self.allow_private) for image in page.images]
        except InputError as error:
            return Example(page, problem=str(error))
        if page.augment:
            images = [compressed(image, draw.randint(75, 100)) for image in images]
        tiles = [tile_page(image, self.tiles_of_each(page), tile_pixels, self.config.thumbnail) for image in images]
        counts = [len(t) for t in tiles]
        prompt, left_out = self.write(page, counts)
        tiles = torch.from_numpy(np.concatenate([np.empty((0, 3, tile_pixels, tile_pixels), np.uint8), *tiles]))
        example = Example(page, tiles, prompt, [page.questions[i] for i in left_out],
                          [i for i in range(len(page.questions)) if i not in left_out], counts)
        if len(left_out) == len(page.questions):
            example.problem = (f"does not fit: {prompt.branches.count(0)} tokens before the question leave no room in "
                               f"--max-length {self.max_length}; raise it or lower --max-tiles")
        return example

    def tiles_of_each(self, page):
        """The most tiles that each image of a page may be cut into: they share those of the page."""
        return max(1, (page.max_tiles or self.max_tiles) // max(1, len(page.images)))

    def write(self, page, tile_counts, asked=None):
        """The prompt of a page and the indices of the questions left out.

        Learned: every conversation is a branch, left out whole. `asked`, indices of questions: each of them is a branch of its
        own, left open behind the turns before it.
        """
        chains = []
        for i in range(len(page.questions)):
            if i in page.follows:
                chains[-1].append(i)
            else:
                chains.append([i])
        if asked is not None:
            chains = [chain[:n + 1] for chain in chains for n, i in enumerate(chain) if i in asked]
        branches = [[(page.questions[i], page.answers[i]) for i in chain] for chain in chains]
        if asked is not None:
            branches = [[*turns[:-1], (turns[-1][0], None)] for turns in branches]
        prompt, left_out = write_page(self.tokenizer, self.config.tokens_per_tile, tile_counts, branches, self.max_length,
                                           page.system, page.opening, page.head)
        return prompt, [i for n in left_out for i in (chains[n] if asked is None else chains[n][-1:])]

    def size(self, page):
        """About how many tokens a page has, from the headers of its images, four bytes of text to a token."""
        most, tiles = self.tiles_of_each(page), 0
        for image in page.images:
            pixels = image_size(image)
            columns, rows = choose_grid(*pixels, most, self.config.vision.tile_pixels) if pixels else (most, 1)
            tiles += columns * rows + (self.config.thumbnail and columns * rows > 1)
        return tiles * self.config.tokens_per_tile + sum(len(text.encode()) for text in page.questions + page.answers) // 4


def leave_signals_to_the_parent(_):
    """For a worker: Ctrl-C and a SIGTERM sent to all processes are the main process's business; a second SIGTERM is meant."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def load_examples(pages, examples, workers, pin_memory=False):
    """A DataLoader over `pages` (a PageStream or a list) that yields examples in their order."""
    return DataLoader(examples, sampler=pages, batch_size=None, num_workers=workers, pin_memory=pin_memory,
                      persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
                      worker_init_fn=leave_signals_to_the_parent)


# ------------------------------------------------------------------------------------------------------------ check, show

def parse_arguments():
    parser = OneLineParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check_parser = commands.add_parser("check", help="validate whole files: file:line and the reason of all that is wrong")
    check_parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders in Hub layout or Hub ids")
    show_parser = commands.add_parser("show", help="one example as the model sees it: a picture of its tiles, its tokens, "
                                      "which are learned")
    show_parser.add_argument("path", metavar="PATH", help="as in check")
    show_parser.add_argument("number", type=int_in(0), metavar="N",
                             help="which example, counted from 0: a page with all its questions")
    show_parser.add_argument("--out", help="the picture's file (show-N.png)")
    for command in (check_parser, show_parser):
        command.add_argument("--model", help="whose tokens and tiles: Hub id or local folder, without its weights "
                             "(the embedded one; check then judges no lengths)")
        command.add_argument("--max-tiles", type=int_in(1, 128), default=12,
                             help="tiles a page may be cut into (%(default)s)")
        command.add_argument("--max-length", type=int_in(1), default=8192,
                             help="tokens of a question with its page (%(default)s)")
        command.add_argument("--allow-private", action="store_true",
                             help="fetch images from addresses of a private network too")
        command.add_argument("--split", default="train", help="of a data set in Hub layout (%(default)s)")
    return parser.parse_args()


def make_examples(arguments):
    """What turns pages into examples, with the configuration and the tokenizer of --model alone."""
    folder, _, _ = find(arguments.model or "tiny", seed=0)              # a seed: the weights are not fetched
    model = SimpleNamespace(config=Config.read(folder / CONFIG), tokenizer=load_tokenizer(folder))
    judged = arguments.model or arguments.command == "show"             # by their length
    return PageDataset(model, arguments.max_tiles, arguments.max_length if judged else None, arguments.allow_private)


def check(path, examples, split):
    """Print file:line: reason for all that is wrong with some data, and a summary. Returns whether all is right."""
    parts = read_file(path) if Path(path).is_file() else []
    # of a file the whole is the look-ahead: an image is decoded once for all its rows
    pages = ([group_rows_into_pages(part.rows, len(part.rows)) for part in parts]
             or [group_rows_into_pages(open_rows(path, split))])
    problems = [problem for part in parts for problem in part.problems + part.remarks]
    rows = sum(part.entries for part in parts)
    counts, pictures = dict.fromkeys(("pages", "questions", "without an answer"), 0), set()
    for page in itertools.chain(*pages):
        rows += 0 if parts else page.rows
        counts["pages"] += 1
        counts["questions"] += len(page.questions)
        counts["without an answer"] += page.unanswered
        pictures.update(image for image in page.images if isinstance(image, str))
        problems += problems_of(examples[page], examples.max_length, in_file=bool(parts))
    for place, reason in sorted(problems, key=by_line):
        print(plain(f"{place}: {' '.join(reason.split())}"))
    print(f"{path}: {'all is right' if not problems else f'{len(problems)} wrong'}; {rows} rows, "
          + ", ".join(f"{count} {name}" for name, count in counts.items()) + (f", {len(pictures)} images" if parts else ""))
    return not problems


def problems_of(example, max_length, in_file):
    """(place, reason) of all that keeps a page, or some of its questions, from being learned."""
    page = example.page
    if example.problem:
        return [(place if in_file else page.name, example.problem) for place in dict.fromkeys(page.places or [page.name])]
    left_out = [place for i, place in enumerate(page.places) if i not in example.kept]
    return [(place, f"does not fit --max-length {max_length}") for place in dict.fromkeys(left_out)]


def by_line(problem):
    file, _, line = problem[0].rpartition(":")
    return file, int(line) if line.isdigit() else 0


def main():
    arguments = parse_arguments()
    examples = make_examples(arguments)
    if arguments.command == "check":
        sys.exit(not all([check(path, examples, arguments.split) for path in arguments.paths]))
    pages = group_rows_into_pages(open_rows(arguments.path, arguments.split, hold_out=False))
    page = next(itertools.islice(pages, arguments.number, None), None)
    if page is None:
        raise InputError(f"{arguments.path}: has no example {arguments.number}; they are counted from 0")
    example = examples[page]
    if example.problem:
        raise InputError(f"{page.name}: {example.problem}")
    if arguments.model is None:
        print("these are the embedded model's tokens; --model OpenGVLab/InternVL2-1B shows that model's", file=sys.stderr)
    show_example(example, examples.tokenizer, arguments.out or f"show-{arguments.number}.png")


if __name__ == "__main__":
    run(main)
