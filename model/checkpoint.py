"""Where does a model come from, and how is it written? Find, download, read, draw at random, save.

    model folder      config.json, the tokenizer's files and one model.safetensors, as published
    adapter folder    PEFT's: adapter_config.json, which names the base model, and adapter_model.safetensors
    run folder        settings.json, checkpoints/, and at the end of the run also the files of a model folder
    checkpoint        of a run: what it trains or drew, and the optimizer's state; the rest is the base model's

Only safetensors and JSON are read or written.
"""
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.errors import InputError, finite, warn
from model.names import PARTS, official_name, our_name, part_of
from model.tokenizer import TOKENIZER_FILES, load_tokenizer

WEIGHTS, CONFIG, SETTINGS, CHECKPOINTS = "model.safetensors", "config.json", "settings.json", "checkpoints"
BESIDE_WEIGHTS = (                      # the other files of a model folder, for us and for the official code
    CONFIG, "generation_config.json", "preprocessor_config.json", *TOKENIZER_FILES,
    "configuration_*.py", "modeling_*.py", "conversation.py")
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MOST_HEADER = 100_000_000               # bytes of the header of a safetensors file, the format's own limit
TINY = Path(__file__).parent / "tiny"


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
    if (run / SETTINGS).is_file() and (path != run or not (run / WEIGHTS).is_file()):
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
    return download(name, BESIDE_WEIGHTS if {*PARTS} <= {*skip} else (WEIGHTS, *BESIDE_WEIGHTS)), [], skip


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
    files += () if {*PARTS} <= {*without} else sorted(folder.glob("model*.safetensors"))
    for path, *_ in overlays:
        files += sorted(path.glob("adapter_*")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for path in filter(Path.is_file, files):
        for part in (path.name.encode(), *(parts_of(path) if path.suffix == ".safetensors" else [path.read_bytes()])):
            total.update(part)
    return total.hexdigest()[:16]


def parts_of(path):
    """Yield the header of a safetensors file, and the first 4 kB of each tensor; of a damaged one less."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
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
        cached = try_to_load_from_cache(name, files[0])
        if isinstance(cached, str):                         # whole, from an earlier download
            return Path(cached).parent
        raise InputError(f"{name}: download failed ({error}); try again, or use a local folder with --model") from error


# -------------------------------------------------------------------------------------------------------------- reading

def load(model, folder, overlays, without=(), device=None, dtype=None):
    """Fill a model that was built on the meta device, but for parts that nothing in `overlays` holds. See `resolve`."""
    from model.lora import load_adapter
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
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    stored = dict.fromkeys(model.state_dict(), getattr(torch, model.config.stored_dtype))
    if wanted := {name: tensor for name, tensor in model.state_dict().items() if part_of(name) not in without}:
        tensors, read_as = read(folder / WEIGHTS, wanted, device, dtype, without)
        model.load_state_dict(tensors, strict=False, assign=True)
        stored |= read_as
    empty = torch.nn.ModuleList(child for name, child in model.named_children() if part_of(name) in without)
    check_size(empty, folder)
    empty.to(dtype).to_empty(device=device)
    if buffers := [name for name, _ in model.named_buffers()]:          # built on the meta device: without values
        raise InputError(f"{', '.join(buffers)}: no place for buffers; make it a parameter, or compute it in forward")
    model.requires_grad_(False).eval()
    model.tokenizer = load_tokenizer(folder)
    if len(model.tokenizer) > model.config.language.vocabulary:
        raise InputError(f"{folder}: its tokenizer has {len(model.tokenizer)} tokens, its config.json a vocab_size of "
                         f"{model.config.language.vocabulary}; they belong to different models")
    model.dtype, model.folder, model.stored_dtypes = dtype, folder, stored
    for path, drawn, skip in overlays:
        if path.is_dir():
            load_adapter(path, model, skip)
        else:
            load_checkpoint(path, model, drawn, skip)
            tiles = read_settings(path.parent.parent).get("max_tiles") or model.config.max_tiles
            model.config = replace(model.config, max_tiles=min(tiles, 128))
    model.fingerprint = fingerprint(folder, overlays, without)
    return model


def check_size(model, folder):
    """Raise InputError for a model that is larger than this machine's memory (unknown on Windows)."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > held:
        raise InputError(f"{folder}: its config.json describes {needed / 1e9:,.0f} GB of weights, this machine has "
                         f"{held / 1e9:,.0f} GB of memory; take a smaller model")


def read(path, wanted, device, dtype, skip=()):
    """Read a safetensors file -> ({our name: tensor of `dtype` on `device`}, {our name: dtype in the file}).

    `wanted`: {our name: tensor of the expected shape}; `skip`: parts that are not read. Raises InputError, which lists
    the tensors that are missing, unexpected, or of another shape or dtype.
    """
    tensors, stored, trouble = {}, {}, {"missing": [], "unexpected": [], "wrong shape": [], "wrong dtype": []}
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if part_of(name) not in skip]
            for name in names:
                ours, part = our_name(name), file.get_slice(name)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if ours not in wanted:
                    trouble["unexpected"].append(name)
                elif shape != wanted[ours].shape:
                    trouble["wrong shape"].append(f"{name} {shape} instead of {tuple(wanted[ours].shape)}")
                elif kind not in STORED_DTYPES:
                    trouble["wrong dtype"].append(f"{name} {kind}")
                else:
                    tensors[ours] = finite(file.get_tensor(name).to(device, dtype), name, path)
                    stored[ours] = STORED_DTYPES[kind]
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; a model folder holds its weights in one {WEIGHTS}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from error
    trouble["missing"] = sorted({official_name(ours) for ours in wanted} - set(names))
    listed = [f"{len(found)} {kind} ({', '.join(found[:8] + ['...'] * (len(found) > 8))})"
              for kind, found in trouble.items() if found]
    if listed:
        parts = {part_of(name) for found in trouble.values() for name in found} - {None}
        raise InputError(f"{path}: not the weights that its config.json describes: {'; '.join(listed)}; "
                         f"expected {len(wanted)} tensors of dtype {', '.join(STORED_DTYPES)}"
                         + f"; train.py --init {','.join(sorted(parts))} draws a changed part anew" * bool(parts))
    return tensors, stored


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
    folder = Path(folder)
    tensors = {official_name(name): tensor.to("cpu", model.stored_dtypes[name]).contiguous()
               for name, tensor in merged(model)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copy_files(model, folder, BESIDE_WEIGHTS)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("max_dynamic_patch") != model.config.max_tiles:   # others cut pages by it
            config["max_dynamic_patch"] = model.config.max_tiles
            write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be written there ({error})") from error


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
