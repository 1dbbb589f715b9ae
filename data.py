"""How does a Hub row become an example?

    rows of DocumentVQA (one a question)  ->  pages (one image, all its questions)  ->  seeded order  ->  tiles and tokens
             streamed, not decoded            gathered over a bounded look-ahead         a buffer         in worker processes

Rows are read once, in the main process; a DataLoader hands whole pages to its workers, which decode, tile and tokenise.
Where a page comes in the order depends on the seed and the epoch alone, never on the number of workers.
"""
import hashlib
import itertools
import queue
import random
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from model import InputError
from model.prompt import Prompt, page_prompt
from model.tiling import read_image, tile_page

INSTRUCTION = " Answer the question using a single word or phrase."     # as in the official evaluation of DocVQA
SYNTHETIC = "synthetic"
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
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"{data}: neither a local folder nor a data set on the Hub; check --data") from error
    except (ConnectionError, TimeoutError) as error:
        raise InputError(f"{data}: the Hub cannot be reached; connect to the network, or give a local folder with --data") from error
    except (ValueError, OSError) as error:              # no such split or configuration; nothing readable in the folder
        hint = " or switch validation off with --eval-every 0" if split == "validation" else ""
        raise InputError(f"{data}: cannot read the split '{split}' ({error}); expected data/{split}-*.parquet{hint}") from error
    columns = rows.column_names or []
    missing = [column for column in ("image", "question", "answers") if column not in columns]
    if missing:
        raise InputError(f"{data}: no column {', '.join(missing)} (found: {', '.join(columns)}); expected DocumentVQA's columns")
    return rows.cast_column("image", datasets.Image(decode=False))


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
    import datasets
    import fsspec
    from pyarrow import ArrowException, parquet
    name, config = hub_name(data)
    files = datasets.load_dataset_builder(name, config).config.data_files[split]
    try:
        return sum(parquet.read_metadata(fsspec.open(str(file)).open()).num_rows for file in files)
    except (ArrowException, OSError) as error:
        raise InputError(f"{data}: cannot read how many rows its files hold ({error}); mend them or, if they are no parquet, "
                         "say how long to train with --steps") from error


# ------------------------------------------------------------------------------------------------------------------ pages

@dataclass
class Page:
    """One image with all its questions."""
    name: str                                                   # document and page number, to be named in messages
    image: bytes                                                # as stored: PNG, JPEG, ...
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)            # the one that is learned of each question,
    accepted: list[list[str]] = field(default_factory=list)     # and all that count as right
    rows: int = 0                                               # of the data set that this page came from,
    unanswered: int = 0                                         # of them without an answer
    epoch: int = 0
    index: int = 0                                              # place in the epoch's order


def gather(rows, look_ahead=512, counts=None):
    """Bring the rows of a page together; yield pages in the order of their first row.

    A row joins a page whose first row lies fewer than `look_ahead` rows before it, so no more than `look_ahead` rows are
    held. A page spread wider becomes two pages, counted in `counts["split pages"]`.

    >>> [page.questions for page in gather([row("a", 1), row("b", 2), row("a", 3)])]
    [[1, 3], [2]]
    """
    waiting, finished = {}, set()                               # page key -> (index of its first row, page), oldest first
    for index, row in enumerate(rows):
        while waiting and index - next(iter(waiting.values()))[0] >= look_ahead:
            key = next(iter(waiting))
            finished.add(hash(key))
            yield waiting.pop(key)[1]
        key = page_key(row)
        if key not in waiting:
            if hash(key) in finished and counts is not None:
                counts["split pages"] += 1
            waiting[key] = index, Page("/".join(map(str, key)), image_bytes(row))
        add_row(waiting[key][1], row)
    for _, page in waiting.values():
        yield page


def page_key(row):
    """What tells pages apart: document and page number, or the image's bytes where a row does not have both."""
    if row.get("docId") is not None and row.get("ucsf_document_page_no") is not None:
        return row["docId"], row["ucsf_document_page_no"]
    return (hashlib.sha1(image_bytes(row)).hexdigest(),)


def image_bytes(row):
    image = row["image"] or {}
    if image.get("bytes") is None and image.get("path"):
        return Path(image["path"]).read_bytes()
    return image.get("bytes") or b""


def add_row(page, row):
    """Add a row's question and its answers, the first to be learned as written, to its page."""
    answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"] or []
    answers = [answer for answer in answers if answer is not None]
    page.rows += 1
    if not isinstance(row["question"] or "", str) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"page {page.name}: question {row['question']!r}, answers {row['answers']!r}; expected text and a list of texts")
    if row["question"] and answers and answers[0]:
        page.questions.append(row["question"] + ("" if row.get("as_written") else INSTRUCTION))
        page.answers.append(answers[0])
        page.accepted.append(answers)
    else:
        page.unanswered += 1


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
    """Pages epoch after epoch, each with its epoch and its index there. `start`: the (epoch, index) to begin at."""

    def __init__(self, rows, epochs=None, shuffle=True, seed=0, look_ahead=512, start=(0, 0), counts=None):
        self.rows, self.epochs, self.shuffle, self.seed = rows, epochs, shuffle, seed
        self.look_ahead, self.start, self.counts = look_ahead, start, counts

    def __iter__(self):
        return ahead(self.pages(), depth=16)

    def pages(self):
        for epoch in itertools.count(self.start[0]):
            if epoch == self.epochs:
                return
            pages = gather(self.rows, self.look_ahead, self.counts)
            if self.shuffle:
                pages = shuffled(pages, f"{self.seed} {epoch}")
            index = -1
            try:
                for index, page in enumerate(pages):
                    if (epoch, index) >= tuple(self.start):
                        page.epoch, page.index = epoch, index
                        yield page
            except InputError:
                raise
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"the rows after page {index + 1} cannot be read ({type(error).__name__}: {error}); "
                                 "look at the data or the network, then go on with --resume") from error
            if index < 0:
                raise InputError("the data holds no rows; expected at least one question about one page")


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


def load_examples(pages, examples, workers, pin_memory=False):
    """A DataLoader over `pages` (a PageStream or a list) that yields examples in their order."""
    return DataLoader(examples, sampler=pages, batch_size=None, num_workers=workers, pin_memory=pin_memory,
                      persistent_workers=workers > 0, prefetch_factor=4 if workers else None)
