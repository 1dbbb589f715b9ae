"""What is each tensor called in files? Our names, the official ones and transformers', side by side.

A part whose class has new tensors needs its rows here and nothing else: ("queries",) for one that exists only here.
Sources: the header of the published file; transformers' models/internvl; the names that PEFT gives to adapters.
"""
import re

import torch

from model.errors import InputError

# Ours, official, transformers: first where a part begins, then what it holds. The order is that of the official class:
# it decides which tensors share a file.
NAMES = (
    (("vision", "vision_model.embeddings", "vision_tower.embeddings"),
     ("class_token", "class_embedding", "cls_token"),
     ("position", "position_embedding", "position_embeddings"),
     ("patch", "patch_embedding", "patch_embeddings.projection")),
    (("vision.blocks.#", "vision_model.encoder.layers.#", "vision_tower.encoder.layer.#"),      # #: number of a block
     ("layer_scale_1", "ls1", "lambda_1"),
     ("layer_scale_2", "ls2", "lambda_2"),
     ("attention.qkv", "attn.qkv", "attention.*_proj"),                 # *: q, k and v, three tensors instead of one
     ("attention.query_norm", "attn.q_norm", "attention.q_norm"),
     ("attention.key_norm", "attn.k_norm", "attention.k_norm"),
     ("attention.out", "attn.proj", "attention.projection_layer"),
     ("mlp_up", "mlp.fc1", "mlp.fc1"),
     ("mlp_down", "mlp.fc2", "mlp.fc2"),
     ("attention_norm", "norm1", "layernorm_before"),
     ("mlp_norm", "norm2", "layernorm_after")),
    (("language", "language_model", "language_model"),
     ("embedding", "model.embed_tokens", "model.embed_tokens")),
    (("language.blocks.#", "language_model.model.layers.#", "language_model.model.layers.#"),
     ("attention.query", "self_attn.q_proj", "self_attn.q_proj"),
     ("attention.key", "self_attn.k_proj", "self_attn.k_proj"),
     ("attention.value", "self_attn.v_proj", "self_attn.v_proj"),
     ("attention.out", "self_attn.o_proj", "self_attn.o_proj"),
     ("attention.query_norm", "self_attn.q_norm", "self_attn.q_norm"),
     ("attention.key_norm", "self_attn.k_norm", "self_attn.k_norm"),
     ("mlp_gate", "mlp.gate_proj", "mlp.gate_proj"),
     ("mlp_up", "mlp.up_proj", "mlp.up_proj"),
     ("mlp_down", "mlp.down_proj", "mlp.down_proj"),
     ("attention_norm", "input_layernorm", "input_layernorm"),
     ("mlp_norm", "post_attention_layernorm", "post_attention_layernorm")),
    (("language", "language_model", "language_model"),
     ("norm", "model.norm", "model.norm"),
     ("lm_head", "lm_head", "lm_head")),
    (("projector", "mlp1", "multi_modal_projector"),
     ("norm", "0", "layer_norm"),
     ("up", "1", "linear_1"),
     ("out", "3", "linear_2")),
)
# decoders whose official files have other names: the same official name twice is one tensor with the rows of several
QKV = ("attention.query", "attention.key", "attention.value")
FUSED = {
    "InternLM2": (
        (("language", "language_model"), ("embedding", "model.tok_embeddings"), ("lm_head", "output")),
        (("language.blocks.#", "language_model.model.layers.#"), *((part, "attention.wqkv") for part in QKV),
         ("attention.out", "attention.wo"), ("mlp_gate", "feed_forward.w1"), ("mlp_up", "feed_forward.w3"),
         ("mlp_down", "feed_forward.w2"), ("attention_norm", "attention_norm"), ("mlp_norm", "ffn_norm"))),
    "Phi3": (
        (("language.blocks.#", "language_model.model.layers.#"), *((part, "self_attn.qkv_proj") for part in QKV),
         ("mlp_gate", "mlp.gate_up_proj"), ("mlp_up", "mlp.gate_up_proj")),),
}


def full_names(table):
    """The rows of a table like NAMES, each name with its part's."""
    return [[f"{part}.{module}".lstrip(".")
             for part, module in zip(parts, modules if len(modules) > 1 else 3 * modules)]
            for parts, *rows in table for modules in rows]


ROWS = full_names(NAMES)
OFFICIAL, TRANSFORMERS = {row[0]: row[1] for row in ROWS}, {row[0]: row[2] for row in ROWS}
OURS = {row[1]: row[0] for row in ROWS}
ORDER = {f"{parts[0]}.{row[0]}": (place, i) for place, (parts, *rows) in enumerate(NAMES) for i, row in enumerate(rows)}
PART_OF = {name.split(".")[0]: part[0].split(".")[0].replace("language", "llm") for part, *_ in NAMES for name in part}
PARTS = tuple(dict.fromkeys(PART_OF.values()))          # as flags name them
ENDINGS = {".adapter.a.weight": ".lora_A.weight", ".adapter.b.weight": ".lora_B.weight",
           ".weight": ".weight", ".bias": ".bias"}


def official_name(ours):
    """'vision.blocks.7.mlp_up.weight' -> 'vision_model.encoder.layers.7.mlp.fc1.weight'; adapters as PEFT names them.

    A run's checkpoints use these names, whatever the decoder. Raises InputError for a tensor without a row in NAMES.
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


def file_names(names, decoder):
    """{official name of a tensor in files: [our names of what it holds]}, in the order of the official class."""
    table, groups = OFFICIAL | dict(full_names(FUSED.get(decoder, ()))), {}

    def place(ours):
        general, number, _ = parse(ours, ENDINGS)
        part, row = ORDER.get(general, (0, 0))
        return part, int(number or 0), row

    for ours in sorted(names, key=place):           # sorting is stable: a weight comes before its bias
        groups.setdefault(translate(ours, table, ENDINGS), []).append(ours)
    return groups


def split_rows(tensor, rows, kv_heads, decoder):
    """One tensor of a file -> one for each number of `rows`. InternLM2 stores the rows of queries, key and value
    together for each key head, others store all queries, all keys, all values.
    """
    if len(rows) == 1:
        return [tensor]
    groups = kv_heads if decoder.startswith("InternLM2") else 1
    parts = tensor.unflatten(0, (groups, -1)).split([count // groups for count in rows], dim=1)
    return [part.flatten(0, 1) for part in parts]


def join_rows(tensors, kv_heads=1, decoder=""):
    """The inverse of `split_rows`."""
    if len(tensors) == 1:
        return tensors[0]
    groups = kv_heads if decoder.startswith("InternLM2") else 1
    return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def transformers_names(ours):
    """The name of a tensor in transformers' files, or the three of its query, key and value where ours is all of them.

    >>> transformers_names("vision.blocks.7.attention.qkv.bias")[1]
    'vision_tower.encoder.layer.7.attention.k_proj.bias'
    """
    name = translate(ours, TRANSFORMERS, ENDINGS)
    return [name.replace("*", part) for part in "qkv"] if "*" in name else [name]


def translate(name, table, endings):
    """Look up the name without its block's number and its ending; put both back. Raises InputError."""
    general, number, end = parse(name, endings)
    if general not in table:
        raise InputError(f"{name} has no row in model/names.py; add it to NAMES there")
    return table[general].replace("#", number) + endings.get(end, "")


def parse(name, endings):
    """'vision.blocks.7.mlp_up.weight' -> ('vision.blocks.#.mlp_up', '7', '.weight')."""
    end = next((end for end in endings if name.endswith(end)), "")
    module = name.removesuffix(end)
    number = re.search(r"\.(\d+)\.", module)
    return (module.replace(number[0], ".#.", 1), number[1], end) if number else (module, "", end)


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
