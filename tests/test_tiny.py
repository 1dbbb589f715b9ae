"""Drawn pages are the same everywhere, their values are held out; the embedded model's files are what their makers write."""
import itertools
import json
import random
import re
import subprocess
import sys

import bench_tiny
import pytest
from bench_tiny import UNREAD
from commands import call, infer, train
from conftest import ROOT
from embedded import PUBLISHED
from PIL import Image
from published import FIRST_RUN, READS, asked_pages, exact_match

from model import InternVL
from model.tiling import choose_grid, tile_page
from model.tiny import pages
from model.tiny import tokenizer as maker
from model.tiny.pages import (
    CELL,
    DOMAINS,
    FIELDS,
    FONTS,
    READ,
    SHAPES,
    TILE,
    UNSEEN_FONTS,
    Sheet,
    SyntheticRows,
    draw_page,
    font_of,
    held_out,
    width_of,
    write_page,
    write_value,
)
from model.tokenizer import load_tokenizer


def rows(split, count=400, **more):
    return list(itertools.islice(SyntheticRows(split, **more), count))


def test_a_page_follows_from_its_seed_alone():
    assert rows("train", 20) == rows("train", 20) != rows("train", 20, seed=1)
    assert rows("validation", 20) != rows("test", 20)


def test_no_value_of_a_validation_page_was_ever_trained_on():
    trained = {row["answers"][0] for row in rows("train", 3000) if row["question"] != READ}
    for split in ("validation", "test"):
        assert trained.isdisjoint(row["answers"][0] for row in rows(split, 1000))
    for kind in {kind for kind, _ in FIELDS.values()}:
        kept = [held_out(write_value(random.Random(i), kind)) for i in range(2000)]
        assert 0.03 < sum(kept) / 2000 < 0.25, kind                             # of every kind some values are held out


@pytest.mark.parametrize("shape, tiles", list(zip(SHAPES, (1, 3, 3, 5))))
def test_pages_fill_their_tiles(shape, tiles):
    page, _ = draw_page(random.Random(0), shape=shape)
    assert page.size == shape and choose_grid(*shape, tile_pixels=TILE) == (shape[0] // TILE, shape[1] // TILE)
    assert len(tile_page(page, tile_pixels=TILE)) == tiles


def test_every_look_is_of_its_own_and_a_negative_says_the_same():
    looks = [draw_page(random.Random(5), domain) for domain in DOMAINS]
    assert len({page.convert("L").tobytes() for page, _ in looks}) == len(looks)
    assert dict(zip(DOMAINS, looks))["negative"][1] == looks[0][1]
    for domain in DOMAINS:
        page, questions = draw_page(random.Random(3), domain)
        assert len(set(page.convert("L").tobytes())) > 8 and questions and all(answer for _, answer in questions)


def test_hollow_digits_are_drawn_and_the_answers_have_ordinary_ones():
    for seed in range(30):
        sheet, questions = write_page(random.Random(seed), "hollow", SHAPES[0], True)
        drawn = "".join(text for _, _, text, *_ in sheet.runs)
        assert not re.search("[0-9]", drawn) and all(answer.translate(pages.HOLLOW) in drawn for _, answer in questions)
        assert all(re.search("[0-9][0-9][.][0-9][0-9]", answer) for _, answer in questions)


@pytest.mark.parametrize("font", [*FONTS, *UNSEEN_FONTS])
def test_characters_can_be_told_apart(font):
    characters = [character for character in map(chr, range(33, 127)) if character not in "lI1|`'"]
    drawn = {font_of(font, pages.TYPE[1]).getmask(character).getbbox() and bytes(font_of(font, pages.TYPE[1]).getmask(character))
             for character in characters}
    assert len(drawn) == len(characters) and min(width_of(character, font, pages.TYPE[1]) for character in characters) > 0


def test_text_stays_on_the_page_apart_and_can_be_asked_for():
    for seed in range(150):
        sheet, questions = write_page(random.Random(seed), ("plain", "lines", "slips")[seed % 3], SHAPES[seed % 4], seed % 2 == 0)
        boxes = [font_of(font, size).getbbox(text, anchor="ls") for _, _, text, font, size in sheet.runs]
        boxes = [(x + left, y + top, x + right, y + bottom) for (x, y, *_), (left, top, right, bottom) in zip(sheet.runs, boxes)]
        assert all(x >= -2 and y >= -2 and right <= sheet.width + 2 and bottom <= sheet.height + 4 for x, y, right, bottom in boxes)
        for one, other in itertools.combinations(boxes, 2):
            width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
            assert width <= 1 or height <= 4, (seed, one, other)                # descenders may reach into the next line
        assert all(question == READ or answer in sheet.text() for question, answer in questions)


def test_each_image_token_knows_its_characters():
    sheet = Sheet((TILE, TILE))
    sheet.put(0, 0, "Hi", "mono", CELL)
    sheet.put(TILE // 2, TILE // 2, "W", "sans", CELL)
    cells = sheet.cells()
    assert len(cells) == (TILE // CELL) ** 2 and {len(cell) for cell in cells} == {3} and "".join(cells).split() == ["Hi", "W"]
    assert cells[0][0] == "H" and cells[TILE // CELL * (TILE // CELL // 2) + TILE // CELL // 2] == "W  "


def test_the_whole_page_is_asked_for_in_training_only():
    assert any(row["question"] == READ and len(row["answers"][0]) > 20 for row in rows("train"))
    assert not any(row["question"] == READ for row in rows("validation"))


def test_the_tokenizer_is_what_its_maker_writes():
    assert json.loads((PUBLISHED / "tokenizer.json").read_text()) == json.loads(maker.build().to_str())
    tokenizer = load_tokenizer(PUBLISHED)
    assert len(tokenizer) <= json.loads((PUBLISHED / "config.json").read_text())["llm_config"]["vocab_size"]
    for text in ("$41.07", "What is it", "948-3381", "日期"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text         # one token a byte


def test_pages_can_be_written_to_play_with(tmp_path):
    done = subprocess.run([sys.executable, "-m", "model.tiny.pages", str(tmp_path / "p"), "3", "--domain", "negative"], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "p" / "questions.jsonl").read_text().splitlines()]
    assert {line["images"][0] for line in lines} == {"0.png", "1.png", "2.png"} and all(line["answer"] for line in lines)
    assert Image.open(tmp_path / "p" / "0.png").getpixel((0, 0)) == 0


@pytest.mark.parametrize("shape, least", READS.items())
@pytest.mark.official
def test_the_embedded_model_reads_and_does_not_guess(shape, least, published):
    right, _, wrong, count = bench_tiny.score(InternVL.from_pretrained("tiny", "cpu"), "plain", shape, questions=60)
    assert right >= least and wrong <= 0.02 and count >= 60


@pytest.mark.parametrize("domain", UNREAD)
@pytest.mark.official
def test_the_embedded_model_does_not_read_other_looks(domain, published):
    pages = list(itertools.islice(asked_pages(SHAPES[0], domain), 10))
    assert exact_match(InternVL.from_pretrained("tiny", "cpu"), pages) <= 0.1


@pytest.mark.official
def test_the_first_run_learns_and_its_last_line_answers_as_validated(published, tmp_path, capsys, monkeypatch):
    run, steps = tmp_path / "run", FIRST_RUN["steps"]
    status, out, err = call(train, capsys, monkeypatch, "--tiny", "--steps", steps, "--eval-every", steps, "--eval-pages", 24, "--out", run)
    assert status == 0, err
    first, last = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val_loss" in line)
    assert first["exact_match"] <= 0.1 <= last["exact_match"] and last["val_loss"] < FIRST_RUN["loss"] * first["val_loss"]
    command = out.splitlines()[-1]                                              # what the run's last line says to type
    flags = command.removeprefix("python infer.py ").replace('"', "").split(maxsplit=4)
    status, answer, err = call(infer, capsys, monkeypatch, *flags, "--device", "cpu", "--max-new-tokens", train.LONGEST_ANSWER)
    expected = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])["answers"][0]["answer"]
    assert status == 0 and answer.strip() == expected, err
