"""Every tensor has one name in each layout, and finds its way back."""
import pytest
import torch
from reference import transformers_tensors

from model import InputError, InternVL
from model.config import Config
from model.lora import add_adapters
from model.names import NAMES, ROWS, fuse, official_name, our_name, split, transformers_names


def full_model():
    with torch.device("meta"):
        model = InternVL(Config())
    for module in model.modules():                                      # adapters of every layer, without drawing them
        if hasattr(module, "adapter"):
            module.adapter = None
    return model


def test_names_lead_to_the_official_ones_and_back(tiny):
    add_adapters(tiny, targets="all-linear")
    for ours in [*full_model().state_dict(), *tiny.state_dict()]:
        assert our_name(official_name(ours)) == ours
    assert official_name("vision.blocks.7.mlp_up.weight") == "vision_model.encoder.layers.7.mlp.fc1.weight"
    assert official_name("vision.blocks.12.layer_scale_1") == "vision_model.encoder.layers.12.ls1"
    assert official_name("language.blocks.0.mlp_up.adapter.b.weight") == "language_model.model.layers.0.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize("name", ["", "x", "mlp1.7.weight", "vision_model.encoder.layers.x.ls1", "a\n.3.b", "model.mlp1.0.weight", "mlp1.0.weight.weight"])
def test_foreign_names_are_none_of_ours(name):
    assert our_name(name) is None


def test_a_tensor_without_a_row_is_named():
    with pytest.raises(InputError, match="projector.no_such_layer.weight has no row in model/names.py"):
        official_name("projector.no_such_layer.weight")


@pytest.mark.official
def test_transformers_names_are_those_of_the_reference():
    shapes = {official_name(name): tensor for name, tensor in full_model().state_dict().items()}
    ours = [part for name in full_model().state_dict() for part in transformers_names(name)]
    assert len(ours) == 733 and {name.removeprefix("model.") for name in transformers_tensors(shapes)} == {
        "lm_head.weight" if name == "language_model.lm_head.weight" else name.replace("language_model.model.", "language_model.") for name in ours}
    assert transformers_names("vision.blocks.7.attention.qkv.bias")[1] == "vision_tower.encoder.layer.7.attention.k_proj.bias"
    assert transformers_names("projector.out.weight") == ["multi_modal_projector.linear_2.weight"]
    assert transformers_names("language.lm_head.weight") == ["language_model.lm_head.weight"]


def test_every_row_has_three_names_of_its_own():
    assert len(ROWS) == sum(len(rows) for _, *rows in NAMES)
    for names in zip(*ROWS, strict=True):
        assert len(set(names)) == len(names)


def test_fusing_undoes_splitting():
    qkv = torch.randn(12, 5)
    pieces = split("vision.blocks.0.attention.qkv.weight", qkv)
    assert [name.rpartition("attention.")[2] for name in pieces] == ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    assert all(torch.equal(piece, part) for piece, part in zip(pieces.values(), qkv.chunk(3)))
    assert torch.equal(fuse("vision.blocks.0.attention.qkv.weight", list(pieces.values())), qkv)
    assert split("language.lm_head.weight", qkv).keys() == {"language_model.lm_head.weight"}
    assert fuse("language.lm_head.weight", [qkv]) is qkv and fuse("vision.blocks.0.attention.qkv.weight", [None] * 3) is None


@pytest.mark.parametrize("missing", [set(), {1}, {0, 2}])
def test_adapters_of_query_key_and_value_become_one_with_the_same_product(missing):
    """Rank 2 each; a layer without an adapter adds nothing to its third of the outputs."""
    a, b = ([None if i in missing else torch.randn(*size) for i in range(3)] for size in ((2, 5), (4, 2)))
    whole_a = fuse("vision.blocks.0.attention.qkv.adapter.a.weight", a)
    whole_b = fuse("vision.blocks.0.attention.qkv.adapter.b.weight", b)
    expected = torch.cat([torch.zeros(4, 5) if i in missing else b[i] @ a[i] for i in range(3)])
    assert torch.allclose(whole_b @ whole_a, expected, atol=1e-6)
