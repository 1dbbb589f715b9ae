"""How does a row of a data set become an example?

    rows of DocumentVQA (one per question)  ->  blocks of rows        ->  pages (one image,  ->  tiles and tokens,
    streamed, images not decoded                read one block ahead      all its questions)     in worker processes

    python data.py check FILE...            is every row of these files right? Prints file:line and the reason where not
    python data.py show FILE N              the N-th example, counted from 0, as the model sees it: tiles and tokens

A block of rows is the unit of everything: its rows are gathered into pages, its pages are shuffled together, and a
resumed run begins by reading its block again. The order of the pages depends on the seed and the epoch alone, never on
the number of workers. Rows are read in the main process; a DataLoader's workers decode, tile and tokenize whole pages.
"""
import contextlib
import hashlib
import itertools
import multiprocessing.queues
import os
import random
import re
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from model import InputError
from model.errors import warn
from model.images import compressed, image_size, load_image
from model.internvl import PromptTensors
from model.prompt import INSTRUCTION, Prompt, write_page
from model.tiling import choose_grid, tile_page

COLUMNS = ("image", "question", "answers")              # columns that rows must have; pages and scores use the others
ROW_COLUMNS = (*COLUMNS, "docId", "ucsf_document_page_no", "questionId", "question_types")
FIRST_BLOCK = 512                       # rows of the first block at most, so that the first step does not wait long
MOST_QUESTIONS, MOST_CHARACTERS = 64, 16_384    # of one page: attention among its questions grows with their square
AT_START, MID_RUN = 7, 600              # seconds without the network before giving up: at the start, in mid-run
LONGEST_PAUSE = 60                      # seconds between two tries


# ------------------------------------------------------------------------------------------------------------- rows

def open_hub_rows(data, split, columns=None):
    """The rows of a data set in the Hub's layout: on the Hub (`owner/name`, `owner/name:config`) or in a local folder.

    `columns`: 'question=query,image=img' if its columns do not have DocumentVQA's names. Returns an iterable of dicts
    with those names, images not decoded. Raises InputError.
    """
    name, config = hub_name(data)
    names = {column: column for column in ROW_COLUMNS} | dict(re.findall("([^,=]+)=([^,]+)", columns or ""))
    try:
        import datasets
    except ImportError as error:
        raise InputError("reading rows needs the package datasets: pip install datasets") from error
    hint = " or switch validation off with --eval-every 0" if split == "validation" else ""
    with reading(data, f"the split '{split}'", f"expected data/{split}-*.parquet{hint}"):
        try:
            builder = retry(lambda: datasets.load_dataset_builder(name, config))
        except datasets.exceptions.DatasetNotFoundError as error:
            raise InputError(f"{data}: neither a local folder nor a data set on the Hub; check --data") from error
        rows = retry(lambda: builder.as_streaming_dataset(split=split))
    check_columns(data, rows.column_names or [], names)
    if builder.name == "parquet":
        return ParquetRows(data, [str(file) for file in builder.config.data_files[split]], names)
    rows = rows.cast_column(names["image"], datasets.Image(decode=False))
    rows = rows.map(rename, remove_columns=rows.column_names, fn_kwargs={"names": names})
    rows.files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
    return rows


@contextlib.contextmanager
def reading(source, what, advice):
    """Raise errors of the network, the Hub or a file as an InputError: `what` of `source` cannot be read; `advice`."""
    from pyarrow import ArrowException
    try:
        yield
    except InputError:
        raise
    except Exception as error:                          # the classes differ between releases of the libraries
        if is_transient(error):
            raise InputError(f"{source}: the Hub cannot be reached; connect to the network, or give a local folder "
                             "with --data; continue a run with --resume") from error
        if not isinstance(error, (ArrowException, OSError, ValueError, LookupError, ImportError)):
            raise
        raise InputError(f"{source}: cannot read {what} ({error}); {advice}") from error


def check_columns(source, found, names):
    missing = [name for column, name in names.items() if name not in found and (column in COLUMNS or name != column)]
    if missing:
        raise InputError(f"{source}: no column {', '.join(missing)} (found: {', '.join(found)}); name the right ones "
                         "with --columns question=...,answers=...,image=...")


def rename(row, names):
    """A row with DocumentVQA's names for its columns; the other columns are dropped."""
    return {column: row[name] for column, name in names.items() if name in row}


def hub_name(data):
    """'owner/name:config' -> ('owner/name', 'config'); a local folder is its own name."""
    if os.path.exists(data):
        return data, None
    name, _, config = data.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or name.endswith((".json", ".jsonl", ".parquet")):
        raise InputError(f"{data}: not found; expected a local folder in Hub layout, a file, a Hub id like owner/name, "
                         "or synthetic")
    return name, config or None


class ParquetRows:
    """Rows of parquet files, local or on the Hub, from any row on; row groups before it are not read.

    When the network fails in the middle, the same row is tried again; raises InputError after MID_RUN seconds.
    """

    def __init__(self, data, files, names):
        self.data, self.files, self.names = data, files, names
        self.sizes = {}                                         # file -> its number of rows, where known

    def __iter__(self):
        return (row for _, row in self.numbered())

    def numbered(self, start=0):
        """(number, row) of the rows from number `start` on."""
        rows = None

        def next_row():
            nonlocal rows
            rows = rows or self.read(start)
            try:
                return next(rows, None)
            except Exception:
                rows = None                                     # the next try opens its file again
                raise

        while found := retry(next_row, MID_RUN):
            start = found[0] + 1
            yield found

    def read(self, start):
        first = 0                                       # number of the first row of the file, then of the row group
        for file in self.files:
            if first + self.sizes.get(file, start + 1) <= start:
                first += self.sizes[file]
                continue
            with reading(file, "it as parquet", "repair it, or remove it"):
                parquet = self.open(file)
                for group in range(parquet.num_row_groups):
                    size = parquet.metadata.row_group(group).num_rows
                    if first + size > start:
                        batches = parquet.iter_batches(64, [group], [*{*self.names.values()}], use_threads=False)
                        rows = (rename(row, self.names) for batch in batches for row in batch.to_pylist())
                        yield from itertools.islice(enumerate(rows, first), max(0, start - first), None)
                    first += size

    def open(self, file):
        import fsspec
        from pyarrow import parquet
        opened = parquet.ParquetFile(fsspec.open(file).open() if "://" in file else file)
        check_columns(file, opened.schema_arrow.names, self.names)
        self.sizes[file] = opened.metadata.num_rows
        return opened

    def __len__(self):
        """The number of rows, from the footers of the files. Raises InputError where one cannot be read."""
        with reading(self.data, "the number of its rows", "repair its files, or give the run's length with --steps"):
            return sum(retry(lambda: self.open(file)).metadata.num_rows for file in self.files)


def numbered(rows, start=0):
    """(number, row) from row number `start` on; rows that can begin there themselves do not read those before."""
    return rows.numbered(start) if hasattr(rows, "numbered") else itertools.islice(enumerate(rows), start, None)


def is_transient(error):
    """Whether an error may go away by itself: a network that refuses, stalls or breaks, a Hub that is overloaded."""
    from huggingface_hub.errors import HTTPError  # of the HTTP library that this release uses
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return True
    cause = error.__cause__ or error.__context__                # "not in the cache", because the Hub did not answer
    return isinstance(error, (OSError, InputError)) and cause is not None and is_transient(cause)


def retry(call, seconds=AT_START):
    """Return `call()`, tried again while the network fails, after 1, 2, 4, ... 60 seconds, each pause printed.

    Raises its last error when less than the next pause is left of `seconds`. The time counts from the first call: the
    libraries pause and try again themselves.
    """
    began, pause = time.monotonic(), 1
    while True:
        try:
            return call()
        except Exception as error:              # the classes differ between releases of the Hub's libraries
            if not is_transient(error) or time.monotonic() + pause > began + seconds:
                raise
            reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        warn(f"no answer from the network ({reason}); trying again in {pause} s, giving up after {seconds} s")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


# ------------------------------------------------------------------------------------------------------------ pages

@dataclass
class Page:
    """One image, sometimes several or none, with all questions about it."""
    name: str                                                   # document and page number, or file and line
    images: list                                                # each as `load_image` takes it
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)            # one per question: the answer in the loss
    accepted: list[list[str]] = field(default_factory=list)     # all answers that count as right
    follows: set[int] = field(default_factory=set)              # questions that continue the conversation before
    ids: list = field(default_factory=list)                     # of the questions, in files of predictions
    types: list[list[str]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)             # of the questions: file:line, or their ids
    rows: int = 0                                               # rows of the data set that this page came from
    unanswered: int = 0                                         # rows without an answer
    key: int = field(default=0, compare=False)                  # equal for all rows of a page
    cut: bool = field(default=False, compare=False)             # another part of the page came before
    epoch: int = 0
    resume: tuple = (0, 0, 0)                                   # (epoch, block, pages of it done) after this page
    instruction: str = ""                                       # added to each of its questions
    system: str | None = None                                   # as in `write_page`
    history: list = field(default_factory=list)
    question_start: str | None = None
    max_tiles: int | None = None                                # if different from --max-tiles
    augment: bool = False                                       # compress its images as JPEG, anew in each epoch

    @property
    def full(self):
        return len(self.questions) >= MOST_QUESTIONS or len(self.instruction.join(self.questions)) >= MOST_CHARACTERS


def group_rows_into_pages(rows, answered=True, instruction=None):
    """Gather the rows of each page -> list of Pages, in the order of their first rows.

    A page with more questions than one row of tokens can hold becomes several, marked as `cut`. `answered`: leave out
    questions without an answer. `instruction`: added to every question; None: that of the row, else INSTRUCTION.

    >>> [page.questions for page in group_rows_into_pages([row("a", 1), row("b", 2), row("a", 3)])]
    [[1, 3], [2]]
    """
    pages, latest = [], {}                                      # latest: key -> the page that takes further rows
    for row in rows:
        key = page_key(row)
        if key not in latest or latest[key].full:
            pages.append(open_page(row, key, instruction))
            pages[-1].cut = key in latest
            latest[key] = pages[-1]
        add_row(latest[key], row, answered)
    return pages


def page_key(row):
    """What tells pages apart: document and page number, or the image's bytes where a row does not have both.

    For a row of a file: its images and system turn; a conversation with images inside, or without any, is its own page.
    """
    part = row.get("part", ())
    if "turns" in row:
        alone = not row["images"] or row["question_start"]
        return part, *((row["place"],) if alone else (row["images"], row["system"]))
    if row.get("docId") is not None and row.get("ucsf_document_page_no") is not None:
        return part, row["docId"], row["ucsf_document_page_no"]
    return part, hashlib.sha1(image_bytes(row)).hexdigest()


def image_bytes(row):
    """The image file of a row; empty, so that the page is reported and skipped, where there is none."""
    image = row["image"] if isinstance(row["image"], dict) else {"bytes": row["image"], "path": row["image"]}
    content, path = image.get("bytes"), image.get("path")
    if hasattr(content, "__bytes__"):
        return content
    return Path(path).read_bytes() if isinstance(path, str) and os.path.isfile(path) else b""


def open_page(row, key, instruction):
    """A Page for a row, still without its questions."""
    instruction = row.get("instruction", INSTRUCTION) if instruction is None else instruction
    if "turns" not in row:
        return Page("/".join(map(str, key[1:])), [image_bytes(row)], key=hash(key), instruction=instruction)
    more = {name: row[name] for name in ("system", "history", "question_start", "max_tiles", "augment") if name in row}
    return Page(row["place"], list(row["images"]), key=hash(key), instruction=instruction, **more)


def add_row(page, row, answered):
    """Add a row's question, or its conversation, to its page; the first of its answers is in the loss, as written."""
    page.rows += 1
    if "turns" in row:
        turns, accepted, place = row["turns"], row["accepted"], row["place"]
    else:
        accepted, place = accepted_answers(page, row), f"{page.name}/{page.rows}"
        turns = [(plain(row["question"] or ""), (accepted or [""])[0])]
        page.unanswered += not accepted
        if answered and not accepted:
            return
    name, types = place if row.get("questionId") is None else row["questionId"], row.get("question_types") or []
    for number, (question, answer) in enumerate(turns):
        if number:
            page.follows.add(len(page.questions))
        page.questions.append(question)
        page.answers.append(answer)
        page.accepted.append([answer] * bool(answer) if accepted is None else accepted)
        page.ids.append(f"{name}/{number + 1}" if len(turns) > 1 else name)
        page.types.append([types] if isinstance(types, str) else [str(kind) for kind in types])
        page.places.append(place if "turns" in row else name)


def accepted_answers(page, row):
    """All answers to a row's question that count as right; none without a question or a first answer."""
    question, answers = row["question"] or "", row["answers"] or []
    answers = [answer for answer in ([answers] if isinstance(answers, str) else answers) if answer is not None]
    if not isinstance(question, str) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"page {page.name}: question {row['question']!r}, answers {row['answers']!r}; "
                         "expected text and a list of texts")
    return [plain(answer) for answer in answers] if question and answers and answers[0] else []


def plain(text):
    """Text as the tokenizer takes it: half a character, as JSON can hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


# ----------------------------------------------------------------------------------------------------------- stream

def page_blocks(rows, epochs=1, seed=0, shuffle=True, block_rows=2048, start=(0, 0, 0), group=None, **more):
    """Yield lists of pages, one block of rows after another: gathered, then shuffled within the block.

    `epochs`: None for no end. `start`: (epoch, block, pages of it done), the `resume` of the last page that was used;
    no row before that block is read. `group`: (size, count) of `group_by_length`. `more`: of `group_rows_into_pages`.
    A page that is cut by the edge of a block becomes two. Raises InputError for rows that cannot be read, or none.
    """
    epoch, block, done = start
    placed = -done                      # pages before this block; only the remainder by a micro-batch's size matters
    first = min(FIRST_BLOCK, block_rows)                    # rows of block 0; of every other one block_rows
    while epoch != epochs:
        before, begin = set(), first + (block - 1) * block_rows if block else 0
        try:
            for block, block_of_rows in itertools.groupby(numbered(rows, begin),
                                                          lambda row: max(0, (row[0] - first) // block_rows + 1)):
                pages = group_rows_into_pages((row for _, row in block_of_rows), **more)
                for page in pages:
                    page.cut, page.epoch = page.cut or page.key in before, epoch
                before, draw = {page.key for page in pages}, random.Random(f"{seed} {epoch} {block}")
                if shuffle:
                    draw.shuffle(pages)
                if group:
                    pages = group_by_length(pages, *group, draw, placed)
                for index, page in enumerate(pages, 1):
                    page.resume = epoch, block, index
                yield pages[done:]
                placed, done = placed + len(pages), 0
        except InputError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"the rows of block {block} cannot be read ({type(error).__name__}: {error}); look at the "
                             "data or the network, then continue with --resume") from error
        if not before and begin == 0:
            raise InputError("the data holds no rows; expected at least one question about one page")
        epoch, block, done, placed = epoch + 1, 0, 0, 0


def group_by_length(pages, size, count, draw, placed=0):
    """Order pages so that each micro-batch, `count` in a row, has a similar `size(page)`; `draw` shuffles these groups.

    `placed`: pages before these. The micro-batches that cross the edges of the block get its smallest pages.
    """
    pages = sorted(pages, key=size)
    begin = min(-placed % count, len(pages))                            # pages that complete the micro-batch before
    end = begin + (len(pages) - begin) % count                          # and those that begin the one after
    groups = [pages[i:i + count] for i in range(end, len(pages), count)]
    draw.shuffle(groups)
    return [*pages[:begin], *itertools.chain(*groups), *pages[begin:end]]


def prefetch(blocks):
    """Yield the pages of `blocks`; a thread gathers the next block while one is used, so two are held at most."""
    def gather():
        block = Future()

        def work():
            try:
                block.set_result(next(blocks, None))
            except BaseException as error:                      # raised where the pages are used
                block.set_exception(error)
        threading.Thread(target=work, daemon=True).start()      # daemon: one that waits for the network ends with us
        return block

    ready = gather()
    while (pages := ready.result()) is not None:
        ready = gather()
        yield from pages


# --------------------------------------------------------------------------------------------------------- examples

@dataclass
class Example:
    """A page as the model reads it, or the `error` that keeps it from being read."""
    page: Page
    tiles: torch.Tensor | None = None                           # uint8 (n, 3, 448, 448)
    prompt: Prompt | PromptTensors | None = None
    too_long: list[str] = field(default_factory=list)           # questions left out,
    kept_questions: list[int] = field(default_factory=list)     # and the indices of the others
    tile_counts: list[int] = field(default_factory=list)        # of each image
    error: str | None = None

    @property
    def answer_tokens(self):
        return self.prompt.answer_tokens

    def pin_memory(self):
        if not self.error:
            self.tiles, self.prompt.numbers = self.tiles.pin_memory(), self.prompt.numbers.pin_memory()
        return self


class PageDataset(Dataset):
    """Turns a page into an example: decoded, tiled, tokenized. The work of a DataLoader's workers."""
    image_key = bool                    # what of an image's bytes leaves a worker; a hash, if images are compared

    def __init__(self, model, max_tiles=12, max_length=8192, allow_private=False):
        self.tokenizer, self.config = model.tokenizer, model.config
        self.max_tiles, self.allow_private, most = max_tiles, allow_private, model.config.language.max_positions
        self.max_length = max_length and min(max_length, most)                  # None: lengths are judged elsewhere
        self.limit = (f"the model's {most} positions; lower --max-tiles" if self.max_length == most
                      else f"--max-length {max_length}; raise it or lower --max-tiles")

    def __getitem__(self, page):
        if not page.questions:
            return Example(page, error=f"none of its {page.rows} questions has an answer "
                                       "(DocumentVQA's test split has none: train on another split)")
        tile_pixels, draw = self.config.vision.tile_pixels, random.Random(f"{page.name} {page.epoch}")
        try:
            images = [load_image(image, self.allow_private) for image in page.images]
        except InputError as error:
            return Example(page, error=str(error))
        if page.augment:
            images = [compressed(image, draw.randint(75, 100)) for image in images]
        tiles = [tile_page(image, self.tiles_of_each(page), tile_pixels, self.config.thumbnail) for image in images]
        counts = [len(t) for t in tiles]
        prompt, left_out = self.write(page, counts)
        tiles = torch.from_numpy(np.concatenate([np.empty((0, 3, tile_pixels, tile_pixels), np.uint8), *tiles]))
        example = Example(page, tiles, prompt, [page.questions[i] for i in left_out],
                          [i for i in range(len(page.questions)) if i not in left_out], counts)
        if len(left_out) == len(page.questions):
            example.error = (f"does not fit: {prompt.branches.count(0)} tokens before the question leave no room "
                             f"in {self.limit}")
        return example

    def light(self, example):
        """The example as it leaves a worker: its prompt as tensors, of its images names or keys, not megabytes."""
        prompt = example.prompt and PromptTensors.of(example.prompt)
        images = [image if isinstance(image, str) else self.image_key(image) for image in example.page.images]
        return replace(example, page=replace(example.page, images=images), prompt=prompt)

    def tiles_of_each(self, page):
        """The most tiles that each image of a page may be cut into: they share those of the page."""
        return max(1, (page.max_tiles or self.max_tiles) // max(1, len(page.images))) if self.config.tiled else 1

    def write(self, page, tile_counts, asked=None):
        """The prompt of a page, and the indices of the questions left out because they are too long.

        For training every conversation is a branch. With `asked`, indices of questions, each of them is a branch of its
        own behind the turns before it, and its answer is left open.
        """
        begins = [i for i in range(len(page.questions)) if i not in page.follows]
        chains = [list(range(*ends)) for ends in itertools.pairwise([*begins, len(page.questions)])]
        if asked is not None:
            chains = [chain[:n + 1] for chain in chains for n, i in enumerate(chain) if i in asked]
        tidy, asked = str.strip if self.config.template.strip and asked is None else str, asked is not None
        behind = str.rstrip if page.question_start and tidy is str.strip else tidy      # an image inside a question
        branches = [[((tidy if i in page.follows else behind)(page.questions[i] + page.instruction),
                      None if asked and i == chain[-1] else tidy(page.answers[i])) for i in chain] for chain in chains]
        history = [(tidy(question + page.instruction), tidy(answer)) for question, answer in page.history]
        prompt, left_out = write_page(self.tokenizer, self.config.tokens_per_tile, tile_counts, branches,
                                      self.max_length, page.system, history, page.question_start, self.config.template)
        return prompt, [i for n in left_out for i in (chains[n][-1:] if asked else chains[n])]

    def size(self, page):
        """About how many tokens a page has, from the headers of its images, four bytes of text to a token."""
        most, tiles = self.tiles_of_each(page), 0
        for image in page.images:
            pixels = image_size(image)
            columns, rows = choose_grid(*pixels, most, self.config.vision.tile_pixels) if pixels else (most, 1)
            tiles += columns * rows + (self.config.thumbnail and columns * rows > 1)
        text = sum(len(text.encode()) for text in (page.instruction.join([*page.questions, ""]), *page.answers))
        return tiles * self.config.tokens_per_tile + text // 4


def leave_signals_to_the_parent(_):
    """In a worker: leave Ctrl-C and a first SIGTERM to the main process; a second SIGTERM ends the worker."""
    # as does an example that cannot be handed over, because /dev/shm is full: the main process would wait for ever
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def chunks(items, size):
    """[1, 2, 3, 4, 5], 2 -> [1, 2], [3, 4], [5]."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def load_examples(pages, dataset, workers, pin_memory=False):
    """A DataLoader over `pages`, an iterable, that yields their examples in the same order, as `PageDataset.light`."""
    return DataLoader(dataset, sampler=pages, batch_size=None, collate_fn=dataset.light, num_workers=workers,
                      pin_memory=pin_memory, persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
                      worker_init_fn=leave_signals_to_the_parent)


if __name__ == "__main__":
    from extras.check import main
    from extras.cli import run
    run(main)
