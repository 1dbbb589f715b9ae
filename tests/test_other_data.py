"""A data set with columns and an instruction of its own is trained on, validated and scored, and no file has to change for it."""
import json
import random

import pytest
from commands import call, data, infer, refuses, train
from small_data import mixed_rows, png, write_split

from data import PageDataset, group_rows_into_pages
from extras.evaluate import question_pages
from extras.formats import read_entry
from extras.sources import open_rows
from model import InputError
from model.prompt import INSTRUCTION
from model.tiny.pages import SyntheticRows, draw_page

COLUMNS = "question=query,answers=label,image=img"
SAY = "Say it in a word."


def renamed(row):
    """A row whose columns have other names, beside columns that have ours and must not be read."""
    return {"query": row["question"], "label": row["answers"][0], "img": row["image"], "question": "wrong", "image": "wrong", "answers": "wrong"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders in Hub layout: with other columns, and with DocumentVQA's and SAY written into the questions."""
    folder = tmp_path_factory.mktemp("other")
    for split, pages, first in (("train", 4, 0), ("validation", 2, 1000)):
        rows = [{name: row[name] for name in ("question", "image", "answers")} for row in mixed_rows(pages, first=first)]
        write_split(folder / "other", split, [renamed(row) for row in rows], image="img")
        write_split(folder / "usual", split, [row | {"question": f"{row['question']} {SAY}"} for row in rows])
    return folder / "other", folder / "usual"


def test_training_validation_and_scoring_ask_with_the_instruction_and_read_the_columns(folders, tmp_path, capsys, monkeypatch):
    """Another instruction in the flag gives the run, the scores and the resumed run that it gives inside the questions."""
    flags, runs = ("--tiny", "--steps", 2, "--accumulate", 1, "--eval-every", 2, "--eval-pages", 2, "--max-tiles", 2), {}
    for folder, more in zip(folders, (("--columns", COLUMNS, "--instruction", SAY), ("--instruction", ""))):
        run = tmp_path / folder.name
        status, out, err = call(train, capsys, monkeypatch, *flags, "--data", folder, *more, "--out", run)
        assert status == 0, err
        kept = json.loads((run / "settings.json").read_text())
        assert (kept["columns"], kept["instruction"]) == ((COLUMNS, f" {SAY}") if more[0] == "--columns" else (None, ""))
        assert call(train, capsys, monkeypatch, "--resume", run, "--steps", 3, "--eval-every", 3)[0] == 0
        losses = [{name: line.get(name) for name in ("train_loss", "val_loss", "anls")} for line in map(json.loads, open(run / "metrics.jsonl"))]
        status, _, err = call(infer, capsys, monkeypatch, "--model", run, "--evaluate", folder, "--device", "cpu", "--max-tiles", 2,
                              "--max-new-tokens", 5, "--predictions", tmp_path / "p.json")
        assert status == 0, err
        scores = json.loads((tmp_path / "p.json.scores.json").read_text())
        assert (scores["settings"]["instruction"], scores["settings"]["columns"]) == (kept["instruction"], kept["columns"])
        runs[folder.name] = losses, scores["scores"], [line["answer"] for line in json.loads((tmp_path / "p.json").read_text())], (
            run / "model.safetensors").read_bytes()
        for name in ("p.json", "p.json.scores.json"):
            (tmp_path / name).unlink()
    assert runs["other"] == runs["usual"]
    samples = (tmp_path / "other" / "samples.md").read_text()
    assert "What is the" in samples and SAY not in samples
    again = ("--evaluate", folders[0], "--predictions", tmp_path / "p.json", "--device", "cpu", "--max-tiles", 2, "--max-new-tokens", 5)
    checkpoint = sorted((tmp_path / "other" / "checkpoints").iterdir())[-1]
    assert call(infer, capsys, monkeypatch, "--model", checkpoint, *again, "--instruction", "Differently.")[0] == 0     # a typed one wins
    assert "Differently.'; repeat that" in refuses(infer, capsys, monkeypatch, "--model", checkpoint, *again)


def test_the_instruction_depends_on_where_rows_come_from_and_stands_behind_every_question(tiny):
    hub, drawn = mixed_rows(1)[:1], [row for row, _ in zip(SyntheticRows("train", 0, "plain", 4), range(1))]
    file = read_entry({"conversations": [{"from": who, "value": text} for who, text in (
        ("human", "Look at <image>"), ("gpt", "I do."), ("human", "And <image> is?"), ("gpt", "Mi"), ("human", "Sure?"), ("gpt", "Yes."))],
        "images": ["a.png", "b.png"]}) | {"place": "x:1"}
    for rows, default in ((hub, INSTRUCTION), (drawn, ""), ([file], "")):
        assert [page.instruction for page in group_rows_into_pages(rows)] == [default]
    for instruction in (f" {SAY}", f"\n{SAY}", ""):
        [page] = group_rows_into_pages([file], instruction=instruction)
        prompt, _ = PageDataset(tiny, 4).write(page, [1, 1])
        text = tiny.tokenizer.decode(prompt.ids)
        assert all(f"{question}{instruction}<|im_end|>" in text for question in ("</img>", " is?", "Sure?"))
        asked, _ = PageDataset(tiny, 4).write(page, [1, 1], asked=[1])
        assert text.count(instruction or "Sure?") == tiny.tokenizer.decode(asked.ids).count(instruction or "Sure?")
    assert [page.instruction for page in question_pages([(0, "What?", ["a.png"])])] == [""]             # a typed question


def test_a_typed_question_takes_no_instruction(tmp_path, capsys, monkeypatch):
    for more in (("What?",), ("--folder", tmp_path, "What?"), ("--questions", "x.jsonl")):
        for flag in (("--instruction", SAY), ("--instruction", ""), ("--columns", COLUMNS)):
            assert "belong to --evaluate" in refuses(infer, capsys, monkeypatch, "--tiny", *flag, *more)


def test_check_and_show_read_other_columns_and_show_the_instruction(folders, tmp_path, capsys, monkeypatch):
    status, out, _ = call(data, capsys, monkeypatch, "check", folders[0], "--columns", COLUMNS)
    assert status == 0 and "all is right" in out and " 4 pages" in out
    status, out, _ = call(data, capsys, monkeypatch, "show", folders[0], 0, "--columns", COLUMNS, "--instruction", "¿Cuánto?", "--out", tmp_path / "a.png")
    assert status == 0 and "¿Cuánto?" in out.replace("|", "") and "wrong" not in out.replace("|", "")


def test_a_column_that_is_missing_or_unknown_is_refused_in_one_line(folders, tmp_path, capsys, monkeypatch):
    found = "(found: query, label, img, question, image, answers)"
    for columns, missing in (("question=q,image=img", "q"), ("docId=document,question=query", "document"), ("question=q,answers=a", "q, a")):
        line = refuses(train, capsys, monkeypatch, "--tiny", "--data", folders[0], "--columns", columns, "--out", tmp_path / "run")
        assert f"no column {missing} {found}" in line and "--columns question=...,answers=...,image=..." in line
        for program, more in ((infer, ("--tiny", "--evaluate", folders[0])), (data, ("check", folders[0])), (data, ("show", folders[0], 0))):
            assert f"no column {missing} {found}" in refuses(program, capsys, monkeypatch, *more, "--columns", columns)
    for columns in ("text=query", "question", "question=", "", "question=query,"):
        line = refuses(train, capsys, monkeypatch, "--tiny", "--data", folders[0], "--columns", columns, "--out", tmp_path / "run")
        assert "is not a column; expected image=NAME, question=NAME, answers=NAME, docId=NAME" in line


def test_other_columns_are_read_from_a_folder_of_images_too(folders, tmp_path):
    images = tmp_path / "images" / "train"
    images.mkdir(parents=True)
    picture, asked = draw_page(random.Random(0))
    (images / "0.png").write_bytes(png(picture))
    (images / "metadata.jsonl").write_text("".join(json.dumps({"file_name": "0.png", "query": q, "answers": a, "question": "wrong"}) + "\n" for q, a in asked))
    rows = open_rows(str(images.parent), "train", columns="question=query")
    for _ in range(2):                                                          # every epoch reads them again
        [page] = group_rows_into_pages(rows)
        assert list(zip(page.questions, page.answers)) == asked and page.images == [png(picture)]
    with pytest.raises(InputError, match=r"no column query \(found: .*image"):
        open_rows(str(folders[1]), "train", columns="question=query")
