"""Where does a model come from, and how is it written? Find, download, read, draw at random, save.

    model folder      config.json, the tokenizer's files and the weights, as published: model.safetensors, or several
                      files and model.safetensors.index.json, which names them
    adapter folder    PEFT's: adapter_config.json, which names the base model, and adapter_model.safetensors
    run folder        settings.json, checkpoints/, and at the end of the run also the files of a model folder
    checkpoint        of a run: its trained tensors in float32 and the optimizer's state; the rest is the base model's

Only safetensors and JSON are read or written.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.config import Config
from model.errors import InputError, warn
from model.names import file_names, join_rows, split_rows
from model.tokenizer import TOKENIZER_FILES, load_tokenizer

WEIGHTS, CONFIG, SETTINGS, CHECKPOINTS = "model.safetensors", "config.json", "settings.json", "checkpoints"
INDEX, SHARDS, SHARD_BYTES = "model.safetensors.index.json", "model-*-of-*.safetensors", 5 * 10 ** 9
BESIDE_WEIGHTS = (                      # the other files of a model folder, for us and for the official code
    CONFIG, "generation_config.json", "preprocessor_config.json", *TOKENIZER_FILES,
    "configuration_*.py", "modeling_*.py", "conversation.py")
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TINY = Path(__file__).parent / "tiny"
LORA_SCALE = 2.0                        # of the folders that the official LoRA script leaves: alpha is twice the rank


# -------------------------------------------------------------------------------------------------------------- finding

def resolve(name, seed=None):
    """Find a model -> (model folder, checkpoints and adapter folders to lay over it, seed of random weights or None).

    `name`: see `InternVL.from_pretrained`; the files of a Hub id are downloaded. Raises InputError.
    """
    from model.lora import ADAPTER_CONFIG, read_adapter_config
    if name == "tiny":
        return TINY, [], seed
    path = Path(name)
    run = path.parent.parent if path.suffix == ".safetensors" else path
    if path.name == WEIGHTS and path.is_file():
        return resolve(path.parent, seed)
    if (run / SETTINGS).is_file() and (path != run or not has_weights(run)):
        settings = read_settings(run)
        trained = path if path != run else latest_checkpoint(run)
        if trained is None:
            raise InputError(f"{name}: this run has no checkpoint yet; its base model is {settings['model']}")
        if Path(settings["model"]).resolve() in (run.resolve(), trained.resolve()):
            raise InputError(f"{name}: its {SETTINGS} names itself as the base model; expected another model")
        folder, overlays, seed = resolve(settings["model"], settings["seed"] if settings["from_scratch"] else None)
        return folder, [*overlays, trained], seed
    if (path / ADAPTER_CONFIG).is_file():
        folder, overlays, seed = resolve(read_adapter_config(path)[0], seed)
        return folder, [*overlays, path], seed
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise InputError(f"{name}: no {CONFIG} in this folder; expected a model folder, a run folder or a Hub id")
        return path, [], seed
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise InputError(f"{name}: not found; expected a model folder, a run folder, a checkpoint in it, a Hub id or "
                         "'tiny'")
    folder = download(name, BESIDE_WEIGHTS)
    if seed is None and not has_weights(folder):
        warn(f"{name}: about {2 * about_parameters(Config.read(folder / CONFIG)) / 1e9:.1f} GB to download; the "
             "weights take as much memory in bfloat16, twice that in float32; train.py prints what a step takes")
    return folder if seed is not None else download(name, (WEIGHTS, INDEX, SHARDS)), [], seed


def about_parameters(config):
    """The number of parameters in the large matrices: at least 99 % of all."""
    vision, language = config.vision, config.language
    heads = 2 * (language.heads + language.kv_heads) * language.head_width
    return (vision.layers * vision.width * (4 * vision.width + 2 * vision.mlp_width) + language.width * (
        language.layers * (heads + 3 * language.mlp_width) + 2 * language.vocabulary))


def has_weights(folder):
    """Whether a model folder has weights, in one file or in several."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def read_settings(run):
    """The settings of a run folder, as train.py wrote them. Raises InputError."""
    try:
        settings = json.loads(Path(run, SETTINGS).read_text(encoding="utf-8"))
        for key, kind in (("model", str), ("seed", int), ("from_scratch", bool), ("train", str)):
            if not isinstance(settings.get(key), kind):
                raise ValueError(f"{key} is {settings[key]!r}" if key in settings else f"{key!r} is missing")
        if any(isinstance(value, (dict, list)) for value in settings.values()):
            raise ValueError("expected plain values")
        return settings
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{run}: not a run folder ({error}); expected the --out folder of an earlier run") from error


def settings_of(name):
    """The settings of the run that `name` is, or is a file of; {} if it is another model. Raises InputError."""
    folders = Path(name), *Path(name).parents[:2 * Path(name).is_file()]
    return next((read_settings(folder) for folder in folders if (folder / SETTINGS).is_file()), {})


def latest_checkpoint(run):
    """The newest checkpoint file of a run, or None."""
    return max(Path(run, CHECKPOINTS).glob("step-*.safetensors"), default=None)


def download(name, files):
    """Download a model's files into the Hub's cache; return their folder. Raises InputError."""
    from huggingface_hub import errors, snapshot_download, try_to_load_from_cache
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"{name}: neither a local folder nor a model on the Hub; check the name, or log in with "
                         "'hf auth login' if it is private") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(f"{name}: the Hub cannot be reached and the model is not in the cache; connect to the "
                         "network, give a local folder with --model, or take the embedded model with --tiny") from error
    except (errors.HTTPError, OSError) as error:
        cached = [try_to_load_from_cache(name, file) for file in files[:2]]         # of several files the index
        if found := [path for path in cached if isinstance(path, str)]:             # from an earlier download
            return Path(found[0]).parent
        raise InputError(f"{name}: download failed ({error}); try again, or use a local folder with --model") from error


# -------------------------------------------------------------------------------------------------------------- reading

def load(model, folder, overlays, seed=None, device=None, dtype=None):
    """Fill a model that was built on the meta device, with what `resolve` returned. See `InternVL.from_pretrained`."""
    from model.lora import lay_over, load_adapter, our_layers
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: not usable here ({reason}); try --device cpu") from error
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    check_size(model, folder, device, dtype if seed is None else torch.float32)
    adapters, model.files = {}, {}
    if seed is None:
        tensors, stored, model.files, adapters = read(folder, model, device, dtype)
        model.load_state_dict(tensors, assign=True)
    else:
        model.to_empty(device="cpu").init_weights(seed)
        model.to(device, dtype)
        stored = dict.fromkeys(model.state_dict(), getattr(torch, model.config.stored_dtype))
    model.requires_grad_(False).eval()
    model.tokenizer = load_tokenizer(folder)
    if len(model.tokenizer) > model.config.language.vocabulary:
        raise InputError(f"{folder}: its tokenizer has {len(model.tokenizer)} tokens, its config.json a vocab_size of "
                         f"{model.config.language.vocabulary}; they belong to different models")
    model.dtype, model.folder, model.stored_dtypes = dtype, folder, stored
    lay_over(model, our_layers(adapters, model), LORA_SCALE, folder)
    for path in overlays:
        load_adapter(path, model) if path.is_dir() else load_checkpoint(path, model)
    return model


def check_size(model, folder, device, dtype):
    """Raise InputError for a model that is larger than the memory of its device."""
    needed, held = sum(p.numel() for p in model.parameters()) * dtype.itemsize, device_memory(device)
    if needed > held:
        advice = "--dtype bfloat16, " * (dtype.itemsize > 2) + "--int8 of infer.py, " * (device.type != "cpu")
        raise InputError(f"{folder}: its config.json describes {needed / 1e9:,.0f} GB of weights, this "
                         f"{'machine' if device.type == 'cpu' else 'GPU'} has {held / 1e9:,.0f} GB of memory; take "
                         f"{advice}a smaller model or a larger machine")


def device_memory(device):
    """The memory of a device, or of the machine, in bytes; infinite where it is unknown (a CPU under Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def weight_files(folder):
    """The paths of a folder's weights: one, or those that its index names. Raises InputError."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError(f"it names {str(files)[:60]}")
        return [folder / file for file in files]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: not an index of weights ({error}); download or copy it again") from error


def read(folder, model, device, dtype):
    """Read the weights of a folder -> ({our name: tensor of `dtype` on `device`}, {our name: dtype in the file},
    {name in files: file}, {name: tensor} of the adapters that the official LoRA script leaves unmerged).

    Raises InputError, which lists tensors that are missing, unexpected, there twice, or of another shape or dtype.
    """
    wanted, language = model.state_dict(), model.config.language
    holds, tensors, stored, files, adapters = file_names(wanted, language.decoder), {}, {}, {}, {}
    trouble = {"missing": [], "unexpected": [], "duplicate": [], "wrong shape": [], "wrong dtype": []}
    for path, name, part in tensors_of(weight_files(folder)):
        plain = name.replace(".base_model.model", "").replace(".base_layer.", ".").replace(".default.", ".")
        ours, shape, kind = holds.get(plain, ()), tuple(part.get_shape()), part.get_dtype()
        rows = [len(wanted[one]) for one in ours]
        if ".lora_" in plain:
            adapters[plain] = part[:]
        elif not ours:
            trouble["unexpected"].append(name)
        elif plain in files:
            trouble["duplicate"].append(f"{name} in {files[plain]} and {path.name}")
        elif shape != (expected := (sum(rows), *wanted[ours[0]].shape[1:])):
            trouble["wrong shape"].append(f"{name} {shape} instead of {expected}")
        elif kind not in STORED_DTYPES:
            trouble["wrong dtype"].append(f"{name} {kind}")
        else:
            tensors |= zip(ours, split_rows(part[:].to(device, dtype), rows, language.kv_heads, language.decoder))
            stored |= dict.fromkeys(ours, STORED_DTYPES[kind])
        files[plain] = path.name
    trouble["missing"] = sorted(holds.keys() - files.keys())
    listed = [f"{len(found)} {kind} ({', '.join(found[:3] + ['...'] * (len(found) > 3))})"
              for kind, found in trouble.items() if found]
    if listed:
        raise InputError(f"{folder}: not the weights that its config.json describes: {'; '.join(listed)}; "
                         f"expected {len(holds)} tensors of dtype {', '.join(STORED_DTYPES)}")
    return tensors, stored, {} if adapters else files, adapters


def tensors_of(paths):
    """Yield (path, name, slice of the tensor) of safetensors files; each is opened once. Raises InputError."""
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield path, name, file.get_slice(name)
        except FileNotFoundError as error:
            raise InputError(f"{path}: not found; a model folder holds its weights in {WEIGHTS}, or in files named by "
                             f"{INDEX}") from error
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from error


def load_checkpoint(path, model):
    """Copy the trained tensors of a run's checkpoint into a model. See `read_checkpoint` and `lora.lay_over`."""
    from model.lora import lay_over
    trained, _, _, scale = read_checkpoint(path)
    lay_over(model, trained, scale, path)


def read_checkpoint(path):
    """Read a checkpoint -> (trained tensors, optimizer state, `state`, scale of its adapters).

    Tensors are in dicts by official name, those of the optimizer after their kind: "exp_avg.mlp1.1.weight". Raises
    InputError, also where a byte changed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata(), file.keys()
            state, scale = metadata["state"], float(metadata.get("lora_scale", 0))
            if checksum(names, file.get_tensor, state) != metadata["sha256"]:
                raise InputError(f"{path}: damaged, its checksum is not that of the saved tensors; delete it to resume "
                                 "from the checkpoint before")
            tensors = {"model": {}, "optimizer": {}}
            for kind, _, name in (name.partition(".") for name in names):
                tensors[kind][name] = file.get_tensor(f"{kind}.{name}")
            return tensors["model"], tensors["optimizer"], json.loads(state), scale
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a checkpoint of train.py, or not a whole one ({error})") from error


def checksum(names, tensor_of, state):
    """SHA-256 of the named tensors in the order of their names, and of the state's text."""
    total = hashlib.sha256(state.encode())
    for name in sorted(names):
        total.update(name.encode())
        total.update(tensor_of(name).reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


# -------------------------------------------------------------------------------------------------------------- writing

def save(model, folder):
    """Write a model folder. See `InternVL.save_pretrained`."""
    from model.lora import merged
    folder, language = Path(folder), model.config.language

    def stored(ours):
        return join_rows([merged(model, one).to("cpu", model.stored_dtypes[one]) for one in ours],
                         language.kv_heads, language.decoder)

    holds = file_names((name for name in model.state_dict() if ".adapter." not in name), language.decoder)
    sizes = {name: sum(model.get_parameter(one).numel() * model.stored_dtypes[one].itemsize for one in ours)
             for name, ours in holds.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copy_files(model, folder, BESIDE_WEIGHTS)
        set_merged(folder / CONFIG)
        write_weights(folder, model.files or shard(sizes), sizes, lambda name: stored(holds[name]))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be written there ({error})") from error


def set_merged(path):
    """Note in the config.json of a folder that the official LoRA script left that its adapters are merged now."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("use_llm_lora") or config.get("use_backbone_lora"):
        write_text(path, json.dumps(config | {"use_llm_lora": 0, "use_backbone_lora": 0}, indent=2) + "\n")


def shard(sizes, most=SHARD_BYTES):
    """{name: bytes}, in the order of the official class -> {name: file}, as transformers 4.37 shared them out."""
    numbers, total, filled = {}, 0, math.inf
    for name, size in sizes.items():
        total, filled = (total + 1, size) if filled + size > most else (total, filled + size)
        numbers[name] = total
    return {name: WEIGHTS if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"
            for name, number in numbers.items()}


def write_weights(folder, files, sizes, tensor_of):
    """Write tensors into the files of {name: file}, one file after another, and their index if there are several."""
    for file in dict.fromkeys(files.values()):
        tensors = {name: tensor_of(name).contiguous() for name in files if files[name] == file}
        write_tensors(folder / file, tensors, {"format": "pt"})
    one = set(files.values()) == {WEIGHTS}
    for old in [INDEX, *(path.name for path in folder.glob(SHARDS))] if one else [WEIGHTS]:
        if old not in files.values():
            (folder / old).unlink(missing_ok=True)
    if not one:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def copy_files(model, folder, patterns):
    """Copy files of the folder that a model was loaded from."""
    for file in [file for pattern in patterns for file in model.folder.glob(pattern)]:
        if file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)


def write_tensors(path, tensors, metadata):
    """Write a safetensors file, whole or not at all."""
    with atomic_replace(path) as beside:
        save_file(tensors, beside, metadata)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with atomic_replace(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_replace(path):
    """Yield a path beside `path` to write to; then rename it, so that `path` never holds half a file."""
    beside = path.with_name(path.name + ".part")
    try:
        yield beside
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())                         # on the disk before its name is, should the power fail
        os.chmod(beside, 0o644)                             # safetensors makes it readable by its owner alone
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
