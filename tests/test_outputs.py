"""Nothing that is not ours is changed, one process writes at a time, and a run knows what it was made of."""
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import call, data, infer, refuses, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_data import page_rows, png, write_dataset

from data import PageDataset
from extras import outputs, plots, run_folder
from extras.export import export
from extras.outputs import lock, new_file, new_folder
from model import InputError, InternVL, images
from model.checkpoint import TINY, checkpoints, fingerprint, latest_checkpoint
from model.names import PARTS
from model.tiny.pages import draw_page

NEW = "--tiny", "--data", "synthetic:1", "--accumulate", 1, "--steps", 2, "--eval-every", 0, "--save-every", 1


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "draw_curve", lambda *_: None)           # they take most of the time
    monkeypatch.setattr(plots, "draw_samples", lambda *_: None)


@pytest.fixture
def fit(tmp_path, capsys, monkeypatch):
    """Runs train.py on the embedded model; returns the run folder."""
    def run(name, *flags):
        status, _, err = call(train, capsys, monkeypatch, *NEW, "--out", tmp_path / name, *flags)
        assert status == 0, err
        return tmp_path / name
    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """The line with which a command is refused."""
    return lambda program, *flags: refuses(program, capsys, monkeypatch, *flags)


@pytest.fixture
def base(tmp_path):
    """The embedded model as a folder."""
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path / "base"


def annotations(path, pages, question=None):
    """An annotation file of drawn pages, with their images in the same folder."""
    with open(path, "w") as file:
        for row in [row for page in pages for row in page_rows(page, questions=1)]:
            (path.parent / f"{row['docId']}.png").write_bytes(row["image"]["bytes"])
            file.write(json.dumps({"question": question or row["question"], "answer": row["answers"][0], "images": [f"{row['docId']}.png"]}) + "\n")
    return path


def change(model, name="mlp1.1.weight"):
    """Change a weight of a model folder or a run."""
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


# --------------------------------------------------------------------------------------------------------- folders, files

NAMES = ("settings.json", "metrics.jsonl", "samples.jsonl", "samples.md", "skipped.jsonl", "curve.png", "samples.png", "page.png", "config.json",
         "model.safetensors", "tokenizer.json", "README.md", ".lock", "settings.json.part", "model.safetensors.part", "film.mkv.part", ".tmp_notes",
         "checkpoints/step-0000001.safetensors", "checkpoints/step-0000002.safetensors.part", "show-0.png", "show.png", "attend.png", "page.html",
         "answers.jsonl", "answers.jsonl.lock", "answers.jsonl.part", "predictions.json", "predictions.json.scores.json", "predictions.scores.json",
         "predictions.json.lock", "predictions.json.part", "deep/archive.part", "deep/.tmp_notes", "adapter_config.json", "adapter_model.safetensors")


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def strangers(tmp_path):
    """A folder full of files that are not ours, under names like ours."""
    for name in NAMES:
        path = tmp_path / "strangers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}, without a line break at its end")
    return tmp_path / "strangers"


def test_no_output_flag_of_train_changes_a_strangers_folder(strangers, fit, refused, tmp_path):
    run, before = fit("run"), snapshot(strangers)
    (strangers / "deep" / "link").symlink_to(strangers / "settings.json")
    before = snapshot(strangers)
    for folder in (strangers, strangers / "deep", strangers / "settings.json", strangers / "deep" / "link"):
        assert "choose" in refused(train, *NEW, "--out", folder)
        assert "choose" in refused(train, "--export", run, folder)
        assert "choose" in refused(train, "--export", run, folder, "--format", "transformers")
        refused(train, "--resume", folder)
    assert snapshot(strangers) == before
    for name in NAMES:                                                  # each alone in its folder
        alone = tmp_path / "alone" / name
        alone.parent.mkdir(parents=True)
        alone.write_text("mine")
        assert f"holds {name.split('/')[0]} already" in refused(train, *NEW, "--out", tmp_path / "alone")
        assert snapshot(tmp_path / "alone")[name] == b"mine"
        shutil.rmtree(tmp_path / "alone")


def test_a_strangers_files_in_a_run_folder_stay(fit, strangers, capsys, monkeypatch):
    run = fit("run")
    ours, kept = snapshot(run), {}
    for name in NAMES:
        if name not in ours and name != ".lock":
            (run / name).parent.mkdir(exist_ok=True)
            kept[name] = shutil.copyfile(strangers / name, run / name).read_bytes()
    status, _, err = call(train, capsys, monkeypatch, "--resume", run, "--steps", 3, "--keep", 1)
    kept.pop("skipped.jsonl"), kept.pop("samples.jsonl")                # a run's own names
    assert status == 0 and {name: (run / name).read_bytes() for name in kept} == kept, err


def test_no_output_flag_of_infer_changes_a_strangers_folder(strangers, refused, tmp_path):
    rows = annotations(tmp_path / "rows.jsonl", [0])
    one = "--tiny", "--max-new-tokens", 1, "--image", tmp_path / "0.png", "What?"
    flags = {"--show": one, "--attend": one, "--explain": one, "--out": ("--tiny", "--questions", rows), "--predictions": ("--tiny", "--evaluate", rows)}
    before = snapshot(strangers)
    for flag, others in flags.items():
        for name in (*NAMES[::4], "answers.jsonl", "predictions.json", "deep", "checkpoints"):
            refused(infer, *others, flag, strangers / name)
            if (strangers / name).is_dir():
                assert "no regular file" in refused(infer, *others, flag, strangers / name, "--overwrite")
        for name in (tmp_path / "0.png", rows) if rows in others else (tmp_path / "0.png",):
            assert "also an input" in refused(infer, *others, flag, name, "--overwrite")
    assert "another output" in refused(infer, *one, "--show", tmp_path / "new.png", "--attend", tmp_path / "new.png", "--overwrite")
    assert snapshot(strangers) == before


def test_data_show_writes_a_new_file_or_a_free_name(strangers, tmp_path, refused, capsys, monkeypatch):
    rows = annotations(tmp_path / "rows.jsonl", [0])
    os.link(rows, tmp_path / "link.png")
    monkeypatch.chdir(strangers)
    before = snapshot(strangers)
    for place, reason in ((strangers / "show.png", "exists"), (strangers / "deep", "no regular file"), (tmp_path / "none" / "x.png", "no folder")):
        assert reason in refused(data, "show", rows, 0, "--out", place)
    for place in (tmp_path / "0.png", rows, tmp_path / "link.png", "deep/../../0.png"):
        assert "also an input" in refused(data, "show", rows, 0, "--overwrite", "--out", place)
    assert snapshot(strangers) == before
    assert call(data, capsys, monkeypatch, "show", rows, 0)[0] == 0
    assert snapshot(strangers).keys() - before.keys() == {"show-0-2.png"}
    (strangers / "show-0-2.png").unlink()
    assert snapshot(strangers) == before
    assert call(data, capsys, monkeypatch, "show", rows, 0, "--overwrite", "--out", "show.png")[0] == 0
    assert Path("show.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_file_is_no_input_and_no_other_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pdf", "b"):
        Path(name).write_text("x")
    Path("link").symlink_to("a.pdf")
    for path, inputs in (("a.pdf", ["./a.pdf#2"]), ("link", ["a.pdf"]), ("new", ["b", tmp_path / "new"]), ("../" + tmp_path.name + "/new", ["new"])):
        with pytest.raises(InputError, match="also an input"):
            new_file(path, True, inputs)
    assert new_file("new", inputs=["http://x/new", "-", "b"]) == Path("new") and new_file("b", resume=True) == new_file("b", overwrite=True)


def test_a_command_that_fails_leaves_no_folder(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(train, *NEW, "--model", "nowhere")
    refused(train, *NEW, "--model", "nowhere", "--out", "run")
    refused(train, "--export", "nowhere", "export")
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
    (tmp_path / "mine").mkdir()
    refused(train, *NEW, "--model", "nowhere", "--out", "mine")
    assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())


# --------------------------------------------------------------------------------------------------------------- processes

def other_process(action):
    """Run `action` in a fork -> its process, when it has printed a line."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        try:
            action(lambda: os.write(1, b"ready\n"))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        lines.readline()
    return child


def hold(place):
    def action(ready):
        with lock(place):
            ready()
            time.sleep(60)
    return other_process(action)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_lock_of_a_killed_process_is_gone_at_once_though_its_workers_live(tmp_path, kind):
    place = tmp_path / kind
    place.mkdir() if kind == "folder" else None

    def action(ready):
        with lock(place):
            worker = os.fork()                                          # as a DataLoader's: it inherits the open file
            if worker == 0:
                time.sleep(60)
            (tmp_path / "worker").write_text(str(worker))
            ready()
            time.sleep(60)
    child = other_process(action)
    worker = int((tmp_path / "worker").read_text())
    with pytest.raises(InputError, match=f"process {child} is writing there"):
        with lock(place):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.kill(worker, 0)                                              # it lives
    with lock(place):
        held = outputs.LOCK if kind == "folder" else place.name + outputs.LOCK
        assert held in {path.name for path in tmp_path.rglob("*")}
    os.kill(worker, signal.SIGKILL)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_second_run_in_a_folder_is_refused(fit, refused):
    run = fit("run")
    before = snapshot(run)
    child = hold(run)
    assert f"process {child} is writing there; wait until it has ended" in refused(train, "--resume", run, "--steps", 9)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert snapshot(run).keys() - before.keys() == {".lock"}


def test_what_a_run_killed_before_its_settings_leaves_behind_counts_as_empty(fit, tmp_path):
    (tmp_path / "run").mkdir()
    child = hold(tmp_path / "run")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / "run" / "settings.json.part").mkdir()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_file()] == [".lock"]
    assert list(checkpoints(fit("run"))) == [1, 2]


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    place, find, late = tmp_path / "20260101-120000", outputs.free_name, iter((True, True, False))
    monkeypatch.setattr(outputs, "free_name", lambda path: Path(path) if next(late) else find(path))
    with new_folder(place, free=True) as first, new_folder(place, free=True) as second:     # for both the name seemed free
        assert first == place and second == tmp_path / "20260101-120000-2" and len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_without_locks_one_line_says_so(tmp_path, fit, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    status, _, err = call(train, capsys, monkeypatch, *NEW, "--out", tmp_path / "run")
    assert status == 0 and err.count("not locked, for there are no locks here") == 1


# ------------------------------------------------------------------------------------------------- what a run is made of

def test_a_fingerprint_is_of_weights_configuration_and_tokenizer(base):
    same = fingerprint(base)
    assert same == fingerprint(TINY) == InternVL.from_pretrained(base, "cpu").fingerprint
    assert fingerprint(base, without=("llm", "vision")) == same != fingerprint(base, without=PARTS)
    change(base, "language_model.model.norm.weight")
    other = fingerprint(base)
    (base / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text() + " ")
    assert len({same, other, fingerprint(base)}) == 3
    (base / "model.safetensors").write_bytes(b"damaged")
    assert fingerprint(base) not in (same, other)


def test_a_run_whose_base_changed_is_refused_by_all_who_read_it(base, fit, refused, tmp_path, capsys, monkeypatch):
    run = fit("run", "--model", base, "--train", "lora")
    (run / "model.safetensors").unlink()                                # not finished: it needs its base
    same = InternVL.from_pretrained(run, "cpu").fingerprint
    change(base)
    line = f"its base model {base} changed since it was trained; bring that one back, or use this one with --allow-changed"
    for name in (run, latest_checkpoint(run)):
        with pytest.raises(InputError, match="changed since it was trained"):
            InternVL.from_pretrained(name, "cpu")
        for layout in ("official", "transformers", "peft"):
            assert line in refused(train, "--export", name, tmp_path / "export", "--format", layout)
    (tmp_path / "page.png").write_bytes(page_rows(0)[0]["image"]["bytes"])
    assert line in refused(infer, "--model", run, "--device", "cpu", "--image", tmp_path / "page.png", "What?")
    assert "the base model" in refused(train, "--resume", run, "--steps", 3)
    assert InternVL.from_pretrained(run, "cpu", allow_changed=True).fingerprint != same
    assert call(train, capsys, monkeypatch, "--export", run, tmp_path / "export", "--allow-changed")[0] == 0
    status, _, err = call(train, capsys, monkeypatch, "--resume", run, "--steps", 3, "--allow-changed")
    assert status == 0 and "the base model" in err
    change(base)                                                        # finished: it carries its whole model
    export(str(run), tmp_path / "again", "official")
    assert InternVL.from_pretrained(run, "cpu").fingerprint


def test_a_base_under_drawn_parts_is_compared_whoever_skips_parts(base, fit, refused):
    run, drawn = fit("run", "--model", base, "--init", "projector"), fit("drawn", "--model", base, "--from-scratch")
    for folder in (run, drawn):
        (folder / "model.safetensors").unlink()
        for init in ((), ("vision",), PARTS):
            InternVL.from_pretrained(folder, "cpu", init=init)
    change(base)
    InternVL.from_pretrained(drawn, "cpu")                              # reads no weights of its base
    with pytest.raises(InputError, match="changed since it was trained"):
        InternVL.from_pretrained(run, "cpu", init=("vision", "llm"))
    assert "the base model" in refused(train, "--resume", run, "--steps", 3)
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    assert "the base model" in refused(train, "--resume", drawn, "--steps", 3)


def test_a_base_that_is_a_run_and_went_on_is_noticed(fit, refused, capsys, monkeypatch):
    first = fit("first")
    second = fit("second", "--model", first)
    (second / "model.safetensors").unlink()
    InternVL.from_pretrained(second, "cpu")
    assert call(train, capsys, monkeypatch, "--resume", first, "--steps", 3, "--lr", "0.5")[0] == 0
    with pytest.raises(InputError, match="changed since it was trained"):
        InternVL.from_pretrained(second, "cpu")
    assert "the base model" in refused(train, "--resume", second, "--steps", 3)


def test_another_base_is_refused_and_the_same_one_elsewhere_is_not(base, fit, refused, tmp_path, capsys, monkeypatch):
    run = fit("run", "--model", base)
    base.rename(tmp_path / "moved")
    assert call(train, capsys, monkeypatch, "--resume", run, "--model", tmp_path / "moved", "--steps", 3)[0] == 0
    InternVL.from_scratch("tiny", 1, "cpu").save_pretrained(tmp_path / "other")
    assert "the base model" in refused(train, "--resume", run, "--model", tmp_path / "other", "--steps", 4)


def test_other_data_is_refused(fit, refused, tmp_path, capsys, monkeypatch):
    rows, other = annotations(tmp_path / "a.jsonl", range(6)), annotations(tmp_path / "b.jsonl", range(6), "What?")
    (tmp_path / "mix.json").write_text(json.dumps({"a": {"annotation": "a.jsonl", "root": "", "repeat_time": 1}}))
    run, mixed = fit("run", "--data", rows), fit("mixed", "--data", f"{tmp_path / 'mix.json'}=2,{rows}")
    drawn = fit("drawn", "--domain", "plain")
    copy = shutil.copyfile(rows, tmp_path / "copy.jsonl")
    assert call(train, capsys, monkeypatch, "--resume", run, "--data", copy, "--steps", 3)[0] == 0
    assert "the data" in refused(train, "--resume", run, "--data", other, "--steps", 4)
    assert "the data" in refused(train, "--resume", drawn, "--domain", "negative", "--steps", 4)
    assert "the data" in refused(train, "--resume", mixed, "--data", f"{tmp_path / 'mix.json'}=3,{rows}", "--steps", 4)
    shutil.copyfile(other, rows)
    assert "the data" in refused(train, "--resume", mixed, "--steps", 4)
    assert "the data" in refused(train, "--resume", run, "--data", rows, "--steps", 4)
    status, _, err = call(train, capsys, monkeypatch, "--resume", run, "--data", rows, "--steps", 4, "--allow-changed")
    assert status == 0 and "the data" in err


def test_other_parquet_files_are_refused(fit, refused, tmp_path, capsys, monkeypatch):
    folder = write_dataset(tmp_path / "data", train_pages=4, validation_pages=2)
    run = fit("run", "--data", folder)
    shutil.move(folder, tmp_path / "moved")
    assert call(train, capsys, monkeypatch, "--resume", run, "--data", tmp_path / "moved", "--steps", 3)[0] == 0
    write_dataset(folder, train_pages=5, validation_pages=2)
    assert "the data" in refused(train, "--resume", run, "--data", folder, "--steps", 4)


def test_a_checkpoint_of_another_run_is_refused(fit, refused):
    run, other = fit("run"), fit("other", "--seed", 1, "--steps", 3)
    shutil.copy(latest_checkpoint(other), run / "checkpoints")
    assert "step-0000003.safetensors: a checkpoint of another run" in refused(train, "--resume", run, "--steps", 5)
    with pytest.raises(InputError, match="a checkpoint of another run"):
        InternVL.from_pretrained(run / "checkpoints" / "step-0000003.safetensors", "cpu")
    shutil.copy(run / "checkpoints" / "step-0000001.safetensors", run / "checkpoints" / "step-0000003.safetensors")
    assert "step-0000003.safetensors: holds step 1" in refused(train, "--resume", run, "--steps", 5)


def test_a_checkpoint_is_known_by_its_exact_name(fit, tmp_path, capsys, monkeypatch):
    run = fit("run")
    content, copies = latest_checkpoint(run).read_bytes(), ("step-0000002-good", "step-best", "step-0000002 (copy)", "step-00000009", "step-9", "Step-0000009")
    for name in copies:
        (run / "checkpoints" / f"{name}.safetensors").write_bytes(content)
    assert call(train, capsys, monkeypatch, "--resume", run, "--steps", 4, "--keep", 1)[0] == 0
    assert {path.stem for path in (run / "checkpoints").iterdir()} == {*copies, "step-0000004"}
    for step in (9_999_999, 10_000_000):
        (run / "checkpoints" / f"step-{step}.safetensors").touch()
    assert list(checkpoints(run)) == [4, 9_999_999, 10_000_000] and latest_checkpoint(run).name == "step-10000000.safetensors"


def test_only_checkpoints_of_the_run_are_removed(fit, capsys, monkeypatch):
    run, other = fit("run", "--keep", 1), fit("other", "--seed", 1)
    shutil.copy(other / "checkpoints" / "step-0000001.safetensors", run / "checkpoints")
    assert call(train, capsys, monkeypatch, "--resume", run, "--steps", 4)[0] == 0
    assert list(checkpoints(run)) == [1, 4]


def test_a_run_of_an_earlier_version_is_read_and_not_resumed(fit, refused, capsys):
    run = fit("run")
    settings = json.loads((run / "settings.json").read_text())
    for key in ("run_id", *run_folder.MADE_OF):
        settings.pop(key, None)
    (run / "settings.json").write_text(json.dumps(settings))
    capsys.readouterr()
    InternVL.from_pretrained(run, "cpu")
    assert not capsys.readouterr().err
    for path in checkpoints(run).values():
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = {key: value for key, value in file.metadata().items() if key != "run_id"}
        save_file(tensors, path, metadata)
    (run / "model.safetensors").unlink()
    InternVL.from_pretrained(run, "cpu")
    assert capsys.readouterr().err.count("\n") == 1
    assert "a run of an earlier version, without fingerprints; begin a new one with --model" in refused(train, "--resume", run, "--steps", 3)


def test_the_card_of_a_run_tells_the_score_of_the_step_exported(fit, tmp_path, capsys, monkeypatch):
    run = fit("run", "--steps", 2, "--eval-every", 1, "--eval-pages", 1)
    checkpoints(run)[2].unlink()                                        # as if killed between validation and checkpoint
    (run / "model.safetensors").unlink()
    (run / "curve.png").touch()
    assert call(train, capsys, monkeypatch, "--export", run, tmp_path / "export")[0] == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "\n| 1 |" in card and "\n| 2 |" not in card


# -------------------------------------------------------------------------------------------------------------- validation

def test_validation_pages_are_read_once_and_are_the_same_every_time(fit, tmp_path, monkeypatch):
    rows, fetched, read = tmp_path / "v.jsonl", [], []
    rows.write_text("".join(json.dumps({"question": "What?", "answer": "x", "images": [f"http://example.com/{i}.png"]}) + "\n" for i in range(4)))

    def fetch(address, *_):
        fetched.append(address)
        if fetched.count(address) > 1:
            raise InputError(f"{address}: cannot be fetched (503)")
        return png(draw_page(random.Random(address))[0])
    for module in (images, run_folder):
        monkeypatch.setattr(module, "fetch", fetch)
    monkeypatch.setattr(PageDataset, "__getitem__", lambda self, page, do=PageDataset.__getitem__: read.append(page.images) or do(self, page))
    run = fit("run", "--eval-data", rows, "--eval-every", 1, "--eval-pages", 4, "--lr", 0)
    losses = [json.loads(line).get("val_loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(fetched) == len(set(fetched)) == 4 and len({loss for loss in losses if loss}) == 1 and len([loss for loss in losses if loss]) == 3
    assert len(json.loads((run / "settings.json").read_text())["validation_pages"].split(",")) == 4


def test_validation_pages_that_are_missing_or_others_stop_a_resumed_run(fit, refused, tmp_path, capsys, monkeypatch):
    rows = annotations(tmp_path / "v.jsonl", range(3))
    run = fit("run", "--eval-data", rows, "--eval-every", 1, "--eval-pages", 2)
    content = (tmp_path / "1.png").read_bytes()
    assert call(train, capsys, monkeypatch, "--resume", run, "--steps", 3)[0] == 0
    (tmp_path / "1.png").unlink()
    assert "the set of validation pages is not what the run began with" in refused(train, "--resume", run, "--steps", 4)
    shutil.copyfile(tmp_path / "2.png", tmp_path / "1.png")
    assert "the set of validation pages is not what the run began with" in refused(train, "--resume", run, "--steps", 4)
    (tmp_path / "1.png").write_bytes(content)
    assert "the set of validation pages is not what the run began with" in refused(train, "--resume", run, "--steps", 4, "--eval-pages", 3)
    assert "the validation data" in refused(train, "--resume", run, "--steps", 4, "--eval-data", annotations(tmp_path / "w.jsonl", range(4)))
    status, _, err = call(train, capsys, monkeypatch, "--resume", run, "--steps", 4, "--eval-pages", 3, "--allow-changed")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert status == 0 and "validation begins anew" in err and [line["step"] for line in lines if "val_loss" in line] == [3, 4]
    assert [line["step"] for line in lines if "val_loss" not in line] == [1, 2, 3, 4]
