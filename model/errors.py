"""What a user can cause, told in one line: what was found, what was expected, what to do."""
import argparse
import sys


class InputError(ValueError):
    """A mistake in what came from outside (arguments, files, network). Its text is one line that a user can act on."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line on standard error, exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def run(main):
    """Call `main()`; an `InputError` ends the program with its line on standard error and exit status 2."""
    try:
        main()
    except InputError as error:
        sys.exit(fail(error))


def fail(error):
    """Print an error as one line on standard error; return the exit status, 2."""
    print(f"{sys.argv[0].rsplit('/')[-1]}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
