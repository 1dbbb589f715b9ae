"""In which layouts do others keep this model? transformers' own InternVL, and PEFT's adapters, by the names in their files.

The official layout is checkpoint.py's; from it everything here is renamed.
Sources: transformers' models/internvl; the official `wrap_backbone_lora` and `wrap_llm_lora`; PEFT's adapter_config.json.
"""
import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model.errors import InputError
from model.prompt import END, IMAGE_CLOSE, IMAGE_OPEN, IMAGE_TOKEN, START, SYSTEM, special_id
from model.vision import IMAGENET_MEAN, IMAGENET_STD

NATIVE_NAMES = (                        # official -> in the files of transformers' InternVL; the language model's are the same
    (r"vision_model\.embeddings\.class_embedding", "vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.patch_embedding", "vision_tower.embeddings.patch_embeddings.projection"),
    (r"vision_model\.embeddings\.position_embedding", "vision_tower.embeddings.position_embeddings"),
    (r"vision_model\.encoder\.layers\.(\d+)\.ls(\d)", r"vision_tower.encoder.layer.\1.lambda_\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm1", r"vision_tower.encoder.layer.\1.layernorm_before"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm2", r"vision_tower.encoder.layer.\1.layernorm_after"),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.proj", r"vision_tower.encoder.layer.\1.attention.projection_layer"),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv", r"vision_tower.encoder.layer.\1.attention.#_proj"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp", r"vision_tower.encoder.layer.\1.mlp"),
    (r"mlp1\.0", "multi_modal_projector.layer_norm"),
    (r"mlp1\.1", "multi_modal_projector.linear_1"),
    (r"mlp1\.3", "multi_modal_projector.linear_2"),
)


def native_names(official):
    """The one name of a tensor in transformers' layout, or the three of its query, key and value where they are fused.

    >>> native_names("vision_model.encoder.layers.7.attn.qkv.bias")[1]
    'vision_tower.encoder.layer.7.attention.k_proj.bias'
    """
    for pattern, replacement in NATIVE_NAMES:
        native, count = re.subn(f"^{pattern}", replacement, official)
        if count:
            return [native.replace("#", part) for part in "qkv"] if "#" in native else [native]
    return [official]


def native_tensors(official):
    """{official name: tensor} -> {native name: tensor}."""
    native = {}
    for name, tensor in official.items():
        names = native_names(name)
        native |= {part: piece.contiguous() for part, piece in zip(names, tensor.chunk(len(names)))}
    return native


def native_files(model):
    """{file name: JSON value or text} that make a folder of native weights complete, beside the tokenizer's files."""
    vision, language, tokenizer = model.config.vision, model.config.language, model.tokenizer
    side = {"height": vision.tile_pixels, "width": vision.tile_pixels}
    end = special_id(tokenizer, END)
    settings = json.loads((model.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    return {
        "config.json": {
            "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "dtype": model.config.stored_dtype,
            "image_token_id": special_id(tokenizer, IMAGE_TOKEN), "image_seq_length": model.config.tokens_per_tile,
            "downsample_ratio": 1 / model.config.shuffle, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
            "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
            "vision_config": {
                "model_type": "internvl_vision", "hidden_size": vision.width, "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.heads, "intermediate_size": vision.mlp_width,
                "image_size": [vision.tile_pixels] * 2,
                "patch_size": [vision.patch_pixels] * 2, "layer_norm_eps": vision.norm_eps, "attention_bias": True,
                "use_qk_norm": False, "hidden_act": "gelu", "norm_type": "layer_norm", "use_absolute_position_embeddings": True,
                "use_mask_token": False, "use_mean_pooling": True, "layer_scale_init_value": 1.0},
            "text_config": {
                "model_type": "qwen2", "hidden_size": language.width, "num_hidden_layers": language.layers,
                "num_attention_heads": language.heads, "num_key_value_heads": language.kv_heads,
                "intermediate_size": language.mlp_width, "vocab_size": language.vocabulary, "rms_norm_eps": language.norm_eps,
                "max_position_embeddings": language.max_positions, "hidden_act": "silu", "use_sliding_window": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta}, "tie_word_embeddings": False,
                "eos_token_id": end}},
        "generation_config.json": {"do_sample": False, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id},
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor", "size": side,
            "resample": 3,
            "crop_to_patches": model.config.thumbnail, "min_patches": 1, "max_patches": 12, "do_convert_rgb": True,
            "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD},
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": model.config.tokens_per_tile},
        "tokenizer_config.json": settings | {
            "processor_class": "InternVLProcessor", "start_image_token": IMAGE_OPEN, "end_image_token": IMAGE_CLOSE,
            "context_image_token": IMAGE_TOKEN, "video_token": tokenizer.pad_token},    # asked for by the class; no video here
        "chat_template.jinja": CHAT_TEMPLATE,
    }


# What prompt.py writes, as a template: turns follow each other without a line break, an image stands on a line of its own.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + f"{START}system\n{SYSTEM}{END}" + "{% endif %}"
    "{% for message in messages %}" + START + "{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{{ '\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant{{ '\n' }}{% endif %}")


# ------------------------------------------------------------------------------------------------------------------- PEFT

ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def peft_files(trained, lora_scale, base, dropout):
    """What trains of a run, {official name: tensor}, in PEFT's layout -> (tensors, adapter_config.json's value).

    Adapters keep their names; the whole projector, where it trains, is a module to save. Raises InputError for a run that
    trains other weights as a whole, which an adapter cannot hold, or no adapter at all.
    """
    ranks = [len(tensor) for name, tensor in trained.items() if name.endswith(".lora_A.weight")]
    whole = [name for name in trained if ".lora_" not in name]
    layers = {name.rpartition(".lora_")[0] for name in trained if ".lora_" in name}
    if not ranks or any(not name.startswith("mlp1.") for name in whole) or (whole and "mlp1.1" in layers):
        raise InputError("an adapter holds what --train lora trains, and the projector as a whole or adapted; this run trains "
                         f"{', '.join((whole or ['nothing'])[:2])}, ... and {len(layers)} adapters; "
                         "write it with --format official")
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": ranks[0], "lora_alpha": lora_scale * ranks[0],
              "lora_dropout": dropout, "bias": "none",
              "target_modules": sorted({".".join(layer.split(".")[-2:]) for layer in layers}),
              "modules_to_save": ["mlp1"] if whole else None, "init_lora_weights": True, "inference_mode": True}
    return {PREFIX + name: tensor for name, tensor in trained.items()}, config


def read_adapter_config(folder):
    """A PEFT folder's adapter_config.json. Raises InputError for what is not plain LoRA."""
    path = Path(folder, ADAPTER_CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        trouble = [f"{key} {config[key]!r}" for key, plain in (("use_dora", False), ("rank_pattern", {}), ("alpha_pattern", {}),
                                                               ("bias", "none")) if config.get(key, plain) not in (plain, None)]
        if not config["base_model_name_or_path"]:
            raise InputError(f"{path}: base_model_name_or_path is empty; write there the model that the adapter belongs to")
        if config["peft_type"] != "LORA" or trouble:
            raise InputError(f"{path}: {config['peft_type']} {', '.join(trouble)}; "
                             "expected plain LoRA, one rank and alpha for all layers")
        config["scale"] = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        return config
    except (OSError, KeyError, TypeError, AttributeError, ArithmeticError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not the description of an adapter ({type(error).__name__}: {error})") from error


def read_adapter(folder, official):
    """Read a PEFT folder -> ({official name: tensor}, what B A is multiplied by).

    `official`: names of the model's tensors. The adapter may have been made on the official model or on transformers' own.
    Raises InputError for another method than plain LoRA and for layers that the model lacks.
    """
    path, scale = Path(folder, ADAPTER_WEIGHTS), read_adapter_config(folder)["scale"]
    try:
        found = {name.removeprefix(PREFIX).removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); a PEFT folder holds its adapter there") from error
    # a model of transformers 5 has language_model.layers where its files and the official ones have language_model.model.layers
    found = {re.sub(r"^language_model\.(?!model\.|lm_head)", "language_model.model.", name): tensor
             for name, tensor in found.items()}
    trained = {}
    for layer in [name.removesuffix("weight") for name in official]:
        for name in [layer + "weight", layer + "lora_A.weight", layer + "lora_B.weight"] if layer.endswith(".") else [layer]:
            pieces = [found.pop(piece, None) for piece in native_names(name)]
            some = next((piece for piece in pieces if piece is not None), None)
            if name in found:
                trained[name] = found.pop(name)
            elif some is None or len(pieces) == 1:
                trained |= {} if some is None else {name: some}
            elif "lora_B" in name:                                      # three thin products side by side are one, less thin
                trained[name] = torch.block_diag(*(some[:, :0] if piece is None else piece for piece in pieces))
            else:
                trained[name] = torch.cat([piece for piece in pieces if piece is not None])
    if found:
        raise InputError(f"{path}: {len(found)} tensors are not of this model, the first: {next(iter(found))}")
    return trained, scale
