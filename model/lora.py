"""How does a large layer learn with few parameters? LoRA: W is frozen, the product of two thin matrices is trained.

    y = W x + b + alpha / rank * B A dropout(x)       A (rank, in) random, B (out, rank) zeros: nothing changes at first
    W <- W + alpha / rank * B A                       merged: an ordinary weight again, at no cost

A and B are float32. Sources: LoRA (arXiv 2106.09685), section 4.1; layers as in the official `wrap_llm_lora` and
`wrap_backbone_lora`; PEFT's adapter files.
"""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from model.errors import InputError, finite
from model.layers import Linear
from model.names import file_names, fuse, join_rows, official_name, our_name, part_of, split_rows, transformers_names

ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

TARGETS = {                             # name -> which of the model's Linear layers get an adapter
    "llm": r"language\.blocks\..*",                                 # the seven of every block of the LLM
    "qkv": r"language\.blocks\.\d+\.attention\.(query|key|value)",
    "vision": r"vision\.blocks\..*",                                # the four of every block, q, k and v as one
    "all-linear": r"(?!language\.lm_head).*",                        # the projector's two as well, but not the head
}


class LoRA(nn.Module):
    """The product that is added to one Linear layer's output; dropout only in training mode."""

    def __init__(self, width_in, width_out, rank, alpha, dropout=0.0, device=None):
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        self.a = Linear(width_in, rank, bias=False, device=device)
        self.b = Linear(rank, width_out, bias=False, device=device)

    def forward(self, x):
        return self.b(self.a(F.dropout(x, self.dropout, self.training))) * self.scale

    def merged_delta(self):
        """The matrix that merging adds to the weight: float32 (out, in)."""
        return self.scale * (self.b.weight.float() @ self.a.weight.float())


def target_layers(model, targets):
    """{name: Linear} of the layers in `targets`, a comma-separated list of names in TARGETS."""
    pattern = "|".join(TARGETS[target] for target in targets.split(","))
    return {name: module for name, module in model.named_modules()
            if isinstance(module, Linear) and re.fullmatch(pattern, name) and ".adapter." not in name}


def add_adapters(model, rank=16, alpha=32, dropout=0.05, targets="llm", seed=0):
    """Give every layer in `targets` a trainable adapter, on the layer's device; `seed` draws A."""
    generator = torch.Generator().manual_seed(seed)
    for layer in target_layers(model, targets).values():
        layer.adapter = LoRA(layer.in_features, layer.out_features, rank, alpha, dropout, layer.weight.device)
        drawn = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)                # as PEFT
        layer.adapter.a.weight.data.copy_(drawn)
        nn.init.zeros_(layer.adapter.b.weight)


def adapters(model):
    """{name of a layer: its LoRA}."""
    return {name.removesuffix(".adapter"): module for name, module in model.named_modules() if isinstance(module, LoRA)}


# -------------------------------------------------------------------------------------------------------------- merging

@torch.no_grad()
def merged(model, name):
    """A tensor of the model by our name; an adapter is added to its layer's weight, in float32."""
    tensor, layer = model.get_parameter(name).detach(), model.get_submodule(name.rpartition(".")[0])
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor             # split over several ranks
    adapter = getattr(layer, "adapter", None) if name.endswith(".weight") else None
    return tensor if adapter is None else tensor.float() + adapter.merged_delta()


@torch.no_grad()
def lay_over(model, trained, scale, source):
    """Copy `trained`, {official name: tensor}, into a model; merge adapters that it lacks, `scale` times B A.

    Tensors take the dtype of the model's. Raises InputError, naming `source`, before anything is changed.
    """
    weights = {official_name(name): parameter for name, parameter in model.named_parameters()}
    whole = {name: tensor for name, tensor in trained.items() if name in weights or ".lora_" not in name}
    for name, tensor in whole.items():
        if name not in weights or tensor.shape != weights[name].shape or not tensor.is_floating_point():
            raise InputError(f"{source}: {name} {tuple(tensor.shape)} {tensor.dtype} is not of this model")
    merging = []                                                        # weight (out, in), A (rank, in), B (out, rank)
    for layer in sorted({name.rpartition(".lora_")[0] for name in trained.keys() - whole.keys()}):
        weight, a, b = weights.get(f"{layer}.weight"), *(trained.get(f"{layer}.lora_{side}.weight") for side in "AB")
        if weight is None or a is None or b is None or len(a) != b.shape[-1] or (len(b), a.shape[-1]) != weight.shape:
            raise InputError(f"{source}: the adapter of {layer} is not of this model")
        merging.append((weight, a, b))
    for name, tensor in whole.items():
        weights[name].copy_(tensor)
    for weight, a, b in merging:
        weight.copy_(weight.float() + scale * (b.float() @ a.float()).to(weight.device))


# ----------------------------------------------------------------------------------------------------------- PEFT files

def read_adapter_config(folder):
    """Read a PEFT folder's description -> (base model, scale of B A). Raises InputError for all but plain LoRA."""
    path = Path(folder, ADAPTER_CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        plain = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
        trouble = [f"{key} {config[key]!r}" for key in plain if config.get(key) not in (plain[key], None)]
        base = config["base_model_name_or_path"]
        if not base or not isinstance(base, str):
            raise InputError(f"{path}: base_model_name_or_path is {base!r}; write the model of the adapter there")
        if config["peft_type"] != "LORA" or trouble:
            raise InputError(f"{path}: {config['peft_type']} {', '.join(trouble)}; "
                             "expected plain LoRA, one rank and alpha for all layers")
        return base, config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    except (OSError, KeyError, TypeError, AttributeError, ArithmeticError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not the description of an adapter ({type(error).__name__}: {error})") from error


def our_layers(found, model):
    """Rename the tensors of a file made on the official model, {name there: tensor}, and cut those of fused layers:
    each of ours gets its rows of weight and B, and all of A.
    """
    language, weights, found = model.config.language, dict(model.named_parameters()), dict(found)
    for name, ours in file_names(weights, language.decoder).items():
        rows = [len(weights[one]) for one in ours]
        for ending in ("weight", "lora_A.weight", "lora_B.weight") if name.endswith(".weight") else ("",):
            if (tensor := found.pop(name.removesuffix("weight") + ending, None)) is not None:
                cut = len(ours) > 1 and ending != "lora_A.weight" and len(tensor) == sum(rows)   # else refused, shared
                pieces = split_rows(tensor, rows, language.kv_heads, language.decoder) if cut else [tensor] * len(ours)
                found |= {official_name(one).removesuffix("weight") + ending: piece for one, piece in zip(ours, pieces)}
    return found


def fused_layers(trained, language):
    """{name in a checkpoint: tensor} of adapters -> {official name: tensor}; those of fused layers become one, exactly:
    its A has the rows of all, its B keeps their outputs apart. All get one rank, filled with zeros: one scale holds.
    """
    done = {}
    for name, ours in file_names(map(our_name, trained), language.decoder).items():
        pieces = [trained[official_name(one)] for one in ours]
        if ".lora_B." in name:
            pieces = torch.block_diag(*pieces).split([len(piece) for piece in pieces])
            pieces = [join_rows(pieces, language.kv_heads, language.decoder)]
        done[name] = torch.cat(pieces)
    rank = max(len(tensor) for name, tensor in done.items() if ".lora_A." in name)
    for name, tensor in done.items():
        missing = {".lora_A.": (0, 0, 0, rank - len(tensor)), ".lora_B.": (0, rank - tensor.shape[-1])}
        done[name] = F.pad(tensor, missing.get(name[-14:-6], (0, 0)))
    return done


def load_adapter(folder, model, skip=()):
    """Merge a PEFT folder into a model, whether it was made on the official model or on transformers' own.

    The parts in `skip` stay. Raises InputError for files that cannot be read and for layers that the model lacks.
    """
    (_, scale), path, trained = read_adapter_config(folder), Path(folder, ADAPTER_WEIGHTS), {}
    try:
        found = {re.sub(r"^model\.(?!layers\.)", "", name.removeprefix(PREFIX)): finite(tensor, name, path)
                 for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); a PEFT folder holds its adapter there") from error
    # a model of transformers 5 has language_model.layers where all files have language_model.model.layers
    found = our_layers({re.sub(r"^language_model\.(?!model\.|lm_head|output\.)", "language_model.model.", name): tensor
                        for name, tensor in found.items() if part_of(name) not in skip}, model)
    for weight, _ in model.named_parameters():
        layer = weight.removesuffix("weight")
        for ours in (weight, f"{layer}adapter.a.weight", f"{layer}adapter.b.weight") if layer != weight else (weight,):
            name, pieces = official_name(ours), transformers_names(ours)
            tensor = found.pop(name) if name in found else fuse(ours, [found.pop(piece, None) for piece in pieces])
            trained |= {} if tensor is None else {name: tensor}
    if found:
        raise InputError(f"{path}: {len(found)} tensors are not of this model, the first: {next(iter(found))}")
    lay_over(model, trained, scale, folder)
