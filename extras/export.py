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

from extras.outputs import new_folder
from extras.run_folder import METRICS, read_lines
from model import InputError, InternVL, checkpoint, lora, prompt
from model.checkpoint import CHECKPOINTS, SETTINGS, WEIGHTS, write_tensors, write_text
from model.names import split
from model.tokenizer import TOKENIZER_FILES, special_id

CARD_FILE = "README.md"
LAYOUT, CHAT_TEMPLATE = (Path(__file__).with_name(name) for name in ("transformers_layout.json", "chat_template.jinja"))
CARD = (                                # settings in a model card
    "data", "domain", "eval_data", "train", "recipe", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
    "steps", "epochs", "batch_pages", "accumulate", "lr", "schedule", "warmup", "weight_decay", "max_tiles", "seed")


def export(source, folder, layout, repository=None, allow_changed=False):
    """Write the model of a run, or of one of its checkpoints, with a model card; upload it to a Hub repository.

    `layout`: "official", "transformers" (or "native", its older name) or "peft". `allow_changed`: as of
    `InternVL.from_pretrained`. Raises InputError for a folder that is not empty, for a run whose base model changed,
    and for one that the layout cannot hold.
    """
    path = Path(source)
    is_checkpoint = path.parent.name == CHECKPOINTS
    run = path.parent.parent if is_checkpoint else path.parent if path.name == WEIGHTS else path
    trained = path if is_checkpoint else checkpoint.latest_checkpoint(run)
    with new_folder(folder) as folder:
        try:
            if layout == "peft":
                save_adapter(run, trained, folder, allow_changed)
            else:
                model = InternVL.from_pretrained(source, "cpu", "float32", allow_changed=allow_changed)
                model.save_pretrained(folder) if layout == "official" else save_transformers(model, folder)
            write_card(run, folder, layout, checkpoint.step_of(trained.name) if trained else math.inf)
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


def save_adapter(run, path, folder, allow_changed):
    """Write the trained tensors of a run's checkpoint as a PEFT folder, unmerged.

    A projector that is trained as a whole becomes a module to save. Raises InputError for a run without adapters, or
    with other weights that are trained as a whole.
    """
    settings = checkpoint.read_settings(run)
    if path is None:
        raise InputError(f"{run}: a run without a checkpoint yet")
    if not allow_changed:
        checkpoint.resolve(path)                # compares the base model, on which the adapter is to be laid
    trained, _, _, scale = checkpoint.read_checkpoint(path)
    ranks = [len(tensor) for name, tensor in trained.items() if name.endswith(".lora_A.weight")]
    whole = [name for name in trained if ".lora_" not in name]
    layers = {name.rpartition(".lora_")[0] for name in trained if ".lora_" in name}
    if not ranks or any(not name.startswith("mlp1.") for name in whole) or (whole and "mlp1.1" in layers):
        raise InputError("an adapter holds the layers of --train lora, and the projector as a whole or adapted; this "
                         f"run trains {', '.join((whole or ['nothing'])[:2])}, ... and {len(layers)} adapters; "
                         "write it with --format official")
    config = {"peft_type": "LORA", "base_model_name_or_path": settings["model"], "r": ranks[0], "bias": "none",
              "lora_alpha": scale * ranks[0], "lora_dropout": settings.get("lora_dropout", 0.0),
              "target_modules": sorted({".".join(layer.split(".")[-2:]) for layer in layers}),
              "modules_to_save": ["mlp1"] if whole else None, "init_lora_weights": True, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / lora.ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    tensors = {lora.PREFIX + name: tensor for name, tensor in trained.items()}
    write_tensors(folder / lora.ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def save_transformers(model, folder):
    """Write a folder that transformers' InternVLForConditionalGeneration opens; adapters are merged."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.copy_files(model, folder, TOKENIZER_FILES)
    for name, value in transformers_files(model).items():
        write_text(folder / name, value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")
    tensors = {}
    for name, tensor in lora.merged(model):
        tensors |= split(name, tensor.to("cpu", model.stored_dtypes[name]))
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


# --------------------------------------------------------------------------------------------------------- transformers

def transformers_files(model):
    """{file name: JSON value or text} of all files of transformers' layout but the weights and the vocabulary.

    A "$name" in transformers_layout.json stands for that attribute of `values`, in chat_template.jinja of prompt.py.
    """
    config, tokenizer = model.config, model.tokenizer
    values = SimpleNamespace(
        config=config, tokenizer=tokenizer, image_token_id=special_id(tokenizer, prompt.IMAGE_TOKEN),
        end_token_id=special_id(tokenizer, prompt.END), downsample_ratio=1 / config.shuffle,
        image_size=[config.vision.tile_pixels] * 2, patch_size=[config.vision.patch_pixels] * 2)

    def fill(part):
        return {key: attrgetter(value[1:])(values) if str(value).startswith("$") else value
                for key, value in part.items()}

    files = json.loads(LAYOUT.read_text(encoding="utf-8"), object_hook=fill)
    settings = json.loads((model.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    files["tokenizer_config.json"] = settings | files["tokenizer_config.json"]
    template = Template(CHAT_TEMPLATE.read_text(encoding="utf-8"))
    return files | {"chat_template.jinja": template.substitute(vars(prompt))}


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
