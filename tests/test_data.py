"""Every question reaches its page, in a known order, whatever the number of workers; bad pages are named, not hidden."""
import itertools
import os
import random
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from data import INSTRUCTION, PageDataset, Page, PageStream, count_rows, group_rows_into_pages, load_examples, open_rows, shuffled
from hub import serve
from model import InputError
from model.images import read_image
from model.tiling import tile_page
from small_data import mixed_rows, page_rows, write_dataset, write_split


def row(page, question, image=b"x"):
    return {"docId": page, "ucsf_document_page_no": "1", "question": str(question), "answers": ["a"], "image": {"bytes": image}}


def names(pages):
    return [(page.name, [question.removesuffix(INSTRUCTION) for question in page.questions]) for page in pages]


def test_questions_of_a_page_are_gathered_in_order_of_first_appearance():
    rows = [row("b", 1), row("a", 1), row("b", 2), row("c", 1), row("a", 2), row("b", 3)]
    assert names(group_rows_into_pages(rows)) == [("b/1", ["1", "2", "3"]), ("a/1", ["1", "2"]), ("c/1", ["1"])]


def test_every_row_is_in_one_page_whatever_the_look_ahead():
    draw = random.Random(0)
    for look_ahead in (1, 2, 5, 40, 1000):
        rows = [row(draw.randrange(60), i) for i in range(400)]
        pages = list(group_rows_into_pages(rows, look_ahead))
        questions = [int(q.removesuffix(INSTRUCTION)) for page in pages for q in page.questions]
        assert sorted(questions) == list(range(400))
        firsts = [int(page.questions[0].removesuffix(INSTRUCTION)) for page in pages]
        assert firsts == sorted(firsts)                                         # pages in the order of their first row
        for page in pages:
            at = [int(q.removesuffix(INSTRUCTION)) for q in page.questions]
            assert at == sorted(at) and at[-1] - at[0] < look_ahead


def test_a_page_spread_wider_than_the_window_becomes_two_and_is_counted():
    rows = [row("wide", 0), *(row(f"p{i}", i) for i in range(1, 10)), row("wide", 10)]
    pages = list(group_rows_into_pages(rows, 10))
    assert [page.name for page in pages if page.split] == ["wide/1"] and [page.name for page in pages].count("wide/1") == 2
    assert len(pages) == 11 and len(list(group_rows_into_pages(rows, 11))) == 10 and not any(page.split for page in group_rows_into_pages(rows, 11))


def test_rows_held_are_bounded_by_the_look_ahead():
    read = itertools.count()
    rows = (row(next(read), 0) for _ in itertools.count())                      # endless, every row a page of its own
    pages = group_rows_into_pages(rows, look_ahead=100)
    next(pages)
    for _ in range(500):
        before = next(read)
        next(pages)
        assert next(read) - before <= 3                                         # one row in, one page out
    held = pages.gi_frame.f_locals["waiting"]
    assert len(held) <= 100


def test_image_bytes_of_further_rows_are_dropped_at_once():
    first, second = bytes([1] * 1000), bytes([1] * 1000)
    [page] = group_rows_into_pages([row("a", 1, first), row("a", 2, second)])
    assert page.images[0] is first


def test_pages_are_told_apart_by_their_image_where_there_are_no_numbers():
    assert len(list(group_rows_into_pages([row("a", i, bytes([i])) | {"ucsf_document_page_no": None} for i in range(3)]))) == 3
    rows = [{"question": f"q{i}", "answers": "one", "image": {"bytes": image, "path": None}} for i, image in enumerate([b"A", b"B", b"A"])]
    assert [len(page.questions) for page in group_rows_into_pages(rows)] == [2, 1]


def test_the_first_answer_is_learned_as_written():
    rows = [row("a", "what is the pH of BHT") | {"answers": ["pH 7 of bht", "PH 7"]}, row("a", "none") | {"answers": []},
            row("a", "null") | {"answers": None}, row("a", "empty") | {"answers": [""]}, row("a", "hollow") | {"answers": [None]}]
    [page] = group_rows_into_pages(rows)
    assert page.questions == ["what is the pH of BHT Answer the question using a single word or phrase."]
    assert page.answers == ["pH 7 of bht"] and page.unanswered == 4 and page.rows == 5


def test_shuffling_loses_nothing_and_depends_on_the_seed_alone():
    for buffer in (1, 10, 1000):
        orders = [list(shuffled(iter(range(200)), seed, buffer)) for seed in ("0 0", "0 0", "0 1")]
        assert orders[0] == orders[1] != orders[2]
        assert all(sorted(order) == list(range(200)) != order for order in orders)


def test_going_on_in_the_middle_gives_the_pages_that_were_left():
    rows = mixed_rows(9)
    def order(**where):
        return list(PageStream(rows, epochs=3, seed=5, **where))
    whole = order()
    assert len(whole) == 27 and [p.name for p in whole[:9]] != [p.name for p in whole[9:18]]
    for i, page in enumerate(whole):
        assert order(start=(page.epoch, page.index + 1, page.refill)) == whole[i + 1:]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_examples_come_in_the_same_order_whatever_the_workers(tiny, workers):
    stream = PageStream(mixed_rows(12), epochs=2, seed=1)
    examples = list(load_examples(stream, PageDataset(tiny, 4), workers))
    assert [e.page.name for e in examples] == [p.name for p in PageStream(mixed_rows(12), epochs=2, seed=1)]
    for example in examples:
        assert example.tiles.dtype == torch.uint8
        expected = tile_page(read_image(example.page.images[0]), 4, 128)
        assert torch.equal(example.tiles, torch.from_numpy(expected))


COLUMNS = {                             # what each Hub copy of DocumentVQA calls its columns
    "zhangfaen/DocumentVQA": ("questionId", "question", "image", "docId", "ucsf_document_id", "ucsf_document_page_no", "answers"),
    "HuggingFaceM4/DocumentVQA": ("questionId", "question", "question_types", "image", "docId", "ucsf_document_id",
                                  "ucsf_document_page_no", "answers"),
    "lmms-lab/DocVQA": ("questionId", "question", "question_types", "image", "docId", "ucsf_document_id",
                        "ucsf_document_page_no", "answers", "data_split"),
    "images only": ("question", "image", "answers"),
}


@pytest.mark.parametrize("source", COLUMNS)
def test_every_copy_of_documentvqa_is_read(tmp_path, source):
    rows = [{name: r.get(name, "other") for name in COLUMNS[source]} for r in mixed_rows(5)]
    write_split(tmp_path, "train", rows, shards=3)                              # pages cross shards
    pages = list(group_rows_into_pages(open_rows(str(tmp_path), "train")))
    expected = list(group_rows_into_pages(rows))
    assert [(p.questions, p.answers, p.images) for p in pages] == [(p.questions, p.answers, p.images) for p in expected]
    assert len(pages) == 5 and count_rows(str(tmp_path), "train") == len(rows)


def test_every_question_of_every_receipt_is_found(receipts):
    for split, count in (("train", 96), ("validation", 24)):
        pages = list(group_rows_into_pages(open_rows(str(receipts), split)))
        assert len(pages) == count and {len(page.questions) for page in pages} == {4}
        firsts = []
        for r in open_rows(str(receipts), split):
            name = f"{r['docId']}/{r['ucsf_document_page_no']}"
            if name not in firsts:
                firsts.append(name)
        assert [page.name for page in pages] == firsts


def test_rows_stream_from_the_hub(tmp_path):
    write_dataset(tmp_path / "datasets" / "zhangfaen" / "DocumentVQA", train_pages=6)
    code = ("from data import *; d = 'zhangfaen/DocumentVQA'\n"
            "print(len(list(group_rows_into_pages(open_rows(d, 'train')))), count_rows(d, 'train'))\n"
            "for name, split in ((d, 'dev'), ('zhangfaen/Other', 'train')):\n"
            "    try: open_rows(name, split)\n"
            "    except InputError as error: print(error)")
    with serve(tmp_path) as address:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")})
    lines = done.stdout.splitlines()
    assert lines[0] == f"6 {len(mixed_rows(6))}", done.stderr
    assert "cannot read the split 'dev'" in lines[1] and "neither a local folder nor a data set on the Hub" in lines[2]


def test_data_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the split 'train'|neither a local folder nor"):
        open_rows(str(tmp_path), "train")                                       # an empty folder
    write_split(tmp_path, "train", [{"question": "a", "image": r["image"], "answers": r["answers"], "x": "1"} for r in page_rows(1)], 1)
    with pytest.raises(InputError, match="cannot read the split 'validation'.*--eval-every 0"):
        open_rows(str(tmp_path), "validation")
    write_split(tmp_path / "b", "train", [{"text": "a", "image": r["image"], "answers": r["answers"]} for r in page_rows(1)], 1)
    with pytest.raises(InputError, match=r"no column question \(found: text, image, answers\)"):
        open_rows(str(tmp_path / "b"), "train")
    with pytest.raises(InputError, match="holds no rows"):
        list(PageStream([]))


@pytest.mark.parametrize("name, message", [
    *((name, f"^{name}: not found; expected a local folder") for name in ("data/my.jsonl", "data/my.json", "data/a.parquet", "../data", "./data", "/no/data")),
    ("", "one of its names is empty"), ("synthetic,,data/my.jsonl", "one of its names is empty"), ("synthetic, ", "one of its names is empty")])
def test_a_mistyped_name_is_refused_without_asking_the_hub(monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=message):
        open_rows(name, "train")


def test_bad_pages_are_named(tiny):
    [good] = group_rows_into_pages(page_rows(1))
    prepare = PageDataset(tiny, 4, max_length=400)
    assert prepare[good].problem is None
    cut = Page("9/1", [good.images[0][:100]], good.questions, good.answers, rows=3)
    assert "cannot read it as an image" in prepare[cut].problem
    assert "none of its 3 questions has an answer" in prepare[Page("9/1", good.images, rows=3)].problem
    assert "leave no room in --max-length 60" in PageDataset(tiny, 4, max_length=60)[good].problem


def test_an_error_while_reading_rows_reaches_the_reader():
    def rows():
        yield row("a", 1)
        raise OSError("the line broke")
    with pytest.raises(InputError, match="rows after page 0 cannot be read .OSError: the line broke"):
        list(PageStream(rows(), shuffle=False))
