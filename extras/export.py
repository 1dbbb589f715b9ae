"""How is a run's model used elsewhere? As a folder in the official layout, in transformers' own, or as a PEFT adapter.

    RUN, or one of its checkpoints  ->  FOLDER: weights, configuration, tokenizer, README.md (the model card), curve.png
                                    ->  a repository of the Hub

Sources of the layouts: the published folder; transformers' models/internvl; PEFT's adapter_config.json.
"""
import json
import math
import os
import shutil
from operator import attrgetter
from pathlib import Path
from string import Template
from types import SimpleNamespace

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from extras.run_folder import METRICS, read_lines
from model import InputError, InternVL, checkpoint, lora, prompt
from model.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    INDEX,
    SETTINGS,
    WEIGHTS,
    shard,
    write_tensors,
    write_text,
    write_weights,
)
from model.config import Config
from model.names import file_names, join_rows, split
from model.tokenizer import SENTENCEPIECE, TOKENIZER_FILES, special_id

CARD_FILE = "README.md"
LAYOUT, CHAT_TEMPLATE = (Path(__file__).with_name(name) for name in ("transformers_layout.json", "chat_template.jinja"))
CARD = (                                # settings in a model card
    "data", "domain", "eval_data", "train", "recipe", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
    "steps", "epochs", "batch_pages", "accumulate", "lr", "schedule", "warmup", "weight_decay", "max_tiles", "seed")


def export(source, target, layout, repository=None):
    """Write the model of a run, or of one of its checkpoints, with a model card; upload it to a Hub repository.

    `layout`: "official", "transformers" (or "native", its older name) or "peft". Raises InputError for a folder that
    holds a run, a model or a README.md already, and for a run that the layout cannot hold.
    """
    path, folder = Path(source), Path(target)
    held = [name for name in (SETTINGS, CONFIG, WEIGHTS, INDEX, lora.ADAPTER_CONFIG, CARD_FILE)
            if (folder / name).exists()]
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
        try:
            HfApi().create_repo(repository, exist_ok=True)
            print("uploaded", HfApi().upload_folder(repo_id=repository, folder_path=folder))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"{repository}: cannot be uploaded ({error}); log in with 'hf auth login', "
                             f"or upload {folder} yourself") from error


def save_adapter(run, path, folder):
    """Write the trained tensors of a run's checkpoint as a PEFT folder, unmerged.

    A projector that is trained as a whole becomes a module to save. Raises InputError for a run without adapters, or
    with other weights that are trained as a whole.
    """
    settings = checkpoint.read_settings(run)
    if path is None:
        raise InputError(f"{run}: this run has no checkpoint yet")
    trained, _, _, scale = checkpoint.read_checkpoint(path)
    ranks = [len(tensor) for name, tensor in trained.items() if name.endswith(".lora_A.weight")]
    whole = [name for name in trained if ".lora_" not in name]
    layers = {name.rpartition(".lora_")[0] for name in trained if ".lora_" in name}
    if not ranks or any(not name.startswith("mlp1.") for name in whole) or (whole and "mlp1.1" in layers):
        raise InputError(f"{run}: --format peft needs --train lora, or projector,lora and no adapter in the projector; "
                         f"this run has --train {settings['train']}: use --format official or transformers")
    base, _, _ = checkpoint.resolve(settings["model"], seed=0)          # a seed: its weights are not needed
    trained = lora.fused_layers(trained, Config.read(base / CONFIG).language)
    layers = {name.rpartition(".lora_")[0] for name in trained if ".lora_" in name}
    rank = max(len(tensor) for name, tensor in trained.items() if name.endswith(".lora_A.weight"))
    config = {"peft_type": "LORA", "base_model_name_or_path": settings["model"], "r": rank, "bias": "none",
              "lora_alpha": scale * rank, "lora_dropout": settings.get("lora_dropout", 0.0),
              "target_modules": sorted({".".join(layer.split(".")[-2:]) for layer in layers}),
              "modules_to_save": ["mlp1"] if whole else None, "init_lora_weights": True, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / lora.ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    tensors = {lora.PREFIX + name: tensor for name, tensor in trained.items()}
    write_tensors(folder / lora.ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def save_transformers(model, folder):
    """Write a folder that transformers' InternVLForConditionalGeneration opens; adapters are merged."""
    folder.mkdir(parents=True, exist_ok=True)
    if (model.folder / SENTENCEPIECE).is_file():        # which transformers would read wrongly
        model.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    else:
        checkpoint.copy_files(model, folder, TOKENIZER_FILES)
    for name, value in transformers_files(model).items():
        write_text(folder / name, value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")
    tensors, names = {}, [name for name in model.state_dict() if ".adapter." not in name]
    fused = model.config.language.decoder == "Phi3"     # there as in the official files; InternLM2 is a Llama
    for name, ours in file_names(names, "Phi3" if fused else "Llama").items():
        whole = join_rows([lora.merged(model, one).to("cpu", model.stored_dtypes[one]) for one in ours])
        tensors |= {name: whole} if len(ours) > 1 else split(ours[0], whole)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_weights(folder, shard(sizes), sizes, tensors.get)


# --------------------------------------------------------------------------------------------------------- transformers

def transformers_files(model):
    """{file name: JSON value or text} of all files of transformers' layout but the weights and the vocabulary.

    A "$name" in transformers_layout.json stands for that attribute of `values`, in chat_template.jinja for a text of
    the template.
    """
    config, tokenizer, template = model.config, model.tokenizer, model.config.template
    values = SimpleNamespace(
        config=config, tokenizer=tokenizer, image_token_id=special_id(tokenizer, prompt.IMAGE_TOKEN),
        end_token_id=special_id(tokenizer, template.end), norm_type=("layer_norm", "rms_norm")[config.vision.rms_norm],
        downsample_ratio=1 / config.shuffle,
        image_size=[config.vision.tile_pixels] * 2, patch_size=[config.vision.patch_pixels] * 2)

    def fill(part):
        return {key: attrgetter(value[1:])(values) if str(value).startswith("$") else value
                for key, value in part.items()}

    files = json.loads(LAYOUT.read_text(encoding="utf-8"), object_hook=fill)
    files["config.json"]["text_config"] |= text_config(config.language, tokenizer)
    settings = json.loads((model.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    if (model.folder / SENTENCEPIECE).is_file():
        settings = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    files["tokenizer_config.json"] = settings | files["tokenizer_config.json"]

    def opened(role):
        return (template.start + template.name).format(role).replace("\n", "{{ '\\n' }}")

    texts = {"SYSTEM": opened("system") + template.system, "TURN": opened("{{ message['role'] }}"),
             "ANSWER": opened("assistant"), "END": template.end + template.gap.replace("\n", "{{ '\\n' }}"),
             "IMAGE_TOKEN": prompt.IMAGE_TOKEN}
    return files | {"chat_template.jinja": Template(CHAT_TEMPLATE.read_text(encoding="utf-8")).substitute(texts)}


def text_config(language, tokenizer):
    """What a decoder's entry in transformers' config.json has beside or instead of Qwen2's."""
    more = {} if language.decoder == "Qwen2" else {
        "model_type": {"InternLM2": "llama"}.get(language.decoder, language.decoder.lower()), "attention_bias": False,
        "head_dim": language.head_width, "pad_token_id": tokenizer.pad_token_id}
    if limit := language.rope.get("original_max_position_embeddings"):
        more["original_max_position_embeddings"] = limit
    return more | {"rope_parameters": {"rope_type": "default"} | language.rope | {"rope_theta": language.rope_theta}}


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
