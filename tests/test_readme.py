"""The README tells no command, file or test that does not exist; the Chinese one tells the same."""
import re
import shlex

import pytest

from commands import infer, train
from conftest import ROOT
from extras import check

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
COMMANDS = sorted({match.strip() for match in re.findall(r"python (?:train|infer|data)\.py[^`\n|&]*", README)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, monkeypatch, tmp_path):
    _, program, *flags = shlex.split(command)
    if "--help" in flags:
        return
    (tmp_path / "settings.json").write_text('{"model": "tiny", "seed": 0, "from_scratch": true, "train": "projector"}')
    flags = [str(tmp_path) if flag == "RUN" else flag for flag in flags]
    monkeypatch.setattr("sys.argv", [program, *flags])
    parse = {"train.py": train.parse_args, "infer.py": infer.parse_arguments, "data.py": check.parse_arguments}[program]
    assert parse() is not None                                          # an unknown flag ends the program


def test_every_file_and_test_named_exists():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"## Test it\n\n```bash\n(.*)\n```", README).group(1)
    install, test = command.split(" && ")
    script = (ROOT / ".ci" / "run").read_text()
    assert install.replace("install", "install -q") in script and test in script


def test_the_code_shown_is_the_code():
    shown = re.search(r"`accumulate_gradients` in.*?```python\n(.*?)```", README, re.DOTALL).group(1)
    source = re.sub(r"\s+", " ", (ROOT / "train.py").read_text())
    for line in shown.splitlines():
        assert re.sub(r"\s+", " ", line).strip() in source


def test_the_lines_from_python_run(monkeypatch, capsys):
    shown = re.search(r"From Python:\n\n```python\n(.*?)```", README, re.DOTALL).group(1)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(shown, names)
    lines = capsys.readouterr().out.splitlines()
    assert len(names["chat"].turns) == 1 and lines[0] == "R13" and lines[2] == "Defi"


def test_the_chinese_readme_has_the_same_content():
    def told(text):
        text = text.replace("[English](README.md)", "").replace("[中文](README.zh.md)", "")
        blocks = re.findall(r"```.*?```", text, re.DOTALL)
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        return {"code": blocks, "headings": re.findall(r"^#+ ", text, re.MULTILINE), "links": sorted(re.findall(r"\]\(([^)]+)\)", text)),
                "inline code": sorted(re.findall(r"`[^`\n]+`", text)), "table rows": len(re.findall(r"^\|", text, re.MULTILINE)),
                "items": len(re.findall(r"^(?:-|\d+\.) ", text, re.MULTILINE))}
    english, chinese = told(README), told(CHINESE)
    for what in english:
        assert chinese[what] == english[what], what
    for target in re.findall(r"\]\(#([^)]+)\)", CHINESE):
        assert f'<a id="{target}"></a>' in CHINESE, target
