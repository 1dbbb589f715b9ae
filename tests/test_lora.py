"""Adapters are PEFT's to the last digit, merge into ordinary weights, and nothing else moves."""
import copy
from argparse import Namespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import accumulate_gradients, reference_model, reference_pixels
from small_data import mixed_rows

from data import PageDataset, group_rows_into_pages
from extras.run_folder import restore_checkpoint, save_checkpoint
from model import InputError, InternVL
from model.checkpoint import load_checkpoint, read_checkpoint
from model.layers import Linear
from model.lora import TARGETS, adapters, add_adapters, merged, target_layers
from train import choose_parts, make_optimizer, part_parameters

SETTINGS = dict(lr=1e-2, weight_decay=0.01, beta2=0.999, device="cpu")
LLM_LEAVES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def example(model, page=0):
    pages = group_rows_into_pages(mixed_rows(3))
    return PageDataset(model, 4)[list(pages)[page]]


def logits(model, page):
    batch = model.pack([(page.tiles, page.prompt)])
    return model(batch)


def filled(model, seed=0):
    """Give B something other than zeros, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model).values():
        adapter.b.weight.data = 0.1 * torch.randn(adapter.b.weight.shape, generator=generator)
    return model


@pytest.fixture
def adapted(tiny):
    add_adapters(tiny, rank=4, alpha=8, dropout=0.0)
    return filled(tiny)


def test_targets_are_the_layers_they_name():
    with torch.device("meta"):
        from model.config import Config
        model = InternVL(Config())
    counts = {target: len(target_layers(model, target)) for target in TARGETS}
    projector = sum(isinstance(module, Linear) for module in model.projector.modules())
    assert {"llm": 7 * 24, "qkv": 3 * 24, "vision": 4 * 24, "all-linear": 11 * 24 + projector}.items() <= counts.items()
    assert len(target_layers(model, "qkv,vision")) == 7 * 24
    with torch.device("meta"):
        for layer in target_layers(model, "llm").values():
            from model.lora import LoRA
            layer.adapter = LoRA(layer.in_features, layer.out_features, 16, 32)
    assert sum(p.numel() for p in part_parameters(model)["lora"]) == 8_798_208          # seven layers in each of 24 blocks, rank 16


def test_a_new_adapter_changes_nothing_and_is_drawn_as_peft_draws_it(tiny):
    page = example(tiny)
    before = logits(tiny, page)
    add_adapters(tiny, rank=8, alpha=16, targets="all-linear", seed=3)
    assert torch.equal(logits(tiny, page), before)
    a = tiny.language.blocks[0].mlp_down.adapter.a.weight                               # (8, 256)
    assert a.abs().max() <= 256 ** -0.5 and a.abs().max() > 0.9 * 256 ** -0.5           # uniform in +- 1 / sqrt(in)
    assert a.std().item() == pytest.approx(256 ** -0.5 / 3 ** 0.5, rel=0.05)
    again = copy.deepcopy(tiny)
    add_adapters(again, rank=8, alpha=16, targets="all-linear", seed=3)
    assert all(torch.equal(x, y) for x, y in zip(tiny.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("targets", ["llm", "qkv", "vision", "all-linear"])
def test_merged_logits_equal_unmerged_ones(tiny, targets, tmp_path):
    page = example(tiny)
    before = logits(tiny, page)
    add_adapters(tiny, rank=4, alpha=8, dropout=0.5, targets=targets)
    filled(tiny).eval()
    unmerged = logits(tiny, page)
    tiny.save_pretrained(tmp_path / "merged")
    plain = InternVL.from_pretrained(tmp_path / "merged", "cpu")
    assert (logits(plain, page) - unmerged).abs().max() < 1e-5 and not adapters(plain)
    assert (before - unmerged).abs().max() > 1e-2


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_whatever_the_frozen_weights_are(tiny, frozen):
    tiny.to(frozen)
    tiny.dtype = frozen
    add_adapters(tiny, dropout=0.1, targets="all-linear")
    choose_parts(tiny, "lora")
    accumulate_gradients(tiny, [example(tiny)], 1)
    assert {p.dtype for p in tiny.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in tiny.parameters() if not p.requires_grad} == {frozen}
    assert all((p.grad is not None) == p.requires_grad for p in tiny.parameters())


def peft_twin(model, pattern):
    """PEFT's LoRA on transformers' InternVL, with the weights and the adapters of `model`."""
    rank = next(iter(adapters(model).values())).a.out_features
    twin = get_peft_model(reference_model(without_adapters(model)),
                          LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=pattern))
    layers = {name.removeprefix("base_model.model."): module for name, module in twin.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == len(adapters(model))
    for name, adapter in adapters(model).items():
        layer = layers[native(name)]
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = adapter.a.weight.data.clone(), adapter.b.weight.data.clone()
    return twin, layers


def without_adapters(model):
    plain = copy.deepcopy(model)
    for layer in target_layers(plain, "all-linear").values():
        layer.adapter = None
    return plain


def native(name):
    """Our name of an LLM's layer -> transformers'."""
    for ours, theirs in (("language.blocks", "model.language_model.layers"), ("attention.query", "self_attn.q_proj"),
                         ("attention.key", "self_attn.k_proj"), ("attention.value", "self_attn.v_proj"),
                         ("attention.out", "self_attn.o_proj"), ("mlp_", "mlp.")):
        name = name.replace(ours, theirs)
    return name if "self_attn" in name else name + "_proj"


def test_outputs_gradients_and_merged_weights_are_pefts(adapted):
    choose_parts(adapted, "lora")
    page = example(adapted)
    page.page.questions, page.page.answers = page.page.questions[:1], page.page.answers[:1]       # the reference reads one a row
    page = PageDataset(adapted, 4)[page.page]
    twin, layers = peft_twin(adapted, rf"model\.language_model\..*\.({LLM_LEAVES})")
    ours = logits(adapted, page)
    theirs = twin(input_ids=torch.tensor([page.prompt.ids]), pixel_values=reference_pixels(page.tiles)).logits[0, :-1]
    labels = torch.tensor(page.prompt.labels[1:])
    assert (ours - theirs[labels >= 0]).abs().max() < 1e-6 * ours.abs().max()
    accumulate_gradients(adapted, [page], 1)
    torch.nn.functional.cross_entropy(theirs, labels).backward()
    for name, adapter in adapters(adapted).items():
        layer = layers[native(name)]
        for mine, peft in ((adapter.a, layer.lora_A["default"]), (adapter.b, layer.lora_B["default"])):
            assert (mine.weight.grad - peft.weight.grad).abs().max() < 1e-6, name
    theirs = dict(twin.merge_and_unload().named_parameters())
    for name, tensor in ((name, merged(adapted, name)) for name in adapted.state_dict() if ".adapter." not in name):
        if name.removesuffix(".weight") in adapters(adapted):
            assert (tensor - theirs[native(name.removesuffix(".weight")) + ".weight"]).abs().max() < 1e-6, name


MODES = {                               # --train, --lora-targets -> what moves
    ("lora", "llm"): {"language"}, ("lora", "qkv"): {"language"}, ("lora", "vision"): {"vision"},
    ("lora", "all-linear"): {"language", "vision", "projector"}, ("projector,lora", "llm"): {"language", "projector"},
}


@pytest.mark.parametrize("train, targets", MODES)
def test_only_the_adapters_and_what_else_trains_move(tiny, train, targets):
    add_adapters(tiny, dropout=0.1, targets=targets)
    choose_parts(tiny, train)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    optimizer = make_optimizer(tiny, Namespace(**SETTINGS))
    for _ in range(2):                                                  # B is zero at first, so A moves from the second step on
        accumulate_gradients(tiny, [example(tiny)], 1)
        optimizer.step()
    changed = {name for name, tensor in tiny.state_dict().items() if not torch.equal(tensor, before[name])}
    whole = {"projector"} if "projector" in train else set()
    assert changed == {name for name in before if ".adapter." in name or name.split(".")[0] in whole}
    assert {name.split(".")[0] for name in changed} == MODES[train, targets]
    assert {name.removesuffix(".adapter.a.weight") for name in changed if name.endswith("a.weight")} == set(target_layers(tiny, targets))


def test_dropout_is_for_training_alone(tiny):
    add_adapters(tiny, rank=4, alpha=8, dropout=0.5)
    filled(tiny).eval()
    page = example(tiny)
    assert torch.equal(logits(tiny, page), logits(tiny, page))
    tiny.train()
    assert not torch.equal(logits(tiny, page), logits(tiny, page))


@pytest.mark.parametrize("train, targets", [("lora", "all-linear"), ("projector,llm,vision", None)])
def test_recomputed_activations_give_the_same_gradient(tiny, train, targets):
    if targets:
        add_adapters(tiny, dropout=0.3, targets=targets)
        filled(tiny)
    choose_parts(tiny, train)
    gradients = []
    for gradient_checkpointing in (False, True):
        tiny.vision.gradient_checkpointing = tiny.language.gradient_checkpointing = gradient_checkpointing
        tiny.zero_grad()
        torch.manual_seed(1)                                            # the same dropout, drawn again in the backward pass
        loss = accumulate_gradients(tiny, [example(tiny)], 1)
        gradients.append([loss, *(p.grad for p in tiny.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_checkpoint_of_adapters_is_merged_where_there_are_none_and_restored_where_they_are(adapted, tmp_path):
    plain, fresh = without_adapters(adapted), without_adapters(adapted)
    choose_parts(adapted, "lora")
    adapted.drawn = fresh.drawn = ()                                    # as if its weights lay in a model folder
    optimizer = make_optimizer(adapted, Namespace(**SETTINGS))
    accumulate_gradients(adapted, [example(adapted)], 1)
    optimizer.step()
    save_checkpoint(tmp_path / "run" / "step-1.safetensors", adapted, optimizer, {"step": 1})
    assert read_checkpoint(tmp_path / "run" / "step-1.safetensors")[2] == {"step": 1}
    load_checkpoint(tmp_path / "run" / "step-1.safetensors", plain)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in ((name, merged(adapted, name)) for name in plain.state_dict()))
    add_adapters(fresh, rank=4, alpha=8, seed=9)
    choose_parts(fresh, "lora")
    again = make_optimizer(fresh, Namespace(**SETTINGS))
    assert restore_checkpoint(tmp_path / "run" / "step-1.safetensors", fresh, again) == {"step": 1}
    assert all(torch.equal(a, b) for a, b in zip(adapted.state_dict().values(), fresh.state_dict().values()))
    assert all(torch.equal(again.state[b][key], optimizer.state[a][key])
               for a, b in zip(adapted.parameters(), fresh.parameters()) if a.requires_grad for key in ("exp_avg", "exp_avg_sq", "step"))
    other = InternVL.from_scratch("tiny", device="cpu")
    other.language.blocks = other.language.blocks[:1]
    with pytest.raises(InputError, match="step-1.safetensors: the adapter of language_model.model.layers.1.* is not of this model"):
        load_checkpoint(tmp_path / "run" / "step-1.safetensors", other)
