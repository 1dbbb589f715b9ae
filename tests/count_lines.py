"""Counts code lines, and holds the budgets that keep the repository small enough to read.

    python tests/count_lines.py FILE...         lines that are neither blank nor only a comment; docstrings count
    python tests/count_lines.py FILE --all      also of the files that FILE imports at module level
    python tests/count_lines.py --check         the budgets below beside the tree; exit status 1 if one is exceeded

`.ci/run` checks the budgets. No test does, so that a fork may add what it needs.
"""
import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
            tokenize.ENDMARKER}
# what runs from the command line to `optimizer.step()`
STEP_PATH = ("train.py", "data.py", "extras/sources.py", *(f"model/{name}.py" for name in (
    "config", "images", "tiling", "prompt", "vision", "projector", "layers", "language", "internvl")))
BUDGETS = {
    "code lines from the command line to optimizer.step()": 1918,
    "code lines imported at module level by train.py": 3743,
    "code lines of all Python files but tests": 6939,
    "Python files directly in model/": 18,
    "lines of the loop of train.py": 60,
    "lines of the longest other function": 40,
    "Python files that the README.md of model/ or extras/ does not name": 0,
}


def code_lines(path):
    """Lines of a Python file that hold code or a docstring."""
    text, lines = path.read_text(encoding="utf-8"), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return sum(bool(text.splitlines()[number - 1].strip()) for number in lines)


def imported(path, found):
    """`path` and the files of this repository that it imports at module level, directly or not."""
    found.add(path)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            for file in (ROOT / f"{name.replace('.', '/')}.py", ROOT / name.replace(".", "/") / "__init__.py"):
                if file.exists() and file not in found:
                    imported(file, found)
    return found


def function_lengths(paths):
    """[(lines, "file:function")] of all functions, the longest first."""
    return sorted(((node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.name}")
                   for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                   if isinstance(node, ast.FunctionDef)), reverse=True)


def not_named():
    """(number, names) of the files in model/ and extras/ that the README.md beside them has no link to."""
    paths = [path for folder in ("model", "extras") for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"
             and f"]({path.name})" not in path.with_name("README.md").read_text(encoding="utf-8")]
    return len(paths), ", ".join(str(path.relative_to(ROOT)) for path in paths)


def measure():
    """[(what, value, note)] in the order of BUDGETS."""
    files = sorted([*ROOT.glob("*.py"), *(ROOT / "extras").glob("*.py"), *(ROOT / "model").rglob("*.py")])
    loop, others = [], []
    for length, name in function_lengths(files):
        (loop if name == "train.py:train" else others).append((length, name))
    reached = imported(ROOT / "train.py", set())
    values = (
        (sum(code_lines(ROOT / name) for name in STEP_PATH), f"{len(STEP_PATH)} files"),
        (sum(map(code_lines, reached)), f"{len(reached)} files"),
        (sum(map(code_lines, files)), f"{len(files)} files"),
        (len(list((ROOT / "model").glob("*.py"))), ""),
        loop[0],
        others[0],
        not_named())
    return [(what, *value) for what, value in zip(BUDGETS, values)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        exceeded = False
        for what, value, note in measure():
            exceeded |= value > BUDGETS[what]
            print(f"{value:6,} of {BUDGETS[what]:6,}  {what}" + (f" ({note})" if note else "")
                  + ("   <-- exceeded" if value > BUDGETS[what] else ""))
        sys.exit(exceeded)
    paths = sorted(imported(args.files[0].resolve(), set())) if args.all else args.files
    for path in paths:
        print(f"{code_lines(path):6}  {path}")
    print(f"{sum(map(code_lines, paths)):6}  {len(paths)} files")


if __name__ == "__main__":
    main()
