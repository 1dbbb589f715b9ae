"""Is every row of a data set right, and how does the model see it? The commands `python data.py check` and `show`."""
import collections
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from data import PageDataset, group_rows_into_pages, page_blocks, plain
from extras.cli import OneLineParser, add_row_flags, count, int_in
from extras.formats import content_hash, read_file
from extras.outputs import free_name, new_file
from extras.pictures import show_example
from extras.sources import is_synthetic, named_parts, open_rows
from model.checkpoint import CONFIG, resolve
from model.config import Config
from model.errors import InputError, printable
from model.names import PARTS
from model.tokenizer import load_tokenizer


def parse_arguments():
    parser = OneLineParser(description="Check your data before you train on it, or see an example as the model does.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check whole files: print file:line and the reason for wrong rows")
    check.add_argument("paths", nargs="+", metavar="PATH", help="files, folders in Hub layout or Hub ids")
    show = commands.add_parser("show", help="show one example: its tiles, its tokens, and which are in the loss")
    show.add_argument("path", metavar="PATH", help="a file, a folder in Hub layout or a Hub id")
    show.add_argument("number", type=int_in(0), metavar="N", help="which page with its questions; the first is 0")
    show.add_argument("--out", help="file for the picture of the tiles (show-N.png, or a free name like it)")
    show.add_argument("--overwrite", action="store_true", help="replace the file of --out if it exists")
    for flag in (check.add_argument, show.add_argument):
        flag("--model", help="its tokenizer and tile size are used (the embedded model; check skips lengths)")
        flag("--max-tiles", type=int_in(1, 128), help="most tiles per page (the model's own)")
        flag("--max-length", type=int_in(1), default=8192, help="tokens of a question with its page (%(default)s)")
        flag("--allow-private", action="store_true", help="fetch images from private networks too")
        flag("--split", default="train", help="split of a data set in Hub layout (%(default)s)")
        add_row_flags(flag)
    check.add_argument("--eval-data", metavar="DATA", help="validation data: list its images that are in PATH")
    return parser.parse_args()


def make_dataset(arguments):
    """The PageDataset for --model: only its configuration and its tokenizer are needed."""
    folder, _, _ = resolve(arguments.model or "tiny", PARTS, True)         # no part: the weights are not fetched
    model = SimpleNamespace(config=Config.read(folder / CONFIG), tokenizer=load_tokenizer(folder))
    judged = arguments.model or arguments.command == "show"             # by their length
    return PageDataset(model, arguments.max_tiles or model.config.max_tiles,
                       arguments.max_length if judged else None, arguments.allow_private)


def check(path, dataset, arguments):
    """Print file:line: reason for every wrong row of some data, and a summary. Returns whether all is right.

    Images that are in two splits of a folder, or in --eval-data too, are wrong as well.
    """
    if is_synthetic(path):
        raise InputError(f"{path}: drawn without an end; check files that python -m model.tiny.pages FOLDER N draws")
    parts, instruction = read_file(path) if os.path.isfile(path) else [], arguments.instruction
    # a file is gathered as a whole: an image is decoded once for all its rows
    blocks = [group_rows_into_pages(part.rows, instruction=instruction) for part in parts] or page_blocks(
        open_rows(path, arguments.split, columns=arguments.columns), shuffle=False, instruction=instruction)
    problems = [problem for part in parts for problem in part.problems + part.unanswered + part.remarks]
    pages, pictures, contents = [], set(), set()
    for page in itertools.chain.from_iterable(blocks):
        problems += problems_of(dataset[page], dataset.limit, in_file=bool(parts))
        pictures.update(image for image in page.images if isinstance(image, str))
        contents.update(map(content_hash, page.images))
        pages.append((page.rows, len(page.questions), page.unanswered))
    splits = {(path, file.name.split("-")[0]) for file in Path(path).glob("data/*.parquet")} - {(path, arguments.split)}
    for other, split in sorted(splits) + [(arguments.eval_data, "validation")] * bool(arguments.eval_data):
        rows = open_rows(other, split, hold_out=False, columns=arguments.columns, answered=False)
        problems += [(f"{other}: {split}: {page.name}", f"its image is in {path} too ({arguments.split})")
                     for page in itertools.chain.from_iterable(page_blocks(rows, shuffle=False, answered=False))
                     if not contents.isdisjoint(map(content_hash, page.images))]
    rows, questions, unanswered = map(sum, zip(*pages)) if pages else (0, 0, 0)
    print_problems(path, problems)
    print(f"{printable(path)}: {f'{len(problems)} wrong' if problems else 'all is right'}; "
          f"{count(sum(part.entries for part in parts) if parts else rows, 'row')}, {count(len(pages), 'page')}, "
          f"{count(questions, 'question')}, {unanswered} without an answer"
          + (f", {count(len(pictures), 'image')}" if parts else ""))
    return not problems


def print_problems(path, problems):
    """Print file:line: reason; of a reason that repeats, the first three lines and a count."""
    reasons = collections.Counter()
    for place, reason in sorted(problems, key=by_line):
        reasons[reason] += 1
        if reasons[reason] <= 3:
            print(printable(plain(f"{place}: {' '.join(reason.split())}")))
    for reason, often in reasons.items():
        if often > 3:
            print(printable(plain(f"{path}: {often - 3} more: {' '.join(reason.split())}")))


def problems_of(example, limit, in_file):
    """(place, reason) of all that keeps a page, or some of its questions, out of training."""
    page, kept, reason = example.page, example.kept_questions, example.error
    places = [place for i, place in enumerate(page.places) if i not in kept]
    if reason and not (in_file and places):
        return [(page.name, reason)]
    return [(place, reason or f"does not fit {limit}") for place in dict.fromkeys(places)]


def by_line(problem):
    file, _, line = problem[0].rpartition(":")
    return file, int(line) if line.isdigit() else 0


def show(arguments, dataset):
    """Print the example with a number as the model reads it, and draw its tiles."""
    rows = open_rows(arguments.path, arguments.split, hold_out=False, columns=arguments.columns)
    pages = itertools.chain.from_iterable(page_blocks(rows, shuffle=False, instruction=arguments.instruction))
    page = next(itertools.islice(pages, arguments.number, None), None)
    if page is None:
        raise InputError(f"{arguments.path}: no example {arguments.number}; the first is 0")
    inputs = [*(name for name, _ in named_parts(arguments.path)), *getattr(rows, "files", ()),
              *(image for image in page.images if isinstance(image, str))]
    out = (new_file(arguments.out, arguments.overwrite, inputs) if arguments.out is not None
           else free_name(f"show-{arguments.number}.png"))
    example = dataset[page]
    if example.error:
        raise InputError(f"{page.name}: {example.error}")
    if arguments.model is None:
        print("tokens of the embedded model; for another model give --model OpenGVLab/InternVL2-1B", file=sys.stderr)
    show_example(example, dataset, out)


def main():
    arguments = parse_arguments()
    dataset = make_dataset(arguments)
    if arguments.command == "show":
        return show(arguments, dataset)
    sys.exit(not all([check(path, dataset, arguments) for path in arguments.paths]))
