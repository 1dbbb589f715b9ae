"""What is each tensor called in files? Our names, the official ones and transformers', side by side.

A part whose class has new tensors needs its rows here and nothing else: ("queries",) for one that exists only here.
Sources: the header of the published file; transformers' models/internvl; the names that PEFT gives to adapters.
"""
import re

import torch

from model.errors import InputError

NAMES = (                               # ours, official, transformers: first where a part begins, then what it holds
    (("vision", "vision_model.embeddings", "vision_tower.embeddings"),
     ("class_token", "class_embedding", "cls_token"),
     ("position", "position_embedding", "position_embeddings"),
     ("patch", "patch_embedding", "patch_embeddings.projection")),
    (("vision.blocks.#", "vision_model.encoder.layers.#", "vision_tower.encoder.layer.#"),      # #: number of a block
     ("attention_norm", "norm1", "layernorm_before"),
     ("attention.qkv", "attn.qkv", "attention.*_proj"),                 # *: q, k and v, three tensors instead of one
     ("attention.out", "attn.proj", "attention.projection_layer"),
     ("layer_scale_1", "ls1", "lambda_1"),
     ("mlp_norm", "norm2", "layernorm_after"),
     ("mlp_up", "mlp.fc1", "mlp.fc1"),
     ("mlp_down", "mlp.fc2", "mlp.fc2"),
     ("layer_scale_2", "ls2", "lambda_2")),
    (("projector", "mlp1", "multi_modal_projector"),
     ("norm", "0", "layer_norm"),
     ("up", "1", "linear_1"),
     ("out", "3", "linear_2")),
    (("language", "language_model", "language_model"),
     ("embedding", "model.embed_tokens", "model.embed_tokens"),
     ("norm", "model.norm", "model.norm"),
     ("lm_head", "lm_head", "lm_head")),
    (("language.blocks.#", "language_model.model.layers.#", "language_model.model.layers.#"),
     ("attention_norm", "input_layernorm", "input_layernorm"),
     ("attention.query", "self_attn.q_proj", "self_attn.q_proj"),
     ("attention.key", "self_attn.k_proj", "self_attn.k_proj"),
     ("attention.value", "self_attn.v_proj", "self_attn.v_proj"),
     ("attention.out", "self_attn.o_proj", "self_attn.o_proj"),
     ("mlp_norm", "post_attention_layernorm", "post_attention_layernorm"),
     ("mlp_gate", "mlp.gate_proj", "mlp.gate_proj"),
     ("mlp_up", "mlp.up_proj", "mlp.up_proj"),
     ("mlp_down", "mlp.down_proj", "mlp.down_proj")),
)
ROWS = [[f"{part}.{module}" for part, module in zip(parts, modules if len(modules) == 3 else 3 * modules)]
        for parts, *rows in NAMES for modules in rows]
OFFICIAL, TRANSFORMERS = {row[0]: row[1] for row in ROWS}, {row[0]: row[2] for row in ROWS}
OURS = {row[1]: row[0] for row in ROWS}
PART_OF = {name.split(".")[0]: part[0].split(".")[0].replace("language", "llm") for part, *_ in NAMES for name in part}
PARTS = tuple(dict.fromkeys(PART_OF.values()))          # as flags name them
ENDINGS = {".adapter.a.weight": ".lora_A.weight", ".adapter.b.weight": ".lora_B.weight",
           ".weight": ".weight", ".bias": ".bias"}


def official_name(ours):
    """'vision.blocks.7.mlp_up.weight' -> 'vision_model.encoder.layers.7.mlp.fc1.weight'; adapters as PEFT names them.

    Raises InputError for a tensor that has no row in NAMES.
    """
    return translate(ours, OFFICIAL, ENDINGS)


def our_name(official):
    """The inverse of `official_name`; None for what is not the name of one of our tensors."""
    try:
        return translate(official, OURS, {theirs: ours for ours, theirs in ENDINGS.items()})
    except InputError:
        return None


def part_of(name):
    """The part in PARTS that a tensor belongs to, whichever of the three names it has; None for a foreign one."""
    return PART_OF.get(name.split(".")[0])


def transformers_names(ours):
    """The name of a tensor in transformers' files, or the three of its query, key and value where ours is all of them.

    >>> transformers_names("vision.blocks.7.attention.qkv.bias")[1]
    'vision_tower.encoder.layer.7.attention.k_proj.bias'
    """
    name = translate(ours, TRANSFORMERS, ENDINGS)
    return [name.replace("*", part) for part in "qkv"] if "*" in name else [name]


def translate(name, table, endings):
    """Look up the name without its block's number and its ending; put both back. Raises InputError."""
    end = next((end for end in endings if name.endswith(end)), "")
    module = name.removesuffix(end)
    number = re.search(r"\.(\d+)\.", module)
    general = module.replace(number[0], ".#.", 1) if number else module
    if general not in table:
        raise InputError(f"{name} has no row in model/names.py; add it to NAMES there")
    return table[general].replace("#", number[1] if number else "") + endings.get(end, "")


def split(ours, tensor):
    """One of our tensors -> {transformers' name: tensor}; a fused query, key and value are cut into three."""
    names = transformers_names(ours)
    return {name: piece.contiguous() for name, piece in zip(names, tensor.chunk(len(names)))}


def fuse(ours, pieces):
    """The inverse of `split`: tensors in the order of `transformers_names`, of adapters None where a layer has none.

    An adapter of the fused layer has the rows of all three A; its B is block-diagonal, so each keeps its outputs.
    """
    found = [piece for piece in pieces if piece is not None]
    if len(found) == 0 or len(pieces) == 1:
        return found[0] if found else None
    if ours.endswith(".adapter.b.weight"):
        return torch.block_diag(*(found[0][:, :0] if piece is None else piece for piece in pieces))
    return torch.cat(found)
