"""A mistake that a user can correct is one line: what was found, what was expected, what to do."""
import re
import sys

from tqdm import tqdm


class InputError(ValueError):
    """A mistake in what came from outside (arguments, files, network). Its text is one line that a user can act on."""


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")       # characters that a terminal would obey


def printable(text):
    """Text from outside without control characters other than line breaks and tabs."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def finite(tensor, name, source):
    """Return a tensor. Raises InputError that names it if it holds NaN or an infinity.

    One pass for both extremes, which carry NaN along: 0.2 s for a billion bfloat16 (torch.isfinite takes 8 s).
    """
    if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
        raise InputError(f"{source}: {name} is not finite everywhere; the weights are damaged, or their training "
                         "diverged: copy them again, or train with a lower --lr")
    return tensor


def warn(text):
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(printable(text), file=sys.stderr)
