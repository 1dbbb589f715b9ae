"""Where does a model come from, and how is it written? Find, download, read, draw at random, save.

    model folder      config.json, the tokenizer's files and the weights, as published: model.safetensors, or several
                      files and model.safetensors.index.json, which names them
    adapter folder    PEFT's: adapter_config.json, which names the base model, and adapter_model.safetensors
    run folder        settings.json, checkpoints/, and at the end of the run also the files of a model folder
    checkpoint        of a run: what it trains or drew, and the optimizer's state; the rest is the base model's

Only safetensors and JSON are read or written; of pytorch_model.bin, as InternLM-XComposer2 has it, only the tensors are
read, and no code in it is run.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.config import Config
from model.errors import InputError, finite, warn
from model.names import PARTS, file_names, join_rows, official_name, part_of, split_rows
from model.tokenizer import TOKENIZER_FILES, load_tokenizer

WEIGHTS, CONFIG, SETTINGS, CHECKPOINTS = "model.safetensors", "config.json", "settings.json", "checkpoints"
BINARY, BINARY_INDEX, BINARY_SHARDS = "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"
INDEX, SHARDS, SHARD_BYTES = "model.safetensors.index.json", "model-*-of-*.safetensors", 5 * 10 ** 9
BESIDE_WEIGHTS = (                      # the other files of a model folder, for us and for the official code
    CONFIG, "generation_config.json", "preprocessor_config.json", *TOKENIZER_FILES,
    "configuration_*.py", "modeling_*.py", "conversation.py", "tokenization_*.py", "build_mlp.py")
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MOST_HEADER = 100_000_000               # bytes of the header of a safetensors file, the format's own limit
TINY = Path(__file__).parent / "tiny"
RESIZED = {}                            # (decoder, our name) -> makes a table of another size fit, see xcomposer2.py
LORA_SCALE = 2.0                        # of the folders that the official LoRA script leaves: alpha is twice the rank


# -------------------------------------------------------------------------------------------------------------- finding

def resolve(name, skip=(), allow_changed=False, seen=()):
    """Find a model -> (model folder, what to lay over it, parts that are not read from its weights).

    `name`, `allow_changed`: see `InternVL.from_pretrained`; files of a Hub id are downloaded. `skip`: parts that the
    caller draws.
    To lay over: (checkpoint or adapter folder, parts that its run drew, parts to skip in it). `seen`: the keys of files
    that led to `name`. Raises InputError.
    """
    from model.lora import ADAPTER_CONFIG, read_adapter_config
    if name == "tiny":
        return TINY, [], skip
    path = Path(name)
    run = path.parent.parent if path.suffix == ".safetensors" else path
    if path.name == WEIGHTS and path.is_file():
        return resolve(path.parent, skip, allow_changed, seen)
    if (run / SETTINGS).is_file() and (path != run or not has_weights(run)):
        settings = read_settings(run)
        trained = path if path != run else latest_checkpoint(run)
        if trained is None:
            raise InputError(f"{name}: this run has no checkpoint yet; its base model is {settings['model']}")
        drawn = PARTS if settings["from_scratch"] else (settings.get("init") or "").split(",")
        where = f"{run / SETTINGS}: model"
        found = resolve_base(where, settings["model"], trained, drawn, skip, allow_changed, seen)
        if not allow_changed:                               # with `skip`: compare what the run itself has read
            base = resolve(settings["model"], drawn, True) if skip else (found[0], found[1][:-1], found[2])
            check_base(name, settings, *base)
        return found
    if (path / ADAPTER_CONFIG).is_file():
        where = f"{path / ADAPTER_CONFIG}: base_model_name_or_path"
        return resolve_base(where, read_adapter_config(path)[0], path, (), skip, allow_changed, seen)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise InputError(f"{name}: no {CONFIG} in this folder; expected a model folder, a run folder or a Hub id")
        return path, [], skip
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise InputError(f"{name}: not found; expected a model folder, a run folder, a checkpoint in it, a Hub id or "
                         "'tiny'")
    folder, unread = download(name, BESIDE_WEIGHTS), {*PARTS} <= {*skip}
    return folder if unread else download_weights(name, folder), [], skip


def download_weights(name, folder):
    """Print the size of a model whose other files are in `folder`, unless it is there already; download its weights."""
    if not has_weights(folder):
        gigabytes = 2 * about_parameters(Config.read(folder / CONFIG)) / 1e9
        warn(f"{name}: about {gigabytes:.1f} GB to download; the weights take as much memory in bfloat16, twice that "
             "in float32; train.py prints what a step takes")
    folder = download(name, (WEIGHTS, INDEX, SHARDS))
    return folder if any(folder.glob("model*.safetensors")) else download(name, (BINARY, BINARY_INDEX, BINARY_SHARDS))


def about_parameters(config):
    """The number of parameters in the large matrices: at least 99 % of all."""
    vision, language = config.vision, config.language
    heads = 2 * (language.heads + language.kv_heads) * language.head_width
    partial = getattr(language, "partial_rank", 0) * (heads + 5 * language.width + 3 * language.mlp_width)
    return (vision.layers * vision.width * (4 * vision.width + 2 * vision.mlp_width) + language.layers * (
        language.width * (heads + 3 * language.mlp_width) + partial) + 2 * language.width * language.vocabulary)


def has_weights(folder):
    """Whether a model folder has weights, in one file or in several."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, BINARY, BINARY_INDEX))


def resolve_base(where, base, overlay, drawn, skip, allow_changed, seen):
    """`resolve` the base model that a key of a file names, and lay a checkpoint or an adapter folder over it."""
    try:
        if where in seen:
            raise InputError(f"{base}: leads back to itself; expected another model")
        folder, overlays, without = resolve(base, {*skip, *drawn}, allow_changed, (*seen, where))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return folder, [*overlays, (overlay, drawn, skip)], without


def read_settings(run):
    """The settings of a run folder, as train.py wrote them. Raises InputError."""
    try:
        if not os.path.isfile(Path(run, SETTINGS)):
            raise ValueError(f"no file {SETTINGS} in it")
        settings = json.loads(Path(run, SETTINGS).read_text(encoding="utf-8"))
        for key, kind in (("model", str), ("seed", int), ("from_scratch", bool), ("train", str)):
            if not isinstance(settings.get(key), kind):
                raise ValueError(f"{key} is {settings[key]!r}" if key in settings else f"{key!r} is missing")
        if any(isinstance(value, (dict, list)) for value in settings.values()):
            raise ValueError("expected plain values")
        return settings
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{run}: not a run folder ({error}); expected the --out folder of an earlier run") from error


def check_base(name, settings, *base):
    """Raise InputError if the base model of a run is not the one that it was trained on. `base`: of `resolve`."""
    if "base_fingerprint" not in settings:
        warn(f"{name}: a run of an earlier version; whether its base model has changed is unknown")
    elif settings["base_fingerprint"] != fingerprint(*base):
        raise InputError(f"{name}: its base model {settings['model']} changed since it was trained; bring that one "
                         "back, or use this one with --allow-changed")


def step_of(name):
    """The step in the name of a checkpoint file; None if it is none: step-0000001.safetensors, exactly."""
    found = re.fullmatch(r"step-([0-9]{7}|[1-9][0-9]{7,18})\.safetensors", name)
    return found and int(found[1])


def checkpoints(run):
    """{step: file} of a run's checkpoints, the newest last."""
    paths = [path for path in Path(run, CHECKPOINTS).glob("step-*") if step_of(path.name) is not None]
    return {step_of(path.name): path for path in sorted(paths, key=lambda path: step_of(path.name))}


def settings_of(name):
    """The settings of the run that `name` is, or is a file of; {} if it is another model. Raises InputError."""
    folders = Path(name), *Path(name).parents[:2 * Path(name).is_file()]
    return next((read_settings(folder) for folder in folders if (folder / SETTINGS).is_file()), {})


def latest_checkpoint(run):
    """The newest checkpoint file of a run, or None."""
    return next(reversed(checkpoints(run).values()), None)


def run_of(path):
    """The id of the run that wrote a checkpoint; None for one of an earlier version, and for what cannot be read."""
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("run_id")


def fingerprint(folder, overlays=(), without=()):
    """A hash, 16 hex digits, of a model as `resolve` found it: config, tokenizer and, unless all are drawn, weights.

    Of the weights, also those of the overlays: the header of each file and the first 4 kB of each tensor.
    """
    files = [folder / name for name in (CONFIG, *TOKENIZER_FILES)]
    weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    files += () if {*PARTS} <= {*without} else weights
    for path, *_ in overlays:
        files += sorted(path.glob("adapter_*")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for path in filter(Path.is_file, files):
        whole = path.suffix not in (".safetensors", ".bin")
        for part in (path.name.encode(), *([path.read_bytes()] if whole else parts_of(path))):
            total.update(part)
    return total.hexdigest()[:16]


def parts_of(path):
    """Yield a safetensors file's header and the first 4 kB of each tensor, or a .bin's checksums; if damaged, less."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, BadZipFile):
        if path.suffix == ".bin":
            yield repr([(part.filename, part.CRC) for part in ZipFile(path).infolist()]).encode()
            return
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            yield (header := file.read(min(size, MOST_HEADER)))
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    file.seek(8 + size + begin)
                    yield file.read(min(end - begin, 4096))


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

def load(model, folder, overlays, without=(), device=None, dtype=None):
    """Fill a model that was built on the meta device, but for parts that nothing in `overlays` holds. See `resolve`."""
    from model.lora import lay_over, load_adapter, our_layers
    paths = folder, *(path for path, _, _ in overlays)
    for file in (file for path in paths for file in (path.iterdir() if path.is_dir() else [path])):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise InputError(f"{file}: a pipe, a socket or a device; expected a regular file")
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: not usable here ({reason}); try --device cpu") from error
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    check_size(model, folder, device, dtype)
    stored, adapters, model.files = dict.fromkeys(model.state_dict(), getattr(torch, model.config.stored_dtype)), {}, {}
    if wanted := {name: tensor for name, tensor in model.state_dict().items() if part_of(name) not in without}:
        tensors, read_as, files, adapters = read(folder, wanted, model.config.language, device, dtype, without)
        model.load_state_dict(tensors, strict=False, assign=True)
        stored, model.files = stored | read_as, {} if without or adapters else files
    for empty in (child for name, child in model.named_children() if part_of(name) in without):
        empty.to(dtype).to_empty(device=device)
    if buffers := [name for name, _ in model.named_buffers()]:          # built on the meta device: without values
        raise InputError(f"{', '.join(buffers)}: no place for buffers; make it a parameter, or compute it in forward")
    model.requires_grad_(False).eval()
    model.tokenizer = load_tokenizer(folder)
    if len(model.tokenizer) > model.config.language.vocabulary:
        raise InputError(f"{folder}: its tokenizer has {len(model.tokenizer)} tokens, its config.json a vocab_size of "
                         f"{model.config.language.vocabulary}; they belong to different models")
    model.dtype, model.folder, model.stored_dtypes = dtype, folder, stored
    lay_over(model, our_layers(adapters, model), LORA_SCALE, folder)
    for path, drawn, skip in overlays:
        if path.is_dir():
            load_adapter(path, model, skip)
        else:
            load_checkpoint(path, model, drawn, skip)
            tiles = read_settings(path.parent.parent).get("max_tiles") or model.config.max_tiles
            model.config = replace(model.config, max_tiles=min(tiles, 128))
    model.fingerprint = fingerprint(folder, overlays, without)


def check_size(model, folder, device, dtype):
    """Raise InputError for a model that is larger than the memory of its device."""
    needed, held = sum(p.numel() for p in model.parameters()) * dtype.itemsize, device_memory(device)
    if needed > held:
        advice = "--dtype bfloat16, " * (dtype.itemsize > 2) + (
            "--int8 of infer.py, --shard of train.py on several GPUs, " * (device.type != "cpu"))
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
    names = [name for name in (WEIGHTS, INDEX, BINARY, BINARY_INDEX) if (folder / name).is_file()] or [WEIGHTS]
    if not (index := folder / names[0]).name.endswith(".json"):
        return [index]
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError(f"it names {str(files)[:60]}")
        return [folder / file for file in files]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: not an index of weights ({error}); download or copy it again") from error


def read(folder, wanted, language, device, dtype, skip=()):
    """Read the weights of a folder -> ({our name: tensor of `dtype` on `device`}, {our name: dtype in the file},
    {name in files: file}, {name: tensor} of the adapters that the official LoRA script leaves unmerged).

    `wanted`: {our name: tensor of the expected shape}; `skip`: parts that are not read. Raises InputError, which lists
    tensors that are missing, unexpected, there twice, or of another shape or dtype.
    """
    holds, tensors, stored, files, adapters = file_names(wanted, language.decoder), {}, {}, {}, {}
    trouble = {"missing": [], "unexpected": [], "duplicate": [], "wrong shape": [], "wrong dtype": []}
    for path, name, shape, kind, part in tensors_of(weight_files(folder), skip):
        plain = name.replace(".base_model.model", "").replace(".base_layer.", ".").replace(".default.", ".")
        ours = holds.get(plain, ())
        rows = [len(wanted[one]) for one in ours]
        if shape and (resize := RESIZED.get((language.decoder, *ours))):
            shape = tuple((part := resize(part[:], rows[0])).shape)
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
            whole = finite(part[:].to(device, dtype), name, path)
            tensors |= zip(ours, split_rows(whole, rows, language.kv_heads, language.decoder))
            stored |= dict.fromkeys(ours, STORED_DTYPES[kind])
        files[plain] = path.name
    trouble["missing"] = sorted(holds.keys() - files.keys())
    listed = [f"{len(found)} {kind} ({', '.join(found[:8] + ['...'] * (len(found) > 8))})"
              for kind, found in trouble.items() if found]
    if listed:
        parts = {part_of(name) for found in trouble.values() for name in found} - {None}
        raise InputError(f"{folder}: not the weights that its config.json describes: {'; '.join(listed)}; "
                         f"expected {len(holds)} tensors of dtype {', '.join(STORED_DTYPES)}"
                         + f"; train.py --init {','.join(sorted(parts))} draws a changed part anew" * bool(parts))
    binary = any(file.endswith(".bin") for file in files.values())              # is saved as safetensors
    return tensors, stored, {} if binary else files, adapters


def tensors_of_binary(path, skip):
    """`tensors_of` a .bin file; no code in it is run. Raises InputError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, part in found.items():
            if not (isinstance(name, str) and isinstance(part, torch.Tensor) and part.ndim
                    and part.layout == torch.strided and part.device.type == "cpu"):
                raise ValueError(f"{str(name)[:60]!r} is not a tensor with values")
    except Exception as error:                  # what torch.load raises for a broken file has no common class
        reason = " ".join(str(error).partition("Check the documentation")[0].split())[-120:] or type(error).__name__
        raise InputError(f"{path}: refused, it holds more than tensors or is not whole ({reason}); download or copy "
                         "the published file again") from error
    kinds = {dtype: kind for kind, dtype in STORED_DTYPES.items()}
    for name, part in found.items():            # without the buffers that older versions of transformers stored
        if part_of(name) not in skip and not name.endswith((".position_ids", ".inv_freq")):
            yield path, name, tuple(part.shape), kinds.get(part.dtype, str(part.dtype)), part.detach()


def tensors_of(paths, skip):
    """Yield (path, name, shape, dtype's name, tensor or slice) of files without the parts `skip`. Raises InputError."""
    for path in paths:
        if path.suffix == ".bin":
            yield from tensors_of_binary(path, skip)
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for name in (name for name in file.keys() if part_of(name) not in skip):
                    part = file.get_slice(name)
                    yield path, name, tuple(part.get_shape()), part.get_dtype(), part
        except FileNotFoundError as error:
            raise InputError(f"{path}: not found; a model folder holds its weights in {WEIGHTS}, or in files named by "
                             f"{INDEX}") from error
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from error


def load_checkpoint(path, model, drawn=(), skip=()):
    """Copy a run's checkpoint into a model, but for the parts in `skip`; the others that the run drew must be whole."""
    from model.lora import lay_over
    whole = [official_name(name) for name in model.state_dict() if part_of(name) in {*drawn} - {*skip}]
    held, _, _, scale = read_checkpoint(path, whole)
    lay_over(model, {name: tensor for name, tensor in held.items() if part_of(name) not in skip}, scale, path)


def read_checkpoint(path, needed=()):
    """Read a checkpoint -> (trained and drawn tensors, optimizer state, `state`, scale of its adapters).

    Tensors are in dicts by official name, those of the optimizer after their kind: "exp_avg.mlp1.1.weight". Raises
    InputError, also where a byte changed or a `needed` tensor is missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata(), file.keys()
            text, scale, run = metadata["state"], float(metadata.get("lora_scale", 0)), path.parent.parent
            state = json.loads(text)
            if (run / SETTINGS).is_file() and metadata.get("run_id") != read_settings(run).get("run_id"):
                raise InputError(f"{path}: a checkpoint of another run; move it away")
            if step_of(path.name) not in (None, state["step"]):
                raise InputError(f"{path}: holds step {state['step']}; move it away, or name it after that")
            if checksum(names, file.get_tensor, text) != metadata["sha256"]:
                raise InputError(f"{path}: damaged, its checksum is not that of the saved tensors; delete it to resume "
                                 "from the checkpoint before")
            tensors = {"model": {}, "optimizer": {}}
            for kind, _, name in (name.partition(".") for name in names):
                tensors[kind][name] = finite(file.get_tensor(f"{kind}.{name}"), f"{kind}.{name}", path)
            if missing := sorted({*needed} - tensors["model"].keys()):
                raise InputError(f"{path}: lacks {', '.join(missing[:3])}, which its run trains or drew")
            return tensors["model"], tensors["optimizer"], state, scale
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
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        new = config | ({"max_dynamic_patch": model.config.max_tiles} if model.config.tiled else {})  # others cut by it
        new |= {key: 0 for key in ("use_llm_lora", "use_backbone_lora") if config.get(key)}     # merged now
        if new != config:
            write_text(folder / CONFIG, json.dumps(new, indent=2) + "\n")
        write_weights(folder, model.files or shard(sizes), sizes, lambda name: stored(holds[name]))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be written there ({error})") from error


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
    """Write a safetensors file, whole or not at all. Raises InputError for values that are not finite."""
    for name, tensor in tensors.items():
        finite(tensor, name, path)
    with atomic_replace(path) as beside:
        save_file(tensors, beside, metadata)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with atomic_replace(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_replace(path):
    """Yield a path to write to, in a folder of its own; then rename it to `path`, which so never holds half a file."""
    for number in itertools.count():
        folder = path.with_name(f"{path.name}.part{number or ''}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()                                  # so nothing in it is anybody else's
            break
    beside = folder / path.name
    try:
        yield beside
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())                         # on the disk before its name is, should the power fail
        os.chmod(beside, 0o644)                             # safetensors makes it readable by its owner alone
        os.replace(beside, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_left_behind(folder):
    """Whether this is a folder of `atomic_replace` whose process was killed; `.tmp*` is safetensors' own."""
    return folder.is_dir() and all(path.name == folder.stem or path.match(".tmp*") for path in folder.iterdir())
