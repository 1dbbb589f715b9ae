"""May a command write here? Every place that is written to is decided in this file, before a byte is written.

    a folder    new or empty; locked until the command ends
    a file      new, or replaced by --overwrite; never a folder, never an input
"""
import contextlib
import itertools
import os
import re
from pathlib import Path

from model.checkpoint import SETTINGS, is_left_behind
from model.errors import InputError, warn

LOCK = ".lock"                          # in a folder; behind the name of a file
LEFT_BEHIND = f"{SETTINGS}.part"        # by a run that was killed before its first settings.json was there


def new_file(path, overwrite=False, inputs=(), resume=False):
    """The path of a file to be written. Raises InputError where nothing may be written.

    `inputs`: names of what the command reads (also scan.pdf#2, addresses) and of its other outputs. `resume`: let an
    existing file through; the caller decides whether it continues.
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
    name = name if os.path.exists(name) else name.partition("#")[0]             # without the number of a page
    if os.path.exists(path) and os.path.exists(name):
        return os.path.samefile(path, name)                                     # links, too
    return os.path.realpath(path) == os.path.realpath(name)


def free_name(path):
    """The first of show.png, show-2.png, ... that does not exist: for a default name, which nobody typed."""
    names = (Path(path).with_stem(f"{Path(path).stem}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([Path(path)], names) if not os.path.lexists(name))


@contextlib.contextmanager
def new_folder(path, free=False):
    """Make a folder, or take an empty one, and lock it. If it was made and stays empty, it is removed at the end.

    `free`: `free_name(path)`, also if another process makes that. Raises InputError for a folder that holds anything,
    but for what a run left behind that was killed before its first settings.json.
    """
    folder, made = None, free or not os.path.lexists(path)
    while folder is None:
        folder = free_name(path) if free else Path(path)
        check_empty(folder)
        try:
            folder.mkdir(parents=True, exist_ok=not free)
        except FileExistsError:
            folder = None
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with lock(folder):
            check_empty(folder, locked=True)                    # another command may have been faster
            yield folder
    finally:
        with contextlib.suppress(OSError):                      # it holds something now
            os.rmdir(folder) if made else None


def check_empty(folder, locked=False):
    """Raise InputError unless a folder is new or empty. `locked`: by us; to read the lock file would release it."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder}: exists, and is no folder; choose another name")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        ours = is_left_behind(path) if path.name == LEFT_BEHIND else path.name == LOCK and (locked or holder(path))
        if not ours:
            raise InputError(f"{folder}: holds {path.name} already; choose a new or an empty folder, or continue a run "
                             "with --resume")


def holder(path):
    """What a lock file of ours says, an empty one if its process was killed at once; None for any other file."""
    with contextlib.suppress(OSError, ValueError):
        found = re.fullmatch("(process [0-9]+\n)?", path.read_text() if path.is_file() else "no file")
        return found and (found[0].strip() or "another process")


@contextlib.contextmanager
def lock(path):
    """Hold a folder, or a file to be written, for this process alone. Raises InputError if another process does.

    The system releases the lock when the process ends, however it ends; forked workers do not inherit it (`lockf`).
    """
    beside, file = Path(path, LOCK) if os.path.isdir(path) else Path(f"{path}{LOCK}"), None
    try:
        while file is None or os.fstat(file.fileno()).st_nlink == 0:            # 0: its holder has just removed it
            if os.path.lexists(beside) and not holder(beside):
                raise InputError(f"{beside}: no lock of this program; move it away, or choose another name")
            file = open(beside, "ab")
            lock_file(file, path)
        file.truncate(0)
        file.write(f"process {os.getpid()}\n".encode())
        file.flush()
    except BlockingIOError as error:
        process = holder(beside) or "another process"
        raise InputError(f"{path}: {process} is writing there; wait until it has ended") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        yield Path(path)
    finally:
        with file, contextlib.suppress(OSError):                # the folder is gone, or read-only
            beside.unlink()


def lock_file(file, path):
    """Lock an open file. Raises BlockingIOError if it is locked; where there are no locks, prints a line."""
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if isinstance(error, (BlockingIOError, PermissionError)):               # the two that systems give for a lock
            raise BlockingIOError from error
        warn(f"{path}: not locked, for there are no locks here ({error}); let only one process write there")
