"""What a user can cause, told in one line: what was found, what was expected, what to do."""
import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm


class InputError(ValueError):
    """A mistake in what came from outside (arguments, files, network). Its text is one line that a user can act on."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line on standard error, exit status 2; flags are not abbreviated."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def warn(text):
    """A line on standard error, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def run(main):
    """Call `main()`; an `InputError` ends the program with its line on standard error and exit status 2."""
    try:
        try:
            main()
        finally:
            print(end="", flush=True)   # here, not when Python ends: whoever read it may be gone
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)                   # as a shell counts a program ended by Ctrl-C
    except BrokenPipeError:             # as in `... | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())          # for what Python flushes when it ends
        sys.exit(141)                   # as a shell counts a program ended by SIGPIPE


def int_in(smallest, largest=2 ** 63 - 1):
    """An argument type: an integer of this range."""
    return lambda text: in_range(int(text), smallest, largest)


def float_in(smallest, largest):
    """An argument type: a number of this range."""
    return lambda text: in_range(float(text), smallest, largest)


def in_range(value, smallest, largest):
    if not smallest <= value <= largest:
        raise argparse.ArgumentTypeError(f"{value} is not between {smallest} and {largest}")
    return value


def names_in(choices, what, more=""):
    """An argument type: names of `choices`, comma-separated. `what` they are, and what `more` is allowed, for the message."""
    def check(text):
        for name in text.split(","):
            if name not in choices:
                expected = ", ".join((*choices, more) if more else choices)
                raise argparse.ArgumentTypeError(f"{name!r} is not a {what}; expected {expected}")
        return text
    return check


def add_switch(group, flag, help, default=False):
    """--flag and --no-flag."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
