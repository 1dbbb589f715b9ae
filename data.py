"""How does a Hub row become an example?

    rows of DocumentVQA (one a question)  ->  pages (one image, all its questions)  ->  seeded order  ->  tiles and tokens
             streamed, not decoded            gathered over a bounded look-ahead         a buffer         in worker processes

Rows are read once, in the main process; a DataLoader hands whole pages to its workers, which decode, tile and tokenise.
Where a page comes in the order depends on the seed and the epoch alone, never on the number of workers. Every page knows from
which row on the pages after it can be made again (`refill`), so going on in the middle reads no row before that one.
"""
import hashlib
import itertools
import queue
import random
import re
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from model import InputError
from model.network import Patience, is_trouble, retried
from model.prompt import Prompt, page_prompt
from model.tiling import read_image, tile_page

INSTRUCTION = " Answer the question using a single word or phrase."     # as in the official evaluation of DocVQA
SYNTHETIC = "synthetic"
COLUMNS = ("image", "question", "answers")                              # what rows must have,
PAGE_COLUMNS = ("docId", "ucsf_document_page_no")                       # and what tells their pages apart, if they have it
PATIENCE = 600                          # seconds without the network, in the middle of a run, before it gives up
MOST_QUESTIONS, MOST_CHARACTERS = 64, 16_384    # of one page: attention among its questions grows with their square
SHUFFLE_PAGES = 512                     # pages among which the next one is drawn: about 100 MB of undecoded scans


# ------------------------------------------------------------------------------------------------------------------- rows

def open_rows(data, split, seed=0, domains="plain"):
    """The rows of a split, to be iterated as often as wanted: dicts with DocumentVQA's columns, images not decoded.

    `data`: Hub id (`owner/name`, or `owner/name:config`), local folder in Hub layout, or "synthetic" (`synthetic:1` for pages
    of one tile only), whose pages are drawn from `seed` and look like `domains`.
    Raises InputError where it cannot be reached or has no such split or columns.
    """
    if is_synthetic(data):
        from model.tiny.pages import SyntheticRows
        return SyntheticRows(split, seed, domains, int(data.partition(":")[2] or 4))
    try:
        import datasets
    except ImportError as error:
        raise InputError("reading rows needs the package datasets: pip install datasets") from error
    name, config = hub_name(data)
    try:
        builder = retried(lambda: datasets.load_dataset_builder(name, config))
        rows = retried(lambda: builder.as_streaming_dataset(split=split))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"{data}: neither a local folder nor a data set on the Hub; check --data") from error
    except (ValueError, OSError) as error:              # no such split or configuration; nothing readable in the folder
        if is_trouble(error):
            raise InputError(f"{data}: the Hub cannot be reached; connect to the network, or give a local folder with "
                             "--data") from error
        hint = " or switch validation off with --eval-every 0" if split == "validation" else ""
        raise InputError(f"{data}: cannot read the split '{split}' ({error}); expected data/{split}-*.parquet{hint}") from error
    columns = rows.column_names or []
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise InputError(f"{data}: no column {', '.join(missing)} (found: {', '.join(columns)}); expected DocumentVQA's columns")
    if builder.name == "parquet":
        return ParquetRows(data, [str(file) for file in builder.config.data_files[split]])
    return rows.cast_column("image", datasets.Image(decode=False))


class ParquetRows:
    """Rows of parquet files, local or on the Hub, from any row on: row groups before it are passed over unread.

    Trouble with the network is told, waited out and tried again at the row where it came; raises InputError after PATIENCE.
    """

    def __init__(self, data, files):
        self.data, self.files = data, files
        self.sizes = {}                                         # file -> its rows, where known

    def __iter__(self):
        return (row for _, row in self.numbered())

    def numbered(self, start=0):
        """(number, row) of the rows from number `start` on."""
        patience = Patience(PATIENCE)
        while True:
            try:
                for number, row in self.read(start):
                    patience.over()
                    start = number + 1
                    yield number, row
                return
            except Exception as error:                          # which classes come up from the network differs by release
                if not is_trouble(error):
                    raise
                if not patience.wait(error):
                    raise InputError(f"{self.data}: no answer from the network for {PATIENCE} seconds ({error}); "
                                     "go on with --resume when it is back") from error

    def read(self, start):
        from pyarrow import ArrowException
        first = 0                                               # number of the file's, then of the row group's first row
        for file in self.files:
            if first + self.sizes.get(file, start + 1) <= start:
                first += self.sizes[file]
                continue
            try:
                parquet = self.open(file)
                for group in range(parquet.num_row_groups):
                    size = parquet.metadata.row_group(group).num_rows
                    if first + size > start:
                        batches = parquet.iter_batches(64, [group], [*COLUMNS, *PAGE_COLUMNS])
                        rows = (row for batch in batches for row in batch.to_pylist())
                        yield from itertools.islice(enumerate(rows, first), max(0, start - first), None)
                    first += size
            except ArrowException as error:
                raise InputError(f"{file}: not whole, or not parquet ({error}); mend it, or take it out of the data") from error

    def open(self, file):
        import fsspec
        from pyarrow import parquet
        opened = parquet.ParquetFile(fsspec.open(file).open())
        missing = [column for column in COLUMNS if column not in opened.schema_arrow.names]
        if missing:
            raise InputError(f"{file}: no column {', '.join(missing)}; expected DocumentVQA's columns")
        self.sizes[file] = opened.metadata.num_rows
        return opened

    def count(self):
        """The number of rows, from the footers of the files."""
        from pyarrow import ArrowException
        try:
            return sum(retried(lambda: self.open(file)).metadata.num_rows for file in self.files)
        except (ArrowException, OSError) as error:
            raise InputError(f"{self.data}: cannot read how many rows its files hold ({error}); mend them or "
                             "say how long to train with --steps") from error


def numbered(rows, start=0):
    """(number, row) from row `start` on, of rows that know how to begin there or of any others."""
    return rows.numbered(start) if hasattr(rows, "numbered") else itertools.islice(enumerate(rows), start, None)


def is_synthetic(data):
    return data in (SYNTHETIC, *(f"{SYNTHETIC}:{tiles}" for tiles in (1, 2, 4)))


def hub_name(data):
    """'owner/name:config' -> ('owner/name', 'config'); a local folder is its own name."""
    if Path(data).exists():
        return data, None
    name, _, config = data.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{data}: not found; expected a local folder in Hub layout, a Hub id like owner/name, or synthetic")
    return name, config or None


def count_rows(data, split):
    """The number of rows of a split, from the footers of its parquet files, without reading the rows."""
    if is_synthetic(data):
        raise InputError("synthetic pages have no end; say how long to train with --steps")
    rows = open_rows(data, split)
    if not isinstance(rows, ParquetRows):
        raise InputError(f"{data}: cannot tell how many rows it has, which is no parquet; say how long to train with --steps")
    return rows.count()


# ------------------------------------------------------------------------------------------------------------------ pages

@dataclass
class Page:
    """One image with all its questions."""
    name: str                                                   # document and page number, to be named in messages
    image: bytes                                                # as stored: PNG, JPEG, ...; or what `bytes()` makes one of
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)            # the one that is learned of each question,
    accepted: list[list[str]] = field(default_factory=list)     # and all that count as right
    rows: int = 0                                               # of the data set that this page came from,
    unanswered: int = 0                                         # of them without an answer
    split: bool = field(default=False, compare=False)           # a part of it came before, since reading (again) began
    epoch: int = 0
    index: int = 0                                              # place in the epoch's order
    refill: tuple = (0, 0)                                      # where to begin again to have this page and those after it

    @property
    def full(self):
        return len(self.questions) >= MOST_QUESTIONS or sum(map(len, self.questions)) >= MOST_CHARACTERS


def gather(rows, look_ahead=512, refill=(0, 0)):
    """Bring the rows of a page together; yield pages in the order of their first row.

    A row joins a page whose first row lies fewer than `look_ahead` rows before it, so no more than `look_ahead` rows are
    held. A page spread wider, or with more questions than one row can hold, becomes several, marked as `split`.

    `refill` says where to begin: (pages before, row, *rows to pass over). A page's own is what yields it and all after it
    again; the rows to pass over lie behind its first one, but are of pages before it.

    >>> [page.questions for page in gather([row("a", 1), row("b", 2), row("a", 3)])]
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
            waiting[number] = Page("/".join(map(str, key)), image_bytes(row), split=hash(key) in seen), key, []
            places[key] = number
            seen.add(hash(key))
        page, _, of_page = waiting[places[key]]
        of_page.append(number)
        add_row(page, row)
    while waiting:
        yield oldest()


def page_key(row):
    """What tells pages apart: document and page number, or the image's bytes where a row does not have both."""
    if row.get("docId") is not None and row.get("ucsf_document_page_no") is not None:
        return row["docId"], row["ucsf_document_page_no"]
    return (hashlib.sha1(image_bytes(row)).hexdigest(),)


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


def add_row(page, row):
    """Add a row's question and its answers, the first to be learned as written, to its page."""
    answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"] or []
    answers = [answer for answer in answers if answer is not None]
    page.rows += 1
    if not isinstance(row["question"] or "", str) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"page {page.name}: question {row['question']!r}, answers {row['answers']!r}; expected text and a list of texts")
    if row["question"] and answers and answers[0]:
        page.questions.append(plain(row["question"]) + ("" if row.get("as_written") else INSTRUCTION))
        page.answers.append(plain(answers[0]))
        page.accepted.append([plain(answer) for answer in answers])
    else:
        page.unanswered += 1


def plain(text):
    """Text as the tokenizer takes it: half a character, as JSON can hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


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


class PageStream:
    """Pages epoch after epoch, each with its epoch, its index there and its refill point.

    `start`: (epoch, index, refill) of the page to begin at; the refill is that of the page before it, or of any earlier one.
    """

    def __init__(self, rows, epochs=None, shuffle=True, seed=0, look_ahead=512, start=(0, 0, (0, 0))):
        self.rows, self.epochs, self.shuffle, self.seed = rows, epochs, shuffle, seed
        self.look_ahead, self.start = look_ahead, start

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
            try:
                for index, page in enumerate(pages):
                    if page is None:                            # handed out before `start`, as are those below `begin`
                        continue
                    oldest = next(iter(waiting.values()))
                    del waiting[page.refill[:2]]
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
        for page in gather(self.rows, self.look_ahead, refill):
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
    too_long: list[str] = field(default_factory=list)           # questions left out
    problem: str | None = None

    @property
    def answer_tokens(self):
        return sum(label >= 0 for label in self.prompt.labels)

    def pin_memory(self):
        self.tiles = self.tiles if self.tiles is None else self.tiles.pin_memory()
        return self


class Examples(Dataset):
    """Turns a page into an example: decoded, tiled, tokenised. What a DataLoader's workers do."""

    def __init__(self, model, max_tiles=12, max_length=8192):
        self.tokenizer, self.config = model.tokenizer, model.config
        self.max_tiles, self.max_length = max_tiles, max_length

    def __getitem__(self, page):
        if not page.questions:
            return Example(page, problem=f"none of its {page.rows} questions has an answer "
                                         "(DocumentVQA's test split has none: train on another split)")
        try:
            image = read_image(page.image)
        except InputError as error:
            return Example(page, problem=str(error))
        tiles = tile_page(image, self.max_tiles, self.config.vision.tile_pixels, self.config.thumbnail)
        prompt, too_long = page_prompt(self.tokenizer, self.config.tokens_per_tile, [len(tiles)], page.questions,
                                       page.answers, self.max_length)
        example = Example(page, torch.from_numpy(tiles), prompt, [page.questions[i] for i in too_long])
        if len(too_long) == len(page.questions):
            example.problem = (f"does not fit: {prompt.branches.count(0)} tokens before the question leave no room in "
                               f"--max-length {self.max_length}; raise it or lower --max-tiles")
        return example


def leave_signals_to_the_parent(_):
    """For a worker: Ctrl-C and a SIGTERM sent to all processes are the main process's business; a second SIGTERM is meant."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def load_examples(pages, examples, workers, pin_memory=False):
    """A DataLoader over `pages` (a PageStream or a list) that yields examples in their order."""
    return DataLoader(examples, sampler=pages, batch_size=None, num_workers=workers, pin_memory=pin_memory,
                      persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
                      worker_init_fn=leave_signals_to_the_parent)
