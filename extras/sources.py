"""Which rows does `--data` name, and how are several data sets mixed?

    owner/name, FOLDER       parquet files on the Hub or here     streamed from any row on (data.py)
    my.jsonl                 a file in one of the usual formats   read whole, one image in 20 held out for validation
    synthetic                pages drawn from a seed              without an end
    my.jsonl=2,owner/name    several                              mixed evenly over the epoch

A row is a dict: for a file what `read_entry` makes of an entry, else DocumentVQA's columns. No image is decoded here.
"""
import collections
import heapq
import itertools
import os
import re
from pathlib import Path

from data import numbered, open_hub_rows
from model.errors import InputError, warn


def open_rows(data, split, seed=0, domains="plain", hold_out=True, columns=None, answered=True):
    """The rows of a split, to be iterated as often as needed: dicts, images not decoded.

    `data`: Hub id (`owner/name`, or `owner/name:config`), local folder in Hub layout, a file in any of FORMATS, a
    mixture file that names several, or "synthetic" (`synthetic:1` for pages of one tile only), pages drawn from `seed`
    that look like `domains`. Several, comma-separated, are mixed; `=2` behind a name: it comes twice in an epoch.
    A file has no splits: with `hold_out` `splits_of` divides the rows of all files together, else both are all rows.
    `columns`: see `open_hub_rows`. `answered`: rows without an answer are malformed. Raises InputError for what cannot
    be reached or lacks a split or a column.
    """
    from extras import formats
    named, parts = named_parts(data), []
    files = {name: open_file(name, split, answered) for name, _ in named if os.path.isfile(name)}
    rows_of_files = [row for of_file in files.values() for part in of_file for row in part.rows] if hold_out else []
    splits = formats.splits_of(rows_of_files)
    split_of = dict(zip(map(id, rows_of_files), splits))
    if "neither" in splits and split == "train":
        warn(f"{data}: {splits.count('neither')} rows are left out: they show images that are held out and others")
    for name, weight in named:
        for part in files.get(name, ()):
            rows = [row for row in part.rows if not hold_out or split_of[id(row)] == split]
            parts.append((rows, name, weight * part.weight))
        if name not in files:
            rows = (open_synthetic(name, split, seed, domains) if is_synthetic(name)
                    else open_hub_rows(name, split, columns))
            parts.append((rows, name, weight))
    if all(rows == [] for rows, _, _ in parts):
        raise InputError(f"{data}: no rows for {split}: too few images to hold one out for validation; name others "
                         "with --eval-data, or switch it off with --eval-every 0")
    if len(parts) == 1 and parts[0][2] == 1:
        return parts[0][0]
    return Mixture([(rows, count_rows(rows, name), weight if split == "train" else 1) for rows, name, weight in parts])


def count_rows(rows, name):
    """The number of the rows that `open_rows(name)` gave. Raises InputError where it is unknown, or without end."""
    if not hasattr(rows, "__len__"):
        reason = "drawn without end" if is_synthetic(name) else "not parquet, so their number is unknown"
        raise InputError(f"{name}: its rows are {reason}; give the length of the run with --steps")
    return len(rows)


def named_parts(data):
    """'a.jsonl=2,owner/name' -> [('a.jsonl', 2.0), ('owner/name', 1.0)]."""
    parts = []
    for name in [data] if os.path.exists(data) else data.split(","):
        if not name.strip():
            raise InputError(f"{data!r}: one of its names is empty; expected names separated by commas")
        begin, _, weight = name.rpartition("=")
        if os.path.exists(name) or not begin:
            parts.append((name, 1.0))
        elif re.fullmatch(r"\d*\.?\d+", weight) and float(weight) > 0:
            parts.append((begin, float(weight)))
        else:
            raise InputError(f"{name}: {weight!r} is not a weight; expected a number above 0 behind the =")
    return parts


def is_synthetic(data):
    return data in ("synthetic", "synthetic:1", "synthetic:2", "synthetic:4")


def open_synthetic(name, split, seed, domains):
    """Drawn pages, without an end. Raises InputError for an unknown domain."""
    from model.tiny.pages import DOMAINS, SyntheticRows
    for domain in domains.split(","):
        if domain not in DOMAINS:
            raise InputError(f"--domain: {domain!r} is not a domain; expected {', '.join(DOMAINS)}")
    return SyntheticRows(split, seed, domains, int(name.partition(":")[2] or 4))


def whole_paths(data):
    """'a.jsonl=2,owner/name' -> the same with whole paths of files, so that a run can be used from any folder."""
    parts = [(name if is_synthetic(name) or not os.path.exists(name) else str(Path(name).resolve()), weight)
             for name, weight in named_parts(data)]
    return ",".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in parts)


class Mixture:
    """Rows of several sources, each spread evenly over the epoch. `parts`: (rows, their number, how often they come).

    A weight of 2.5 means all rows twice and the first half of them once more.
    """

    def __init__(self, parts):
        self.parts = parts
        self.totals = [int(count * weight + 1e-9) for _, count, weight in parts]

    def __len__(self):
        return sum(self.totals)

    def __iter__(self):
        return (row for _, row in self.numbered())

    def numbered(self, start=0):
        """(number, row) from row number `start` on; a source that can begin in the middle reads no row before it."""
        order = heapq.merge(*([((i + 0.5) / total, n) for i in range(total)] for n, total in enumerate(self.totals)))
        taken = collections.Counter(part for _, part in itertools.islice(order, start))
        sources = [self.repeated(part, taken[part]) for part in range(len(self.parts))]
        return ((number, next(sources[part])) for number, (_, part) in enumerate(order, start))

    def repeated(self, part, start):
        """The rows of one source from number `start` on, again and again; a repeated row belongs to another page."""
        rows, count, _ = self.parts[part]
        for time in itertools.count(start // count):
            for _, row in numbered(rows, start % count if time == start // count else 0):
                yield row | {"part": (part, time)}


def open_file(path, split, answered):
    """The parts of a file, or of each file in a mixture file. Raises InputError. See `open_rows`."""
    from extras.formats import read_file
    if split not in ("train", "validation"):
        raise InputError(f"{path}: --split {split}; a file has train and validation")
    parts = read_file(path)
    if problems := [problem for part in parts for problem in part.problems + part.unanswered * answered]:
        more = f"; {len(problems)} in all, listed by: python data.py check {path}" if len(problems) > 1 else ""
        raise InputError(": ".join(problems[0]) + more)
    return parts
