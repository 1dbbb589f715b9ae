"""What people bring along from other programs is read rightly or reported in one line, never dropped."""
import json
import os
import random
import socket

import pytest
import torch
from commands import call, data, infer, refuses, train
from conftest import TINY
from example_formats import jsonl
from PIL import Image
from small_data import mixed_rows, write_split

from data import PageDataset, group_rows_into_pages
from extras.formats import read_entry
from extras.sources import open_rows
from extras.video import load_images
from model import InputError, InternVL
from model.checkpoint import resolve
from model.images import load_image
from model.tiny.pages import SHAPES, draw_page

CHAT = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]}
QUERY, MESSAGES = {"query": "What?", "response": "This."}, [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]


@pytest.fixture
def pages(tmp_path):
    for i, shape in enumerate(SHAPES[:2]):
        draw_page(random.Random(i), shape=shape)[0].save(tmp_path / f"{'ab'[i]}.png")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- rows

@pytest.mark.parametrize("more, key", [
    ({"image_path": "a.png"}, "image_path"), ({"img": "a.png"}, "img"), ({"picture": "a"}, "picture"), ({"page": "scans/7.TIF"}, "page"),
    ({"id": "a.png"}, "id"), ({"where": {"file": ["a.jpg"]}}, "where"), ({"url": "https://example.com/x"}, "url"),
    ({"images": ["a.png"], "image2": "b.png"}, "image2"), ({"images": ["a.png"], "back": "b.png"}, "back"), ({"image": "a.png", "images": ["b.png"]}, "images"),
    ({"objects": {"ref": ["the date"]}}, "objects"), ({"messages": MESSAGES}, "messages"), ({"history": [["a", "b"]]}, "history"), ({"respons": "x"}, "respons"), ({"prompt": "x"}, "prompt"),
    ({"loss": False}, "loss"), ({"loss_mask": [0, 1]}, "loss_mask"), ({"rejected_response": "x"}, "rejected_response"), ({"tools": [{"name": "x"}]}, "tools"),
    ({"chosen": "x"}, "chosen"), ({"label": "x"}, "label"), ({"scan": "7"}, "scan"), ({"dialog": [["a", "b"]]}, "dialog")])
def test_a_key_that_may_carry_an_image_a_turn_or_a_mask_is_reported(more, key):
    with pytest.raises(InputError, match=f"^{key}: not a key that is read here, and it may carry an image, a turn or a mask"):
        read_entry({"conversations": [["What?", "This."]]} | more)


def test_keys_that_carry_nothing_are_passed_over():
    found = read_entry(CHAT | {"id": "a.png", "width": 9, "height_list": [9], "source": "b.png", "dataset": "mine", "topic": "x", "image_id": 4, "image_size": [9, 9],
                               "history": [], "loss": True, "weight": 1, "objects": None, "tags": ["x"], "question_id": 3, "ucsf_document_page_no": "7", "docId": "x", "meta": {"a": 1}, "topics": "art", "n_questions": 5})
    assert found["images"] == ["a.png"] and found["questionId"] == 3 and found["turns"] == [("What?", "This.")]


@pytest.mark.parametrize("more, key", [({"loss": False}, "turn 2: loss"), ({"weight": 0}, "turn 2: weight"), ({"image": "b.png"}, "turn 2: image"),
                                       ({"tool_calls": [{"function": {}}]}, "turn 2: tool_calls"), ({"loss": True, "name": "x", "id": 4, "tool_calls": None}, None)])
def test_the_keys_of_a_turn_are_read_or_reported_too(more, key):
    row = {"messages": [MESSAGES[0], MESSAGES[1] | more]}
    if key is None:
        assert read_entry(row)["turns"] == [("What?", "This.")]
    else:
        with pytest.raises(InputError, match=f"^{key}: not a key that is read"):
            read_entry(row)


@pytest.mark.parametrize("text", ["<image1>", "<image 2>", "<image_1>", "<Image>", "<|image_1|>", "<|image|>", "<image_placeholder>", "<img1>", "<ref-object>", "<bbox>"])
def test_what_looks_like_a_place_of_an_image_or_a_box_is_reported(text):
    for row in ({"query": f"The receipt {text}?", "response": "x", "images": ["a.png"]}, {"query": "?", "response": f"see {text}"}):
        with pytest.raises(InputError, match=f"^{text.replace('|', '.')} is not the place of an image or a box"):
            read_entry(row)
    assert read_entry({"query": 'What is <img src="x"> or <imaginary>?', "response": "<p>"})["turns"] == [('What is <img src="x"> or <imaginary>?', "<p>")]


@pytest.mark.parametrize("text", ["<image>", "<ImageHere>", "<img>a.png</img>"])
def test_an_image_in_an_answer_or_a_system_turn_is_reported(text):
    with pytest.raises(InputError, match=f"^{text} in an answer; expected images in questions alone"):
        read_entry({"messages": [MESSAGES[0], {"role": "assistant", "content": f"{text} This."}], "images": ["a.png"]})
    with pytest.raises(InputError, match=f"^{text} in a system turn"):
        read_entry(QUERY | {"images": ["a.png"], "system": f"Look at {text}."})


def test_a_system_text_beside_the_turns_means_the_same_in_every_format():
    rows = (CHAT, {"messages": MESSAGES}, QUERY, {"question": "What?", "answer": "This."})
    for row in rows:
        found = read_entry(row | {"system": "Be brief."})
        assert (found["system"], found["turns"]) == ("Be brief.", [("What?", "This.")])
    system = {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]}
    assert read_entry(system | {"system": "Be brief."}) == read_entry(system)
    with pytest.raises(InputError, match='system is "Be long.", and the system turn is another; expected one of them'):
        read_entry(system | {"system": "Be long."})
    with pytest.raises(InputError, match="turn 1 is 5; expected text"):
        read_entry(QUERY | {"system": 5})


# ------------------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize("content, told", [
    (b"PAR1\0\0data\n{\"", "begins with b'PAR1'; .* of parquet files give the folder"), (b"\x1f\x8b\x08\0\0", "no text file"), (b"PK\x03\x04\x14\0[", "no text file"),
    (b"image,question,answer\n" + b"a.png,What?,This\n" * 99, "no line is JSON")])
def test_a_file_of_another_kind_is_one_line(tmp_path, capsys, monkeypatch, content, told):
    (tmp_path / "x.jsonl").write_bytes(content)
    status, out, err = call(data, capsys, monkeypatch, "check", tmp_path / "x.jsonl")
    assert status == 1 and len(out.splitlines()) == 2 and not err
    with pytest.raises(InputError, match=told):
        open_rows(str(tmp_path / "x.jsonl"), "train")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_files_as_windows_writes_them_are_read(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "名前?", "response": "é"}, ensure_ascii=False) + "\r\n", encoding=encoding)
    [row] = open_rows(str(tmp_path / "a.jsonl"), "train", hold_out=False)
    assert row["turns"] == [("名前?", "é")]


def test_every_page_of_a_tiff_is_asked_about(tmp_path, capsys):
    scans = [Image.new("L", (20 + i, 10), 40 * i) for i in range(3)]
    path = str(tmp_path / "scan.tif")
    scans[0].save(path, save_all=True, append_images=scans[1:])
    assert [image.size for image in load_images(path)] == [(20, 10), (21, 10), (22, 10)]
    assert [image.size for image in load_images(path + "#2")] == [(21, 10)] and not capsys.readouterr().err
    for number in (0, 4, 4294967297):
        with pytest.raises(InputError, match="it has 3 pages|no such file"):
            load_images(f"{path}#{number}")
    assert load_image(path).size == (20, 10)
    assert "scan.tif: 3 pages, only the first is read" in capsys.readouterr().err
    Image.new("L", (9, 9)).save(tmp_path / "one.tiff")
    assert len(load_images(str(tmp_path / "one.tiff"))) == 1 and not capsys.readouterr().err
    (tmp_path / "broken.tif").write_bytes((tmp_path / "scan.tif").read_bytes()[:60])
    with pytest.raises(InputError, match="broken.tif as an image"):
        load_images(str(tmp_path / "broken.tif"))


# ----------------------------------------------------------------------------------------------------------- settings

def test_the_tiles_a_model_was_trained_with_travel_with_it(pages, capsys, monkeypatch):
    (pages / "a.jsonl").write_text(jsonl({"images": ["b.png"], "query": f"What is {i}?", "response": "x"} for i in range(2)))
    run = pages / "run"
    flags = ("--tiny", "--data", pages / "a.jsonl", "--max-tiles", 1, "--steps", 1, "--accumulate", 1, "--eval-every", 0, "--out", run)
    status, _, err = call(train, capsys, monkeypatch, *flags)
    assert status == 0, err
    assert call(train, capsys, monkeypatch, "--export", run, pages / "official")[0] == 0
    assert call(train, capsys, monkeypatch, "--export", run, pages / "transformers", "--format", "transformers")[0] == 0
    for folder in (run, pages / "official"):
        assert json.loads((folder / "config.json").read_text())["max_dynamic_patch"] == 1
    assert json.loads((pages / "transformers" / "preprocessor_config.json").read_text())["max_patches"] == 1
    (run / "model.safetensors").unlink()                                # an interrupted run knows it too
    for flags, tiles in (((), [1]), (("--max-tiles", 2), [3])):
        for model in (run, pages / "official", run / "checkpoints" / "step-0000001.safetensors"):
            status, out, err = call(infer, capsys, monkeypatch, "--model", model, "--device", "cpu", "--max-new-tokens", 1, "--image", pages / "b.png", "--json",
                                    *flags, "What is 0?")
            assert status == 0 and json.loads(out)["tiles"] == tiles, (model, out, err)
    assert InternVL.from_pretrained("tiny", "cpu").chat().max_tiles == 12
    tiny = InternVL.from_pretrained("tiny", "cpu")
    tiny.save_pretrained(pages / "same")
    assert (pages / "same" / "config.json").read_bytes() == (TINY / "config.json").read_bytes()


def test_a_file_of_questions_without_answers_is_answered(pages, capsys, monkeypatch):
    rows = [{"image": f"{name}.png", "question": "What is the name?", "question_id": i} for name, i in (("a", 11), ("b", 12))]
    (pages / "test.jsonl").write_text(jsonl([*rows, rows[0] | {"question_id": 13, "answer": ""}]))
    status, out, err = call(infer, capsys, monkeypatch, "--tiny", "--evaluate", pages / "test.jsonl", "--predictions", pages / "p.json", "--max-new-tokens", 2)
    assert status == 0 and "3 questions, 0 of them with an answer to compare with" in out, err
    assert sorted(line["questionId"] for line in json.loads((pages / "p.json").read_text())) == [11, 12, 13]
    assert "the last turn is not an answer" in refuses(train, capsys, monkeypatch, "--tiny", "--data", pages / "test.jsonl", "--out", pages / "run")


# ------------------------------------------------------------------------------------------------------- where models are

def run_of(folder, model):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-0000001.safetensors").touch()
    (folder / "settings.json").write_text(json.dumps({"model": str(model), "seed": 0, "from_scratch": False, "train": "projector"}))
    return folder


def adapter_of(folder, base):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base, "r": 1, "lora_alpha": 2}))
    return folder


def test_a_message_about_a_base_model_says_which_file_names_it(tmp_path):
    adapter = adapter_of(tmp_path / "adapter", "/data/models/InternVL2-1B")
    told = f"{adapter}/adapter_config.json: base_model_name_or_path: /data/models/InternVL2-1B: not found; expected a model folder"
    with pytest.raises(InputError, match=f"^{told}"):
        resolve(str(adapter))
    with pytest.raises(InputError, match=f"^{tmp_path}/run/settings.json: model: {told}"):
        resolve(str(run_of(tmp_path / "run", adapter)))


def test_models_that_lead_back_to_themselves_are_refused(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    run_of(a, b), run_of(b, a), adapter_of(c, str(c))
    for start in (a, b, c):
        with pytest.raises(InputError, match="leads back to itself; expected another model"):
            resolve(str(start))
    for number, base in enumerate((5, ["x"], {"a": 1}, None, "")):
        with pytest.raises(InputError, match="base_model_name_or_path is .*; write the model of the adapter there"):
            resolve(str(adapter_of(tmp_path / f"base {number}", base)))


# ------------------------------------------------------------------------------------------------------------ odd input

def test_pipes_and_sockets_are_refused_and_never_waited_for(pages, capsys, monkeypatch):
    for name in ("model.safetensors", "tokenizer.json"):
        folder = pages / f"with {name}"
        folder.mkdir()
        for file in TINY.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        assert f"{name}: a pipe" in refuses(infer, capsys, monkeypatch, "--model", folder, "--device", "cpu", "What?")
    os.mkfifo(pages / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(pages / "socket"))
    for path in (pages / "pipe", pages / "socket", "/dev/zero"):
        assert "not a regular file" in refuses(infer, capsys, monkeypatch, "--tiny", "--questions", path)
        refuses(infer, capsys, monkeypatch, "--tiny", "--image", path, "What?")
        refuses(infer, capsys, monkeypatch, "--tiny", "--video", path, "What?")
        refuses(train, capsys, monkeypatch, "--tiny", "--data", path, "--out", pages / "run")
    (pages / "old").mkdir()
    os.mkfifo(pages / "old" / "settings.json")
    assert "not a run folder" in refuses(train, capsys, monkeypatch, "--resume", pages / "old")


@pytest.mark.parametrize("program, flags", [
    (train, ("--tiny", "--data")), (train, ("--tiny", "--out", "run", "--eval-data")), (infer, ("--tiny", "--evaluate")), (data, ("check",)),
    (train, ("--tiny", "--model")), (infer, ("--model",)), (infer, ("--tiny", "--folder")), (infer, ("--tiny", "--questions")), (train, ("--resume",))])
def test_a_name_that_is_too_long_is_one_line(pages, capsys, monkeypatch, program, flags):
    monkeypatch.chdir(pages)
    for name in ("x" * 5000, "y/" * 3000, "z" * 5000 + ".jsonl"):
        refuses(program, capsys, monkeypatch, *flags, name, *(["What?"] if flags[-1] in ("--model", "--folder") and program is infer else []))


def test_control_characters_from_outside_never_reach_the_terminal(pages, capsys, monkeypatch):
    odd = "no\x1b[31m\x9bsuch"
    (pages / "q.jsonl").write_text(jsonl([{"question": "What?", "images": [f"{odd}.png"], odd: 1}]))
    (pages / "d.jsonl").write_text(jsonl([QUERY | {"images": [f"{odd}.png"]}, QUERY | {f"image{odd}": "x"}, {"messages": [{"role": odd, "content": odd}]}]))
    (pages / f"{odd}.jsonl").write_text(jsonl([QUERY] * 2))
    for program, *flags in ((infer, "--tiny", "--image", f"{odd}.png", "What?"), (infer, "--tiny", "--questions", pages / "q.jsonl"), (infer, "--tiny", "--questions", odd),
                            (infer, f"--{odd}"), (data, "check", pages / "d.jsonl", pages / f"{odd}.jsonl"), (train, "--tiny", "--data", pages / "d.jsonl"),
                            (train, "--tiny", "--data", odd), (infer, "--model", odd)):
        _, out, err = call(program, capsys, monkeypatch, *flags)
        assert not {"\x1b", "\x9b"} & set(out + err) and "no\N{REPLACEMENT CHARACTER}" in out + err or "\\u001b" in out, (flags, out, err)


@pytest.mark.parametrize("program, flag", [(train, "--" + name) for name in (
    "batch-pages", "accumulate", "lora-rank", "look-ahead", "steps", "eval-pages", "workers", "max-length", "keep")] + [(infer, "--frames"), (infer, "--max-new-tokens"), (infer, "--batch")])
def test_numbers_that_no_machine_can_do_are_refused(program, flag, capsys, monkeypatch):
    for number in (10 ** 9, 2 ** 63 - 1, 10 ** 30):
        assert f"argument {flag}" in refuses(program, capsys, monkeypatch, "--tiny", flag, number)


def test_a_temperature_near_zero_takes_the_likeliest_token(tiny, pages):
    first, second = (tiny.chat(temperature=t, max_new_tokens=4).ask("What?", str(pages / "a.png")) for t in (0.0, 1e-40))
    assert first == second


# ------------------------------------------------------------------------------------------------- held out and validated on

def test_pages_with_an_image_of_the_validation_data_are_left_out_and_counted(pages, capsys, monkeypatch):
    for i in range(12):
        draw_page(random.Random(i), shape=SHAPES[0])[0].save(pages / f"{i}.png")
    (pages / "copy.png").write_bytes((pages / "3.png").read_bytes())
    (pages / "t.jsonl").write_text(jsonl({"query": "What?", "response": "x", "images": [f"{i}.png"]} for i in range(12)))
    (pages / "v.jsonl").write_text(jsonl({"query": "Who?", "response": "x", "images": [f"{i}.png"]} for i in ("copy", 5)))
    flags = ("--tiny", "--data", pages / "t.jsonl", "--eval-data", pages / "v.jsonl", "--epochs", 1, "--accumulate", 3, "--out")
    monkeypatch.setattr(train, "evaluate", lambda *_: ({"val_loss": 1.0}, [{"page": "1", "question": "?", "answer": "", "expected": ["a"]}]))
    steps = []
    monkeypatch.setattr(train, "check_step", lambda step, loss, norm, examples, *_: steps.extend(example.page.images[0] for example in examples))
    status, out, err = call(train, capsys, monkeypatch, *flags, pages / "run", "--steps", 99)
    assert status == 0 and ", 2 pages with an image of --eval-data; peak memory" in out, err
    assert sorted(os.path.basename(path) for path in steps) == sorted(f"{i}.png" for i in range(12) if i not in (3, 5))
    status, out, _ = call(data, capsys, monkeypatch, "check", pages / "t.jsonl", "--eval-data", pages / "v.jsonl")
    assert status == 1 and out.count("v.jsonl: validation: ") == 2 and f"its image is in {pages / 't.jsonl'} too" in out
    same = flags[:4] + (pages / "t.jsonl",) + flags[5:]
    assert "12 of 12 pages cannot be used" in refuses(train, capsys, monkeypatch, *same, pages / "all", "--steps", 99)


def test_check_lists_images_that_are_in_two_splits(tmp_path, capsys, monkeypatch):
    write_split(tmp_path, "train", mixed_rows(4), 1)
    write_split(tmp_path, "validation", mixed_rows(2, first=100), 1)
    assert call(data, capsys, monkeypatch, "check", tmp_path)[0] == 0
    write_split(tmp_path, "validation", mixed_rows(2, first=100) + [row | {"docId": 77} for row in mixed_rows(1)], 1)
    status, out, _ = call(data, capsys, monkeypatch, "check", tmp_path)
    assert status == 1 and f"{tmp_path}: validation: 77/1: its image is in {tmp_path} too (train)" in out
    assert "synthetic: drawn without an end" in refuses(data, capsys, monkeypatch, "check", "synthetic")


def test_evaluating_the_validation_split_of_a_file_tells_when_a_run_held_nothing_out(pages, capsys, monkeypatch):
    for i in range(4):
        draw_page(random.Random(i), shape=SHAPES[0])[0].save(pages / f"{i}.png")
    (pages / "t.jsonl").write_text(jsonl({"query": "What?", "response": "x", "images": [f"{i}.png"]} for i in range(4)))
    run, flags = pages / "run", ("--evaluate", pages / "t.jsonl", "--device", "cpu", "--max-new-tokens", 1, "--model")
    assert call(train, capsys, monkeypatch, "--tiny", "--data", pages / "t.jsonl", "--eval-every", 0, "--steps", 1, "--accumulate", 1, "--out", run)[0] == 0
    told = "held no pages out: these may have been trained on"
    assert told in call(infer, capsys, monkeypatch, *flags, run, "--split", "validation")[2]
    assert told not in call(infer, capsys, monkeypatch, *flags, run)[2] + call(infer, capsys, monkeypatch, *flags, "tiny", "--split", "validation")[2]
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"eval_every": 5}))
    assert told not in call(infer, capsys, monkeypatch, *flags, run, "--split", "validation")[2]
    assert "--split validaton; a file has train and validation" in refuses(infer, capsys, monkeypatch, *flags, run, "--split", "validaton")


# -------------------------------------------------------------------------------------------------------------- run folders

@pytest.mark.parametrize("content", [b"garbage\n", b"\n", b"[1]\n", b"5\n", b"\xff\xfe\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"[" * 99_999 + b"\n"])
def test_a_damaged_metrics_file_is_named(tmp_path, content):
    from extras.run_folder import read_lines
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "train_loss": 2.0}\n' + content)
    with pytest.raises(InputError, match="metrics.jsonl: damaged .*; repair it, or remove it"):
        read_lines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("change", [{"schedule": "x"}, {"data": None}, {"data": 5}, {"workers": None}, {"max_tiles": None}, {"max_tiles": 10 ** 9}, {"warmup": None},
                                    {"dtype": "5"}, {"shuffle": "yes"}, {"shuffle": None}, {"eval_every": -1}, {"lr": "x"}, {"accumulate": 1.5}, {"recipe": "x"}])
def test_damaged_settings_are_one_line(tmp_path, capsys, monkeypatch, change):
    kept = {"model": "tiny", "seed": 0, "from_scratch": False, "train": "projector", "data": "synthetic:1", "steps": 1, "schedule": "cosine", "device": "cpu",
            "run_id": "0"}
    (tmp_path / "settings.json").write_text(json.dumps(kept | change))
    [key] = change
    line = refuses(train, capsys, monkeypatch, "--resume", tmp_path)
    assert key in line or "--" + key.replace("_", "-") in line or "5: not found" in line


def test_an_example_that_cannot_be_handed_over_ends_the_run_and_nothing_waits(pages, tiny):
    """As where /dev/shm is full: a worker's queue would drop it, and the main process wait for it."""
    class Full(PageDataset):
        def light(self, example):
            return lambda: None                                         # cannot be pickled, as tensors without memory cannot
    from data import load_examples
    (pages / "a.jsonl").write_text(jsonl([QUERY | {"images": ["a.png"]}]))
    found = group_rows_into_pages(open_rows(str(pages / "a.jsonl"), "train", hold_out=False))
    with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
        list(load_examples(found, Full(tiny), workers=1))
    assert torch.utils.data.get_worker_info() is None
