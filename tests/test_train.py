"""The loop does what its log says: what moves, what is counted, what is written, where it goes on."""
import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from itertools import chain

import pytest
import torch
from commands import call, refuses, train
from conftest import ROOT
from hub import serve
from reference import loss_of
from safetensors.torch import load_file, save_file
from small_data import mixed_rows, write_dataset, write_split

from data import Example, Page, group_rows_into_pages, page_blocks
from extras import evaluate
from extras.memory import choose_split
from extras.run_folder import SkipLog
from model import InternVL
from model.checkpoint import TINY
from model.names import official_name
from model.tiny.pages import SHAPES, draw_page

METRICS = {"step", "train_loss", "lr", "grad_norm", "questions", "answer_tokens", "questions_per_second", "data_wait", "peak_gb"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), train_pages=12, validation_pages=4)


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def fit(folder, dataset, tmp_path, capsys, monkeypatch):
    """Runs train.py on small local files; returns the run folder."""
    def run(name, *flags, data=dataset):
        status, out, err = call(train, capsys, monkeypatch, "--model", folder, "--data", data, "--device", "cpu", "--workers", 0,
                                "--max-tiles", 4, "--eval-pages", 4, "--out", tmp_path / name, *flags)
        assert status == 0, err
        return tmp_path / name
    return run


def projector_names():
    """Official names of the projector's tensors."""
    return {official_name(name) for name in InternVL.from_scratch("tiny", device="cpu").state_dict() if name.startswith("projector.")}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training(run):
    return [line for line in metrics(run) if "train_loss" in line]


def test_a_tiny_run_learns_and_leaves_a_model_folder(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    status, out, err = call(train, capsys, monkeypatch, "--tiny", "--train", "all", "--lr", 5e-3, "--accumulate", 2, "--steps", 60, "--eval-every", 30,
                            "--eval-pages", 8, "--out", run)
    assert status == 0, err
    losses = [line["val_loss"] for line in metrics(run) if "val_loss" in line]
    assert len(losses) == 3 and losses[-1] < 0.7 * losses[0]
    assert all(METRICS <= set(line) for line in training(run)) and [line["step"] for line in training(run)] == list(range(1, 61))
    assert {file.name for file in run.iterdir()} >= {
        "settings.json", "metrics.jsonl", "curve.png", "samples.jsonl", "samples.md", "samples.png", "page.png", "checkpoints",
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} and not list(run.rglob("*.part"))
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in ("curve.png", "samples.png"))
    assert all({"step", "val_loss", "exact_match", "anls"} <= set(line) for line in metrics(run) if "val_loss" in line)
    samples = (run / "samples.md").read_text()
    assert samples.count("## Step") == 3 and "| page | question | answer | expected |" in samples
    assert f"python infer.py --model {run}" in out and "trainable" in out
    assert InternVL.from_pretrained(run, "cpu").state_dict().keys() == InternVL.from_pretrained("tiny", "cpu").state_dict().keys()


def test_settings_are_saved_under_the_flags_names(fit):
    run = fit("run", "--steps", 1, "--lr", "1e-3", "--no-shuffle")
    settings = json.loads((run / "settings.json").read_text())
    assert settings["steps"] == 1 and settings["lr"] == 1e-3 and settings["shuffle"] is False and settings["max_tiles"] == 4
    assert settings["dtype"] == "float32" and settings["batch_pages"] == 1


def test_only_the_projector_moves_and_everything_else_is_saved_bit_for_bit(fit, folder):
    run = fit("run", "--steps", 2, "--lr", "1e-2")
    before, after = load_file(folder / "model.safetensors"), load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == projector_names()


def test_the_logged_loss_and_gradient_do_not_depend_on_the_micro_batch(fit):
    runs = [fit(f"{b}x{a}", "--batch-pages", b, "--accumulate", a, "--steps", 2, "--eval-every", 0, "--lr", "1e-2")
            for b, a in ((1, 12), (4, 3), (12, 1))]
    first = training(runs[0])
    for run in runs[1:]:
        for a, b in zip(training(run), first):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
            assert (a["answer_tokens"], a["questions"], a["lr"]) == (b["answer_tokens"], b["questions"], b["lr"])


def test_left_over_pages_are_a_step_of_their_own(fit, dataset):
    run = fit("run", "--accumulate", 5, "--epochs", 2, "--eval-every", 0)
    pages = list(group_rows_into_pages(mixed_rows(12)))
    assert len(training(run)) == 6                                      # 5 + 5 + 2 pages, twice
    assert sum(line["questions"] for line in training(run)) == 2 * sum(len(page.questions) for page in pages)


def test_pages_cut_by_the_edge_of_a_block_are_counted_at_the_end(folder, dataset, tmp_path, capsys, monkeypatch):
    flags = "--model", folder, "--data", dataset, "--device", "cpu", "--workers", 0, "--max-tiles", 4, "--eval-every", 0, "--epochs", 1
    outputs = [call(train, capsys, monkeypatch, *flags, "--look-ahead", rows, "--out", tmp_path / str(rows))[1] for rows in (3, 2048)]
    cut = sum(page.cut for page in chain.from_iterable(page_blocks(mixed_rows(12), block_rows=3)))
    assert cut > 0 and f"; {cut} pages split in two by the edge of a block" in outputs[0] and "split in two" not in outputs[1]


def test_steps_and_epochs_end_the_run_at_the_first_one_reached(fit):
    assert len(training(fit("a", "--accumulate", 12, "--steps", 3, "--epochs", 2, "--eval-every", 0))) == 2
    assert len(training(fit("b", "--accumulate", 12, "--steps", 1, "--epochs", 2, "--eval-every", 0))) == 1
    assert len(training(fit("c", "--accumulate", 12, "--eval-every", 0))) == 1          # neither: one epoch


def test_validation_is_the_token_weighted_loss_of_the_fixed_pages(fit, folder):
    from data import PageDataset
    run = fit("run", "--steps", 1, "--lr", 0)
    lines = [line for line in metrics(run) if "val_loss" in line]
    assert [line["step"] for line in lines] == [0, 1] and lines[0]["val_loss"] == lines[1]["val_loss"]
    model = InternVL.from_pretrained(folder, "cpu")
    total = tokens = 0
    for page in group_rows_into_pages(mixed_rows(4, first=1000)):
        example = PageDataset(model, 4)[page]
        total, tokens = total + loss_of(model, [(example.tiles, example.prompt)]).item(), tokens + example.answer_tokens
    assert lines[0]["val_loss"] == pytest.approx(total / tokens, rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_is_the_one_of_transformers_sampled_in_the_middle_of_each_step(schedule):
    from transformers import get_scheduler
    steps, warmup = 1000, 30
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=2 * warmup, num_training_steps=2 * steps)    # in half steps
    settings = Namespace(schedule=schedule, warmup=warmup / steps)
    for half in range(2 * steps):
        if half % 2:
            assert 4e-5 * train.lr_factor(half / 2 / steps, settings) == pytest.approx(reference.get_last_lr()[0], rel=1e-9, abs=1e-16)
        optimizer.step()
        reference.step()


def test_a_recipe_sets_flags_says_so_and_gives_way_to_what_is_typed(fit, folder, dataset, tmp_path, capsys, monkeypatch):
    status, out, err = call(train, capsys, monkeypatch, "--model", folder, "--data", dataset, "--device", "cpu", "--workers", 0, "--eval-every", 0,
                            "--recipe", "xtuner-lora", "--lr", "projector=1e-3", "--steps", 1, "--out", tmp_path / "run")
    assert status == 0 and "recipe xtuner-lora (XTuner" in out and "--lora-rank 128" in out and "--lr 3e-05" not in out, err
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["lora_rank"], settings["lora_alpha"], settings["weight_decay"], settings["train"]) == (128, 256, 0.05, "projector,lora")
    assert settings["lr"] == "projector=0.001,lora=4e-05" and settings["checkpoint_activations"] is True
    for recipe in train.recipes.RECIPES:
        monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", recipe, "--steps", "1"])
        parsed = vars(train.parse_args())
        assert all(parsed[key] == value for key, value in train.recipes.RECIPES[recipe][1].items())


def test_each_part_has_its_learning_rate(fit, tiny):
    tiny.requires_grad_(False)
    train.choose_parts(tiny, "projector,llm")
    optimizer = train.make_optimizer(tiny, Namespace(lr="projector=1e-3,llm=1e-5", weight_decay=0.1, beta2=0.9, device="cpu"))
    rates = {id(p): (group["peak_lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in tiny.projector.parameters()} == {(1e-3, 0.1), (1e-3, 0)}
    assert {rates[id(p)] for p in tiny.language.parameters()} == {(1e-5, 0.1), (1e-5, 0)} and len(rates) == len(list(tiny.projector.parameters())) + 2 * 12 + 3
    run = fit("run", "--train", "projector,llm", "--lr", "projector=1e-2,llm=0", "--steps", 2, "--eval-every", 0)
    assert training(run)[0]["lr"] == pytest.approx(train.lr_factor(1 / 4, Namespace(warmup=0.03, schedule="cosine")) * 1e-2)
    before, after = (load_file(path) for path in (run.parent / "model" / "model.safetensors", run / "model.safetensors"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == projector_names()


def test_the_gradient_is_clipped_to_the_norm(fit, folder):
    kept = load_file(folder / "model.safetensors")
    assert training(fit("a", "--steps", 1, "--eval-every", 0, "--clip", 0))[0]["grad_norm"] > 0.01
    a, b = (load_file(fit(f"{c}", "--steps", 1, "--eval-every", 0, "--clip", c, "--lr", 1e-2) / "model.safetensors") for c in (1e-9, 0))
    moved = [max((x[n] - kept[n]).abs().max().item() for n in kept) for x in (a, b)]
    assert moved[0] < 0.5 * moved[1]                                    # AdamW's eps shows in an update of tiny gradients


@pytest.mark.parametrize("flags", [(), ("--train", "all", "--batch-pages", 2), ("--epochs", 2), ("--train", "projector,lora", "--lora-dropout", 0.3)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(fit, capsys, monkeypatch, flags):
    common = (*flags, "--accumulate", 2, "--eval-every", 3, "--save-every", 2, "--lr", "1e-2", "--steps", 8)
    whole = fit("whole", *common)
    run = fit("run", *common)
    (run / "model.safetensors").unlink()                                # as if killed after step 5, checkpoint at step 4
    for checkpoint in sorted((run / "checkpoints").iterdir())[2:]:
        checkpoint.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:8]) + '\n{"step": 7, "tr')     # the last line cut short
    status, _, err = call(train, capsys, monkeypatch, "--resume", run)
    assert status == 0, err
    a, b = load_file(whole / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    def without_times(lines):
        return [{k: v for k, v in line.items() if k not in ("questions_per_second", "data_wait", "peak_gb")} for line in lines]
    assert without_times(metrics(whole)) == without_times(metrics(run))
    assert (whole / "samples.md").read_text() == (run / "samples.md").read_text()


def test_flags_beside_resume_override(fit, capsys, monkeypatch):
    run = fit("run", "--steps", 2, "--accumulate", 2)
    status, _, err = call(train, capsys, monkeypatch, "--resume", run, "--steps", 3)
    assert status == 0 and [line["step"] for line in training(run)] == [1, 2, 3], err
    assert json.loads((run / "settings.json").read_text())["steps"] == 3
    settings = (run / "settings.json").read_bytes()
    assert "nothing to do" in refuses(train, capsys, monkeypatch, "--resume", run)
    assert "the run began with another value" in refuses(train, capsys, monkeypatch, "--resume", run, "--train", "llm")
    assert "--lora-rank 8: the run began with another value" in refuses(train, capsys, monkeypatch, "--resume", run, "--lora-rank", 8)
    assert "--seed 5: the run began with another value" in refuses(train, capsys, monkeypatch, "--resume", run, "--seed", 5)
    assert "nothing to do after step 3" in refuses(train, capsys, monkeypatch, "--resume", run, "--steps", 1)
    assert (run / "settings.json").read_bytes() == settings
    assert "continues in its own folder" in refuses(train, capsys, monkeypatch, "--resume", run, "--out", "elsewhere")
    assert "nowhere: not found" in refuses(train, capsys, monkeypatch, "--resume", run, "--model", "nowhere")
    assert json.loads((run / "settings.json").read_text())["model"] != "nowhere"          # a mistake is not kept


def test_the_split_of_a_step_is_stored_and_kept_on_resume(fit, tiny, monkeypatch):
    monkeypatch.setattr("extras.memory.room_gb", lambda device: 1e3)
    monkeypatch.setattr(train, "choose_split", lambda args, model: choose_split(args, model) if args.batch_pages else pretend(args, model))
    def pretend(args, model):                                           # a GPU with room for all pages
        args.device = "cuda"
        choose_split(args, model)
        args.device = "cpu"
    run = fit("run", "--steps", 1, "--eval-every", 0)
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["batch_pages"], settings["accumulate"]) == (8, 1)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(run)])
    resumed = train.parse_args()
    assert (resumed.batch_pages, resumed.accumulate) == (8, 1)


def test_a_rate_beside_resume_leaves_the_other_parts_at_theirs(tmp_path, monkeypatch):
    settings = {"model": "tiny", "seed": 0, "from_scratch": False, "train": "projector,llm"}
    for before, typed, after in (("projector=0.01,llm=0.001", "llm=1e-4", "projector=0.01,llm=0.0001"), (0.01, "llm=1e-4", "projector=0.01,llm=0.0001"),
                                 ("projector=0.01,llm=0.001", "llm=1e-2", 0.01), ("projector=0.01,llm=0.001", "1e-4", 1e-4)):
        (tmp_path / "settings.json").write_text(json.dumps(settings | {"lr": before}))
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path), "--lr", typed])
        assert train.parse_args().lr == after


def test_a_page_that_every_epoch_skips_is_counted_once():
    skips = SkipLog()
    for epoch in range(3):
        for name in "ab":
            skips.usable(Example(Page(name, [], unanswered=2, epoch=epoch, resume=(epoch, 0, 0)), error="broken" if name == "a" else None))
    assert str(skips) == "skipped: 1 page, 0 questions too long, 4 without an answer"


def test_a_resumed_run_is_known_by_its_newest_weights(fit, capsys, monkeypatch):
    run = fit("run", "--steps", 2, "--accumulate", 2, "--lr", "1e-2", "--eval-every", 0)
    old = InternVL.from_pretrained(run, "cpu").state_dict()
    monkeypatch.setattr(InternVL, "save_pretrained", lambda *_: None)                     # killed before the model is written
    assert call(train, capsys, monkeypatch, "--resume", run, "--steps", 4)[0] == 0
    new = InternVL.from_pretrained(run, "cpu").state_dict()
    assert {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])} == {"projector"}
    monkeypatch.undo()
    assert call(train, capsys, monkeypatch, "--resume", run)[0] == 0                      # nothing is left but to write it
    assert all(torch.equal(tensor, new[name]) for name, tensor in InternVL.from_pretrained(run / "model.safetensors", "cpu").state_dict().items())


def test_a_failed_start_leaves_the_folder_free(tmp_path, capsys, monkeypatch):
    flags = "--tiny", "--from-scratch", "--steps", 1, "--accumulate", 1, "--eval-every", 0, "--out", tmp_path / "run"
    assert "nowhere" in refuses(train, capsys, monkeypatch, *flags, "--model", "nowhere")
    assert call(train, capsys, monkeypatch, *flags)[0] == 0


def test_compiled_blocks_give_the_same_step(fit):
    plain, compiled = (training(fit(name, *more, "--steps", 2, "--accumulate", 2, "--eval-every", 0))
                       for name, more in (("plain", ()), ("compiled", ("--compile",))))
    for a, b in zip(plain, compiled):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    config = torch._dynamo.config                                       # more graphs than 8 do not end the compiling without a word
    assert config.recompile_limit == 256 and config.fail_on_recompile_limit_hit


@pytest.mark.official
def test_a_run_its_checkpoints_and_its_export_are_models(fit, tmp_path, capsys, monkeypatch):
    run = fit("run", "--steps", 2, "--accumulate", 2, "--lr", "1e-2", "--save-every", 1)
    finished = InternVL.from_pretrained(run, "cpu").state_dict()
    last = InternVL.from_pretrained(run / "checkpoints" / "step-0000002.safetensors", "cpu").state_dict()
    first = InternVL.from_pretrained(run / "checkpoints" / "step-0000001.safetensors", "cpu").state_dict()
    assert all(torch.equal(finished[name], last[name]) for name in finished)
    assert {name.split(".")[0] for name in finished if not torch.equal(finished[name], first[name])} == {"projector"}
    assert call(train, capsys, monkeypatch, "--export", run / "model.safetensors", tmp_path / "of-file")[0] == 0
    assert (tmp_path / "of-file" / "README.md").exists()
    (run / "model.safetensors").unlink()                                # an interrupted run: its latest checkpoint counts
    assert all(torch.equal(finished[name], tensor) for name, tensor in InternVL.from_pretrained(run, "cpu").state_dict().items())
    status, _, err = call(train, capsys, monkeypatch, "--export", run, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert status == 0 and all(torch.equal(exported[official_name(name)], finished[name]) for name in finished), err
    for folder in (run, tmp_path / "exported"):
        assert f"{folder}: holds " in refuses(train, capsys, monkeypatch, "--export", run, folder)


def test_pages_held_out_stay_held_out(tmp_path, capsys, monkeypatch):
    rows = [{"question": f"What is {i}?", "answer": str(i), "image": f"{i}.png"} for i in range(30)]
    for i in range(30):
        draw_page(random.Random(i), "plain", SHAPES[0])[0].save(tmp_path / f"{i}.png")
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, out, err = call(train, capsys, monkeypatch, "--tiny", "--data", tmp_path / "my.jsonl", "--steps", 1, "--batch-pages", 1,
                            "--accumulate", 1, "--out", tmp_path / "run")
    assert status == 0 and "\n1 step, 1 question; skipped: 0 pages, " in out, err
    assert "train on pages that it held out" in refuses(train, capsys, monkeypatch, "--resume", tmp_path / "run", "--eval-every", 0)


def test_a_checkpoint_holds_what_trains_and_nothing_else(fit):
    run = fit("run", "--steps", 1, "--accumulate", 2)
    [path] = (run / "checkpoints").iterdir()
    names = load_file(path).keys()
    assert {name.split(".")[0] for name in names} == {"model", "optimizer"} and len(names) == 4 * len(projector_names())     # weight, two moments, step
    assert all(name.endswith(tuple(projector_names())) for name in names)


def test_too_long_questions_and_bad_pages_are_counted_and_named(fit, tmp_path, capsys, monkeypatch):
    rows = mixed_rows(12)
    rows[0]["question"] = "long " * 300                                 # of page 0
    for row in rows:
        if row["docId"] == 5:
            row["image"] = {"bytes": row["image"]["bytes"][:50], "path": None}
    write_split(tmp_path / "data", "train", rows)
    write_split(tmp_path / "data", "validation", mixed_rows(2, first=50))
    status, out, err = call(train, capsys, monkeypatch, "--model", "tiny", "--from-scratch", "--data", tmp_path / "data", "--workers", 0,
                            "--device", "cpu", "--max-length", 600, "--epochs", 1, "--accumulate", 3, "--out", tmp_path / "run")
    assert status == 0, err
    assert "page 0/1: 1 of its questions do not fit --max-length or the model's positions and are skipped" in err and "page 5/1: cannot read it as an image" in err
    assert "skipped: 1 page, 1 question too long, 0 without an answer" in out
    assert sum(line["questions"] for line in training(tmp_path / "run")) == sum(row["docId"] != 5 for row in rows) - 1


def test_more_than_one_percent_of_bad_pages_stops_the_run(tmp_path, capsys, monkeypatch):
    rows = mixed_rows(12)
    for row in rows:
        if row["docId"] in (2, 5, 7):
            row["image"] = {"bytes": b"broken", "path": None}
    write_split(tmp_path / "data", "train", rows)
    line = refuses(train, capsys, monkeypatch, "--model", "tiny", "--from-scratch", "--data", tmp_path / "data", "--workers", 0,
                   "--device", "cpu", "--epochs", 1, "--eval-every", 0, "--out", tmp_path / "run")
    assert "3 of 12 pages cannot be used, and 1 % is the limit" in line


def test_a_split_without_answers_is_refused(tmp_path, capsys, monkeypatch):
    rows = [row | {"answers": None} for row in mixed_rows(6)]
    write_split(tmp_path / "data", "train", rows)
    line = refuses(train, capsys, monkeypatch, "--model", "tiny", "--from-scratch", "--data", tmp_path / "data", "--workers", 0,
                   "--device", "cpu", "--eval-every", 0, "--out", tmp_path / "run")
    assert "has an answer (DocumentVQA's test split has none: train on another split)" in line


def test_a_loss_that_is_no_number_stops_before_the_update(folder, dataset, tmp_path, capsys, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"][:] = 3e38               # finite, or it would be refused when loaded
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    line = refuses(train, capsys, monkeypatch, "--model", folder, "--data", dataset, "--device", "cpu", "--workers", 0,
                   "--eval-every", 0, "--steps", 2, "--accumulate", 2, "--out", tmp_path / "run")
    assert "step 1: loss " in line and ("nan" in line or "inf" in line) and "stopped before the update; pages" in line and "/1" in line


@pytest.mark.parametrize("flags, message", [
    (("--nonsense",), "unrecognized arguments: --nonsense"),
    (("--accumulate", "0"), "0 is not between 1 and"),
    (("--warmup", "2"), "2.0 is not between 0 and 1"),
    (("--schedule", "wild"), "invalid choice: 'wild'"),
    (("--recipe", "mine"), "invalid choice: 'mine'"),
    (("--tiny", "--format", "peft"), "belong to --export RUN FOLDER"),
    (("--lora-targets", "head"), "'head' is not a set of layers; expected llm"),
    (("--lr", "projector=1e-3,tail=1"), "'tail' is not a part of the model"),
    (("--lr", "projector=1e-3,1e-4"), "invalid learning_rates value"),
    (("--lr", "lora=1e-3"), "--lr gives a rate for lora, but --train is projector"),
    (("--train", "projector,head"), "'head' is not a part of the model; expected projector"),
    (("--data", "nowhere"), "nowhere: not found; expected a local folder"),
    (("--model", "nowhere"), "nowhere: not found; expected a model folder"),
    (("--device", "nonsense"), "try --device cpu"),
    (("--max-length", "50"), "leave no room in --max-length 50; raise it or lower --max-tiles"),
    (("--resume", "nowhere"), "nowhere: not a run folder"),
    *(((flag, ""), f"argument {flag}: the value is empty") for flag in ("--out", "--resume", "--data", "--eval-data", "--model", "--device")),
    (("--export", "run", ""), "argument --export: the value is empty"), (("--push-to-hub", ""), "argument --push-to-hub: the value is empty"),
])
def test_wrong_flags_get_one_line(tmp_path, capsys, monkeypatch, flags, message):
    assert message in refuses(train, capsys, monkeypatch, "--tiny", "--steps", 1, "--eval-every", 0, "--out", tmp_path / "run", *flags)


def test_a_folder_that_holds_a_run_is_not_overwritten(fit, capsys, monkeypatch, tmp_path):
    run = fit("run", "--steps", 1, "--accumulate", 1)
    before = (run / "settings.json").read_bytes()
    assert "holds checkpoints already" in refuses(train, capsys, monkeypatch, "--tiny", "--out", run)
    assert "already; choose a new or an empty folder" in refuses(train, capsys, monkeypatch, "--tiny", "--out", TINY)
    assert (run / "settings.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    assert "exists, and is no folder" in refuses(train, capsys, monkeypatch, "--tiny", "--out", tmp_path / "file")


def command(*flags, cwd=ROOT, **environment):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, flags)], cwd=cwd, capture_output=True, text=True,
                          timeout=120, env=os.environ | environment)


def test_bare_training_finds_model_and_data_on_the_hub(folder, dataset, tmp_path):
    (tmp_path / "hub" / "models" / "OpenGVLab").mkdir(parents=True)
    (tmp_path / "hub" / "datasets" / "zhangfaen").mkdir(parents=True)
    (tmp_path / "hub" / "models" / "OpenGVLab" / "InternVL2-1B").symlink_to(folder)
    (tmp_path / "hub" / "datasets" / "zhangfaen" / "DocumentVQA").symlink_to(dataset)
    with serve(tmp_path / "hub") as address:
        done = command(cwd=tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    assert len(training(run)) == 2 and [line["step"] for line in metrics(run) if "val_loss" in line] == [0, 2]     # 12 pages, 8 a step


def test_without_a_network_training_stops_with_one_line(tmp_path):
    done = command("--out", tmp_path / "run", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: OpenGVLab/InternVL2-1B: the Hub cannot be reached")
    done = command("--model", TINY, "--from-scratch", "--out", tmp_path / "other", HF_ENDPOINT="http://127.0.0.1:9",
                   HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the Hub cannot be reached; connect to the network" in done.stderr.splitlines()[-1]


def test_validation_scores_the_greedy_answers_of_every_question(tiny, monkeypatch):
    from data import PageDataset
    pages = list(group_rows_into_pages(mixed_rows(3)))
    pages[0].accepted[1] = ["nothing like it", pages[0].answers[1].upper() + " "]
    told = iter([[*page.answers[:-1], "zzz"] for page in pages])            # right but for each page's last question
    def answering(model, rows, image_tokens, max_new_tokens):
        ids = [tiny.tokenizer(text).input_ids for text in next(told)]
        return ([column[i] if i < len(column) else None for column in ids] for i in range(max(map(len, ids))))
    monkeypatch.setattr(evaluate, "generate", answering)
    seen = []
    monkeypatch.setattr(InternVL, "encode_images", lambda self, tiles, see=InternVL.encode_images: seen.append(len(tiles)) or see(self, tiles))
    measures, answers = train.evaluate(tiny, [PageDataset(tiny, 4)[page] for page in pages])
    assert len(seen) == len(pages)                                          # a page is seen once
    questions = sum(len(page.questions) for page in pages)
    assert len(answers) == questions and measures["exact_match"] == pytest.approx(1 - 3 / questions)
    assert measures["anls"] == pytest.approx(1 - 3 / questions)
