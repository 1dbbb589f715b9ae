"""Files of every format become the same pages; every mistake in them is reported with its line; check and show agree with the run."""
import collections
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import call, data, refuses, train
from conftest import ROOT
from example_formats import jsonl, write_formats
from PIL import Image
from reference import conversation_prompt, loss_of

from data import PageDataset, group_rows_into_pages, page_blocks
from extras.formats import FORMATS, read_entry, read_file
from extras.pictures import draw_tiles
from extras.sources import count_rows, named_parts, open_rows
from model import InputError, InternVL
from model.images import load_image
from model.prompt import INSTRUCTION
from model.tiling import choose_grid, tile_page
from model.tiny.pages import draw_page


def pages_of(path, **more):
    return list(group_rows_into_pages(open_rows(str(path), "train", hold_out=False, **more)))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Drawn pages as PNG files, and (file name, question, answer) of them, two pages at a time mixed."""
    folder, queues = tmp_path_factory.mktemp("files"), []
    for number in range(8):
        image, questions = draw_page(random.Random(number))
        image.save(folder / f"page {number}.png")
        queues.append([(f"page {number}.png", question, answer) for question, answer in questions])
    rows = [row for pair in zip(queues[::2], queues[1::2]) for both in itertools.zip_longest(*pair) for row in both if row]
    return folder, rows


@pytest.fixture(scope="module")
def files(asked):
    return write_formats(*asked)


def contents(pages):
    return [(page.images, page.questions, page.answers, page.accepted, page.follows, page.system, page.question_start, page.rows) for page in pages]


def test_every_format_gives_the_same_pages_tokens_and_tiles(files, asked, tiny):
    folder, rows = asked
    expected = {}
    for image, question, answer in rows:
        expected.setdefault(str(folder / image), []).append((question, answer))
    first = None
    for name, file in files.items():
        pages = pages_of(file)
        assert {page.images[0]: list(zip(page.questions, page.answers)) for page in pages} == expected, name
        assert [page.images[0] for page in pages] == list(expected), name
        examples = [PageDataset(tiny, 4)[page] for page in pages]
        first = first or (contents(pages), [(e.prompt, e.tiles) for e in examples])
        assert contents(pages) == first[0], name
        assert all(e.prompt == prompt and torch.equal(e.tiles, tiles) for e, (prompt, tiles) in zip(examples, first[1])), name


def test_a_file_gives_the_pages_of_the_hub_layout(receipts, tmp_path):
    hub, rows = list(group_rows_into_pages(open_rows(str(receipts), "validation"))), []
    for row in open_rows(str(receipts), "validation"):
        (tmp_path / f"{row['docId']}.jpg").write_bytes(row["image"]["bytes"])
        rows.append((f"{row['docId']}.jpg", row["question"], row["answers"][0]))
    for name, file in write_formats(tmp_path, rows).items():
        pages = pages_of(file)
        assert len(pages) == len(hub) == 24, name
        for page, other in zip(pages, hub):
            assert (page.questions, page.answers) == (other.questions, other.answers) and (page.instruction, other.instruction) == ("", INSTRUCTION)
            assert open(page.images[0], "rb").read() == other.images[0]


def test_several_turns_are_one_branch_whatever_the_format(asked, tmp_path, tiny):
    folder, _ = asked
    turns, image = [("What is the date?", "03/04/05"), ("And the total?", "$12.00"), ("Thanks", "...")], str(folder / "page 1.png")
    said = [side for turn in turns for side in turn]
    entries = {
        "conversations": {"image": image, "conversations": [{"from": "system", "value": "Be brief."}, *(
            {"from": who, "value": text} for who, text in zip(itertools.cycle(("human", "gpt")), ["<image>\n" + said[0], *said[1:]]))]},
        "messages": {"images": [image], "messages": [{"role": "system", "content": "Be brief."}, *(
            {"role": who, "content": text} for who, text in zip(itertools.cycle(("user", "assistant")), ["<image>" + said[0], *said[1:]]))]},
        "history": {"system": "Be brief.", "query": turns[2][0], "response": turns[2][1], "images": [image],
                    "history": [[f"<image>{turns[0][0]}", turns[0][1]], list(turns[1])]},
    }
    (tmp_path / "a.jsonl").write_text(jsonl(entries.values()))
    pages = [page for i in range(3) for page in group_rows_into_pages(itertools.islice(open_rows(str(tmp_path / "a.jsonl"), "train", hold_out=False), i, i + 1))]
    assert contents(pages)[0] == contents(pages)[1] == contents(pages)[2]
    example = PageDataset(tiny, 4)[pages[0]]
    whole = conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, example.tile_counts, turns)
    skip = len(tiny.tokenizer("Be brief.").input_ids) - 1           # the model's own system sentence is one token
    assert example.prompt.ids[-60:] == whole.ids[-60:] and example.prompt.labels[-60:] == whole.labels[-60:]
    assert example.prompt.positions == list(range(len(whole.ids) + skip)) and set(example.prompt.branches) == {0, 1}
    assert example.answer_tokens == sum(len(tiny.tokenizer(a).input_ids) + 1 for _, a in turns)
    prompt, _ = PageDataset(tiny, 4).write(pages[0], example.tile_counts, asked=[0, 2])        # asked behind the true turns before
    last = [token for token, branch in zip(prompt.ids, prompt.branches) if branch == 2]
    learned = [token for token, branch in zip(example.prompt.ids, example.prompt.branches) if branch == 1]
    assert learned[:len(last)] == last and prompt.branches.count(1) < prompt.branches.count(2)
    merged = pages_of(tmp_path / "a.jsonl")
    assert len(merged) == 1 and len(merged[0].questions) == 9           # three conversations about one image: one page


def test_images_in_the_text_stay_where_they_are(asked, tmp_path, tiny):
    folder, _ = asked
    a, b = (str(folder / f"page {i}.png") for i in (0, 1))
    rows = [
        ([a, b], [("Image-1: <image>\nImage-2: <image>\nWhat differs?", "nothing")]),
        ([a, b], [("<image>\nWhat is the date?", "today"), ("And of <image>?", "never"), ("Why?", "so")]),
        ([a, b], [("<image>\n<image>\nBoth?", "yes")]),
        ([a, b], [("Both?", "yes")]),
        ([a], [("Look at <image> first", "yes")]),
        ([], [("Who are you?", "InternVL"), ("Sure?", "yes")]),
    ]
    (tmp_path / "a.jsonl").write_text(jsonl({"image": images, "conversations": [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]} for images, turns in rows))
    pages = pages_of(tmp_path / "a.jsonl")
    assert [len(page.questions) for page in pages] == [1, 2, 2, 1, 2]                      # the third and fourth are one page
    examples, seen = [PageDataset(tiny, 12)[page] for page in pages], [0, 1, 2, 4, 5]
    for example, (images, turns) in zip(examples, [rows[i] for i in seen]):
        counts = [len(tile_page(load_image(image), 12 // len(images), 128)) for image in images]    # tiles are shared
        assert example.tile_counts == counts and len(example.tiles) == sum(counts)
        if example.page is not pages[2]:
            whole = conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, counts, turns)
            assert (example.prompt.ids, example.prompt.labels) == (whole.ids, whole.labels)
            assert example.prompt.positions == list(range(len(whole.ids)))
    with torch.no_grad():                                       # split into prefix and branch or not: the loss is the same
        for example, (images, turns) in zip(examples, [rows[i] for i in seen]):
            if example.page is not pages[2]:
                whole = conversation_prompt(tiny.tokenizer, tiny.config.tokens_per_tile, example.tile_counts, turns)
                losses = [loss_of(tiny, [(example.tiles, prompt)]).item() for prompt in (example.prompt, whole)]
                assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_foodieqas_own_rows_are_those_of_its_conversion(asked, tmp_path):
    folder, _ = asked
    row = {"question": "这是什么菜？", "choices": ["糖醋排骨", "麻婆豆腐"], "answer": "1", "question_en": "?", "choices_en": ["a", "b"],
           "food_name": "麻婆豆腐", "food_meta": {"food_file": str(folder / "page 0.png"), "food_name": "麻婆豆腐"}, "question_id": 7}
    converted = {"image": str(folder / "page 0.png"), "conversations": [{"from": "human", "value": "这是什么菜？\n<image>"},
                                                                        {"from": "gpt", "value": "麻婆豆腐，图中的菜是麻婆豆腐"}]}
    for name, entry in (("a", row), ("b", converted)):
        (tmp_path / f"{name}.json").write_text(json.dumps([entry], ensure_ascii=False))
    assert contents(pages_of(tmp_path / "a.json")) == contents(pages_of(tmp_path / "b.json"))
    assert pages_of(tmp_path / "a.json")[0].ids == [7]


def test_weights_say_how_often_rows_come_and_spread_them_evenly(files, asked):
    a, b, n = files["internvl.jsonl"], files["swift-query.jsonl"], len(asked[1])
    for weights, counts in (((1, 2), (n, 2 * n)), ((0.5, 1), (n // 2, n)), ((2.5, 1), (int(2.5 * n), n))):
        mixed = f"{a}={weights[0]},{b}={weights[1]}"
        rows = list(open_rows(mixed, "train", hold_out=False))
        came = collections.Counter(row["place"].rpartition(":")[0] for row in rows)
        assert (came[str(a)], came[str(b)]) == counts and count_rows(open_rows(mixed, "train", hold_out=False), mixed) == sum(counts) == len(rows)
        halves = collections.Counter(row["place"].rpartition(":")[0] for row in rows[:len(rows) // 2])
        assert all(abs(2 * halves[str(f)] - came[str(f)]) <= 2 for f in (a, b))
        pages = list(group_rows_into_pages(rows))
        assert sum(len(page.questions) for page in pages) == len(rows)
        assert all(len(set(page.questions)) == len(page.questions) for page in pages)   # a repeated row is another page
    assert named_parts(f"{a}=2,owner/name:x,{b}") == [(str(a), 2.0), ("owner/name:x", 1.0), (str(b), 1.0)]
    with pytest.raises(InputError, match="'lots' is not a weight"):
        open_rows(f"{a}=lots", "train")


def test_a_mixture_file_sets_weights_tiles_and_augmentation(files, asked, tmp_path, tiny):
    folder, rows = asked
    (tmp_path / "mix.json").write_text(json.dumps({
        "small": {"root": str(folder), "annotation": str(files["internvl.jsonl"]), "repeat_time": 0.5, "max_dynamic_patch": 1},
        "often": {"root": str(folder), "annotation": str(files["internvl.jsonl"]), "repeat_time": 2, "data_augment": True}}))
    mixed = list(open_rows(str(tmp_path / "mix.json"), "train", hold_out=False))
    assert len(mixed) == len(rows) // 2 + 2 * len(rows)
    examples = [PageDataset(tiny, 4)[page] for page in group_rows_into_pages(mixed)]
    small = [example for example in examples if example.page.max_tiles == 1]
    assert small and all(len(example.tiles) == 1 for example in small) and any(len(example.tiles) == 5 for example in examples)
    augmented = [example for example in examples if example.page.augment]
    plain = tile_page(load_image(augmented[0].page.images[0]), 4, 128)
    assert not (augmented[0].tiles == torch.from_numpy(plain)).all()
    assert (augmented[0].tiles.float() - torch.from_numpy(plain).float()).abs().mean() < 12     # but it is the same page
    again = PageDataset(tiny, 4)[augmented[0].page]
    assert torch.equal(again.tiles, augmented[0].tiles)                                 # drawn from page and epoch


def split_images(*files, **more):
    """(images of the training rows, images of the validation rows) of some files, told apart by what they hold."""
    content = {}
    for split in ("train", "validation"):
        rows = open_rows(",".join(map(str, files)), split, **more)
        content[split] = {Path(image).read_bytes() if Path(image).exists() else image for row in rows for image in row["images"]}
    return content["train"], content["validation"]


def ask(images, text="What?"):
    return {"images": list(map(str, images)), "query": text, "response": "x"}


def test_an_image_is_in_training_or_in_validation_whatever_its_names_rows_and_files(tmp_path, monkeypatch):
    images = []
    for i in range(40):
        images.append(tmp_path / f"{i}.png")
        images[-1].write_bytes(b"image %d" % i)
    (tmp_path / "link.png").symlink_to(images[0])
    copies = [tmp_path / f"copy {i}.png" for i in range(40)]
    for image, copy in zip(images, copies):
        copy.write_bytes(image.read_bytes())
    monkeypatch.chdir(tmp_path)
    cases = {
        "one file": [[ask([i]) for i in images]],
        "small files and a large one": [*([ask([images[2 * n]]), ask([images[2 * n + 1]])] for n in range(4)), [ask([i]) for i in images]],
        "other names": [[ask([i]) for i in images] + [ask([f"./{i.name}"], "Who?") for i in images] + [ask(["link.png"])]],
        "copies": [[ask([i]) for i in images] + [ask([i], "Who?") for i in copies]],
        "one and two images": [[ask([i]) for i in images] + [ask(pair) for pair in zip(images, images[1:])]],
        "no image too": [[ask([i]) for i in images] + [ask([])] * 5],
        "addresses": [[ask([f"http://localhost/{i}.png"]) for i in range(40)]],
    }
    for name, files in cases.items():
        paths = [tmp_path / f"{name} {n}.jsonl" for n in range(len(files))]
        for path, rows in zip(paths, files):
            path.write_text(jsonl(rows))
        train_images, kept = split_images(*paths)
        assert kept and train_images and not kept & train_images, name
    mixed = {"a": {"annotation": "one file 0.jsonl"}, "b": {"annotation": "copies 0.jsonl"}}
    (tmp_path / "mix.json").write_text(json.dumps(mixed))
    train_images, kept = split_images(tmp_path / "mix.json")
    assert kept and train_images and not kept & train_images


def test_rows_that_are_added_never_move_a_page_from_training_to_validation(tmp_path):
    seen = set()
    for count in (10, 11, 40, 400, 4000):
        (tmp_path / "a.jsonl").write_text(jsonl(ask([f"http://localhost/{i}.png"]) for i in range(count)))
        os.utime(tmp_path / "a.jsonl", ns=(count, count))
        train_images, kept = split_images(tmp_path / "a.jsonl")
        assert len(train_images) + len(kept) == count and not kept & seen
        seen |= train_images
    assert 40 <= len(kept) <= 90                                                # 64 rows of 4,000
    random.Random(0).shuffle(lines := (tmp_path / "a.jsonl").read_text().splitlines())
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert split_images(tmp_path / "b.jsonl") == (train_images, kept)


def test_rows_that_mix_both_are_counted_and_where_nothing_is_left_the_run_is_refused(tmp_path, capsys):
    addresses = [f"http://localhost/{i}.png" for i in range(40)]
    (tmp_path / "a.jsonl").write_text(jsonl([*(ask([i]) for i in addresses), *(ask([i, j]) for i, j in zip(addresses, addresses[1:]))]))
    sides = [open_rows(str(tmp_path / "a.jsonl"), split) for split in ("train", "validation")]
    neither = 79 - len(sides[0]) - len(sides[1])
    assert neither > 0 and f"{neither} rows are left out: they show images that are held out and others" in capsys.readouterr().err
    for rows in ([ask(["a.png"])], [ask([])] * 9):
        (tmp_path / "few.jsonl").write_text(jsonl(rows))
        with pytest.raises(InputError, match="no rows for (train|validation): too few images to hold one out"):
            split_images(tmp_path / "few.jsonl")
        os.utime(tmp_path / "few.jsonl", ns=(1, 1))
    assert len(open_rows(str(tmp_path / "few.jsonl"), "train", hold_out=False)) == 9
    with pytest.raises(InputError, match="--split dev; a file has train and validation"):
        open_rows(str(tmp_path / "a.jsonl"), "dev")


def test_micro_batches_have_pages_of_similar_length_and_resume_in_the_middle(tmp_path, tiny):
    for i in range(203):
        Image.new("L", random.Random(i).choice(((100, 100), (256, 128), (256, 256), (512, 128)))).save(tmp_path / f"{i}.png")
    (tmp_path / "a.jsonl").write_text(jsonl({"image": f"{i}.png", "query": f"{i}?", "response": "x"} for i in range(203)))
    examples = PageDataset(tiny, 4)
    rows = open_rows(str(tmp_path / "a.jsonl"), "train", hold_out=False)

    def order(**where):
        group = examples.size, 4
        return list(itertools.chain.from_iterable(page_blocks(rows, 2, 3, block_rows=1000, group=group, **where)))
    whole = order()
    sizes = [examples.size(page) for page in whole]
    for page, size in zip(whole[:20], sizes):
        assert 0 <= len(examples[page].prompt.ids) - size < 70                          # the system turn and the header
    for epoch in range(2):
        batches = [sizes[epoch * 203 + i:epoch * 203 + i + 4] for i in range(0, 200, 4)]
        assert sum(max(batch) > 1.2 * min(batch) for batch in batches) <= 3             # at most where one size ends
        assert batches != sorted(batches)
    names = [(page.resume, page.name) for page in whole]
    assert sorted(names[:203], key=lambda n: n[1]) != names[:203] and len({name for _, name in names[:203]}) == 203
    assert [n for _, n in names[:203]] != [n for _, n in names[203:]]
    for last in (7, 151, 199, 202, 206, 402):                   # a run resumes behind a micro-batch, or the end of an epoch
        assert [(p.resume, p.name) for p in order(start=whole[last].resume)] == names[last + 1:]


# ------------------------------------------------------------------------------------------------------------ what is wrong

def chat(*said, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in said], **more}


def said(content):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]}


Q, A = ("human", "What?"), ("gpt", "This.")
IMAGE_Q = ("human", "<image>\nWhat?")
MALFORMED = [                           # a line, and what is reported about it
    ("{", "not JSON"), ('{"a": 1,}', "not JSON"), ("nonsense", "not JSON"), ('{"query": "a" "response": "b"}', "not JSON"), ("{'query': 'a'}", "not JSON"),
    ('{"query": "a", "response": "b"', "not JSON"), ('{"query": "a", "response": "b"}}', "not JSON"),
    (5, "5; expected an object"), ("null", "missing; expected an object"), ('"text"', '"text"; expected an object'), (True, "true; expected an object"),
    ({}, f"none of the keys {', '.join(FORMATS)} (found: none)"), ({"text": "x"}, "(found: text)"),
    ({"instruction": "x", "output": "y"}, "(found: instruction, output)"),
    ([], "turns are []"), ({"conversations": []}, "turns are []"), ({"conversations": None}, "turns are missing"),
    ({"conversations": "x"}, 'turns are "x"; expected a list'), ({"messages": {}}, "turns are {}"), ({"conversations": [5]}, "turn 1 is 5"),
    ({"conversations": [{"from": "human"}]}, 'turn 1 is {"from": "human"}; expected [question, answer] or {"from", "value"}'),
    ({"messages": [{"from": "user", "value": "x"}]}, 'expected [question, answer] or {"role", "content"}'),
    ({"conversations": [["a", "b", "c"]]}, 'turn 1 is ["a", "b", "c"]'), ({"conversations": [["a"]]}, 'turn 1 is ["a"]'),
    (chat(Q, ("robot", "x")), 'turn 2 is from "robot"; expected one of human'), (chat((5, "x"), A), "turn 1 is from 5"),
    (chat((None, "x"), A), "turn 1 is from missing"), (chat(A, Q), "gpt speaks where a question is expected"),
    (chat(Q, Q, A), "human speaks where an answer is expected"), (chat(Q, A, A), "gpt speaks where a question is expected"),
    (chat(Q), "the last turn is not an answer"), (chat(Q, A, Q), "the last turn is not an answer"), (chat(("system", "x")), "no question"),
    (chat(Q, ("system", "x"), A), "system speaks where an answer is expected"),
    (chat(("human", " "), A), "an empty question"), ({"query": "", "response": "x"}, "an empty question"), ({"question": "", "answer": "x"}, "an empty question"),
    (chat(Q, ("gpt", "")), "an empty answer"), (chat(Q, ("gpt", " \n")), "an empty answer"), (chat(Q, ("gpt", None)), "turn 2 is missing; expected text"),
    (chat(("human", 5), A), "turn 1 is 5; expected text"), (chat(("human", ["x"]), A), 'turn 1 is ["x"]; expected text'),
    ('{"query": "\\ud800", "response": "x"}', "turn 1 is not UTF-8 at its character 1"), (b'{"query": "caf\xe9", "response": "x"}', "turn 1 is not UTF-8 at its character 4"),
    ({"query": None, "response": "x"}, "turn 1 is missing"), ({"query": "x", "response": 5}, "turn 2 is 5"),
    ({"query": "x", "response": "y", "history": "z"}, 'turns are "z"'), ({"query": "x", "response": "y", "history": [["z"]]}, 'turn 1 is ["z"]; expected [question, answer]'),
    (chat(IMAGE_Q, A), "1 <image> and 0 images"), (chat(("human", "<image><image>"), A, image="page 0.png"), "2 <image> and 1 images"),
    (chat(IMAGE_Q, A, image=["page 0.png", "page 1.png"]), "1 <image> and 2 images"), (chat(Q, A, image=5), "image is [5]; expected a path"),
    (chat(Q, A, image=[""]), 'image is [""]'), (chat(Q, A, image={"file": "x"}), 'image is [""]'), (chat(Q, A, image={"path": "lost.png"}), "lost.png: no such file"),
    (chat(Q, A, image="data:image/png;base64,iVBORw0KGgo="), 'an image inside the row, "data:image/png;base64,iVBORw0KGgo="; write it to a file'),
    (said([{"type": "video", "video": "x.mp4"}, {"type": "text", "text": "What?"}]), "KeyError: 'video'"),
    (said([{"type": "image"}, {"type": "text", "text": "What?"}]), "1 <image> and 0 images"),
    (said([{"type": "image_url", "image_url": {"url": "gone.png"}}, {"type": "text", "text": "What?"}]), "gone.png: no such file"),
    (said([{"text": "What?"}]), "KeyError: 'type'"),
    (chat(("human", "<img></img>x"), A), "an <img></img> without a path"),
    (chat(IMAGE_Q, A, image="nowhere.png"), "nowhere.png: no such file"), (chat(IMAGE_Q, A, image="broken.png"), "broken.png as an image"),
    (chat(IMAGE_Q, A, image="cut.png"), "cut.png as an image"), (chat(IMAGE_Q, A, image="."), "as an image"),
    (chat(("human", "<img>nowhere.png</img>x"), A), "nowhere.png: no such file"), (chat(IMAGE_Q, A, image="http://127.0.0.1:9/x.png"), "http://127.0.0.1:9/x.png"),
    (chat(Q, A, video="x.mp4"), "a video; only images are read"),
    ({"question": "x", "answer": 5}, "answers are 5"),
    ({"question": "x", "food_meta": {}, "choices": ["a"], "answer": "3", "food_name": "y"}, "IndexError"), ({"question": "x", "food_meta": {}}, "KeyError: 'choices'"),
]


def test_every_malformed_line_is_told_with_its_line_and_reason(asked, tmp_path, capsys, monkeypatch):
    assert len(MALFORMED) >= 60
    folder, rows = asked
    (tmp_path / "page 0.png").write_bytes((folder / "page 0.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((folder / "page 0.png").read_bytes()[:200])
    good = json.dumps(chat(IMAGE_Q, A, image="page 0.png"))
    lines = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line, _ in MALFORMED]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(part for line in lines for part in (good.encode(), line, b"")))   # blank lines are fine
    status, out, err = call(data, capsys, monkeypatch, "check", tmp_path / "bad.jsonl")
    *told, summary = out.splitlines()
    assert status == 1 and not err
    assert len(told) == len(MALFORMED), [line for line in told if not line.startswith(str(tmp_path))]
    for number, (line, (_, reason)) in enumerate(zip(told, MALFORMED)):
        assert line.startswith(f"{tmp_path / 'bad.jsonl'}:{3 * number + 2}: ") and reason in line, (line, reason)
    assert f"{len(MALFORMED)} wrong; {2 * len(MALFORMED)} rows" in summary


def test_a_missing_answer_is_wrong_in_every_format_for_training_and_right_for_questions(tmp_path, capsys, monkeypatch):
    rows = [{"query": "x"}, {"question": "x"}, {"question": "x", "answers": []}, {"query": "x", "response": None, "history": [["a", "b"]]}, chat(Q), chat(Q, A, Q),
            {"messages": [{"role": "user", "content": "x"}]}]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    status, out, _ = call(data, capsys, monkeypatch, "check", tmp_path / "a.jsonl")
    reason = "the last turn is not an answer; expected an answer to every question"
    assert status == 1 and out.splitlines()[:4] == [*(f"{tmp_path / 'a.jsonl'}:{i}: {reason}" for i in (1, 2, 3)), f"{tmp_path / 'a.jsonl'}: 4 more: {reason}"]
    with pytest.raises(InputError, match=f"a.jsonl:1: {reason}; 7 in all"):
        open_rows(str(tmp_path / "a.jsonl"), "train")
    pages = list(group_rows_into_pages(open_rows(str(tmp_path / "a.jsonl"), "validation", hold_out=False, answered=False)))
    assert sum(len(page.questions) for page in pages) == 9 and [page.accepted[-1] for page in pages] == [[]] * 7
    assert sorted(len(answers) for page in pages for answers in page.accepted) == [0] * 7 + [1] * 2


def test_a_format_of_ones_own_is_one_entry_in_formats(asked, tmp_path, capsys, monkeypatch):
    """It returns its turns and its images, whatever their keys; where no place is written they come first, as elsewhere."""
    folder, _ = asked
    monkeypatch.setitem(FORMATS, "ask", lambda entry: ([("user", entry["ask"]), ("assistant", entry["say"])], entry["about"]["file"]))
    images = [str(folder / f"page {i}.png") for i in (0, 1)]
    own = [{"ask": "What?", "say": "This.", "about": {"file": images[0]}}, {"ask": "Both <image> or <image>?", "say": "Yes.", "about": {"file": images}}]
    usual = [{"question": "What?", "answer": "This.", "image": images[0]}, {"question": "Both <image> or <image>?", "answer": "Yes.", "images": images}]
    for name, rows in (("own", own), ("usual", usual)):
        (tmp_path / f"{name}.jsonl").write_text(jsonl(rows))
    assert contents(pages_of(tmp_path / "own.jsonl")) == contents(pages_of(tmp_path / "usual.jsonl"))
    other = str(folder / "page 2.png")
    for name, row in (("own", own[0] | {"about": {"file": other}}), ("usual", usual[0] | {"image": other})):        # and it is trained and validated on
        (tmp_path / f"{name} eval.jsonl").write_text(jsonl([row]))
        flags = ("--tiny", "--data", tmp_path / f"{name}.jsonl", "--eval-data", tmp_path / f"{name} eval.jsonl", "--steps", 1, "--max-tiles", 4)
        assert call(train, capsys, monkeypatch, *flags, "--out", tmp_path / name)[0] == 0
    for file in ("model.safetensors", "samples.jsonl"):
        own, usual = ((tmp_path / name / file).read_bytes() for name in ("own", "usual"))
        assert own.replace(b"own eval.jsonl", b"usual eval.jsonl") == usual


def test_a_key_of_ones_own_may_stand_beside_the_usual_ones_if_its_entry_comes_first(monkeypatch):
    row = {"question": "What?", "image": "a.png", "better": "B."}
    own = {"better": lambda entry: ([("user", entry["question"]), ("assistant", entry["better"])], entry["image"])}
    monkeypatch.setattr("extras.formats.FORMATS", own | FORMATS)
    assert read_entry(row)["turns"] == [("What?", "B.")] and read_entry({"question": "What?", "answer": "A."})["turns"] == [("What?", "A.")]


def test_content_in_parts_and_images_as_objects_are_read_as_the_usual_row(asked, tmp_path):
    folder, _ = asked
    a, b = (str(folder / f"page {i}.png") for i in (0, 1))
    text = {"type": "text", "text": "What?"}
    usual = [{"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}], "image": a}] * 6
    parts = [said([{"type": "image_url", "image_url": {"url": a}}, text]), said([{"type": "image_url", "image_url": a}, text]),
             said([{"type": "image", "image": a}, text]), said([{"type": "image", "path": a}, text]),
             said([{"type": "image", "text": None}, text]) | {"images": [{"bytes": None, "path": a}]},
             {"question": "What?", "answer": "This.", "images": [{"path": a}]}]
    parts[0]["messages"][1]["content"] = [{"type": "text", "text": "This."}]
    usual.append({"conversations": [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "This."}], "image": [a, b]})
    parts.append(said([{"type": "text", "text": "Is "}, {"type": "image", "image": a}, {"type": "text", "text": " like "}, {"type": "image", "image": b},
                       {"type": "text", "text": "?"}]))
    for name, rows in (("parts", parts), ("usual", usual)):
        (tmp_path / f"{name}.jsonl").write_text(jsonl(rows))
    assert contents(pages_of(tmp_path / "parts.jsonl")) == contents(pages_of(tmp_path / "usual.jsonl"))


def test_a_row_of_a_format_of_ones_own_that_lacks_a_key_is_told_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FORMATS, "ask", lambda entry: ([("user", entry["ask"]), ("assistant", entry["say"][0])], entry.get("of", [])))
    (tmp_path / "own.jsonl").write_text(jsonl([{"ask": "What?", "say": ["This."]}, {"ask": "What?"}, {"ask": "What?", "say": []}, {"ask": "What?", "say": None}]))
    lines = call(data, capsys, monkeypatch, "check", tmp_path / "own.jsonl")[1].splitlines()
    for number, (line, reason) in enumerate(zip(lines, ("KeyError: 'say'; expected a row of the format with the key ask", "IndexError", "TypeError")), 2):
        assert f"own.jsonl:{number}: {reason}" in line


@pytest.mark.parametrize("text, place, reason", [
    ('[\n {"query": "a", "response": "b"},\n {"query": "a"}\n]', ": entry 2", "the last turn is not an answer"),
    ('[{"query": "a", "response": "b"}, {"query": "a"}]', ": entry 2", "the last turn is not an answer"),
    ('[\n {"query": "a", "response": "b"}\n {"query": "a"}\n]', ":3", "Expecting ',' delimiter"),
    ('[\n {"query": "a", "response": "b"},\n]', ":3", "not JSON"), ('[\n {"query": "a", "response": "b"},\n', ":3", "not JSON"),
    ('[{"query": "a", "response": "b"},\n {"query": "a"', ":2", "not JSON"),
    ('[\n {"query": "a", "response": "b"}\n]\nmore', ":4", "Extra data"), ("", ":1", "no rows"), ("\n\n", ":1", "no rows"), ("[\n]", ":1", "no rows"),
    ("[" * 100_000, ":1", "not JSON"),
    ('{\n "a": {"root": "x"}\n "b": 1}', ":3", "not JSON"), ('{\n "x": {"annotation": "no.jsonl"}\n}', ": x", "annotation"),
    ('{"x": {"annotation": "ok.jsonl"},\n "y": 5}', ": y", "5; expected an object"), ('{\n\n"x": {"annotation": 5}}', ": x", "annotation is 5; expected a file"),
    ('{"x": {"annotation": "ok.jsonl", "repeat_time": "2"}}', ": x", 'repeat_time is "2"'), ('{"x": {"annotation": "ok.jsonl", "repeat_time": 0}}', ": x", "above 0"),
    ('{"x": {"annotation": "ok.jsonl", "repeat_time": true}}', ": x", "above 0"), ('{"x": {"annotation": "ok.jsonl", "root": 5}}', ": x", "root is 5"),
    ('{"x": {"annotation": "ok.jsonl", "max_dynamic_patch": 0}}', ": x", "expected 1 to 128"), ('{"x": {"annotation": "ok.jsonl", "data_augment": 1}}', ": x", "true or false"),
    ('{"x": {"annotation": "ok.jsonl", "length": 7}}', ": x", "length is 7, but ok.jsonl has 1 rows"),
    ('{"x": {"annotation": "mix.json"}}', ": x", "is a mixture file itself"), ('{"x": {"annotation": "a.json"}}', ": x", "is a mixture file itself"),
])
def test_lists_and_mixtures_name_the_entry_and_broken_json_its_line(tmp_path, capsys, monkeypatch, text, place, reason):
    (tmp_path / "ok.jsonl").write_text('{"query": "a", "response": "b"}\n')
    (tmp_path / "mix.json").write_text('{"x": {"annotation": "ok.jsonl"}, "y": {"annotation": "ok.jsonl"}}')
    (tmp_path / "a.json").write_text(text)
    status, out, _ = call(data, capsys, monkeypatch, "check", tmp_path / "a.json")
    assert status == 1 and out.splitlines()[0].startswith(f"{tmp_path / 'a.json'}{place}: ") and reason in out, out
    if "length" not in reason:
        monkeypatch.setattr(train, "load_model", None)                  # a bad row is refused before
        assert f"a.json{place}: " in refuses(train, capsys, monkeypatch, "--tiny", "--data", tmp_path / "a.json", "--out", tmp_path / "run")


def test_check_finds_nothing_wrong_with_right_files(files, asked, tiny, capsys, monkeypatch):
    status, out, _ = call(data, capsys, monkeypatch, "check", *files.values())
    assert status == 0 and len(out.splitlines()) == len(files)
    assert all(f"all is right; {len(asked[1])} rows, 8 pages, {len(asked[1])} questions" in line for line in out.splitlines())
    status, out, _ = call(data, capsys, monkeypatch, "check", files["internvl.jsonl"], "--model", "tiny", "--max-length", 5 * tiny.config.tokens_per_tile + 30)
    assert status == 1 and "does not fit" in out and "internvl.jsonl:" in out.splitlines()[0]
    assert "nowhere" in refuses(data, capsys, monkeypatch, "check", "nowhere.jsonl")


def test_show_prints_what_the_model_reads(files, tmp_path, capsys, monkeypatch):
    """Tiles as `infer.py --show` draws them, tokens question by question, those in the loss in brackets."""
    picture, tiny = tmp_path / "tiles.png", InternVL.from_pretrained("tiny", "cpu")
    status, out, err = call(data, capsys, monkeypatch, "show", files["llava.json"], 2, "--out", picture)
    assert status == 0 and "--model OpenGVLab/InternVL2-1B" in err
    page = pages_of(files["llava.json"])[2]
    example = PageDataset(tiny, 12)[page]
    n, tokens = len(example.tiles), tiny.config.tokens_per_tile
    drawn = SimpleNamespace(tiles=example.tiles, grid=choose_grid(*load_image(page.images[0]).size, 12, tiny.config.vision.tile_pixels))
    assert f"tiles: {picture}" in out and Image.open(picture).tobytes() == draw_tiles([drawn], tokens).tobytes()
    for question, answer in zip(page.questions, page.answers):
        text = f"⏎{question}<|im_end|><|im_start|>assistant⏎[{answer}<|im_end|>]"
        assert text in out.replace("|<|", "<|").replace("|>|", "|>").replace("⏎|", "⏎").replace("|", "").replace("<im_end>", "<|im_end|>").replace(
            "<im_start>", "<|im_start|>")
    assert f"<IMG_CONTEXT> x {n * tokens}" in out and "branch" not in out
    assert "\nprefix, shared by all questions: " in out and f"\nquestion 1 of {len(page.questions)}: " in out
    assert out.splitlines()[-1] == f"{len(example.prompt.ids)} tokens, {n * tokens} of them from images, {example.answer_tokens} in the loss"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "no example 99" in refuses(data, capsys, monkeypatch, "show", files["llava.json"], 99)
    gone = tmp_path / "gone" / "a.png"
    assert f"{gone}: there is no folder" in refuses(data, capsys, monkeypatch, "show", files["llava.json"], 2, "--model", "tiny",
                                                     "--out", gone)


def test_output_that_nobody_reads_any_more_ends_quietly(files, tmp_path):
    for command in (("show", files["llava.json"], 2, "--out", tmp_path / "tiles.png"), ("check", files["llava.json"])):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "data.py", *map(str, command)], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
        os.close(writer)
        assert done.returncode == 141 and not [line for line in done.stderr.splitlines() if "embedded model" not in line], done.stderr


def test_files_train_and_interrupted_runs_go_on(files, asked, tmp_path, capsys, monkeypatch):
    folder, _ = asked
    text = jsonl([{"query": "Who are you?", "response": "a model"}, {"images": [str(folder / "page 0.png")] * 2, "query": "Same?", "response": "yes"}])
    (tmp_path / "more.jsonl").write_text(text)
    flags = ("--tiny", "--data", f"{files['internvl.jsonl']}=2,{tmp_path / 'more.jsonl'}", "--eval-data", files["xcomposer-pairs.json"], "--group-by-length",
             "--batch-pages", 2, "--accumulate", 1, "--steps", 9, "--eval-every", 9, "--save-every", 4)
    assert call(train, capsys, monkeypatch, *flags, "--out", tmp_path / "whole")[0] == 0
    assert call(train, capsys, monkeypatch, *flags, "--out", tmp_path / "run")[0] == 0
    for name in ("step-0000008.safetensors", "step-0000009.safetensors"):
        (tmp_path / "run" / "checkpoints" / name).unlink()
    (tmp_path / "run" / "model.safetensors").unlink()
    status, out, err = call(train, capsys, monkeypatch, "--resume", tmp_path / "run")
    assert status == 0 and "resumed after step 4" in out, err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (tmp_path / "run" / "curve.png").exists()
    assert [line["step"] for line in lines if "anls" in line] == [0, 9]


def test_pages_without_any_image_train_nothing_of_the_projector_and_do_not_stop_the_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.jsonl").write_text(jsonl({"query": f"{i}?", "response": "x"} for i in range(30)))
    status, _, err = call(train, capsys, monkeypatch, "--tiny", "--data", tmp_path / "a.jsonl", "--steps", 2, "--eval-every", 0, "--out", tmp_path / "run")
    assert status == 0, err


def test_a_mixture_file_is_read_once_and_again_when_it_changes(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl([{"query": "a", "response": "b"}]))
    first = read_file(tmp_path / "a.jsonl")
    assert read_file(tmp_path / "a.jsonl") is first
    (tmp_path / "a.jsonl").write_text(jsonl([{"query": "a", "response": "b"}] * 2))
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert len(read_file(tmp_path / "a.jsonl")[0].rows) == 2


@pytest.mark.parametrize("row", [
    {"query": "And that?", "response": "B.", "history": [["What?", "A."]]},
    {"messages": [{"role": role, "content": text} for role, text in (("user", "What?"), ("assistant", "A."), ("user", "And that?"), ("assistant", "B."))]}])
def test_images_without_a_place_begin_the_last_question_in_ms_swift(row):
    """In ms-swift images without a tag are inserted at the start of the last query. Elsewhere they begin the first."""
    found = read_entry(row | {"images": ["a.png"]})
    assert found["history"] == [("What?", "A.")] and found["question_start"] == "<image>" and found["turns"] == [("\nAnd that?", "B.")]
    llava = {"conversations": [{"from": who, "value": text} for who, text in (("human", "What?"), ("gpt", "A."), ("human", "And that?"), ("gpt", "B."))]}
    found = read_entry(llava | {"image": "a.png"})
    assert (found["history"], found["question_start"], found["turns"]) == ([], None, [("What?", "A."), ("And that?", "B.")])
