"""Which rows does a data set hold, and where do they come from?

    owner/name, FOLDER       parquet files on the Hub or here     streamed from any row on, trouble with the network waited out
    my.jsonl                 a file in one of the usual formats   read whole, one page in 20 kept for validation
    synthetic                pages drawn from a seed              without an end
    my.jsonl=2,owner/name    several                              mixed evenly over the epoch

A row is a dict: of a file what `read_entry` makes of an entry, of all others DocumentVQA's columns. No image is decoded here.
"""
import heapq
import itertools
import re
from pathlib import Path

from extras.formats import read_file
from model.errors import InputError
from model.network import Backoff, is_transient, retry
from model.tiny.pages import SyntheticRows

COLUMNS = ("image", "question", "answers")                              # what rows must have,
PAGE_COLUMNS = ("docId", "ucsf_document_page_no")                       # and what tells their pages apart, if they have it
NAME_COLUMNS = ("questionId", "question_types")                         # and what predictions and scores call them
PATIENCE = 600                          # seconds without the network, in the middle of a run, before it gives up
HELD_OUT, MOST_HELD_OUT = 20, 64        # of a file one page in 20 is kept for validation, at least 1, at most 64


def open_rows(data, split, seed=0, domains="plain", hold_out=True):
    """The rows of a split, to be iterated as often as wanted: dicts, images not decoded.

    `data`: Hub id (`owner/name`, or `owner/name:config`), local folder in Hub layout, a file in any of FORMATS or the mixture
    file that names several, or "synthetic" (`synthetic:1` for pages of one tile only), whose pages are drawn from `seed` and
    look like `domains`. Several, comma-separated, are mixed; `=2` behind one says how often it comes in an epoch.
    A file has no splits: with `hold_out` "validation" is one page in 20 of it and "train" the others, else both are all of it.
    Raises InputError where it cannot be reached or has no such split or columns, or has a malformed row.
    """
    parts = []
    for name, weight in named_parts(data):
        if Path(name).is_file():
            parts += [(rows, name, weight * often) for rows, often in open_file(name, split, hold_out)]
        elif is_synthetic(name):
            parts.append((SyntheticRows(split, seed, domains, int(name.partition(":")[2] or 4)), name, weight))
        else:
            parts.append((open_hub_rows(name, split), name, weight))
    if split == "validation" and all(rows == [] for rows, _, _ in parts):
        raise InputError(f"{data}: too few pages to keep one for validation; name others with --eval-data, or switch it off "
                         "with --eval-every 0")
    if len(parts) == 1 and parts[0][2] == 1:
        return parts[0][0]
    return Mixture([(rows, number_of(rows, name), weight if split == "train" else 1) for rows, name, weight in parts])


def count_rows(data, split, hold_out=True):
    """The number of rows of a split. Raises InputError where it is unknown, or without end."""
    return number_of(open_rows(data, split, hold_out=hold_out), data)


def number_of(rows, name):
    if isinstance(rows, SyntheticRows):
        raise InputError("synthetic pages have no end; say how long to train with --steps")
    if not isinstance(rows, (list, Mixture, ParquetRows)):
        raise InputError(f"{name}: cannot tell how many rows it has, which is no parquet; say how long to train with --steps")
    return rows.count() if isinstance(rows, ParquetRows) else len(rows)


# ---------------------------------------------------------------------------------------------------------------- several

def named_parts(data):
    """'a.jsonl=2,owner/name' -> [('a.jsonl', 2.0), ('owner/name', 1.0)]."""
    parts = []
    for name in [data] if Path(data).exists() else data.split(","):
        if not name.strip():
            raise InputError(f"{data!r}: one of its names is empty; expected names with a comma between each two")
        begin, _, weight = name.rpartition("=")
        if Path(name).exists() or not begin:
            parts.append((name, 1.0))
        elif re.fullmatch(r"\d*\.?\d+", weight) and float(weight) > 0:
            parts.append((begin, float(weight)))
        else:
            raise InputError(f"{name}: {weight!r} is no weight; expected a number above 0 behind the =")
    return parts


def is_synthetic(data):
    return data in ("synthetic", "synthetic:1", "synthetic:2", "synthetic:4")


class Mixture:
    """Rows of several sources, each spread evenly over the epoch. `parts`: (rows, their number, how often they come).

    A weight of 2.5 is twice all rows and once the first half of them.
    """

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return sum(int(count * weight + 1e-9) for _, count, weight in self.parts)

    def __iter__(self):
        def spread(number, rows, count, weight):
            total = int(count * weight + 1e-9)
            again = itertools.chain.from_iterable(itertools.repeat(rows))
            for i, row in enumerate(itertools.islice(again, total)):
                yield (i + 0.5) / total, row | {"part": (number, i // count)}       # a row that comes again is another page's
        streams = [spread(number, *part) for number, part in enumerate(self.parts)]
        return (row for _, row in heapq.merge(*streams, key=lambda pair: pair[0]))


# ----------------------------------------------------------------------------------------------------------------- a file

def open_file(path, split, hold_out):
    """(rows, how often they come in an epoch) of a file, or of each that a mixture file names. See `open_rows`."""
    for part in read_file(path):
        if part.problems:
            count = len(part.problems)
            more = f"; {count} in all, told by: python data.py check {path}" if count > 1 else ""
            raise InputError(": ".join(part.problems[0]) + more)
        if hold_out:
            kept = held_out(part.rows)
            yield [row for row in part.rows if (row["key"] in kept) == (split == "validation")], part.weight
        else:
            yield part.rows, part.weight


def held_out(rows):
    """The keys of the rows kept for validation, all rows of an image or none; drawn by a hash, so they stay when rows move."""
    keys = sorted({row["key"] for row in rows})
    return set(keys[:min(max(1, len(keys) // HELD_OUT), MOST_HELD_OUT, len(keys) - 1)])


# ----------------------------------------------------------------------------------------- the Hub, folders in its layout

def open_hub_rows(data, split):
    """The rows of one data set in Hub layout. See `open_rows`."""
    name, config = hub_name(data)
    try:
        import datasets
    except ImportError as error:
        raise InputError("reading rows needs the package datasets: pip install datasets") from error
    try:
        builder = retry(lambda: datasets.load_dataset_builder(name, config))
        rows = retry(lambda: builder.as_streaming_dataset(split=split))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"{data}: neither a local folder nor a data set on the Hub; check --data") from error
    except Exception as error:                          # classes differ by release
        if is_transient(error):
            raise InputError(f"{data}: the Hub cannot be reached; connect to the network, or give a local folder with "
                             "--data") from error
        if not isinstance(error, (ValueError, OSError)):
            raise
        hint = " or switch validation off with --eval-every 0" if split == "validation" else ""
        raise InputError(f"{data}: cannot read the split '{split}' ({error}); expected data/{split}-*.parquet{hint}") from error
    columns = rows.column_names or []
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise InputError(f"{data}: no column {', '.join(missing)} (found: {', '.join(columns)}); "
                         "expected DocumentVQA's columns")
    if builder.name == "parquet":
        return ParquetRows(data, [str(file) for file in builder.config.data_files[split]])
    return rows.cast_column("image", datasets.Image(decode=False))


def hub_name(data):
    """'owner/name:config' -> ('owner/name', 'config'); a local folder is its own name."""
    if Path(data).exists():
        return data, None
    name, _, config = data.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or name.endswith((".json", ".jsonl", ".parquet")):
        raise InputError(f"{data}: not found; expected a local folder in Hub layout, a file, a Hub id like owner/name, "
                         "or synthetic")
    return name, config or None


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
        patience = Backoff(PATIENCE)
        while True:
            try:
                for number, row in self.read(start):
                    patience.over()
                    start = number + 1
                    yield number, row
                return
            except Exception as error:                          # which classes come up from the network differs by release
                if not is_transient(error):
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
                        batches = parquet.iter_batches(64, [group], [*COLUMNS, *PAGE_COLUMNS, *NAME_COLUMNS])
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
            return sum(retry(lambda: self.open(file)).metadata.num_rows for file in self.files)
        except Exception as error:                              # classes differ by release
            if not isinstance(error, (ArrowException, OSError)) and not is_transient(error):
                raise
            raise InputError(f"{self.data}: cannot read how many rows its files hold ({error}); mend them or "
                             "say how long to train with --steps") from error


def numbered(rows, start=0):
    """(number, row) from row `start` on, of rows that know how to begin there or of any others."""
    return rows.numbered(start) if hasattr(rows, "numbered") else itertools.islice(enumerate(rows), start, None)
