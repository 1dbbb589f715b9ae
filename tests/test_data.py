"""Every question reaches its page, in a known order, whatever the number of workers; bad pages are named, not hidden."""
import collections
import itertools
import os
import pickle
import random
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from hub import serve
from small_data import mixed_rows, page_rows, write_dataset, write_split

from data import Page, PageDataset, group_by_length, group_rows_into_pages, load_examples, page_blocks, prefetch
from extras.sources import count_rows, open_rows
from model import InputError
from model.images import load_image
from model.tiling import tile_page


def row(page, question, image=b"x"):
    return {"docId": page, "ucsf_document_page_no": "1", "question": str(question), "answers": ["a"], "image": {"bytes": image}}


def names(pages):
    return [(page.name, page.questions) for page in pages]


def test_questions_of_a_page_are_gathered_in_order_of_first_appearance():
    rows = [row("b", 1), row("a", 1), row("b", 2), row("c", 1), row("a", 2), row("b", 3)]
    assert names(group_rows_into_pages(rows)) == [("b/1", ["1", "2", "3"]), ("a/1", ["1", "2"]), ("c/1", ["1"])]


def flat(blocks):
    return list(itertools.chain.from_iterable(blocks))


def test_every_row_is_in_one_page_whatever_the_block():
    draw = random.Random(0)
    for block_rows in (1, 2, 5, 40, 1000):
        rows = [row(draw.randrange(60), i) for i in range(400)]
        blocks = list(page_blocks(rows, shuffle=False, block_rows=block_rows))
        questions = [int(q) for page in flat(blocks) for q in page.questions]
        assert sorted(questions) == list(range(400)) and len(blocks) == -(-400 // block_rows)
        for number, pages in enumerate(blocks):
            of_block = [[int(q) for q in page.questions] for page in pages]
            assert sorted(sum(of_block, [])) == list(range(400))[number * block_rows:(number + 1) * block_rows]
            assert of_block == sorted(sorted(page) for page in of_block)        # pages in the order of their first row


def test_a_page_cut_by_the_edge_of_a_block_becomes_two_and_is_counted():
    rows = [row("wide", 0), *(row(f"p{i}", i) for i in range(1, 10)), row("wide", 10)]
    pages = flat(page_blocks(rows, shuffle=False, block_rows=10))
    assert [page.name for page in pages if page.cut] == ["wide/1"] and [page.name for page in pages].count("wide/1") == 2
    whole = flat(page_blocks(rows, shuffle=False, block_rows=11))
    assert len(pages) == 11 and len(whole) == 10 and not any(page.cut for page in whole)


def test_the_first_block_is_short_and_the_others_are_of_the_size_asked_for():
    rows = [row(i, i) for i in range(5000)]
    assert [len(pages) for pages in page_blocks(rows, block_rows=2048)] == [512, 2048, 2048, 392]
    assert [len(pages) for pages in page_blocks(rows, block_rows=2048, start=(0, 2, 48))] == [2000, 392]


def test_two_blocks_are_held_at_most_and_the_next_one_is_read_while_one_is_used():
    read = []
    rows = (read.append(i) or row(i, 0) for i in itertools.count())             # endless, every row a page of its own
    pages = prefetch(page_blocks(rows, shuffle=False, block_rows=10))
    for used in range(1, 200):
        next(pages)
        deadline = time.monotonic() + 5
        while len(read) < 10 * (2 + (used - 1) // 10) and time.monotonic() < deadline:
            time.sleep(0.001)                                                   # the thread gathers the block after this one
        assert 10 * (2 + (used - 1) // 10) <= len(read) <= 10 * (2 + (used - 1) // 10) + 1      # one row to see its edge


def test_an_error_in_the_reading_thread_reaches_the_loop():
    def blocks():
        yield group_rows_into_pages(page_rows(1))
        raise InputError("the line broke")
    pages = prefetch(blocks())
    next(pages)
    with pytest.raises(InputError, match="the line broke"):
        next(pages)


def test_image_bytes_of_further_rows_are_dropped_at_once():
    first, second = bytes([1] * 1000), bytes([1] * 1000)
    [page] = group_rows_into_pages([row("a", 1, first), row("a", 2, second)])
    assert page.images[0] is first


def test_pages_are_told_apart_by_their_image_where_there_are_no_numbers():
    assert len(list(group_rows_into_pages([row("a", i, bytes([i])) | {"ucsf_document_page_no": None} for i in range(3)]))) == 3
    rows = [{"question": f"q{i}", "answers": "one", "image": {"bytes": image, "path": None}} for i, image in enumerate([b"A", b"B", b"A"])]
    assert [len(page.questions) for page in group_rows_into_pages(rows)] == [2, 1]


def test_the_first_answer_is_in_the_loss_as_written():
    rows = [row("a", "what is the pH of BHT") | {"answers": ["pH 7 of bht", "PH 7"]}, row("a", "none") | {"answers": []},
            row("a", "null") | {"answers": None}, row("a", "empty") | {"answers": [""]}, row("a", "hollow") | {"answers": [None]}]
    [page] = group_rows_into_pages(rows)
    assert page.questions == ["what is the pH of BHT"] and page.instruction == " Answer the question using a single word or phrase."
    assert page.answers == ["pH 7 of bht"] and page.unanswered == 4 and page.rows == 5


def test_shuffling_loses_nothing_stays_in_the_block_and_depends_on_the_seed_alone():
    rows = [row(i, i) for i in range(200)]
    for block_rows in (1, 10, 1000):
        orders = [[int(page.name.split("/")[0]) for page in flat(page_blocks(rows, seed=seed, block_rows=block_rows, epochs=2))]
                  for seed in (0, 0, 1)]
        assert orders[0] == orders[1] and (orders[0] != orders[2] or block_rows == 1)
        for order in (orders[0][:200], orders[0][200:]):
            assert all(sorted(order[i:i + block_rows]) == list(range(200))[i:i + block_rows] for i in range(0, 200, block_rows))
        assert block_rows == 1 or orders[0][:200] != orders[0][200:] != list(range(200))


def test_resuming_after_any_page_gives_the_pages_that_were_left():
    rows = mixed_rows(9)
    for more in ({"block_rows": 2048}, {"block_rows": 7}, {"block_rows": 7, "group": (lambda page: len(page.questions), 2)}):
        whole = flat(page_blocks(rows, epochs=3, seed=5, **more))
        assert sum(page.rows for page in whole) == 3 * len(rows)
        for i in range(1, len(whole), 2):                                       # a run resumes behind a whole step
            assert flat(page_blocks(rows, epochs=3, seed=5, start=whole[i].resume, **more)) == whole[i + 1:]


def test_grouping_by_length_puts_pages_of_similar_size_into_a_micro_batch():
    draw = random.Random(0)
    for placed in range(8):
        pages = [draw.randrange(1000) for _ in range(83)]
        grouped = group_by_length(pages, lambda page: page, 4, random.Random(0), placed)
        assert sorted(grouped) == sorted(pages)
        begin = -placed % 4
        batches = [grouped[i:i + 4] for i in range(begin, 80, 4)]
        spread = sum(max(batch) - min(batch) for batch in batches if len(batch) == 4) / len(batches)
        assert spread < 150 and grouped[begin:] != sorted(grouped[begin:])      # drawn at random it is about 600


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_examples_come_in_the_same_order_whatever_the_workers(tiny, workers):
    stream = dict(epochs=2, seed=1, block_rows=20)
    examples = list(load_examples(prefetch(page_blocks(mixed_rows(12), **stream)), PageDataset(tiny, 4), workers))
    assert [e.page.name for e in examples] == [p.name for p in flat(page_blocks(mixed_rows(12), **stream))]
    images = {page.name: page.images[0] for page in group_rows_into_pages(mixed_rows(12))}
    for example in examples:
        assert example.tiles.dtype == torch.uint8
        expected = tile_page(load_image(images[example.page.name]), 4, 128)
        assert torch.equal(example.tiles, torch.from_numpy(expected))


def test_image_bytes_do_not_leave_the_worker_and_the_page_here_keeps_them(tiny):
    [page, *_], dataset = group_rows_into_pages(mixed_rows(2)), PageDataset(tiny, 4)
    for workers in (0, 1):
        [example] = load_examples([page], dataset, workers)
        assert example.page.images == [True] and page.images[0].startswith(b"\x89PNG") and example.page.questions == page.questions
        assert len(pickle.dumps(example.page)) < len(page.images[0])
        assert example.prompt.numbers.dtype == torch.int64 and example.answer_tokens == dataset[page].answer_tokens
    [broken] = load_examples([Page("x", [b"no image"], ["What?"], ["it"])], dataset, 0)
    assert broken.error and broken.prompt is None and broken.pin_memory() is broken


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
    assert len(pages) == 5 and count_rows(open_rows(str(tmp_path), "train"), str(tmp_path)) == len(rows)


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
    other = [{"query": row["question"], "label": row["answers"][0], "img": row["image"]} for row in mixed_rows(5)]
    write_split(tmp_path / "datasets" / "some" / "other", "train", other, image="img")
    code = ("from data import *; from extras.sources import *; d = 'zhangfaen/DocumentVQA'\n"
            "print(len(list(group_rows_into_pages(open_rows(d, 'train')))), count_rows(open_rows(d, 'train'), d))\n"
            "for name, split in ((d, 'dev'), ('zhangfaen/Other', 'train')):\n"
            "    try: open_rows(name, split)\n"
            "    except InputError as error: print(error)\n"
            "for columns in ('question=query,answers=label,image=img', 'question=query'):\n"
            "    try: print([p.questions for p in group_rows_into_pages(open_rows('some/other', 'train', columns=columns))])\n"
            "    except InputError as error: print(error)")
    with serve(tmp_path) as address:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")})
    lines = done.stdout.splitlines()
    assert lines[0] == f"6 {len(mixed_rows(6))}", done.stderr
    assert "cannot read the split 'dev'" in lines[1] and "neither a local folder nor a data set on the Hub" in lines[2]
    assert lines[3] == str([page.questions for page in group_rows_into_pages(mixed_rows(5))])
    assert "some/other: no column image, answers (found: query, label, img);" in lines[4]


def test_data_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the split 'train'|neither a local folder nor"):
        open_rows(str(tmp_path), "train")                                       # an empty folder
    write_split(tmp_path, "train", [{"question": "a", "image": r["image"], "answers": r["answers"], "x": "1"} for r in page_rows(1)], 1)
    with pytest.raises(InputError, match="cannot read the split 'validation'.*--eval-every 0"):
        open_rows(str(tmp_path), "validation")
    write_split(tmp_path / "b", "train", [{"text": "a", "image": r["image"], "answers": r["answers"]} for r in page_rows(1)], 1)
    with pytest.raises(InputError, match=r"no column question \(found: text, image, answers\); .* --columns question=\.\.\.,"):
        open_rows(str(tmp_path / "b"), "train")
    with pytest.raises(InputError, match="holds no rows"):
        list(page_blocks([]))


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
    assert prepare[good].error is None
    cut = Page("9/1", [good.images[0][:100]], good.questions, good.answers, rows=3)
    assert "cannot read it as an image" in prepare[cut].error
    assert "none of its 3 questions has an answer" in prepare[Page("9/1", good.images, rows=3)].error
    assert "leave no room in --max-length 60; raise it" in PageDataset(tiny, 4, max_length=60)[good].error


def test_what_exceeds_the_positions_of_the_model_is_left_out_whatever_max_length_is(tiny):
    [page] = group_rows_into_pages(page_rows(1, questions=2))
    page.questions[1] = "the date of this page " * 400
    example = PageDataset(tiny, 4, max_length=8192)[page]
    assert example.kept_questions == [0] and example.too_long == [page.questions[1]] and max(example.prompt.positions) < 2048
    page.questions[0] = page.questions[1]
    assert "leave no room in the model's 2048 positions; lower --max-tiles" in PageDataset(tiny, 4, max_length=8192)[page].error
    assert PageDataset(tiny, 4, max_length=None)[page].error is None                    # where somebody else judges lengths


def test_an_error_while_reading_rows_reaches_the_reader():
    def rows():
        yield row("a", 1)
        raise OSError("the line broke")
    with pytest.raises(InputError, match="rows of block 0 cannot be read .OSError: the line broke"):
        list(page_blocks(rows(), shuffle=False))


def test_a_damaged_parquet_file_is_named_in_one_line(tmp_path):
    write_split(tmp_path, "train", mixed_rows(6), shards=2)
    rows, [_, second] = open_rows(str(tmp_path), "train"), sorted((tmp_path / "data").iterdir())
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{second.name}: cannot read it as parquet .*; repair it, or remove it"):
        collections.deque(iter(rows), 0)                                        # list() would ask for their number first
    with pytest.raises(InputError, match="cannot read the number of its rows .*; repair its files, or give the run's length with --steps"):
        len(rows)


def test_a_parquet_file_that_lacks_a_column_is_named(tmp_path):
    write_split(tmp_path, "train", page_rows(1), shards=1)
    rows = open_rows(str(tmp_path), "train")
    write_split(tmp_path / "b", "train", [{name: row[name] for name in ("question", "image")} | {"answers": []} for row in page_rows(1)], 1)
    [file], [other] = (tmp_path / "data").iterdir(), (tmp_path / "b" / "data").iterdir()
    from pyarrow import parquet
    parquet.write_table(parquet.read_table(other).drop_columns("question"), file)
    with pytest.raises(InputError, match=rf"{file.name}: no column question \(found: image, answers\)"):
        collections.deque(iter(rows), 0)


def test_a_row_is_tried_again_until_the_network_is_back_or_the_time_is_up(tmp_path, monkeypatch):
    write_split(tmp_path, "train", mixed_rows(6), shards=2)
    rows, clock, faults = open_rows(str(tmp_path), "train"), [0.0], []
    expected = list(iter(rows))
    monkeypatch.setattr("data.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("data.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def opening(file, open=rows.open):
        if faults and faults.pop():
            raise ConnectionError("gone")
        return open(file)
    monkeypatch.setattr(rows, "open", opening)
    faults[:] = [True] * 3
    assert list(iter(rows)) == expected and clock[0] == 1 + 2 + 4
    faults[:] = [True] * 99
    with pytest.raises(InputError, match="the Hub cannot be reached; connect to the network, .* --resume"):
        collections.deque(iter(rows), 0)
    assert clock[0] <= 7 + 600 and len(faults) == 99 - 15
