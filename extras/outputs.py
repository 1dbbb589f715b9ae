"""May a command write here? Every place that is written to is decided in this file, before a byte is written.

    a folder    new or empty; it is held by this process alone until the command ends
    a file      new, or replaced by --overwrite; never a folder, never an input
    a lock      says which process holds a folder or a file; the system releases it when that process ends
"""
import contextlib
import itertools
import os
import re
from pathlib import Path

from model.checkpoint import SETTINGS
from model.errors import InputError, warn

LOCK = ".lock"                                                  # in a folder; behind the name of a file
HELD = re.compile(rb"held by process (\d+)\n")                  # what a lock file says
LEFT_BEHIND = f"{SETTINGS}.part"                                # by a run killed before its first settings were there


def new_file(path, overwrite=False, inputs=(), resume=False):
    """The path of a file to be written. Raises InputError for one that must not be.

    `overwrite`: an existing file may be replaced. `inputs`: names of what the command reads (also `scan.pdf#2` and
    addresses), and of its other outputs. `resume`: an existing file is let through; the caller decides whether it
    continues.
    """
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise InputError(f"{path}: there is no folder {os.path.dirname(path)}; make it first")
    if any(same_file(path, name) for name in map(str, inputs)):
        raise InputError(f"{path}: also an input, or another output, of this command; choose another name")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: exists, and is no regular file; choose another name")
    if os.path.lexists(path) and not (overwrite or resume):
        raise InputError(f"{path}: exists; choose another name, or replace it with --overwrite")
    return Path(path)


def same_file(path, name):
    """Whether two names are of one file, links included. `name` may have a page behind a #."""
    if not os.path.exists(name) and "#" in name:
        name = name.rpartition("#")[0]
    if os.path.exists(path) and os.path.exists(name):
        return os.path.samefile(path, name)
    return os.path.realpath(path) == os.path.realpath(name)


def names_like(path):
    """show.png, show-2.png, show-3.png, ..."""
    path = Path(path)
    return itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2)))


def free_name(path):
    """The first of `names_like(path)` that does not exist: for a default name, which nobody typed."""
    return next(name for name in names_like(path) if not os.path.lexists(name))


def free_folder(path):
    """Make the first folder of `names_like(path)` that does not exist; two processes get two folders."""
    for name in names_like(path):
        with making(path), contextlib.suppress(FileExistsError):
            name.mkdir(parents=True)
            return name


@contextlib.contextmanager
def new_folder(path):
    """Make a folder, or take an empty one, and hold its lock. One that was made and stays empty is removed at the end.

    Raises InputError for a folder that holds something. What a run leaves behind that was killed before its first
    settings.json does not count.
    """
    check_empty(path)
    made = not os.path.lexists(path)
    with making(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    try:
        with lock(path):
            check_empty(path, locked=True)                      # another command may have been faster
            yield Path(path)
    finally:
        if made:
            with contextlib.suppress(OSError):                  # it holds something now
                os.rmdir(path)


@contextlib.contextmanager
def making(path):
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be made ({error.strerror})") from error


def check_empty(path, locked=False):
    """Raise InputError for a folder that holds something. `locked`: its lock is ours; to read it would release it."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f"{path}: exists, and is no folder; choose another name")
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
        if name != LEFT_BEHIND and not (name == LOCK and (locked or holder(Path(path, name)))):
            raise InputError(f"{path}: holds {name} already; choose a new or an empty folder")


def holder(path):
    """The process that a lock file names, as text; None if it is no lock file of ours."""
    with contextlib.suppress(OSError):
        found = HELD.fullmatch(path.read_bytes()) if path.is_file() else None
        return found and found[1].decode()


@contextlib.contextmanager
def lock(path):
    """Hold a folder, or a file to be written, for this process alone. Raises InputError if another process does.

    Forked workers do not inherit the lock (`lockf`), and the system releases it when the process ends: a leftover
    lock file of a killed process is no lock. Where there are no locks, one line says so.
    """
    beside, file = Path(path, LOCK) if os.path.isdir(path) else Path(f"{path}{LOCK}"), None
    try:
        import fcntl
        while file is None or os.fstat(file.fileno()).st_nlink == 0:    # the process that held it has just removed it
            process = holder(beside)
            if process is None and os.path.lexists(beside):
                raise InputError(f"{beside}: no lock of this program; move it away, or choose another name")
            file = open(beside, "ab")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"held by process {os.getpid()}\n".encode())
        file.flush()
    except (BlockingIOError, PermissionError) as error:
        reason = (f"process {process} is writing there; wait until it has ended" if file
                  else f"cannot be written ({error.strerror})")
        raise InputError(f"{path}: {reason}") from error
    except (ImportError, OSError) as error:
        warn(f"{path}: no lock is held, for this system has none ({error}); let only one process write there")
    try:
        yield
    finally:
        if file:
            beside.unlink(missing_ok=True)
            file.close()
