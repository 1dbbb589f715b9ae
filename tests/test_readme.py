"""README and the manuals: every link, command and quoted line is real, the front page stays short, the Chinese one agrees."""
import ast
import re
import shlex

import pytest
from commands import infer, train
from conftest import ROOT

from extras import check

ENGLISH, CHINESE = "README.md", "README.zh.md"
MANUALS = ("extras/README.md", "tests/README.md", "model/README.md", "model/tiny/README.md", "tests/exercises/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (ENGLISH, CHINESE, *MANUALS)}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PHRASES = ("is told", "gone on with", "of like size", "makes nothing of", "the wish to", "doubts about", "what trains")    # issue 17
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "model").rglob("*.py"), *(ROOT / "extras").rglob("*.py")])


def prose(text):
    return BLOCK.sub("", text)


def blocks(text, language):
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def without_comment(line):
    return re.sub(r"(^|\s+)#\s.*", "", line).strip()


def commands(text):
    """All commands of a text: the lines of its bash blocks and the code between backticks, without comments."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    inline = [code for code in re.findall(r"`([^`\n]+)`", prose(text)) if code.startswith(("python ", "pip ", "grep "))]
    return [re.sub(r"\s+", " ", line) for line in map(without_comment, lines + inline) if line]


def links(text):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if link not in (ENGLISH, CHINESE)]


def anchors(text):
    """The fragments that GitHub gives to the headings of a text."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PROGRAMS = sorted({part.strip() for text in TEXTS.values() for line in commands(text) for part in re.split(r" && | &&$|&&| > ", line)
                   if re.match(r"python (train|infer|data)\.py", part.strip())})


@pytest.mark.parametrize("command", PROGRAMS)
def test_every_command_parses(command, monkeypatch, tmp_path):
    _, program, *flags = shlex.split(command)
    if "--help" in flags:
        return
    (tmp_path / "settings.json").write_text('{"model": "tiny", "seed": 0, "from_scratch": true, "train": "projector"}')
    monkeypatch.setattr("sys.argv", [program, *(str(tmp_path) if flag == "RUN" else flag for flag in flags)])
    parse = {"train.py": train.parse_args, "infer.py": infer.parse_arguments, "data.py": check.parse_arguments}[program]
    assert parse() is not None                                          # an unknown flag ends the program


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    for link in links(TEXTS[name]):
        path, _, fragment = link.partition("#")
        if "://" not in link:
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), link
            assert not fragment or fragment in anchors(target.read_text(encoding="utf-8")), link


def test_every_test_named_exists():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", "".join(TEXTS.values()))
    assert named and [name for name in named if f"def {name}(" not in code] == []


def test_every_file_of_a_command_exists():
    for line in sum(map(commands, TEXTS.values()), []):
        for file in re.findall(r"(?:^|\s)((?:tests|model|assets)/[\w/]+\.\w+)", line):
            assert (ROOT / file).exists(), line


@pytest.mark.parametrize("thing, name, holds", [
    ("the loss", "answer_loss", "logits"), ("the optimizer", "make_optimizer", "torch.optim"), ("the schedule", "lr_factor", "progress"),
    ("the projector", "Projector", "def forward"), ("how pages are cut", "tile_page", "thumbnail"),
    ("the prompt", "PromptBuilder", "def question"), ("the score", "anls", "prediction")])
def test_where_to_change_what(thing, name, holds):
    """The manual's pointer leads to a function that holds the thing; the front page points there too."""
    row = next(line for line in TEXTS["model/README.md"].splitlines() if line.startswith(f"| {thing} |"))
    pointed, path = re.search(r"`(\w+)` in \[[^]]+\]\(([^)]+)\)", row).groups()
    path = (ROOT / "model" / path).resolve()
    source = path.read_text(encoding="utf-8")
    found = [node for node in ast.parse(source).body if getattr(node, "name", None) == pointed]
    assert pointed == name and holds in ast.get_source_segment(source, *found)
    assert any(f"`{name}`" in line and f"]({path.relative_to(ROOT)})" in line for line in TEXTS[ENGLISH].splitlines())


def test_the_front_page_is_short():
    lines, text = TEXTS[ENGLISH].splitlines(), TEXTS[ENGLISH]
    assert len(lines) <= 200 and len(prose(text).split()) <= 2200
    assert [line for line in lines if len(line) > 130 and not line.startswith("|")] == []


def test_ci_runs_the_readmes_test_command():
    section = TEXTS[ENGLISH].partition("\n## Tests")[2]
    install, test = blocks(section, "bash")[0].strip().split(" && ")
    script = (ROOT / ".ci" / "run").read_text()
    assert install.replace("install", "install -q") in script and test in script


def test_the_accumulation_shown_is_that_of_train_py():
    shown = next(code for code in blocks(TEXTS[ENGLISH], "python") if "backward" in code)
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    fenced = re.search(r"-- one optimizer step\n(.*?)# -{60}", text, re.DOTALL).group(1)
    passes = re.search(r"\ndef forward_backward\(.*?\n(.*?)\n\n\n", text, re.DOTALL).group(1)
    source = [without_comment(line) for line in (fenced + passes).splitlines()]
    places = [source.index(without_comment(line)) for line in shown.splitlines()]          # ValueError for a line that is not there
    assert len(places) == 5 and places == sorted(places)


@pytest.mark.official
def test_the_python_shown_runs(published, monkeypatch, capsys):
    shown = next(code for code in blocks(TEXTS[ENGLISH], "python") if "import" in code)
    monkeypatch.chdir(ROOT)
    exec(shown, names := {})
    answers = re.findall(r"\) +# (\S+)$", shown, re.MULTILINE)
    assert capsys.readouterr().out.split() == answers and len(answers) == 2 and len(names["chat"].turns) == 1


def test_the_chinese_front_page_agrees():
    english, chinese = TEXTS[ENGLISH], TEXTS[CHINESE]
    assert commands(chinese) == commands(english) and links(chinese) == links(english)
    assert len(re.findall(r"^#+ ", prose(chinese), re.MULTILINE)) == len(re.findall(r"^#+ ", prose(english), re.MULTILINE))
    for language in ("", "json"):
        assert blocks(chinese, language) == blocks(english, language)
    for here, there in zip(blocks(chinese, "python"), blocks(english, "python"), strict=True):
        assert [without_comment(line) for line in here.splitlines()] == [without_comment(line) for line in there.splitlines()]


@pytest.mark.parametrize("path", [*TEXTS, *SOURCES], ids=lambda path: str(path).removeprefix(f"{ROOT}/"))
def test_none_of_the_odd_phrases_is_left(path):
    text = re.sub(r"[\s#]+", " ", (ROOT / path).read_text(encoding="utf-8")).lower()
    assert [phrase for phrase in PHRASES if re.search(rf"\b{phrase}\b", text)] == []
