"""Small checkpoints of the family in the official layout, and transformers' own models given their files.

The tensors of a file are renamed and cut here by hand, with rules of this file alone: nothing of model/names.py is used.
"""
import copy
import json
import re
import shutil
from pathlib import Path

import torch
from reference import TRANSFORMERS_NAMES, randomise
from safetensors.torch import load_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from model import InternVL, checkpoint
from model.checkpoint import TINY

CONFIGS = json.loads(Path(__file__).with_name("family_configs.json").read_text(encoding="utf-8"))
VOCABULARIES = Path(__file__).with_name("vocabularies")
# one for each published pair of decoder and vision tower: name -> (heads, key heads, head width, hidden size)
KINDS = {
    "InternVL2-2B": (4, 2, 32, 128), "InternVL2_5-8B": (8, 2, 32, 256), "InternVL2-26B": (12, 2, 16, 192),      # 2, 4, 6 heads share a key head
    "InternVL2-4B": (2, 2, 96, 192), "InternVL2-Llama3-76B": (8, 1, 16, 128), "InternVL3-1B": (7, 1, 16, 112),
    "InternVL2_5-38B": (5, 1, 32, 160), "InternVL3_5-1B": (4, 2, 48, 96), "InternVL3_5-38B": (8, 1, 32, 160)}
TEXT = {"InternLM2ForCausalLM": LlamaConfig, "LlamaForCausalLM": LlamaConfig, "Phi3ForCausalLM": Phi3Config, "Qwen2ForCausalLM": Qwen2Config,
        "Qwen3ForCausalLM": Qwen3Config}


def small_config(name):
    """The configuration of a published model with its ratios and few, narrow layers."""
    config, (heads, kv_heads, width, hidden) = copy.deepcopy(CONFIGS[name]["config"]), KINDS[name]
    config |= {"force_image_size": 64, "torch_dtype": "float32"}
    large = config["vision_config"]["hidden_size"] == 3200
    config["vision_config"] |= dict(hidden_size=96 if large else 64, num_attention_heads=3 if large else 2, num_hidden_layers=2,
                                    intermediate_size=128, image_size=64, patch_size=8)
    config["llm_config"] |= dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=2, intermediate_size=160)
    if "head_dim" in config["llm_config"]:
        config["llm_config"]["head_dim"] = width
    return config


def make_folder(name, folder, shard_bytes=600_000):
    """Write a random checkpoint of a kind: configuration, tokenizer, weights in several files."""
    folder.mkdir(parents=True)
    config = small_config(name)
    decoder = config["llm_config"]["architectures"][0]
    tokenizer = {"InternLM2ForCausalLM": VOCABULARIES / "internlm2", "Phi3ForCausalLM": VOCABULARIES / "phi3"}.get(decoder, TINY)
    for file in (tokenizer / name for name in checkpoint.TOKENIZER_FILES if (tokenizer / name).exists()):
        shutil.copyfile(file, folder / file.name)
    from model.tokenizer import load_tokenizer
    config["llm_config"]["vocab_size"] = len(load_tokenizer(folder))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = randomise(InternVL.from_scratch(folder, seed=0, device="cpu"))
    sizes, usual = checkpoint.shard, checkpoint.SHARD_BYTES
    checkpoint.shard = lambda of: sizes(of, shard_bytes)
    try:
        model.save_pretrained(folder)
    finally:
        checkpoint.shard = sizes
    assert checkpoint.SHARD_BYTES == usual
    return folder


# ------------------------------------------------------------------------------------------------------------ the reference

def official_tensors(folder):
    """All tensors of a folder's weight files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def cut_wqkv(tensor, heads, kv_heads):
    """InternLM2's rows, head by head: of each key head its queries, then its key, then its value."""
    blocks = list(tensor.split(len(tensor) // (heads + 2 * kv_heads)))
    group, q, k, v = heads // kv_heads, [], [], []
    while blocks:
        q += blocks[:group]
        k.append(blocks[group])
        v.append(blocks[group + 1])
        del blocks[:group + 2]
    return torch.cat(q), torch.cat(k), torch.cat(v)


PLAIN = (                               # the vision encoder and the projector as in reference.py, norms of the 6B, InternLM2
    *TRANSFORMERS_NAMES[:-2],
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.", r"model.vision_tower.encoder.layer.\1.attention."),
    (r"language_model\.(lm_head|output)", "lm_head"), (r"language_model\.model\.tok_embeddings", "model.language_model.embed_tokens"),
    (r"(language_model\.model\.layers\.\d+)\.attention\.wo", r"\1.self_attn.o_proj"), (r"(language_model\.model\.layers\.\d+)\.feed_forward\.w1", r"\1.mlp.gate_proj"),
    (r"(language_model\.model\.layers\.\d+)\.feed_forward\.w2", r"\1.mlp.down_proj"), (r"(language_model\.model\.layers\.\d+)\.feed_forward\.w3", r"\1.mlp.up_proj"),
    (r"(language_model\.model\.layers\.\d+)\.attention_norm", r"\1.input_layernorm"), (r"(language_model\.model\.layers\.\d+)\.ffn_norm", r"\1.post_attention_layernorm"),
    (r"language_model\.model\.", "model.language_model."),
)


def native_tensors(official, llm):
    """{official name: tensor} -> {transformers' name: tensor}."""
    found = {}
    for name, tensor in official.items():
        if "attn.qkv." in name:
            many = list(zip("qkv", tensor.chunk(3)))
        elif "attention.wqkv" in name:
            name = name.replace("attention.wqkv", "self_attn.#_proj")
            many = list(zip("qkv", cut_wqkv(tensor, llm["num_attention_heads"], llm["num_key_value_heads"])))
        else:
            many = [("", tensor)]
        for pattern, replacement in PLAIN:
            name = re.sub(f"^{pattern}", replacement, name)
        found |= {name.replace("#", part): piece for part, piece in many}
    return found


def reference_of(folder, dtype=torch.float32):
    """transformers' InternVL in the shape of a folder's config.json, with the weights of its files."""
    config = json.loads((folder / "config.json").read_text())
    vision, llm = config["vision_config"], config["llm_config"]
    kind, scaling = TEXT[llm["architectures"][0]], dict(llm.get("rope_scaling") or {"type": "default"})
    rope = {"rope_type": {"su": "longrope"}.get(scaling.get("type"), scaling.get("type") or scaling.get("rope_type")), "rope_theta": float(llm["rope_theta"])}
    rope |= {key: value for key, value in scaling.items() if key in ("factor", "short_factor", "long_factor")}
    more = {key: llm[key] for key in ("head_dim", "original_max_position_embeddings") if key in llm}
    if "original_max_position_embeddings" in more:
        rope |= more
    text = kind(vocab_size=llm["vocab_size"], hidden_size=llm["hidden_size"], intermediate_size=llm["intermediate_size"],
                num_hidden_layers=llm["num_hidden_layers"], num_attention_heads=llm["num_attention_heads"], num_key_value_heads=llm["num_key_value_heads"],
                max_position_embeddings=llm["max_position_embeddings"], rms_norm_eps=llm["rms_norm_eps"], rope_parameters=rope, pad_token_id=0,
                tie_word_embeddings=False, attention_bias=False, **more)
    from model.tokenizer import load_tokenizer
    internvl = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision["hidden_size"], num_hidden_layers=vision["num_hidden_layers"], num_attention_heads=vision["num_attention_heads"],
            intermediate_size=vision["intermediate_size"], image_size=vision["image_size"], patch_size=vision["patch_size"],
            attention_bias=vision["qkv_bias"], use_qk_norm=vision["qk_normalization"], hidden_act="gelu", norm_type=vision["norm_type"],
            layer_norm_eps=vision["layer_norm_eps"], use_absolute_position_embeddings=True, use_mask_token=False, use_mean_pooling=True,
            layer_scale_init_value=1.0),
        text_config=text, image_token_id=load_tokenizer(folder).convert_tokens_to_ids("<IMG_CONTEXT>"), downsample_ratio=0.5,
        projector_hidden_act="gelu", vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False)
    reference = InternVLForConditionalGeneration(internvl)
    reference.load_state_dict(native_tensors(official_tensors(folder), llm), strict=True)
    return reference.to(dtype).eval()
