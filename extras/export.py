"""How does a run's model leave for elsewhere? As a model folder with a card that tells its base, data, settings and score.

    RUN, or one of its checkpoints  ->  FOLDER: weights in a layout of one's choice, config, tokenizer, README.md, curve.png
                                    ->  a repository of the Hub
"""
import math
import os
import shutil
from pathlib import Path

from extras.run_folder import METRICS, read_lines
from model.checkpoint import CHECKPOINTS, CONFIG, SETTINGS, WEIGHTS, export_adapter, read_settings
from model.errors import InputError
from model.internvl import InternVL
from model.layouts import ADAPTER_CONFIG

CARD_FILE = "README.md"
# told in a model card
CARD = ("data", "domain", "eval_data", "train", "recipe", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "steps",
        "epochs", "batch_pages", "accumulate", "lr", "schedule", "warmup", "weight_decay", "max_tiles", "seed")


def export(run_folder, target, layout, repository=None):
    """Write a run's (or a checkpoint's) model as a model folder with a model card; upload it if a Hub repository is named.

    Raises InputError for a folder that holds a run, a model or a README.md already.
    """
    held = [name for name in (SETTINGS, WEIGHTS, CONFIG, ADAPTER_CONFIG, CARD_FILE) if (Path(target) / name).exists()]
    if held:
        raise InputError(f"{target}: holds {held[0]} already; choose another folder")
    if layout == "peft":
        export_adapter(run_folder, target)
    else:
        InternVL.from_pretrained(run_folder, "cpu", "float32").save_pretrained(target, layout)
    path = Path(run_folder)
    if path.parent.name == CHECKPOINTS:
        write_card(path.parent.parent, Path(target), last_step=int(path.stem.split("-")[-1]))
    else:
        write_card(path.parent if path.name == WEIGHTS else path, Path(target))
    print(f"wrote {target}")
    if repository:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        try:
            HfApi().create_repo(repository, exist_ok=True)
            print("uploaded", HfApi().upload_folder(repo_id=repository, folder_path=target))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"{repository}: cannot be uploaded ({error}); log in with 'hf auth login', "
                             f"or upload {target} yourself") from error


def write_card(run, folder, last_step=math.inf):
    """Write README.md, the model card: base, data, settings, score up to a step and curve of a run."""
    if not (run / SETTINGS).exists():                           # a model folder exported anew: nothing is known of its training
        return
    settings, lines = read_settings(run), read_lines(run / METRICS)
    measured = [line for line in lines if "val_loss" in line and line["step"] <= last_step]
    settings |= {key: ",".join(Path(part).name if os.path.isabs(part) else part for part in settings[key].split(","))
                 for key in ("model", "data", "eval_data") if settings.get(key)}        # no folders of this machine
    told = {key: settings[key] for key in CARD if settings.get(key) is not None
            and ("lora" in settings["train"].split(",") or not key.startswith("lora_"))
            and ("synthetic" in settings["data"] or key != "domain")}
    card = [f"---\nbase_model: {settings['model']}\npipeline_tag: image-text-to-text\n---\n",
            f"# {settings['model']}, fine-tuned\n", "| setting | value |\n|---|---|",
            *(f"| {key} | {value} |" for key, value in told.items())]
    if measured:
        names = [name for name in measured[-1] if name != "step"]
        card += ["", f"| step | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|",
                 *(f"| {line['step']} | " + " | ".join(f"{line[name]:.4f}" for name in names) + " |"
                   for line in (measured[0], measured[-1]))]
        shutil.copyfile(run / "curve.png", folder / "curve.png")
        card += ["\n![training and validation loss](curve.png)"]
    (folder / CARD_FILE).write_text("\n".join(card) + "\n", encoding="utf-8")
