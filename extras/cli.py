"""What do all commands share? A parser with errors of one line, checked number types, exit codes without tracebacks."""
import argparse
import errno
import os
import re
import sys
from pathlib import Path

from data import ROW_COLUMNS
from model.errors import InputError, printable
from model.tokenizer import clean


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, with exit status 2; flags cannot be abbreviated.

    A flag that takes a name takes no empty one.
    """

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
        self.register("type", None, not_empty)          # the type of all arguments without one

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")

    def check_stored(self, stored, place):
        """Raise InputError for a stored setting that no flag can have; numbers are checked as defaults are."""
        for action in self._actions:
            value = stored.get(action.dest, action.default)
            if ((value is None) > (action.default is None) or action.choices and value not in (None, *action.choices)
                    or action.nargs == 0 and type(value) is not type(action.default)):
                raise InputError(f"{place}: {action.dest} is {value!r}; repair it, or begin a new run")


def run(main):
    """Call `main()`. An InputError ends the program with its line on standard error and exit status 2."""
    try:
        try:
            main()
        finally:
            print(end="", flush=True)   # here, not when Python ends: the reader of a pipe may be gone
    except KeyboardInterrupt:
        sys.exit(130)                   # as a shell reports a program ended by Ctrl-C
    except BrokenPipeError:             # as in `... | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())          # for what Python flushes when it ends
        sys.exit(141)                   # as a shell reports a program ended by SIGPIPE
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        print(f"{Path(sys.argv[0]).name}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)


def not_empty(text):
    """An argument type: text. An empty value, as of an unset variable in a script, would act like no flag at all."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty; give a name, or leave the flag out")
    return text


def int_in(smallest, largest=10 ** 9 - 1):
    """An argument type: an integer in this range, by default below what any machine can do."""
    return lambda text: in_range(int(text), smallest, largest)


def float_in(smallest, largest):
    """An argument type: a number in this range."""
    return lambda text: in_range(float(text), smallest, largest)


def in_range(value, smallest, largest):
    if not smallest <= value <= largest:
        raise argparse.ArgumentTypeError(f"{value} is not between {smallest} and {largest}")
    return value


# the settings of an answer, as `Chat` has them, each with its type
ANSWER_SETTINGS = {"max_tiles": int_in(1, 128), "max_new_tokens": int_in(1), "temperature": float_in(0, 1000),
                   "top_p": float_in(1e-6, 1), "seed": int_in(0, 2 ** 63 - 1)}

SCORES = ".scores.json"                 # of predictions: a file beside them, with this behind their whole name


def count(number, thing):
    """1, 'page' -> '1 page'; 1200, 'page' -> '1,200 pages'."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def as_flag(name, value):
    """'max_tiles', 6 -> '--max-tiles 6'; True: the flag alone; None or False: 'no --max-tiles'."""
    flag = f"--{name.replace('_', '-')}"
    return f"no {flag}" if value is None or value is False else flag if value is True else f"{flag} {value}"


def names_in(choices, what, more=""):
    """An argument type: names of `choices`, comma-separated. `what` and `more`: words of its error message."""
    def check(text):
        for name in text.split(","):
            if name not in choices:
                expected = ", ".join((*choices, more) if more else choices)
                raise argparse.ArgumentTypeError(f"{name!r} is not a {what}; expected {expected}")
        return text
    return check


def add_row_flags(flag):
    """--instruction, to follow each question after a space or the white space it begins with, and --columns."""
    flag("--instruction", type=lambda text: clean(" " * (text[:1] > " ") + text), metavar="TEXT", help="added to every "
         "question of the data (in Hub layout DocVQA's, in files nothing; with --evaluate: that of the run)")
    known = names_in([f"{column}=NAME" for column in ROW_COLUMNS], "column")
    flag("--columns", type=lambda text: known(re.sub("=[^,]+", "=NAME", text)) and text, metavar="OURS=THEIRS,...",
         help="names of the columns in Hub layout, such as question=query,answers=label,image=img (DocumentVQA's; with "
         "--evaluate: those of the run)")


def add_switch(group, flag, help, default=False):
    """--flag and --no-flag."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
