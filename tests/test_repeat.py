"""A command that is repeated ends like one that was never interrupted, or is refused: --questions, --folder, --evaluate.

Between two tries weights, images, questions, settings and their order change at random; a try ends at any line of our code.
ROUNDS=200 python -m pytest tests/test_repeat.py: more rounds.
"""
import json
import os
import random
import sys
from pathlib import Path

import pytest
from commands import call, infer
from PIL import Image
from reference import randomise

from extras import evaluate, outputs
from model import InputError, InternVL, checkpoint

WATCHED = {module.__file__ for module in (infer, evaluate, outputs, checkpoint)}
LINES = 700                                             # of our code that a command runs, about


class World:
    """What a command depends on, in a folder."""

    def __init__(self, folder, draw):
        self.folder, self.draw, self.names = folder, draw, [f"{i}.png" for i in range(5)]
        self.pages = folder / "pages"
        self.pages.mkdir(parents=True)
        self.model, self.settings = "a", {"max-new-tokens": 2, "temperature": 0, "seed": 0, "max-tiles": 1}
        for name in self.names[:4]:
            self.paint(name)
        self.asked = [(draw.choice(("What?", "Who?", "<image> When?")), draw.choice(self.names)) for _ in range(4)]
        self.question = "Which?"

    def paint(self, name):
        Image.new("L", (128, 128), self.draw.randrange(256)).save(self.pages / name)

    def change(self):
        """One change at random."""
        draw, name, other = self.draw, self.draw.choice(self.names), self.draw.choice(self.names)
        kind = draw.choice(("model", "model", "setting", "setting", "paint", "paint", "remove", "swap", "ask", "ask", "drop", "order", "question"))
        if kind == "model":
            self.model = draw.choice("ab")
        elif kind == "setting":
            key, value = draw.choice((("max-new-tokens", 3), ("temperature", 1.5), ("seed", 1), ("max-new-tokens", 2), ("temperature", 0), ("seed", 0)))
            self.settings[key] = value
        elif kind == "paint":
            self.paint(name)
        elif kind == "remove" and len(list(self.pages.iterdir())) > 1:
            (self.pages / name).unlink(missing_ok=True)
        elif kind == "swap" and (self.pages / name).exists():
            (self.pages / name).rename(self.pages / other)
        elif kind == "ask":
            self.asked.append((draw.choice(("What?", "Who?", "Where?")), name))
        elif kind == "drop" and len(self.asked) > 1:
            self.asked.pop(draw.randrange(len(self.asked)))
        elif kind == "order":
            draw.shuffle(self.asked)
        elif kind == "question":
            self.question = draw.choice(("Which?", "Where?"))

    def flags(self, mode, out):
        (self.folder / "q.jsonl").write_text("".join(json.dumps(
            {"id": name, "question": question, "answer": "x", "images": [f"pages/{name}"]}) + "\n" for question, name in self.asked))
        flags = ["--model", self.model, "--batch", self.draw.randint(1, 3), *(part for key, value in self.settings.items() for part in (f"--{key}", value))]
        return flags + {"questions": ["--questions", self.folder / "q.jsonl", "--out", out],
                        "folder": ["--folder", self.pages, "--out", out, self.question],
                        "evaluate": ["--evaluate", self.folder / "q.jsonl", "--predictions", out]}[mode]

    @property
    def common(self):
        """What all answers of a file have in common."""
        return self.model, str(self.settings)


def interrupted_after(lines, program):
    """Run `program` up to a number of lines of our code, then raise KeyboardInterrupt."""
    left = [lines]

    def each_line(frame, event, _):
        left[0] -= event == "line"
        if left[0] == 0:
            raise KeyboardInterrupt
        return each_line
    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: each_line if frame.f_code.co_filename in WATCHED else None)
    try:
        return program()
    finally:
        sys.settrace(before)


def content(out):
    """What a command has written, but for times."""
    if out.suffix == ".json":
        return [(path.read_text() if path.exists() else None) for path in (out, Path(f"{out}.scores.json"))]
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in out.read_text().splitlines()]


def test_a_process_that_was_killed_before_it_wrote_into_its_lock_holds_none(tmp_path):
    (tmp_path / "a.jsonl.lock").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    with outputs.lock(tmp_path / "a.jsonl"), outputs.new_folder(tmp_path / "run"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]
    (tmp_path / "a.jsonl.lock").write_text("mine")
    with pytest.raises(InputError, match="no lock of this program"), outputs.lock(tmp_path / "a.jsonl"):
        pass


@pytest.mark.parametrize("mode", ["questions", "folder", "evaluate"])
def test_a_repeated_command_ends_like_a_fresh_one_or_is_refused(tmp_path, capsys, monkeypatch, mode):
    models = {name: randomise(InternVL.from_scratch("tiny", seed=i, device="cpu")) for i, name in enumerate("ab")}
    monkeypatch.setattr(infer, "load_model", lambda arguments: models[arguments.model])
    ends = []
    for number in range(int(os.environ.get("ROUNDS", 20)) // 3 + 1):
        draw = random.Random(f"{mode} {number}")
        world, begun = World(tmp_path / str(number), draw), None
        out = world.folder / ("out.json" if mode == "evaluate" else "out.jsonl")
        for attempt in range(draw.randint(1, 4)):
            for _ in range(draw.choice((0, 0, 1, 2))):
                world.change()
            flags, files = world.flags(mode, out), [path for path in (out, Path(f"{out}.scores.json")) if path.exists()]
            before = [path.read_bytes() for path in files]
            status, _, err = interrupted_after(draw.randint(1, LINES) if draw.random() < 0.7 else -1, lambda: call(infer, capsys, monkeypatch, *flags))
            ends.append(status)
            assert status in (0, 2, 130), err
            if status == 2:
                assert "was started with" in err and begun != world.common and [path.read_bytes() for path in files] == before
            elif status == 0:
                assert begun in (None, world.common)
            if mode != "evaluate" and status == 130 and out.exists() and draw.random() < 0.5:       # the power fails: half a line
                out.write_bytes(out.read_bytes()[:-draw.randint(1, 60)])
            holds_answers = Path(f"{out}.scores.json").exists() or out.exists() and b"\n" in out.read_bytes()
            begun = (begun or world.common) if holds_answers else None
        flags, fresh = world.flags(mode, out), world.folder / f"fresh{out.suffix}"
        if begun not in (None, world.common):
            flags.append("--overwrite")
        for path, last in ((out, flags), (fresh, world.flags(mode, fresh))):
            status, _, err = call(infer, capsys, monkeypatch, *last)
            assert status == 0, (number, err)
        assert content(out) == content(fresh), number
        assert sorted(path.name for path in world.folder.iterdir() if path.suffix in (".lock", ".part")) == []
    assert {0, 2, 130} <= set(ends) or number < 6
    print(mode, {status: ends.count(status) for status in set(ends)})
