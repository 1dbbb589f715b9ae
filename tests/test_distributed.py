"""Several ranks are one run: the same pages in each step, the same losses, gradients, files and endings as one process."""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from small_data import page_rows

from extras.cli import SCORES
from model.checkpoint import TINY

TIMES = ("questions_per_second", "data_wait", "peak_gb")
SHORT = ("--device", "cpu", "--workers", 0, "--max-tiles", 2, "--accumulate", 4, "--lr", "1e-3", "--eval-pages", 3)


FAULTS = {          # what happens to a rank in the fourth step: (its code, exit statuses, the one line that is printed, the step that is saved)
    "a rank is out of memory": ("if rank == 1: at_call(setattr, train, 'answer_loss', 7, lambda: fail(torch.OutOfMemoryError('CUDA out of memory. Tried')))",
                                [2, 2], "train.py: out of memory with 4 tiles in a micro-batch, pages ", 3),
    "rank 0 is out of memory": ("if rank == 0: at_call(setattr, train, 'answer_loss', 7, lambda: fail(MemoryError()))", [2, 2], "train.py: out of memory", 3),
    "a bug": ("if rank == 1: at_call(setattr, train, 'answer_loss', 7, lambda: fail(KeyError('a bug')))", [2, 1], "KeyError: 'a bug'", 3),
    "a loss that is not finite": ("if rank == 1: at_call(setattr, train, 'answer_loss', 7, lambda: setattr(train, 'answer_loss', lambda x, _: x.sum() * float('nan')))",
                                  [2, 2], "train.py: step 4: loss nan", 3),
    "a worker is killed": ("import multiprocessing\nif rank == 1: at_call(setattr, train, 'check_step', 3, lambda: [os.kill(child.pid, 9) "
                           "for child in multiprocessing.active_children()])", [2, 2], "train.py: a worker process was killed", 3),
    "the disk is full": ("if rank == 0: at_call(setattr, train.RunFolder, 'log', 4, lambda: fail(OSError(28, 'No space left on device')))",
                         [2, 2], "cannot be written (No space left on device)", 4),
    "SIGTERM of one rank": ("if rank == 1: at_call(setattr, train, 'check_step', 3, lambda: kill(15))", [143, 143], "stopped after step 3", 3),
    "Ctrl-C": ("at_call(setattr, train, 'check_step', 3, lambda: kill(2))", [130, 130], "stopped after step 3", 3),
    "--shard: out of memory": ("if rank == 1: at_call(setattr, train, 'answer_loss', 7, lambda: fail(torch.OutOfMemoryError('CUDA out of memory. Tried')))",
                               [2, 2], "train.py: out of memory", 2),
    "--shard: a loss that is not finite": ("at_call(setattr, train, 'check_step', 4, lambda: fail(train.InputError('step 4: loss nan')))",
                                           [2, 2], "step 4: loss nan", 3),
    "--shard: SIGTERM of one rank": ("if rank == 1: at_call(setattr, train, 'check_step', 3, lambda: kill(15))", [143, 143], "stopped after step 3", 3),
    "SIGKILL of one rank": ("if rank == 1: at_call(setattr, train, 'answer_loss', 7, lambda: kill(9))", [2, -9], "another process of torchrun has ended", 3),
}


GRADIENTS = {"pages without and with an image, three and nine tiles": ("float64", (0, 1, 3, 9, 1, 2, 0)), "only pages without an image": ("float64", (0, 0, 0)),
             "in float32": ("float32", (0, 1, 3, 9, 1, 2, 0))}
TRAINED = ("projector", "lora", "llm", "all")


def start(*runs):
    """Runs of tests/ranks.py -> their [{"status", "err"}]."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "ranks.py")], input=json.dumps(runs, default=str), capture_output=True,
                          text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def lines_of(run, name="metrics.jsonl"):
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics(run):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines_of(run)]


def assert_same(run, one, rel=1e-6):
    """A run on several ranks has the metrics, skipped pages, samples, checkpoints and weights of one process."""
    a, b = metrics(run), metrics(one)
    assert [line.keys() for line in a] == [line.keys() for line in b] and len(a) > 1
    for ours, theirs in zip(a, b):
        for key in ours:
            assert ours[key] == (pytest.approx(theirs[key], rel=10 * rel if key == "grad_norm" else rel, abs=1e-6)), (key, ours, theirs)
    for name in ("skipped.jsonl", "samples.jsonl"):
        assert lines_of(run, name) == lines_of(one, name)
    newest = max((one / "checkpoints").iterdir()).name
    assert max((run / "checkpoints").iterdir()).name == newest
    for name in (f"checkpoints/{newest}", "model.safetensors"):
        mine, other = load_file(run / name), load_file(one / name)
        assert mine.keys() == other.keys()
        for key in mine:
            assert (mine[key].float() - other[key].float()).norm() <= 1e-3 * other[key].float().norm(), key


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Rows about 14 pages: one without an image, one whose image cannot be read, one with a question that is too long."""
    folder, rows = tmp_path_factory.mktemp("pages"), []
    for page in range(14):
        for row in page_rows(page, questions=3):
            (folder / f"{page}.png").write_bytes(row["image"]["bytes"][:-300 if page == 4 else None])
            rows.append({"image": f"{page}.png", "question": row["question"], "answer": row["answers"][0]})
    rows = [row for row in rows if row["image"] != "3.png"] + [{"question": f"How much is {i} + 1?", "answer": f"{i + 1}"} for i in range(2)]
    rows.append({"image": "8.png", "question": "long " * 200, "answer": "no"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def runs(pages, tmp_path_factory):
    """{name: (run folder, its statuses and errors)} of runs in one process and on 1 to 4 ranks."""
    folder = tmp_path_factory.mktemp("runs")
    whole = ("--model", "tiny", "--data", pages, "--max-length", 300, "--epochs", 2, "--eval-every", 3, "--save-every", 3, *SHORT)
    grouped = ("--model", "tiny", "--data", pages, "--max-length", 300, "--steps", 3, "--eval-every", 0, "--batch-pages", 2, "--group-by-length",
               "--train", "projector,lora", "--lora-dropout", 0.2, "--workers", 1, "--seed", 3)
    same = ("--schedule", "constant", "--warmup", 0)
    wanted = {f"{name} {ranks}": {"ranks": ranks, "flags": [*flags, "--out", folder / f"{name} {ranks}"]}
              for name, flags, counts in (("whole", whole, (0, 1, 2, 3, 4)), ("grouped", (*SHORT, *grouped), (0, 2, 3))) for ranks in counts}
    for number, (dtype, tiles) in enumerate(GRADIENTS.values()):
        (folder / str(number)).mkdir()
        for ranks in (0, 2, 3):
            wanted[f"{number} {ranks}"] = {"ranks": ranks, "program": "gradients", "flags": [folder / str(number), dtype, *tiles]}
    for ranks, steps in ((2, 2), (3, 4), (1, 6)):                           # one run, on another number of ranks each time
        place = ("--resume", folder / "resumed") if steps > 2 else (*SHORT, *grouped, *same, "--out", folder / "resumed")
        wanted[f"resumed {ranks}"] = {"ranks": ranks, "flags": [*place, "--steps", steps]}
    wanted["uninterrupted"] = {"ranks": 0, "flags": [*SHORT, *grouped, *same, "--steps", 6, "--out", folder / "uninterrupted"]}
    for name, ranks, flags in (("too many", 3, ("--accumulate", 2)), ("wrong flag", 2, ("--batch-pages", 0)), ("one GPU", 2, ("--device", "cuda:0")), ("no model", 2, ("--model", "nowhere")),
                               ("rows", 2, ("--data", pages.parent))):
        wanted[name] = {"ranks": ranks, "flags": [*SHORT, "--model", "tiny", "--data", pages, "--out", folder / name, *flags]}
    for name, ranks, predictions in (("answers", 0, ()), ("answers", 3, ()), ("resumed answers", 2, folder / "answers 3.json")):
        wanted[f"{name} {ranks}"] = {"ranks": ranks, "program": "infer", "flags": [
            "--model", "tiny", "--evaluate", pages, "--device", "cpu", "--max-tiles", 1, "--max-new-tokens", 6, "--json", "--predictions",
            predictions or folder / f"{name} {ranks}.json"]}
    for name, (patch, *_) in FAULTS.items():
        wanted[name] = {"ranks": 2, "patch": patch, "flags": [*SHORT, *grouped, "--steps", 5, "--out", folder / name, *(["--shard", "--train", "llm", "--save-every", 2] if "--shard" in name else [])]}
    for train in TRAINED:
        flags = [*SHORT, "--model", "tiny", "--data", pages, "--max-length", 300, "--eval-every", 4, "--eval-pages", 2, "--steps", 5, "--train", train,
                 "--lora-dropout", 0.2]
        for name, ranks, more in (("whole", 0, ()), ("split", 2, ("--shard",)), ("recomputed", 3 if train == "all" else 2, ("--shard", "--checkpoint-activations"))):
            wanted[f"{train} {name}"] = {"ranks": ranks, "flags": [*flags, *more, "--out", folder / f"{train} {name}"]}
    wanted["all machines"] = {"ranks": 4, "patch": "os.environ['LOCAL_WORLD_SIZE'] = '2'", "flags": [*flags, "--shard", "--out", folder / "all machines"]}
    for ranks, steps, more in ((2, 2, ("--shard",)), (3, 4, ()), (1, 6, ("--no-shard",))):
        place = ("--resume", folder / "split") if steps > 2 else (*SHORT, *grouped, *same, "--train", "all", "--out", folder / "split")
        wanted[f"split {ranks}"] = {"ranks": ranks, "flags": [*place, "--steps", steps, *more]}
    wanted["not split"] = {"ranks": 0, "flags": [*SHORT, *grouped, *same, "--train", "all", "--steps", 6, "--out", folder / "not split"]}
    return {name: (folder / name, done) for name, done in zip(wanted, start(*wanted.values()))}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_run_on_several_ranks_is_that_of_one_process(runs, ranks):
    run, done = runs[f"whole {ranks}"]
    one, alone = runs["whole 0"]
    assert done["status"] == [0] * ranks, done["err"]
    assert_same(run, one)
    assert done["err"] == [alone["err"][0], *[[]] * (ranks - 1)]            # rank 0 prints what one process prints


def test_the_special_cases_are_in_these_runs(runs, pages):
    """A smaller last step, ranks without a page, a page without an image, one that only one rank has to skip, a question too long."""
    run, _ = runs["whole 0"]
    skipped = [(line["epoch"], line["left_out"]) for line in lines_of(run, "skipped.jsonl")]
    assert skipped.count((0, "page")) == skipped.count((1, "page")) == skipped.count((0, "questions too long")) == 1
    steps = [line["questions"] for line in lines_of(run) if "train_loss" in line]
    assert len(steps) == 8 and steps[3] <= 6 and steps[7] <= 6             # 4 + 4 + 4 + 2 pages, twice: on 3 and 4 ranks some have none
    assert sum("image" not in json.loads(line) for line in pages.read_text().splitlines()) == 2


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gradient_is_that_of_one_process(runs, name, ranks):
    number = list(GRADIENTS).index(name)
    folder, done = runs[f"{number} {ranks}"]
    assert done["status"] == [0] * ranks, done["err"]
    one = torch.load(folder.parent / str(number) / "one.pt")
    for rank in range(ranks):
        for ours, theirs in zip(torch.load(folder.parent / str(number) / f"{rank}.pt"), one, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert (ours - theirs).norm() <= (1e-10 if ours.dtype == torch.float64 else 1e-6) * theirs.norm()


@pytest.mark.parametrize("ranks", [2, 3])
def test_pages_grouped_by_length_and_dropout_are_those_of_one_process(runs, ranks):
    run, done = runs[f"grouped {ranks}"]
    assert done["status"] == [0] * ranks, done["err"]
    assert_same(run, runs["grouped 0"][0])


def test_a_run_resumed_on_three_ranks_and_on_one_equals_an_uninterrupted_one(runs):
    for ranks in (2, 3, 1):
        assert runs[f"resumed {ranks}"][1]["status"] == [0] * ranks, runs[f"resumed {ranks}"][1]
    assert_same(runs["uninterrupted"][0].with_name("resumed"), runs["uninterrupted"][0])


@pytest.mark.parametrize("train", TRAINED)
@pytest.mark.parametrize("name", ["split", "recomputed"])
def test_split_weights_train_as_whole_ones(runs, train, name):
    run, done = runs[f"{train} {name}"]
    assert set(done["status"]) == {0}, done["err"]
    assert_same(run, runs[f"{train} whole"][0], 1e-5)


def test_weights_that_are_split_inside_two_machines_and_repeated_between_them_train_as_whole_ones(runs):
    run, done = runs["all machines"]
    assert done["status"] == [0] * 4, "\n".join(line for lines in done["err"] for line in lines)       # all of it: where a rank waits
    assert_same(run, runs["all whole"][0], 1e-5)


def test_a_split_run_resumes_on_three_ranks_and_on_one_that_holds_everything(runs):
    for ranks in (2, 3, 1):
        assert runs[f"split {ranks}"][1]["status"] == [0] * ranks, runs[f"split {ranks}"][1]
    assert_same(runs["not split"][0].with_name("split"), runs["not split"][0], 1e-5)


@pytest.mark.parametrize("name, text", [("too many", "--accumulate"), ("wrong flag", "--batch-pages"), ("one GPU", "--device"), ("no model", "nowhere"), ("rows", "no column question")])
def test_what_is_wrong_from_the_start_is_one_line_of_one_rank(runs, name, text):
    _, done = runs[name]
    assert set(done["status"]) == {2}, done
    [line] = [line for err in done["err"] for line in err]
    assert line.startswith("train.py: ") and text in line


@pytest.mark.parametrize("name", FAULTS)
def test_a_rank_that_fails_ends_all_with_one_line_and_the_run_saved(runs, name):
    run, done = runs[name]
    _, statuses, text, step = FAULTS[name]
    assert done["status"] == statuses, done
    printed = [[line for line in err if not line.endswith("; skipped") and " are skipped, " not in line] for err in done["err"]]
    assert sum(map(bool, printed)) == 1                                     # by one rank
    [lines] = filter(None, printed)
    assert text in lines[-1] and (len(lines) == 1 or lines[0].startswith("Traceback")), lines
    assert max(path.stem for path in (run / "checkpoints").iterdir()) == f"step-{step:07}"


def test_answers_on_several_ranks_are_those_of_one_process_in_their_order(runs, pages):
    (one, alone), (three, done), (_, again) = (runs[name] for name in ("answers 0", "answers 3", "resumed answers 2"))
    assert alone["status"] + done["status"] + again["status"] == [0] * 6, (done, again)
    for end in ("", SCORES):
        assert Path(f"{three}.json{end}").read_text() == Path(f"{one}.json{end}").read_text()
    assert len({line["questionId"] for line in json.loads(one.with_suffix(".json").read_text())}) == len(pages.read_text().splitlines())
    assert [err[-1:] for err in done["err"]] == [alone["err"][0][-1:], [], []] == [err[-1:] for err in again["err"]] + [[]]


def launch(*flags, ranks=2, **more):
    """A process of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    split = flags.index("train.py")
    return subprocess.Popen([*launcher, *map(str, flags[:split]), str(ROOT / "train.py"), *map(str, flags[split + 1:])],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | more)


def test_two_machines_train_to_the_losses_of_one_process(runs, pages, tmp_path):
    run, _ = runs["uninterrupted"]
    settings = json.loads((run / "settings.json").read_text()) | {"model": TINY}
    flags = [f"--{key.replace('_', '-')}" + f"={settings[key]}" for key in (
        "model", "data", "max_length", "steps", "eval_every", "batch_pages", "train", "lora_dropout", "workers", "seed", "device", "max_tiles",
        "accumulate", "lr", "schedule", "warmup")] + ["--group-by-length"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = ("--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}")
    machines = [launch(*place, "train.py", *flags, "--out", tmp_path / "run", ranks=1) for _ in range(2)]
    texts = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], texts
    assert_same(tmp_path / "run", run)


def test_when_a_rank_is_killed_torchrun_ends_the_others_and_the_run_resumes(tmp_path):
    run = tmp_path / "run"
    launcher = launch("train.py", "--tiny", "--model", TINY, "--data", "synthetic:1", "--steps", 1000, "--save-every", 2, "--eval-every", 0, "--out", run)
    began = time.monotonic()
    while len(lines_of(run)) < 5:
        assert launcher.poll() is None and time.monotonic() < began + 150, launcher.communicate()[0]
        time.sleep(0.1)
    ranks = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if is_child(path, launcher.pid)]
    os.kill(max(ranks), signal.SIGKILL)
    text, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 1 and len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks), text
    [done] = start({"ranks": 1, "flags": ["--resume", run, "--steps", len(lines_of(run)) + 2]})
    assert done["status"] == [0] and max(line["step"] for line in lines_of(run)) == len(lines_of(run))


def is_child(path, parent):
    try:
        return int(path.read_text().rpartition(")")[2].split()[1]) == parent
    except OSError:
        return False


def test_without_torchrun_nothing_of_it_is_imported():
    code = ("import sys, runpy, infer, data; sys.argv = ['train.py', '--tiny', '--steps', '1', '--eval-every', '0', "
            "'--accumulate', '1', '--out', sys.argv[1]]; runpy.run_path('train.py', run_name='__main__'); "
            "print('extras.distributed' in sys.modules, sys.modules['torch.distributed'].is_initialized())")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, f"{folder}/run"], cwd=ROOT, capture_output=True, text=True, timeout=200,
                              env={key: value for key, value in os.environ.items() if key != "RANK"} | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
