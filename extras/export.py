"""How is a run's model used elsewhere? As a folder in the official layout, in transformers' own, or as a PEFT adapter.

    RUN, or one of its checkpoints  ->  FOLDER: weights, configuration, tokenizer, README.md (the model card), curve.png
                                    ->  a repository of the Hub

Sources of the layouts: the published folder; transformers' models/internvl; PEFT's adapter_config.json.
"""
import json
import math
import os
import re
import shutil
from operator import attrgetter
from pathlib import Path
from string import Template
from types import SimpleNamespace

import torch
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from extras.outputs import new_folder
from extras.run_folder import METRICS, read_lines
from model import InputError, InternVL, checkpoint, lora, prompt
from model.checkpoint import CHECKPOINTS, CONFIG, SETTINGS, TINY, WEIGHTS, write_tensors, write_text
from model.config import Config
from model.names import PARTS, file_names, join_rows, official_name, part_of, split
from model.tokenizer import SENTENCEPIECE, TOKENIZER_FILES, load_tokenizer, special_id

LAYOUT, CHAT_TEMPLATE, HOW_TO_OPEN = (Path(__file__).with_name(name) for name in (
    "transformers_layout.json", "chat_template.jinja", "model_card.md"))
CARD = (                                # settings in a model card
    "data", "domain", "eval_data", "init", "train", "recipe", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
    "steps", "epochs", "batch_pages", "accumulate", "lr", "schedule", "warmup", "weight_decay", "max_tiles", "seed")


def export(source, folder, layout, repository=None, allow_changed=False):
    """Write the model of a run, or of one of its checkpoints, with a model card; upload it to a Hub repository.

    `layout`: "official", "transformers" (or "native", its older name) or "peft". `allow_changed`: as of
    `InternVL.from_pretrained`. Raises InputError for a folder that is not empty, for a run whose base model changed,
    and for a model that the layout cannot hold.
    """
    path = Path(source)
    is_checkpoint = path.parent.name == CHECKPOINTS
    run = path.parent.parent if is_checkpoint else path.parent if path.name == WEIGHTS else path
    if layout != "peft":
        check_layout(source, allow_changed)
    trained = path if is_checkpoint else checkpoint.latest_checkpoint(run)
    with new_folder(folder) as folder:
        try:
            model = layout != "peft" and InternVL.from_pretrained(source, "cpu", "float32", allow_changed=allow_changed)
            if layout == "peft":
                save_adapter(run, trained, folder, allow_changed)
            elif layout == "official":
                model.save_pretrained(folder)
                if not model.config.model_class:
                    add_chat_template(folder)
            else:
                save_transformers(model, folder)
            last_step = trained and checkpoint.step_of(trained.name) or math.inf
            write_card(run, folder, layout, last_step, repository or "FOLDER")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder}: the model cannot be written there ({error})") from error
    print(f"wrote {folder}" + "; LoRA adapters are merged: do not load them onto it again" * merges(run, layout))
    if repository:
        try:
            HfApi().create_repo(repository, exist_ok=True)
            print("uploaded", HfApi().upload_folder(repo_id=repository, folder_path=folder))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"{repository}: cannot be uploaded ({error}); log in with 'hf auth login', "
                             f"or upload {folder} yourself") from error


def merges(run, layout):
    """Whether an export merges adapters: those of a run, or a PEFT folder's."""
    trained = checkpoint.read_settings(run)["train"].split(",") if (run / SETTINGS).exists() else ()
    return layout != "peft" and ("lora" in trained or (run / lora.ADAPTER_CONFIG).exists())


def check_layout(source, allow_changed, concerned=lambda name: True):
    """Raise InputError, with names, if transformers' class for the same config.json has other `concerned` tensors."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    folder, _, _ = checkpoint.resolve(source, PARTS, allow_changed)
    if (config := Config.read(folder / CONFIG)).model_class:            # not InternVL: there is no other class
        return
    with torch.device("meta"):
        model = InternVL(config)
        model.tokenizer, model.folder = load_tokenizer(folder), folder
        theirs = InternVLForConditionalGeneration(InternVLConfig(**transformers_files(model)["config.json"]))
    expected = {f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.").replace(
        "language_model.", "language_model.model.", 1): tensor.shape for name, tensor in theirs.state_dict().items()}
    wrong = [official_name(ours) for ours, name, piece in layout_tensors(model, model.state_dict().get)
             if expected.pop(name, None) != piece.shape] + [*expected]
    if wrong := list(dict.fromkeys(filter(concerned, wrong))):
        raise InputError(f"{source}: not exported, because other programs expect other tensors for its config.json; "
                         f"{len(wrong)} differ ({', '.join(wrong[:20])}); use the folder of a finished run instead")


def save_adapter(run, path, folder, allow_changed):
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
    check_layout(path, allow_changed,
                 lambda name: name.removesuffix(".weight") in layers or whole and part_of(name) == "projector")
    folder_of_base, _, _ = checkpoint.resolve(settings["model"], PARTS, True)
    trained = lora.fused_layers(trained, Config.read(folder_of_base / CONFIG).language)
    layers = {name.rpartition(".lora_")[0] for name in trained if ".lora_" in name}
    rank = max(len(tensor) for name, tensor in trained.items() if name.endswith(".lora_A.weight"))
    modules = sorted({name.partition(".")[0] for name in trained if ".lora_" not in name})      # the projector, or none
    base = str(TINY) if settings["model"] == "tiny" else settings["model"]         # a name that others can open
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "bias": "none",
              "lora_alpha": scale * rank, "lora_dropout": settings.get("lora_dropout", 0.0),
              "target_modules": sorted({".".join(layer.split(".")[-2:]) for layer in layers}),
              "modules_to_save": modules or None, "init_lora_weights": True, "inference_mode": True}
    write_text(folder / lora.ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    tensors = {lora.PREFIX + name: tensor for name, tensor in trained.items()}
    write_tensors(folder / lora.ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def chat_template(template):
    """The Jinja template that writes the prompts of prompt.py."""
    def opened(role):
        return (template.start + template.name).format(role).replace("\n", "{{ '\\n' }}")

    texts = {"SYSTEM": opened("system") + template.system, "TURN": opened("{{ message['role'] }}"),
             "ANSWER": opened("assistant"), "END": template.end + template.gap.replace("\n", "{{ '\\n' }}"),
             "IMAGE_TOKEN": prompt.IMAGE_TOKEN}
    return Template(CHAT_TEMPLATE.read_text(encoding="utf-8")).substitute(texts)


def add_chat_template(folder):
    """Put the chat template into a folder's tokenizer_config.json; InternVL2-1B was published with that of Qwen2."""
    path = folder / "tokenizer_config.json"
    template = chat_template(Config.read(folder / CONFIG).template)
    settings = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def save_transformers(model, folder):
    """Write a folder that transformers' InternVLForConditionalGeneration opens; adapters are merged."""
    if model.config.model_class:
        raise InputError("transformers has no class for this model; export it with --format official")
    if (model.folder / SENTENCEPIECE).is_file():        # which transformers would read wrongly
        model.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    else:
        checkpoint.copy_files(model, folder, TOKENIZER_FILES)
    for name, value in transformers_files(model).items():
        write_text(folder / name, value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")
    tensors = {name: tensor for _, name, tensor in layout_tensors(
        model, lambda ours: lora.merged(model, ours).to("cpu", model.stored_dtypes[ours]))}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    checkpoint.write_weights(folder, checkpoint.shard(sizes), sizes, tensors.get)


def layout_tensors(model, tensor_of):
    """Yield (our name, transformers' name, tensor) of a model's tensors; `tensor_of`: our name -> tensor."""
    fused = model.config.language.decoder == "Phi3"     # there as in the official files; InternLM2 is a Llama
    names = [name for name in model.state_dict() if ".adapter." not in name]
    for name, ours in file_names(names, "Phi3" if fused else "Llama").items():
        whole = join_rows([tensor_of(one) for one in ours])
        for theirs, piece in ({name: whole} if len(ours) > 1 else split(ours[0], whole)).items():
            yield ours[0], theirs, piece


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
    return files | {"chat_template.jinja": chat_template(template)}


def text_config(language, tokenizer):
    """What a decoder's entry in transformers' config.json has beside or instead of Qwen2's."""
    more = {} if language.decoder == "Qwen2" else {
        "model_type": {"InternLM2": "llama"}.get(language.decoder, language.decoder.lower()), "attention_bias": False,
        "head_dim": language.head_width, "pad_token_id": tokenizer.pad_token_id}
    if limit := language.rope.get("original_max_position_embeddings"):
        more["original_max_position_embeddings"] = limit
    return more | {"rope_parameters": {"rope_type": "default"} | language.rope | {"rope_theta": language.rope_theta}}


# ----------------------------------------------------------------------------------------------------------- model card

def write_card(run, folder, layout, last_step, name):
    """Write README.md: base model, data, settings, scores up to a step, curve, and how to open it under `name`."""
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
    card += ["", how_to_open(folder, layout, name, settings["model"], merges(run, layout))]
    library = {"transformers": "transformers", "native": "transformers", "peft": "peft"}.get(layout)
    data = ModelCardData(base_model=settings["model"], pipeline_tag="image-text-to-text", library_name=library)
    write_text(folder / "README.md", f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(card) + "\n")


def how_to_open(folder, layout, name, base, merged):
    """The part of a model card that says how an exported folder, called `name`, is opened in its target."""
    parts = dict(re.findall(r"<!-- (\w+) -->\n(.*?)(?=<!-- |\Z)", HOW_TO_OPEN.read_text(encoding="utf-8"), re.DOTALL))
    values = {"ask": parts["ask"], "folder": name, "base": "model/tiny" if base == "tiny" else base}
    part = "transformers" if layout == "native" else layout
    if layout == "official":
        config = Config.read(folder / CONFIG)
        values |= vars(config) | vars(config.vision)
    elif layout == "peft":
        layers = json.loads((folder / lora.ADAPTER_CONFIG).read_text(encoding="utf-8"))["target_modules"]
        part = "peft" if all(layer.endswith("_proj") for layer in layers) else "peft_official"
    return Template(parts[part] + parts["merged"] * merged).substitute(values)
