"""Drawn pages are the same everywhere, their values are held out; the embedded model's files are what their makers write."""
import io
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from model.checkpoint import TINY
from model.tiling import choose_grid, tile_page
from model.tiny import tokenizer as maker
from model.tiny.pages import DOMAINS, FIELDS, LOOSE, READ, SHAPES, SyntheticRows, draw_page, glyph, held_out
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
    for draw_value in FIELDS.values():
        kept = [held_out(draw_value(random.Random(i))) for i in range(2000)]
        assert 0.03 < sum(kept) / 2000 < 0.25                                   # of every field some values are held out


@pytest.mark.parametrize("shape, tiles", list(zip(SHAPES, (1, 3, 5))))
def test_pages_are_cut_where_their_characters_end(shape, tiles):
    page, _ = draw_page(random.Random(0), shape=shape)
    assert choose_grid(*page.size, tile_pixels=128) == (shape[0] // 8, shape[1] // 8)
    assert len(tile_page(page, tile_pixels=128)) == tiles


def test_every_domain_looks_different_and_says_the_same():
    pages = [draw_page(random.Random(3), domain) for domain in DOMAINS]
    assert all(questions == pages[0][1] for _, questions in pages)
    assert len({page.convert("RGB").tobytes() for page, _ in pages}) == len(DOMAINS)
    mixed = {Image.open(io.BytesIO(bytes(row["image"]["bytes"]))).mode for row in rows("train", 60, domains="plain,blueprint")}
    assert mixed == {"L", "RGB"}


def test_characters_can_be_told_apart():
    characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghiklmnoprstv0123456789$./:-"
    for domain in DOMAINS:
        assert len({glyph(character, domain).tobytes() for character in characters}) == len(characters)


def test_the_whole_page_is_asked_for_in_training_only():
    assert any(row["question"] == READ and len(row["answers"][0]) == 64 for row in rows("train"))
    assert not any(row["question"] == READ for row in rows("validation"))


def test_the_tokenizer_is_what_its_maker_writes():
    assert json.loads((TINY / "tokenizer.json").read_text()) == json.loads(maker.build().to_str())
    tokenizer = load_tokenizer(TINY)
    assert len(tokenizer) == json.loads((TINY / "config.json").read_text())["llm_config"]["vocab_size"]
    for text in ("$41.07", "Bolelo", "948-3381", "日期"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text         # one token a byte


def test_pages_can_be_written_to_play_with(tmp_path):
    done = subprocess.run([sys.executable, "-m", "model.tiny.pages", str(tmp_path / "p"), "3", "--domain", "negative"], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "p" / "questions.jsonl").read_text().splitlines()]
    assert {line["images"][0] for line in lines} == {"0.png", "1.png", "2.png"} and all(line["answer"] for line in lines)
    assert Image.open(tmp_path / "p" / "0.png").getpixel((0, 0)) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.official
def test_the_embedded_model_reads_and_does_not_guess(shape):
    import bench_tiny

    from model import InternVL
    right, _, wrong, count = bench_tiny.score(InternVL.from_pretrained("tiny", "cpu"), "plain", shape, questions=60)
    assert right >= 0.93 and wrong <= 0.05 and count >= 60


@pytest.mark.official
def test_the_embedded_model_makes_nothing_of_other_domains():
    import bench_tiny

    from model import InternVL
    model = InternVL.from_pretrained("tiny", "cpu")
    assert all(bench_tiny.score(model, domain, None, questions=30)[0] <= 0.2 for domain in DOMAINS if domain != "plain")


@pytest.mark.official
def test_a_trained_projector_reads_what_it_could_not(tmp_path, capsys, monkeypatch):
    from commands import call, infer, train
    run = tmp_path / "run"
    status, out, err = call(train, capsys, monkeypatch, "--tiny", "--domain", "bitmap", "--steps", 150, "--eval-every", 150,
                            "--eval-pages", 16, "--out", run)
    assert status == 0, err
    first, last = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val_loss" in line)
    assert first["exact_match"] <= 0.2 and last["exact_match"] >= 0.7 and last["val_loss"] < 0.3 * first["val_loss"]
    command = out.splitlines()[-1]                                              # what the run's last line says to type
    flags = command.removeprefix("python infer.py ").replace('"', "").split(maxsplit=4)
    status, answer, err = call(infer, capsys, monkeypatch, *flags, "--device", "cpu")
    expected = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])["answers"][0]["answer"]
    assert status == 0 and answer.strip() == expected, err


@pytest.mark.parametrize("domain", LOOSE)
def test_blocks_off_the_grid_stay_on_the_page_and_apart(domain):
    for seed in range(40):
        page, questions = draw_page(random.Random(seed), domain, unseen=False)
        ink = np.asarray(page) < 128
        assert not ink[:, -1].any() and ink.any() and len(questions) >= 3
        offsets = {(x % 16, y % 16) for y, x in np.argwhere(ink)}
        assert len(offsets) > 100                                               # no cell's border is kept free
        plain, _ = draw_page(random.Random(seed), "plain", unseen=False)
        assert 0.4 < ink.sum() / (np.asarray(plain) < 128).sum() < 1.3          # nothing is cut off or drawn over


@pytest.mark.parametrize("domain, least", [("plain", 0.95), ("moved", 0.7), ("spaced", 0.35)])
@pytest.mark.official
def test_the_loose_model_reads_off_the_grid(domain, least):
    import bench_tiny

    from model import InternVL
    right, close, wrong, _ = bench_tiny.score(InternVL.from_pretrained(TINY / "loose", "cpu"), domain, None, questions=60)
    assert right >= least and close > right - 1e-9 and wrong <= 0.05
