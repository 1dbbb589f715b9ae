"""Runs train.py, infer.py and data.py inside the test process: importing torch anew for every command would take most of the time."""
import io
import sys
from types import SimpleNamespace

import infer
import train
from extras import check
from extras.cli import run

train.LONGEST_ANSWER = 12                                            # drawn weights never end an answer; right ones may be longer
data = SimpleNamespace(__name__="data", main=check.main)             # what `python data.py` runs


def call(program, capsys, monkeypatch, *flags, stdin=""):
    """-> (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    try:
        run(program.main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def refuses(program, capsys, monkeypatch, *flags, stdin=""):
    """The one line with which a command refuses its flags; asserts exit status 2 and that nothing else is said."""
    status, out, err = call(program, capsys, monkeypatch, *flags, stdin=stdin)
    assert status == 2, (status, err)
    lines = [line for line in err.splitlines() if line.strip() and not line.endswith("; skipped") and "%|" not in line and "questions/s]" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"{program.__name__}.py: "), err
    return lines[0]


def at_call(put, owner, name, count, action):
    """Have `action` come before the `count`-th call of a function. `put`: setattr, or monkeypatch's."""
    function, calls = getattr(owner, name), []

    def wrapped(*arguments, **more):
        calls.append(None)
        if len(calls) == count:
            action()
        return function(*arguments, **more)
    put(owner, name, wrapped)


__all__ = ["at_call", "call", "data", "infer", "refuses", "train"]
