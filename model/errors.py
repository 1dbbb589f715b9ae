"""A mistake that a user can correct is one line: what was found, what was expected, what to do."""
import sys

from tqdm import tqdm


class InputError(ValueError):
    """A mistake in what came from outside (arguments, files, network). Its text is one line that a user can act on."""


def warn(text):
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
