"""Crash safety: kills, signals, a bad network, a full disk, hostile files. The README's promises about it, one by one."""
import argparse
import collections
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import chain, islice
from multiprocessing import active_children

import pytest
import torch
from commands import at_call, call, refuses, train
from conftest import ROOT
from reference import page_prompt
from safetensors.torch import load_file
from small_data import mixed_rows, write_split

import data
from data import MOST_QUESTIONS, page_blocks
from extras import evaluate, plots, run_folder
from extras.run_folder import restore_checkpoint, save_checkpoint
from extras.sources import open_rows
from model import InputError, InternVL
from model.checkpoint import TINY, latest_checkpoint, run_of
from model.images import load_image
from model.prompt import IGNORE_INDEX
from model.tiling import choose_grid, tile_page
from model.tiny import pages

TIMES = ("questions_per_second", "data_wait", "peak_gb")


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(a, b):
    """Two runs ended with the same metrics, samples and weights."""
    assert metrics(a) == metrics(b)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert not (a / "samples.md").exists() or (a / "samples.md").read_text() == (b / "samples.md").read_text()


def program(name, *arguments, timeout=500):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / name), *map(str, arguments)], capture_output=True, text=True,
                          timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def fit(tmp_path, capsys, monkeypatch):
    """Runs train.py on the embedded model and drawn pages; returns (exit status, standard error, run folder)."""
    monkeypatch.setattr(plots, "draw_curve", lambda *_: None)           # pictures take most of the time
    monkeypatch.setattr(plots, "draw_samples", lambda *_: None)

    def run(name, *flags):
        folder = tmp_path / name
        place = ("--resume", folder) if (folder / "settings.json").exists() else (
            "--tiny", "--data", "synthetic:1", "--steps", 6, "--batch-pages", 1, "--accumulate", 2, "--eval-every", 0, "--save-every", 0, "--out", folder)
        status, _, err = call(train, capsys, monkeypatch, *place, *flags)
        return status, [line for line in err.splitlines() if line.strip() and "%|" not in line], folder
    return run


def fail(error):
    raise error


# ----------------------------------------------------------------------------------------------------------------- resume

def test_25_kills_change_nothing(tmp_path):
    write_split(tmp_path / "data", "train", mixed_rows(40), 4)
    write_split(tmp_path / "data", "validation", mixed_rows(2, first=1000), 1)
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "killed.py"), tmp_path / "data", tmp_path, "25"],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    moments = json.loads(done.stdout)
    assert len(moments) == 25 and {phase for phase, _ in moments} == {"check_step", "evaluate", "save_checkpoint", "main"}
    assert sum(orphans for _, orphans in moments) > 5                   # resumed while workers of the killed process lived
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 56 + 20
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 3     # --keep 2 and the best; no half-written file


class Numbers:
    """As many pages of one row as are asked for, numbered like drawn ones."""

    def numbered(self, start=0):
        return ((8 * page, {"docId": page, "ucsf_document_page_no": "1", "question": "?", "answers": ["a"], "image": None})
                for page in iter(range(start // 8, 10 ** 9)))


def test_going_on_at_page_50000_draws_no_page_before_it(fit, monkeypatch):
    before, *after = islice(chain.from_iterable(page_blocks(Numbers(), seed=0)), 49_999, 50_004)
    _, _, run = fit("run", "--steps", 1, "--save-every", 1)
    model = InternVL.from_pretrained("tiny", "cpu")
    model.projector.requires_grad_(True)
    optimizer = train.make_optimizer(model, argparse.Namespace(lr=1.0, weight_decay=0, beta2=0.999, device="cpu"))
    path = latest_checkpoint(run)
    state = restore_checkpoint(path, model, optimizer) | dict(zip(("epoch", "block", "index"), before.resume))
    save_checkpoint(path, model, optimizer, state, run_of(path))
    (run / "model.safetensors").unlink()
    drawn, used = [], []
    monkeypatch.setattr(pages.DrawnFile, "__bytes__", lambda file, draw=pages.DrawnFile.__bytes__: drawn.append(file.page) or draw(file))
    monkeypatch.setattr(train, "check_step", lambda step, loss, norm, examples, *_:
                        used.extend(int(e.page.name.split("/")[0]) for e in examples))
    status, err, _ = fit("run", "--steps", 3)
    assert status == 0, err
    assert used == [int(page.name.split("/")[0]) for page in after] == drawn


def test_the_order_of_pages_goes_on_from_any_page_whatever_the_rows():
    for seed in range(80):
        draw = random.Random(seed)
        documents = draw.randint(1, 80)
        rows = [{"docId": draw.randrange(documents) if draw.random() < 0.3 else i // 4, "ucsf_document_page_no": "1",
                 "question": draw.choice((str(i), "", "long " * 2_000)), "answers": ["a"], "image": None} for i in range(draw.randint(1, 300))]
        rows += [rows[0]] * draw.choice((0, 0, 3 * MOST_QUESTIONS))
        settings = dict(epochs=2, seed=seed, block_rows=draw.choice((1, 3, 10, 50, 2048)), shuffle=draw.random() < 0.7)
        whole = list(chain.from_iterable(page_blocks(rows, **settings)))
        for epoch in (0, 1):                                            # every row is in one page
            assert sum(page.rows for page in whole if page.epoch == epoch) == len(rows)
        assert all(len(page.questions) <= MOST_QUESTIONS for page in whole)
        for place in draw.sample(range(len(whole)), min(4, len(whole))):
            page = whole[place]
            assert list(chain.from_iterable(page_blocks(rows, **settings, start=page.resume))) == whole[place + 1:]


def test_row_groups_before_the_start_are_not_read(tmp_path, monkeypatch):
    from pyarrow import parquet
    rows = mixed_rows(30)
    write_split(tmp_path, "train", rows, shards=4)
    read = []
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self, *a, do=parquet.ParquetFile.iter_batches, **more: read.append(self) or do(self, *a, **more))
    stream = open_rows(str(tmp_path), "train")
    assert [row for _, row in stream.numbered(len(rows) - 5)] == list(open_rows(str(tmp_path), "train"))[-5:]
    assert len(read) == 1 + 4


# -------------------------------------------------------------------------------------------------------------- interruptions

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits(fit, monkeypatch, number):
    flags, handler = ("--eval-every", 3, "--eval-pages", 2), signal.getsignal(number)
    _, _, whole = fit("whole", *flags)
    with monkeypatch.context() as patch:
        at_call(patch.setattr, train, "check_step", 3, lambda: os.kill(os.getpid(), number))
        status, err, run = fit("run", *flags)
    assert status == 128 + number and len(err) == 2 and "finishing this step, then saving the run" in err[0]
    assert err[1] == f"stopped after step 3; to continue: python train.py --resume {run}"
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3] and latest_checkpoint(run).name == "step-0000003.safetensors"
    assert signal.getsignal(number) == handler
    assert fit("run")[0] == 0
    assert_same(whole, run)


def test_a_signal_while_waiting_for_pages_or_validating_saves_and_exits(fit, monkeypatch):
    flags = "--eval-every", 3, "--eval-pages", 2
    _, _, whole = fit("whole", *flags)
    for owner, name, count in ((data, "tile_page", 7), (evaluate, "generate", 3)):
        with monkeypatch.context() as patch:
            at_call(patch.setattr, owner, name, count, lambda: os.kill(os.getpid(), signal.SIGTERM))
            status, err, run = fit("run", *flags)
        assert status == 143 and "saving the run" in err[0] and "to continue: python train.py --resume" in err[1], err
    assert fit("run")[0] == 0
    assert_same(whole, run)


def test_a_signal_while_saving_waits_for_the_checkpoint(fit, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch.setattr, run_folder, "save_checkpoint", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        status, err, run = fit("run", "--save-every", 2)
    assert status == 143 and latest_checkpoint(run).name == "step-0000002.safetensors", err


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    code = ("import os, signal, sys, train; from extras.cli import run\n"
            "train.check_step = lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]\n"
            f"sys.argv = ['train.py', '--tiny', '--model', {str(TINY)!r}, '--steps', '2', '--eval-every', '0', '--out', {str(tmp_path / 'run')!r}]; run(train.main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM and not (tmp_path / "run" / "checkpoints").exists(), done.stderr


# ---------------------------------------------------------------------------------------------------------------- bad numbers

def test_a_loss_that_is_no_number_leaves_the_state_of_the_step_before(fit, monkeypatch):
    _, _, whole = fit("whole")
    with monkeypatch.context() as patch:
        at_call(patch.setattr, train, "answer_loss", 5, lambda: patch.setattr(
            train, "answer_loss", lambda logits, _: logits.sum() * math.nan))                    # from the second half of step 3
        status, err, run = fit("run")
    assert status == 2 and len(err) == 1 and "step 3: loss nan" in err[0] and "stopped before the update; pages" in err[0]
    assert latest_checkpoint(run).name == "step-0000002.safetensors"
    assert fit("run")[0] == 0
    assert_same(whole, run)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_names_the_tiles_and_the_flags(fit, monkeypatch, error):
    _, _, whole = fit("whole")
    with monkeypatch.context() as patch:
        at_call(patch.setattr, train, "answer_loss", 5, lambda: fail(error))
        status, err, run = fit("run")
    assert status == 2 and len(err) == 1 and "out of memory with 1 tiles" in err[0]
    assert "--max-tiles" in err[0] and "--batch-pages" in err[0] and latest_checkpoint(run).name == "step-0000002.safetensors"
    assert fit("run")[0] == 0
    assert_same(whole, run)


def test_a_worker_that_is_killed_is_one_line_and_nothing_is_lost(fit, monkeypatch):
    _, _, whole = fit("whole")
    with monkeypatch.context() as patch:
        at_call(patch.setattr, train, "check_step", 3, lambda: [os.kill(child.pid, signal.SIGKILL) for child in active_children()])
        status, err, run = fit("run", "--workers", 1)
    assert status == 2 and len(err) == 1 and "a worker process was killed" in err[0] and "--workers" in err[0]
    assert fit("run")[0] == 0
    assert_same(whole, run)


# ---------------------------------------------------------------------------------------------------------------- checkpoints

def test_the_newest_checkpoints_and_the_best_validated_are_kept(fit, monkeypatch):
    told = iter([5.0, 4.0, 1.0, 3.0, 2.0, 2.5, 2.4])
    monkeypatch.setattr(train, "evaluate", lambda *_: ({"val_loss": next(told)}, [{"page": "1", "question": "?", "answer": "", "expected": ["a"]}]))
    _, err, run = fit("run", "--save-every", 1, "--eval-every", 1, "--eval-pages", 1, "--keep", 2)
    names = sorted(path.stem for path in (run / "checkpoints").iterdir())
    assert names == ["step-0000002", "step-0000005", "step-0000006"], err


def test_a_damaged_checkpoint_is_told_and_the_one_before_still_loads(fit, capsys, monkeypatch):
    _, _, whole = fit("whole")
    _, _, run = fit("run", "--save-every", 2)
    (run / "model.safetensors").unlink()
    path = latest_checkpoint(run)
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(20):                                                 # any byte behind the header, any length
        place = draw.randrange(len(content) - 100_000, len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:])
        with pytest.raises(InputError, match="damaged, its checksum"):
            InternVL.from_pretrained(run, "cpu")
        path.write_bytes(content[:draw.randrange(len(content))])
        with pytest.raises(InputError, match="not a checkpoint of train.py, or not a whole one"):
            InternVL.from_pretrained(run, "cpu")
    assert str(path) in refuses(train, capsys, monkeypatch, "--resume", run)
    path.unlink()
    assert fit("run")[0] == 0
    assert_same(whole, run)


def test_a_disk_that_is_full_keeps_the_checkpoints_that_were_there(fit, monkeypatch):
    _, _, whole = fit("whole")
    with monkeypatch.context() as patch:                                # settings 1, checkpoints 2 and 4, settings again 3 and 5
        at_call(patch.setattr, os, "fsync", 6, lambda: fail(OSError(28, "No space left on device")))
        status, err, run = fit("run", "--save-every", 1)
    assert status == 2 and len(err) == 1 and "No space left on device" in err[0] and "make room" in err[0]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000001.safetensors", "step-0000002.safetensors"]
    InternVL.from_pretrained(run, "cpu")
    assert fit("run")[0] == 0
    assert_same(whole, run)


def test_a_small_file_system_fills_up_and_the_run_goes_on_elsewhere(fit, tmp_path):
    _, _, whole = fit("whole")
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        status, err, run = fit("disk/run", "--save-every", 1)
        assert status == 2 and len(err) == 1 and "cannot be written" in err[0], err
        last = latest_checkpoint(run).name
        assert "step-0000002" <= last and not list(run.rglob("*.part"))
        shutil.copytree(run, tmp_path / "moved")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        for name in ("disk/run", "disk/new"):                           # read-only
            status, err, _ = fit(name)
            assert status == 2 and len(err) == 1 and "cannot be written" in err[0], err
        InternVL.from_pretrained(run, "cpu")
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)
    assert fit("moved", "--save-every", 0)[0] == 0
    assert_same(whole, tmp_path / "moved")


def test_a_run_folder_that_was_removed_is_one_line(fit, tmp_path, monkeypatch):
    at_call(monkeypatch.setattr, train, "check_step", 3, lambda: shutil.rmtree(tmp_path / "run"))
    status, err, _ = fit("run")
    assert status == 2 and len(err) == 1 and "cannot be written (No such file or directory); the folder is gone" in err[0]


# -------------------------------------------------------------------------------------------------------------- bad data

def test_what_is_left_out_is_counted_once_and_named_in_skipped_jsonl(tmp_path, capsys, monkeypatch):
    rows = mixed_rows(30)
    rows[2]["answers"], rows[9]["answers"], rows[30]["question"] = None, [""], "long " * 3_000
    for row in rows:
        if row["docId"] == 17:
            row["image"] = {"bytes": row["image"]["bytes"][:99], "path": None}
    write_split(tmp_path / "data", "train", rows)
    flags = ("--model", "tiny", "--data", tmp_path / "data", "--device", "cpu", "--workers", 0, "--eval-every", 0, "--max-tiles", 1,
             "--max-length", 600, "--accumulate", 3, "--epochs", 2)
    status, out, _ = call(train, capsys, monkeypatch, *flags, "--out", tmp_path / "whole")
    assert status == 0 and "skipped: 1 page, 1 question too long, 2 without an answer" in out
    lines = [json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    counted = collections.Counter()
    for line in lines:
        counted[line["left_out"]] += line["count"]
    assert counted == {"page": 2, "questions too long": 2, "questions without an answer": 4}
    assert [line["page"] for line in lines if line["left_out"] == "page"] == ["17/1"] * 2
    with monkeypatch.context() as patch:
        at_call(patch.setattr, train, "check_step", 14, lambda: os.kill(os.getpid(), signal.SIGTERM))
        call(train, capsys, monkeypatch, *flags, "--out", tmp_path / "run")
    status, again, _ = call(train, capsys, monkeypatch, "--resume", tmp_path / "run")
    assert status == 0 and [line for line in out.splitlines() if "skipped:" in line] == [line for line in again.splitlines() if "skipped:" in line]
    assert (tmp_path / "run" / "skipped.jsonl").read_text() == (tmp_path / "whole" / "skipped.jsonl").read_text()
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_hostile_files_and_rows_are_refused_or_read(tmp_path):
    told = program("hostile.py", tmp_path)
    assert told["escaped"] == [] and told["count"] >= 380 and told["refused"] >= 200
    assert told["gb"] < 2 and told["slowest"][1] < 10


def image_file(kind, image, **more):
    import io
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def test_images_are_read_as_a_viewer_shows_them():
    import numpy as np
    from PIL import Image
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    deep = load_image(image_file("PNG", Image.fromarray(grey * 257)))
    assert deep.mode == "L" and (np.asarray(deep) == grey).all()                        # 16 bits a channel
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.putpixel((2, 3), (10, 20, 30, 255))
    shown = load_image(image_file("PNG", clear))
    assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((2, 3)) == (10, 20, 30)
    turned, exif = Image.new("RGB", (20, 10), "white"), Image.Exif()
    turned.paste("red", (0, 0, 5, 10))
    for orientation, corner in ((3, (19, 0)), (6, (0, 0)), (8, (0, 19))):
        exif[0x112] = orientation
        shown = load_image(image_file("PNG", turned, exif=exif))
        assert shown.size == ((20, 10) if orientation == 3 else (10, 20)) and shown.getpixel(corner) == (255, 0, 0)
    first = load_image(image_file("GIF", Image.new("L", (4, 4), 9), save_all=True, append_images=[Image.new("L", (4, 4), 99)]))
    assert first.convert("L").getpixel((0, 0)) == 9
    wide = load_image(image_file("PNG", Image.new("L", (30_000, 20))))
    assert len(tile_page(wide, 12)) == 13 and len(tile_page(Image.new("L", (1, 1)))) == 1


def test_tiles_of_any_page_keep_to_the_rules():
    draw = random.Random(0)
    for _ in range(400):
        width, height, most = int(30_000 ** draw.random()), int(30_000 ** draw.random()), draw.randint(1, 40)
        columns, rows = choose_grid(width, height, most)
        assert 1 <= columns * rows <= most
        difference = abs(width / height - columns / rows)
        assert all(difference <= abs(width / height - c / r) for c in range(1, most + 1) for r in range(1, most // c + 1))


def test_prompts_of_any_page_keep_to_the_rules(tiny):
    draw, alphabet = random.Random(0), "aé日😀<|im_end|>\n\t\0 <image>\u202e"
    for _ in range(100):
        questions = ["".join(draw.choice(alphabet) for _ in range(draw.randint(1, 60))) for _ in range(draw.randint(1, 8))]
        answers = ["".join(draw.choice(alphabet) for _ in range(draw.randint(1, 20))) for _ in questions]
        most = draw.choice((None, 150, 220))
        prompt, too_long = page_prompt(tiny.tokenizer, 64, [1], questions, answers, most)
        used = [i for i in range(len(questions)) if i not in too_long]
        assert sorted(set(prompt.branches) - {0}) == list(range(1, len(used) + 1))
        prefix = prompt.branches.count(0)
        for branch, i in enumerate(used, 1):
            learned = [label for label, b in zip(prompt.labels, prompt.branches) if b == branch and label != IGNORE_INDEX]
            assert tiny.tokenizer.decode(learned[:-1]) == tiny.tokenizer.decode(tiny.tokenizer(answers[i], split_special_tokens=True).input_ids)
            assert not most or prefix + prompt.branches.count(branch) <= most
        alone = [page_prompt(tiny.tokenizer, 64, [1], [questions[i]], [answers[i]])[0] for i in used]
        assert sum(len(one.ids) - prefix for one in alone) + prefix == len(prompt.ids)


# ---------------------------------------------------------------------------------------------------------------- bad network

def test_a_faulty_hub_gives_the_same_pages_and_losses(tmp_path):
    write_split(tmp_path / "datasets" / "zhangfaen" / "DocumentVQA", "train", mixed_rows(40), 4)
    told = program("faulty.py", tmp_path, tmp_path)
    quiet = told["quiet"]
    assert quiet["status"] == 0 and quiet["pauses"] == 0 and len(quiet["pages"]) > 100
    for i in range(3):
        assert told[f"faulty {i}"] | {"pauses": 0} == quiet and told[f"faulty {i}"]["pauses"] > 3
    assert len(told["faults"]) >= 6 and told["gone"]["status"] == 2 and 0 < len(told["gone"]["pages"]) < len(quiet["pages"])
    assert told["gone resumed"]["losses"] == quiet["losses"]
    assert told["gone"]["pages"] + told["gone resumed"]["pages"] == quiet["pages"]


def test_a_model_is_never_used_half_downloaded(tmp_path):
    shutil.copytree(TINY, tmp_path / "models" / "OpenGVLab" / "InternVL2-1B")
    code = ("import sys; sys.path[:0] = ['tests']; from hub import serve; from pathlib import Path; import os, time\n"
            "faults = []\n"
            "with serve(Path(sys.argv[1]), lambda path: 'cut' if path.endswith('.safetensors') and faults else None) as address:\n"
            "    os.environ |= {'HF_ENDPOINT': address, 'HF_HOME': sys.argv[1] + '/cache', 'HF_HUB_DOWNLOAD_TIMEOUT': '1'}\n"
            "    from model import InternVL, InputError\n"
            "    sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.02))\n"
            "    for faults[:] in ([1], []):\n"
            "        try: print(len(InternVL.from_pretrained('OpenGVLab/InternVL2-1B', 'cpu').state_dict()))\n"
            "        except InputError as error: print('refused', error)\n"
            "print(len(InternVL.from_pretrained('OpenGVLab/InternVL2-1B', 'cpu').state_dict()))     # the Hub is gone\n")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith("refused OpenGVLab/InternVL2-1B: ") and lines[1:] == [str(len(load_file(TINY / "model.safetensors")))] * 2, done.stderr[-2000:]


def test_pauses_grow_are_told_and_end(monkeypatch, capsys):
    clock, told = [0.0], []
    monkeypatch.setattr(data.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(data.time, "sleep", lambda seconds: (told.append(seconds), clock.__setitem__(0, clock[0] + seconds)))
    with pytest.raises(ConnectionError, match="gone"):
        data.retry(lambda: fail(ConnectionError("gone")), 600)
    assert told == [1, 2, 4, 8, 16, 32, *[60] * 8] and clock[0] <= 600
    assert capsys.readouterr().err.count("trying again in") == len(told)
    with pytest.raises(FileNotFoundError):                              # no trouble of the network
        data.retry(lambda: fail(FileNotFoundError("x")))
