"""Every exercise is red as it stands and green with its solution."""
import importlib.util
import inspect

import pytest
from conftest import ROOT

FOLDER = ROOT / "tests" / "exercises"
NAMES = sorted(path.stem for path in FOLDER.glob("exercise_*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, monkeypatch):
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(*[monkeypatch] * len(inspect.signature(test).parameters))


def test_there_are_ten_and_the_readme_lists_them():
    text = (FOLDER / "README.md").read_text()
    assert len(NAMES) == 10 and all(f"({name}.py)" in text and (FOLDER / name).with_suffix(".py").read_text().partition("\n")[0].split(". ", 1)[1].split("?")[0]
                                    in text for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_is_red_as_it_stands_and_green_when_solved(name, monkeypatch):
    module = load(FOLDER / f"{name}.py")
    with pytest.raises(NotImplementedError):
        run(module, monkeypatch)
    for key, value in vars(load(FOLDER / "solutions" / f"{name}.py")).items():
        if not key.startswith("__"):
            setattr(module, key, value)
    run(module, monkeypatch)
