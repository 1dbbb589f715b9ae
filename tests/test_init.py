"""--init draws the named parts, loads the others, and stores what it drew; a changed part has no other way in."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from commands import call, infer, refuses, train
from conftest import ROOT
from safetensors.torch import load_file
from test_checkpoint import set_config
from torch import nn

from model import InputError, InternVL, names
from model.checkpoint import TINY
from model.layers import Linear
from model.names import official_name, part_of

FLAGS = "--model", "tiny", "--data", "synthetic:1", "--device", "cpu", "--workers", 0, "--steps", 2, "--accumulate", 1, "--eval-every", 0, "--lr", "1e-2"


class Queries(nn.Module):
    """A projector of another class: every image token attends to all patches of its tile."""

    def __init__(self, config):
        super().__init__()
        self.test_queries = nn.Parameter(torch.zeros(config.tokens_per_tile, config.language.width))
        self.test_layer = Linear(config.vision.width, config.language.width)

    def forward(self, patches):
        x = self.test_layer(patches)
        return F.scaled_dot_product_attention(self.test_queries.to(x.dtype).expand(len(x), -1, -1), x, x)


@pytest.fixture
def another_class(monkeypatch):
    """The model with Queries for its projector, and the rows of its new tensors."""
    monkeypatch.setattr("model.internvl.Projector", Queries)
    for name in ("test_queries", "test_layer"):
        monkeypatch.setitem(names.OFFICIAL, f"projector.{name}", f"mlp1.{name}")
        monkeypatch.setitem(names.OURS, f"mlp1.{name}", f"projector.{name}")
        monkeypatch.setitem(names.TRANSFORMERS, f"projector.{name}", f"multi_modal_projector.{name}")


@pytest.fixture
def fit(tmp_path, capsys, monkeypatch):
    """Runs train.py on the embedded model; returns the run folder and what was printed."""
    def run(name, *flags):
        status, out, err = call(train, capsys, monkeypatch, *FLAGS, "--out", tmp_path / name, *flags)
        assert status == 0, err
        return tmp_path / name, out
    return run


@pytest.fixture
def no_drawing(monkeypatch):
    """From the call on, nothing can be drawn."""
    def never(self, seed, parts=names.PARTS):
        assert not parts, f"drawn again: {parts}"
    return lambda: monkeypatch.setattr(InternVL, "init_weights", never)


def weights(folder):
    return load_file(folder / "model.safetensors")


def interrupt(run):
    """Leave of a run what an interrupted one has; returns the weights that its end wrote."""
    whole = weights(run)
    (run / "model.safetensors").unlink()
    return whole


def same(model, tensors):
    """Whether a model has these tensors, but for the rounding of the dtype on file."""
    return all(torch.equal(tensor.to(tensors[official_name(name)].dtype), tensors[official_name(name)])
               for name, tensor in model.state_dict().items())


def test_a_projector_of_another_class_trains_under_pretrained_weights(another_class, fit, no_drawing, capsys, monkeypatch, tmp_path):
    refused = refuses(train, capsys, monkeypatch, *FLAGS, "--out", tmp_path / "none")
    assert "3 missing (mlp1.test_layer.bias, mlp1.test_layer.weight, mlp1.test_queries)" in refused and "--init projector" in refused
    assert all(name in refused for name in sorted(filter(lambda name: part_of(name) == "projector", weights(TINY)))[:8])
    run, out = fit("run", "--init", "projector", "--seed", 3)
    assert "drawn from --seed 3: mlp1.test_queries, mlp1.test_layer.weight, mlp1.test_layer.bias\n" in out
    assert json.loads((run / "settings.json").read_text())["init"] == "projector"
    base, after = weights(TINY), weights(run)
    assert {name for name in base.keys() & after.keys() if torch.equal(base[name], after[name])} == {
        name for name in base if part_of(name) != "projector"}
    drawn = InternVL.from_pretrained("tiny", "cpu", init=["projector"], seed=3).projector.test_queries
    assert 0 < (drawn - after["mlp1.test_queries"]).abs().max() < 0.1 and drawn.std() > 0.05         # trained from the drawn ones
    adapted, _ = fit("adapted", "--init", "projector", "--train", "lora")           # its checkpoint holds the drawn projector
    no_drawing()
    assert same(InternVL.from_pretrained(run / "checkpoints" / "step-0000002.safetensors", "cpu"), interrupt(run))
    status, out, err = call(train, capsys, monkeypatch, "--resume", run, "--steps", 3)
    assert status == 0 and "drawn" not in out, err
    assert "--init vision: the run began with another value" in refuses(train, capsys, monkeypatch, "--resume", run, "--init", "vision")
    for source, layout in ((run, "official"), (run, "transformers"), (adapted, "peft")):
        refused = refuses(train, capsys, monkeypatch, "--export", source, tmp_path / layout, "--format", layout)
        assert "mlp1.test_queries" in refused and "multi_modal_projector.linear_1.weight" in refused and not (tmp_path / layout).exists()
    page = ROOT / "assets" / "explain_page.png"
    flags = "--model", run, "--device", "cpu", "--image", page
    assert call(infer, capsys, monkeypatch, *flags, "--attend", tmp_path / "look.png", "What is the room?")[0] == 0
    assert call(infer, capsys, monkeypatch, *flags, "--explain", tmp_path / "out.html", "What is the room?")[0] == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Queries makes image tokens" in text and "64 tokens, in their order" in text and "neighboring" not in text


def test_a_buffer_is_refused_because_its_values_would_be_lost(another_class, monkeypatch):
    class WithTable(Queries):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("table", torch.ones(3), persistent=False)

    monkeypatch.setattr("model.internvl.Projector", WithTable)
    with pytest.raises(InputError, match="projector.table: no place for buffers"):
        InternVL.from_pretrained("tiny", "cpu", init=["projector"])


@pytest.mark.parametrize("flags, parts", [
    (("--init", "vision"), {"vision"}), (("--init", "llm", "--train", "lora"), {"llm"}), (("--from-scratch",), set(names.PARTS))])
def test_a_drawn_part_is_in_every_checkpoint_trained_or_frozen(fit, no_drawing, capsys, monkeypatch, flags, parts):
    run, _ = fit("run", *flags)
    held = load_file(run / "checkpoints" / "step-0000002.safetensors")
    base, expected, changed = weights(TINY), interrupt(run), set() if "lora" in flags else {"projector"}
    assert {name for name in base if f"model.{name}" in held} >= {name for name in base if part_of(name) in parts}
    assert {part_of(name) for name in base if not torch.equal(base[name], expected[name])} == parts | changed
    no_drawing()
    assert same(InternVL.from_pretrained(run, "cpu"), expected)
    status, _, err = call(train, capsys, monkeypatch, "--resume", run, "--steps", 3)
    assert status == 0, err


def test_what_is_drawn_depends_on_the_seed_alone():
    first, again, other = (InternVL.from_pretrained("tiny", "cpu", init=["projector", "vision"], seed=seed) for seed in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        drawn = part_of(name) != "llm" and tensor.ndim > 1
        assert torch.equal(tensor, other.state_dict()[name]) != drawn


def test_a_part_is_drawn_over_a_run(fit, no_drawing, tmp_path):
    """The second run keeps what the first one trained, but for the part that it draws; both checkpoints are read."""
    first, _ = fit("first", "--train", "projector,llm", "--init", "vision")
    whole = interrupt(first)
    second, _ = fit("second", "--model", first, "--init", "projector", "--seed", 5)
    expected = interrupt(second)
    assert {part_of(name) for name in whole if not torch.equal(whole[name], expected[name])} == {"projector"}
    no_drawing()
    assert same(InternVL.from_pretrained(second, "cpu"), expected)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path / "model"


@pytest.mark.official
def test_another_shuffle_factor_or_width_needs_the_flag_and_exports(folder, fit, capsys, monkeypatch, tmp_path):
    set_config(folder, downsample_ratio=0.25)
    refused = refuses(train, capsys, monkeypatch, *FLAGS, "--model", folder, "--out", tmp_path / "none")
    assert "3 wrong shape (mlp1.0.bias (256,) instead of (1024,)" in refused and "--init projector" in refused
    run, _ = fit("shuffle", "--model", folder, "--init", "projector")
    status, _, err = call(train, capsys, monkeypatch, "--export", run, tmp_path / "out", "--format", "transformers")
    assert status == 0 and weights(tmp_path / "out")["multi_modal_projector.linear_1.weight"].shape == (96, 1024), err
    set_config(folder, llm_config__hidden_size=48)
    refused = refuses(train, capsys, monkeypatch, *FLAGS, "--model", folder, "--init", "llm", "--out", tmp_path / "none")
    assert "mlp1.1.weight (96, 256) instead of (48, 1024)" in refused and "language_model" not in refused
    fit("width", "--model", folder, "--init", "llm,projector")


def test_a_checkpoint_without_a_drawn_part_is_refused(fit):
    run, _ = fit("run")
    interrupt(run)
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"init": "vision"}))
    with pytest.raises(InputError, match="lacks vision_model.*which its run trains or drew"):
        InternVL.from_pretrained(run, "cpu")


def test_a_row_of_one_name_is_enough():
    """names.py as a fork would change it."""
    source = (ROOT / "model" / "names.py").read_text(encoding="utf-8")
    rows = '(("projector", "mlp1", "multi_modal_projector"), ("queries",)),'
    exec(source.replace("NAMES = (", "NAMES = (" + rows, 1), fork := {"__name__": "fork"})
    assert fork["official_name"]("projector.queries") == "mlp1.queries" and fork["our_name"]("mlp1.queries") == "projector.queries"
    assert fork["transformers_names"]("projector.queries") == ["multi_modal_projector.queries"]
