"""How is a run's model used elsewhere? As a folder in the official layout, in transformers' own, or as a PEFT adapter.

    RUN, or one of its checkpoints  ->  FOLDER: weights, configuration, tokenizer, README.md (the model card), curve.png
                                    ->  a repository of the Hub

Sources of the layouts: the published folder; transformers' models/internvl; PEFT's adapter_config.json.
"""
import json
import math
import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from extras.run_folder import METRICS, read_lines
from model import InputError, InternVL, checkpoint
from model.checkpoint import CHECKPOINTS, CONFIG, SETTINGS, WEIGHTS, write_tensors, write_text
from model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_files, merged
from model.names import split
from model.prompt import END, IMAGE_CLOSE, IMAGE_OPEN, IMAGE_TOKEN, START, SYSTEM
from model.tokenizer import TOKENIZER_FILES, special_id
from model.vision import IMAGENET_MEAN, IMAGENET_STD

CARD_FILE = "README.md"
CARD = (                                # settings in a model card
    "data", "domain", "eval_data", "train", "recipe", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
    "steps", "epochs", "batch_pages", "accumulate", "lr", "schedule", "warmup", "weight_decay", "max_tiles", "seed")


def export(source, target, layout, repository=None):
    """Write the model of a run, or of one of its checkpoints, with a model card; upload it to a Hub repository.

    `layout`: "official", "transformers" (or "native", its older name) or "peft". Raises InputError for a folder that
    holds a run, a model or a README.md already, and for a run that the layout cannot hold.
    """
    path, folder = Path(source), Path(target)
    held = [name for name in (SETTINGS, WEIGHTS, CONFIG, ADAPTER_CONFIG, CARD_FILE) if (folder / name).exists()]
    if held:
        raise InputError(f"{folder}: holds {held[0]} already; choose another folder")
    is_checkpoint = path.parent.name == CHECKPOINTS
    run = path.parent.parent if is_checkpoint else path.parent if path.name == WEIGHTS else path
    try:
        if layout == "peft":
            save_adapter(run, path if is_checkpoint else checkpoint.latest_checkpoint(run), folder)
        elif layout == "official":
            InternVL.from_pretrained(source, "cpu", "float32").save_pretrained(folder)
        else:
            save_transformers(InternVL.from_pretrained(source, "cpu", "float32"), folder)
        write_card(run, folder, layout, last_step=int(path.stem.split("-")[-1]) if is_checkpoint else math.inf)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be written there ({error})") from error
    print(f"wrote {folder}")
    if repository:
        upload(folder, repository)


def save_adapter(run, path, folder):
    """Write the trained tensors of a run's checkpoint as a PEFT folder, unmerged."""
    settings = checkpoint.read_settings(run)
    if path is None:
        raise InputError(f"{run}: a run without a checkpoint yet")
    trained, _, _, scale = checkpoint.read_checkpoint(path)
    tensors, config = adapter_files(trained, scale, settings["model"], settings.get("lora_dropout", 0.0))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def save_transformers(model, folder):
    """Write a folder that transformers' InternVLForConditionalGeneration opens; adapters are merged."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.copy_files(model, folder, TOKENIZER_FILES)
    for name, value in transformers_files(model).items():
        write_text(folder / name, value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")
    tensors = {}
    for name, tensor in merged(model):
        tensors |= split(name, tensor.to("cpu", model.stored_dtypes[name]))
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def upload(folder, repository):
    try:
        HfApi().create_repo(repository, exist_ok=True)
        print("uploaded", HfApi().upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{repository}: cannot be uploaded ({error}); log in with 'hf auth login', "
                         f"or upload {folder} yourself") from error


# --------------------------------------------------------------------------------------------------------- transformers

def transformers_files(model):
    """{file name: JSON value or text} of all files of transformers' layout but the weights and the vocabulary."""
    config, end = model.config, special_id(model.tokenizer, END)
    settings = json.loads((model.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    return {
        "config.json": {
            "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl",
            "dtype": config.stored_dtype, "image_token_id": special_id(model.tokenizer, IMAGE_TOKEN),
            "image_seq_length": config.tokens_per_tile,
            "downsample_ratio": 1 / config.shuffle, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
            "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
            "vision_config": vision_config(config.vision), "text_config": text_config(config.language, end)},
        "generation_config.json": {
            "do_sample": False, "eos_token_id": end, "pad_token_id": model.tokenizer.pad_token_id},
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor",
            "size": {"height": config.vision.tile_pixels, "width": config.vision.tile_pixels}, "resample": 3,
            "crop_to_patches": config.thumbnail, "min_patches": 1, "max_patches": 12, "do_convert_rgb": True,
            "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
        "processor_config.json": {
            "processor_class": "InternVLProcessor", "image_seq_length": config.tokens_per_tile},
        "tokenizer_config.json": settings | {
            "processor_class": "InternVLProcessor", "start_image_token": IMAGE_OPEN, "end_image_token": IMAGE_CLOSE,
            "context_image_token": IMAGE_TOKEN,
            "video_token": model.tokenizer.pad_token},          # the class asks for one; no video here
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def vision_config(vision):
    return {
        "model_type": "internvl_vision", "hidden_size": vision.width, "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads, "intermediate_size": vision.mlp_width,
        "image_size": [vision.tile_pixels] * 2, "patch_size": [vision.patch_pixels] * 2,
        "layer_norm_eps": vision.norm_eps, "attention_bias": True,
        "use_qk_norm": False, "hidden_act": "gelu", "norm_type": "layer_norm", "use_absolute_position_embeddings": True,
        "use_mask_token": False, "use_mean_pooling": True, "layer_scale_init_value": 1.0}


def text_config(language, end):
    return {
        "model_type": "qwen2", "hidden_size": language.width, "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads, "num_key_value_heads": language.kv_heads,
        "intermediate_size": language.mlp_width, "vocab_size": language.vocabulary, "rms_norm_eps": language.norm_eps,
        "max_position_embeddings": language.max_positions, "hidden_act": "silu", "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta}, "tie_word_embeddings": False,
        "eos_token_id": end}


# The prompt of prompt.py as a template: no line break between turns, each image on a line of its own.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + f"{START}system\n{SYSTEM}{END}" + "{% endif %}"
    "{% for message in messages %}" + START + "{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{{ '\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant{{ '\n' }}{% endif %}")


# ----------------------------------------------------------------------------------------------------------- model card

def write_card(run, folder, layout, last_step):
    """Write README.md: base model, data, settings, scores up to a step, and curve of a run."""
    if not (run / SETTINGS).exists():                           # a model folder, whose training is unknown
        return
    settings, lines = checkpoint.read_settings(run), read_lines(run / METRICS)
    measured = [line for line in lines if "val_loss" in line and line["step"] <= last_step]
    settings |= {key: ",".join(Path(part).name if os.path.isabs(part) else part for part in settings[key].split(","))
                 for key in ("model", "data", "eval_data") if settings.get(key)}        # no folders of this machine
    shown = {key: settings[key] for key in CARD if settings.get(key) is not None
             and ("lora" in settings["train"].split(",") or not key.startswith("lora_"))
             and ("synthetic" in settings["data"] or key != "domain")}
    card = [f"# {settings['model']}, fine-tuned\n", "| setting | value |\n|---|---|",
            *(f"| {key} | {value} |" for key, value in shown.items())]
    if measured:
        names = [name for name in measured[-1] if name != "step"]
        card += ["", f"| step | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|",
                 *(f"| {line['step']} | " + " | ".join(f"{line[name]:.4f}" for name in names) + " |"
                   for line in (measured[0], measured[-1]))]
        shutil.copyfile(run / "curve.png", folder / "curve.png")
        card += ["\n![training and validation loss](curve.png)"]
    library = {"transformers": "transformers", "native": "transformers", "peft": "peft"}.get(layout)
    data = ModelCardData(base_model=settings["model"], pipeline_tag="image-text-to-text", library_name=library)
    write_text(folder / CARD_FILE, f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(card) + "\n")
