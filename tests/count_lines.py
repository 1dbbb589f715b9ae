"""Lines of Python files that are neither blank nor a comment alone, docstrings counted: python tests/count_lines.py FILE...

With one FILE that imports others of this repository, `--all` counts these too. What README's comparison counts by, here and
in the peers' repositories.
"""
import ast
import io
import sys
import tokenize
from pathlib import Path

NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def code_lines(text):
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return sum(bool(text.splitlines()[number - 1].strip()) for number in lines)


def reached(path, root, found):
    """`path` and the files below `root` that it imports, wherever it does."""
    found.add(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                 [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            for file in (root / f"{name.replace('.', '/')}.py", root / name.replace(".", "/") / "__init__.py"):
                if file.exists() and file not in found:
                    reached(file, root, found)
    return found


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:] if name != "--all"]
    if "--all" in sys.argv:
        paths = sorted(reached(paths[0], paths[0].parent, set()))
    counts = [(code_lines(path.read_text(encoding="utf-8")), path) for path in paths]
    for count, path in counts:
        print(f"{count:6}  {path}")
    print(f"{sum(count for count, _ in counts):6}  {len(paths)} files")
