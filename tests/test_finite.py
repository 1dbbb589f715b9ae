"""Weights, logits and losses that are not numbers are one line that names the tensor or the page."""
import math

import pytest
import torch
from commands import call, infer, refuses, train
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_data import mixed_rows

from data import PageDataset, group_rows_into_pages
from extras.evaluate import answer_questions, evaluate_rows
from extras.run_folder import append_line
from model import InputError
from model.checkpoint import checksum, write_tensors
from model.errors import finite


@pytest.fixture
def base(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def poison(file, name, value):
    weights = load_file(file)
    weights[name].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})


def test_every_number_is_looked_at_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert finite(torch.empty(0, 3, dtype=dtype), "a", "b").numel() == 0
        for value in (math.nan, math.inf, -math.inf):
            for place in (0, 37, 999):
                tensor = torch.linspace(-6e4, 6e4, 1000).to(dtype)
                assert finite(tensor, "a", "b") is tensor
                tensor[place] = value
                with pytest.raises(InputError, match="b: a is not finite everywhere"):
                    finite(tensor, "a", "b")
    assert finite(torch.tensor([1, 2]), "a", "b") is not None


@pytest.mark.parametrize("name, value", [("mlp1.1.weight", math.nan), ("vision_model.embeddings.class_embedding", math.inf),
                                         ("language_model.model.layers.0.mlp.up_proj.weight", -math.inf)])
def test_a_base_model_is_refused_by_every_reader(base, tmp_path, capsys, monkeypatch, name, value):
    poison(base / "model.safetensors", name, value)
    asked = ("--max-new-tokens", 2, "What?")
    for program, *flags in ((infer, *asked), (infer, "--int8", *asked), (infer, "--dtype", "bfloat16", *asked),
                            (train, "--data", "synthetic:1", "--steps", 1, "--out", tmp_path / "run"), (train, "--export", base, tmp_path / "out")):
        model = () if "--export" in flags else ("--model", base, "--device", "cpu")
        assert f"model.safetensors: {name} is not finite everywhere" in refuses(program, capsys, monkeypatch, *model, *flags)
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


@pytest.fixture
def run(base, tmp_path, capsys, monkeypatch):
    """A run of one step with adapters, without its whole model."""
    status, _, err = call(train, capsys, monkeypatch, "--model", base, "--data", "synthetic:1", "--device", "cpu", "--workers", 0, "--accumulate", 1,
                          "--eval-every", 0, "--train", "lora", "--steps", 1, "--out", tmp_path / "run")
    assert status == 0, err
    (tmp_path / "run" / "model.safetensors").unlink()
    return tmp_path / "run"


def test_a_checkpoint_is_refused_by_every_reader(run, tmp_path, capsys, monkeypatch):
    """Also one whose checksum is right, of a program that wrote it as it was."""
    [file] = (run / "checkpoints").iterdir()
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    for name in (next(name for name in tensors if name.startswith("model.") and "lora_B" in name), next(name for name in tensors if "exp_avg_sq" in name)):
        kept = tensors[name].clone()
        tensors[name].view(-1)[-1] = math.nan
        save_file(tensors, file, metadata | {"sha256": checksum(tensors, tensors.get, metadata["state"])})
        for program, *flags in ((infer, "--model", run, "--device", "cpu", "What?"), (train, "--resume", run, "--steps", 2),
                                (train, "--export", run, tmp_path / "out"), (train, "--export", run, tmp_path / "out", "--format", "peft")):
            assert f"{file}: {name} is not finite everywhere" in refuses(program, capsys, monkeypatch, *flags)
        tensors[name] = kept
    with pytest.raises(InputError, match="exp_avg_sq.* is not finite everywhere"):              # and none is written
        write_tensors(tmp_path / "x.safetensors", {"optimizer.exp_avg_sq": torch.tensor([1, math.inf])}, {})
    assert not (tmp_path / "x.safetensors").exists()


def test_an_adapter_is_refused(run, tmp_path, capsys, monkeypatch):
    assert call(train, capsys, monkeypatch, "--export", run, tmp_path / "adapter", "--format", "peft")[0] == 0
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    name = next(name for name in load_file(file) if "lora_A" in name)
    poison(file, name, math.nan)
    assert f"{file}: {name} is not finite everywhere" in refuses(infer, capsys, monkeypatch, "--model", tmp_path / "adapter", "--device", "cpu", "What?")


def test_logits_that_are_not_finite_are_no_answer(tiny, tmp_path):
    """Weights may be finite, and what they compute not: a training that diverged. Then the last norm may give zeros."""
    weight = tiny.language.norm.weight.data.clone()
    for part, value in ((tiny.language.embedding, 1e30), (tiny.language.norm, 0), (tiny.language.norm, 3e38)):
        tiny.language.norm.weight.data.copy_(weight)
        part.weight.data.fill_(value)
        with pytest.raises(InputError, match="no answer: the logits are not finite, or all equal; the weights are damaged"):
            tiny.chat(max_new_tokens=2).ask("What?")
    Image.new("L", (128, 128), 99).save(tmp_path / "page.png")
    with pytest.raises(InputError, match="page.png: no answer: the logits are not finite"):
        answer_questions(tiny, [("What?", [str(tmp_path / "page.png")])], tmp_path / "a.jsonl", max_new_tokens=2)
    with pytest.raises(InputError, match="the logits are not finite"):
        evaluate_rows(tiny, mixed_rows(1), dict(max_tiles=1, max_new_tokens=2, temperature=1.0, top_p=1.0, seed=0), tmp_path / "p.json")
    assert (tmp_path / "a.jsonl").read_text() == "" and not (tmp_path / "p.json").exists()


def test_a_validation_that_is_not_finite_names_its_page_and_is_not_written(tiny, tmp_path):
    tiny.language.norm.weight.data.fill_(3e38)
    examples = [PageDataset(tiny, 1)[page] for page in group_rows_into_pages(mixed_rows(2))]
    with pytest.raises(InputError, match=f"validation page {examples[0].page.name}: loss (nan|inf); look at the page, or lower --lr"):
        train.evaluate(tiny, examples)
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_line(tmp_path / "metrics.jsonl", {"step": 1, "val_loss": math.nan})
    assert not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").read_text() == ""
