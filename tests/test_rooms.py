"""The layers: imports point one way, every file says what it is, importing has no effect, the README names the core."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "extras").glob("*.py"), *(ROOT / "model").glob("*.py"), *(ROOT / "model" / "tiny").glob("*.py")])
CORE = ("train.py", "infer.py", "data.py",
        *(f"model/{name}.py" for name in "config tiling prompt vision projector language internvl generate".split()))
# train.py, infer.py -> extras/ -> data.py -> model/: what a layer must not import
ABOVE = {"model": {"data", "extras", "train", "infer", "tests"}, "data": {"extras", "train", "infer", "tests"},
         "extras": {"train", "infer", "tests"}, "infer": {"train", "tests"}, "train": {"infer", "tests"}}


def imported(path):
    """Names of all modules that a file imports, wherever it does; not what data.py calls as a program, `if __name__ == ...`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (path.name == "data.py" and isinstance(node, ast.If))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert not {name.split(".")[0] for name in imported(path)} & ABOVE[room]


def test_no_two_files_import_each_other_directly_or_through_others():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    arrows = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not (name == "data" and node.module.startswith("extras")):
                found = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys() or {node.module} & names.keys()
                arrows[name] |= {module for module in found if module != "model"}       # the package's face: InternVL, InputError
    while free := [name for name, to in arrows.items() if not to & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows


def test_the_rooms_of_the_model_know_no_more_than_they_need():
    """Tiling knows no torch, prompt no tensors, vision no text, language no images, the projector only layers."""
    allowed = {"config": set(), "errors": set(), "layers": set(), "tiling": set(), "images": {"errors"}, "prompt": {"errors", "tokenizer"},
               "vision": {"layers"}, "projector": {"layers"}, "language": {"layers"}, "lora": {"errors", "layers", "names"},
               "names": {"errors"}, "tokenizer": {"errors"}}
    allowed["config"] = {"errors", "prompt"}
    for room, names in allowed.items():
        found = {name.split(".")[1] for name in imported(ROOT / "model" / f"{room}.py") if name and name.startswith("model.")}
        assert found <= names, (room, found)
    assert "torch" not in set(imported(ROOT / "model" / "tiling.py")) | set(imported(ROOT / "model" / "prompt.py"))


def test_every_file_begins_with_what_it_is():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or path.name == "__init__.py" or ast.get_docstring(ast.parse(text)), path


def test_the_readme_names_every_file_of_the_core():
    """`count_lines.py --check` looks for the other files of model/ and extras/ in their manuals: a fork may add one without."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in CORE if f"]({name})" not in text] == []


def test_importing_prints_nothing_and_touches_no_file(tmp_path):
    modules = ", ".join(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.name != "__init__.py")
    done = subprocess.run([sys.executable, "-B", "-c", f"import {modules}"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""},
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_function_fits_a_screen_and_a_line_the_page(path):
    text = path.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > 128]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
