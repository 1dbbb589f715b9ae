"""How do file names map to ours? The border: what is loaded is checked here, and official names are known only here.

A *model folder* has the official layout: config.json, the tokenizer's files and one model.safetensors.
An *adapter folder* is PEFT's: adapter_config.json, which names the model it belongs to, and adapter_model.safetensors.
A *run folder* is what train.py writes: settings.json, checkpoints/, and when the run has ended also a model folder.
A *checkpoint* in it holds the trained tensors, in float32, and the optimizer's state; the rest is in the run's base model.
Only safetensors and JSON are read or written. Source of the names: the header of the published file.
"""
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.config import Config
from model.errors import InputError
from model.layouts import (ADAPTER_CONFIG, ADAPTER_WEIGHTS, native_files, native_tensors, peft_files, read_adapter,
                           read_adapter_config)
from model.lora import adapters
from model.network import retry

OFFICIAL_NAMES = {                      # of modules; a block's number stands for #
    "vision.class_token": "vision_model.embeddings.class_embedding",
    "vision.position": "vision_model.embeddings.position_embedding",
    "vision.patch": "vision_model.embeddings.patch_embedding",
    "vision.blocks.#.attention_norm": "vision_model.encoder.layers.#.norm1",
    "vision.blocks.#.attention.qkv": "vision_model.encoder.layers.#.attn.qkv",
    "vision.blocks.#.attention.out": "vision_model.encoder.layers.#.attn.proj",
    "vision.blocks.#.layer_scale_1": "vision_model.encoder.layers.#.ls1",
    "vision.blocks.#.mlp_norm": "vision_model.encoder.layers.#.norm2",
    "vision.blocks.#.mlp_up": "vision_model.encoder.layers.#.mlp.fc1",
    "vision.blocks.#.mlp_down": "vision_model.encoder.layers.#.mlp.fc2",
    "vision.blocks.#.layer_scale_2": "vision_model.encoder.layers.#.ls2",
    "projector.norm": "mlp1.0",
    "projector.up": "mlp1.1",
    "projector.out": "mlp1.3",
    "language.embedding": "language_model.model.embed_tokens",
    "language.blocks.#.attention_norm": "language_model.model.layers.#.input_layernorm",
    "language.blocks.#.attention.query": "language_model.model.layers.#.self_attn.q_proj",
    "language.blocks.#.attention.key": "language_model.model.layers.#.self_attn.k_proj",
    "language.blocks.#.attention.value": "language_model.model.layers.#.self_attn.v_proj",
    "language.blocks.#.attention.out": "language_model.model.layers.#.self_attn.o_proj",
    "language.blocks.#.mlp_norm": "language_model.model.layers.#.post_attention_layernorm",
    "language.blocks.#.mlp_gate": "language_model.model.layers.#.mlp.gate_proj",
    "language.blocks.#.mlp_up": "language_model.model.layers.#.mlp.up_proj",
    "language.blocks.#.mlp_down": "language_model.model.layers.#.mlp.down_proj",
    "language.norm": "language_model.model.norm",
    "language.lm_head": "language_model.lm_head",
}
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WEIGHTS, CONFIG, SETTINGS, CHECKPOINTS = "model.safetensors", "config.json", "settings.json", "checkpoints"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt")
BESIDE_WEIGHTS = (                      # what else makes a model folder complete, for us and for the official code
    CONFIG, "generation_config.json", "preprocessor_config.json", *TOKENIZER,
    "configuration_*.py", "modeling_*.py", "conversation.py")
TINY = Path(__file__).parent / "tiny"


def official_name(name):
    """'vision.blocks.7.mlp_up.weight' -> 'vision_model.encoder.layers.7.mlp.fc1.weight'; adapters as PEFT names them."""
    layer, adapter, part = name.partition(".adapter.")
    if adapter:
        return official_name(layer) + {"a.weight": ".lora_A.weight", "b.weight": ".lora_B.weight"}[part]
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".#.", name)
    kind = re.search(r"\.(weight|bias)$", general)
    path = general[:kind.start()] if kind else general
    official = OFFICIAL_NAMES[path] + (kind.group() if kind else "")
    return official.replace("#", number.group(1)) if number else official


# ---------------------------------------------------------------------------------------------------------------- loading

def load(build, name, device=None, dtype=None, seed=None):
    """Build a model and fill it, from files or, with a `seed`, at random. See `InternVL.from_pretrained`."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: not usable here ({str(error).splitlines()[0]}); try --device cpu") from error
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder, overlays, seed = find(name, seed)
    config = Config.read(folder / CONFIG)
    if seed is None:
        with torch.device("meta"):
            model = build(config)
        expected = {official_name(ours): (ours, tensor.shape) for ours, tensor in model.state_dict().items()}
        tensors, stored = read_tensors(folder / WEIGHTS, expected, device, dtype)
        model.load_state_dict(tensors, assign=True)
    else:
        from model.internvl import (
            initialise,  # only here: internvl.py imports this file
        )
        check_size(build, config, folder)
        model = build(config)
        initialise(model, seed)
        model.to(device, dtype)
        stored = dict.fromkeys(model.state_dict(), getattr(torch, config.stored_dtype))
    model.requires_grad_(False).eval()
    model.tokenizer = load_tokenizer(folder)
    if len(model.tokenizer) > config.language.vocabulary:
        raise InputError(f"{folder}: its tokenizer has {len(model.tokenizer)} tokens, its config.json a vocab_size of "
                         f"{config.language.vocabulary}; they are not of the same model")
    model.dtype, model.folder, model.stored_dtypes = dtype, folder, stored
    for path in overlays:
        (load_adapter if path.is_dir() else load_checkpoint)(path, model)
    return model


def check_size(build, config, folder):
    """Raise InputError for a configuration whose weights this machine's memory cannot hold (Windows does not tell)."""
    with torch.device("meta"):
        needed = 4 * sum(parameter.numel() for parameter in build(config).parameters())
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > held:
        raise InputError(f"{folder}: its config.json describes {needed / 1e9:,.0f} GB of weights, this machine has "
                         f"{held / 1e9:,.0f} GB of memory; take a smaller model")


def find(name, seed=None):
    """Where a model is -> (model folder, checkpoints and adapter folders to lay over it, seed of random weights or None)."""
    if name == "tiny":
        return TINY, [], seed
    path = Path(name)
    run = path.parent.parent if path.suffix == ".safetensors" else path
    if path.name == WEIGHTS and path.is_file():
        return find(path.parent, seed)
    if (run / SETTINGS).is_file() and (path != run or not (run / WEIGHTS).is_file()):
        settings = read_settings(run)
        trained = path if path != run else latest_checkpoint(run)
        if trained is None:
            raise InputError(f"{name}: a run without a checkpoint yet; its base model is {settings['model']}")
        if Path(settings["model"]).resolve() in (run.resolve(), trained.resolve()):
            raise InputError(f"{name}: its {SETTINGS} names itself as the base model; expected another model")
        folder, overlays, seed = find(settings["model"], settings["seed"] if settings["from_scratch"] else None)
        return folder, [*overlays, trained], seed
    if (path / ADAPTER_CONFIG).is_file():
        folder, overlays, seed = find(read_adapter_config(path)["base_model_name_or_path"], seed)
        return folder, [*overlays, path], seed
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise InputError(f"{name}: no {CONFIG} in this folder; expected a model folder, a run folder or a Hub id")
        return path, [], seed
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise InputError(f"{name}: not found; expected a model folder, a run folder, a checkpoint in it, a Hub id or 'tiny'")
    return download(name, BESIDE_WEIGHTS if seed is not None else (WEIGHTS, *BESIDE_WEIGHTS)), [], seed


def read_settings(run):
    """The settings of a run folder, as train.py wrote them. Raises InputError."""
    try:
        settings = json.loads(Path(run, SETTINGS).read_text(encoding="utf-8"))
        for key, kind in (("model", str), ("seed", int), ("from_scratch", bool), ("train", str)):
            if not isinstance(settings[key], kind):
                raise ValueError(f"{key} is {settings[key]!r}")
        if any(isinstance(value, (dict, list)) for value in settings.values()):
            raise ValueError("expected plain values")
        return settings
    except KeyError as error:
        raise InputError(f"{run}: not a run folder ({error} is missing); expected the --out of an earlier run") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{run}: not a run folder ({error}); expected the --out of an earlier run") from error


def download(name, files):
    """Bring a model's files from the Hub into its cache; return the folder. Raises InputError where they cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    try:
        return Path(retry(lambda: snapshot_download(name, allow_patterns=list(files))))
    except RepositoryNotFoundError as error:
        raise InputError(f"{name}: neither a local folder nor a model on the Hub; check the name, or log in with "
                         "'hf auth login' if it is private") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"{name}: the Hub cannot be reached and the model is not in the cache; connect to the network, "
                         "give a local folder with --model, or take the embedded model with --tiny") from error
    except (HTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{name}: download failed ({error}); try again, or give a local folder with --model") from error


def read_tensors(path, expected, device, dtype):
    """Read exactly the `expected` tensors, {official name: (our name, shape)}, from one safetensors file.

    Returns ({our name: tensor of `dtype` on `device`}, {our name: dtype in the file}). Raises InputError that lists what is
    missing, unexpected, of another shape or of a dtype that is no floating point format of this model family.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}
            trouble = {
                "missing": [name for name in expected if name not in found],
                "unexpected": [name for name in found if name not in expected],
                "wrong shape": [f"{name} {tuple(found[name].get_shape())} instead of {tuple(shape)}"
                                for name, (_, shape) in expected.items()
                                if name in found and tuple(found[name].get_shape()) != tuple(shape)],
                "wrong dtype": [f"{name} {found[name].get_dtype()}" for name in expected
                                if name in found and found[name].get_dtype() not in STORED_DTYPES],
            }
            told = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                    for kind, names in trouble.items() if names]
            if told:
                raise InputError(f"{path}: not the weights that its config.json describes: {'; '.join(told)}; "
                                 f"expected {len(expected)} tensors of dtype {', '.join(STORED_DTYPES)}")
            return ({ours: file.get_tensor(name).to(device, dtype) for name, (ours, _) in expected.items()},
                    {ours: STORED_DTYPES[found[name].get_dtype()] for name, (ours, _) in expected.items()})
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; a model folder holds its weights in one {WEIGHTS}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from error


def load_tokenizer(folder):
    """The tokenizer of a model folder: transformers' Qwen2 class, directly, so that no code of the folder is run."""
    from transformers import Qwen2Tokenizer
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        tokenizer("?")                                              # some settings are looked at only here
        return tokenizer
    except Exception as error:                                      # the libraries below raise whatever the files lead to
        raise InputError(f"{folder}: its tokenizer cannot be read ({str(error)[:300]}); expected vocab.json and merges.txt, "
                         "or tokenizer.json, and tokenizer_config.json") from error


# ----------------------------------------------------------------------------------------------------------------- saving

def save(model, folder, layout="official"):
    """Write a model folder. See `InternVL.save_pretrained`."""
    folder = Path(folder)
    tensors = {official_name(ours): tensor.to("cpu", model.stored_dtypes[ours]).contiguous() for ours, tensor in merged(model)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in BESIDE_WEIGHTS if layout == "official" else TOKENIZER:
            for file in model.folder.glob(pattern):
                if file.resolve() != (folder / file.name).resolve():
                    shutil.copyfile(file, folder / file.name)
        if layout == "native":
            tensors = native_tensors(tensors)
            for name, value in native_files(model).items():
                write_text(folder / name, value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")
        write(tensors, folder / WEIGHTS, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be written there ({error})") from error


@torch.no_grad()
def merged(model):
    """Yield (our name, tensor) of the model as it is without adapters: they are added to their layers' weights, in float32."""
    added = {f"{name}.weight": adapter for name, adapter in adapters(model).items()}
    for name, tensor in model.state_dict().items():
        if ".adapter." not in name:
            yield name, tensor.float() + added[name].merged_delta() if name in added else tensor


def write(tensors, path, metadata):
    """Write a safetensors file beside its place and rename it, so that the place never holds half a file."""
    beside = path.with_name(path.name + ".part")
    try:
        save_file(tensors, beside, metadata)
        atomic_replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file as a whole or, where that fails, not at all."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, encoding="utf-8")
        atomic_replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def atomic_replace(beside, path):
    with open(beside, "r+b") as file:
        os.fsync(file.fileno())                                     # on the disk before its name is, should the power fail
    os.chmod(beside, 0o644)                                         # safetensors makes it readable by its owner alone
    os.replace(beside, path)


def latest_checkpoint(run):
    """The newest checkpoint file of a run, or None."""
    return max(Path(run, CHECKPOINTS).glob("step-*.safetensors"), default=None)


def keep_newest(run, count, losses):
    """Delete a run's checkpoints but the newest `count` and the one with the lowest of the `losses`, {step: loss}."""
    paths = sorted(Path(run, CHECKPOINTS).glob("step-*.safetensors"))
    checkpoints = {int(path.stem.removeprefix("step-")): path for path in paths}
    best = min(checkpoints.keys() & losses.keys(), key=losses.get, default=None)
    for step in list(checkpoints)[:-count]:
        if step != best:
            checkpoints[step].unlink()


def save_checkpoint(path, model, optimizer, state):
    """Write the trained tensors, the optimizer's state of each, and `state` (plain JSON values) into one file.

    Raises InputError where it cannot be written; what was there before stays.
    """
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    state = json.dumps(state)
    try:
        path.parent.mkdir(exist_ok=True)
        scale = {"lora_scale": str(adapter.scale) for adapter in adapters(model).values()}      # all have one
        write(tensors, path, {"state": state, "sha256": checksum(tensors, tensors.get, state)} | scale)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); the checkpoints before it are whole: make room, then go on "
                         f"with --resume {path.parent.parent}") from error


def checksum(names, tensor_of, state):
    """SHA-256 of the named tensors in the order of their names, and of the state's text."""
    total = hashlib.sha256(state.encode())
    for name in sorted(names):
        total.update(name.encode())
        total.update(tensor_of(name).reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def load_checkpoint(path, model, optimizer=None):
    """Lay a checkpoint's trained tensors over a model; with an `optimizer` restore it too. Returns the saved `state`.

    Raises InputError for a file that does not fit the model or is not what was written, before anything is changed.
    Trained tensors take the dtype of the model's parameters; adapters that the model lacks are merged into its weights.
    """
    ours, adapted = {official_name(name): parameter for name, parameter in model.named_parameters()}, {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                kind, name = ("model", key[6:]) if key.startswith("model.") else key.split(".", 2)[1:]
                if ".lora_" in name and name not in ours:
                    adapted |= {name: file.get_tensor(key)} if kind == "model" else {}
                    continue
                tensor = file.get_slice(key)
                expected = [] if kind == "step" else list(ours[name].shape) if name in ours else None
                if tensor.get_shape() != expected or tensor.get_dtype() not in STORED_DTYPES:
                    raise InputError(f"{path}: {name} {tuple(tensor.get_shape())} {tensor.get_dtype()} is not of this model")
            fitting = match_adapters(ours, adapted, path)
            state = file.metadata()["state"]
            if checksum(file.keys(), file.get_tensor, state) != file.metadata()["sha256"]:
                raise InputError(f"{path}: damaged, its checksum is not that of what was saved; delete it to go on from the "
                                 "checkpoint before")
            state = json.loads(state)
            lacking = trained_parameters(model).keys() - {key[6:] for key in file.keys()} if optimizer else ()
            if lacking:
                raise InputError(f"{path}: lacks {', '.join(sorted(lacking)[:3])}, which trains")
            for key in file.keys():
                kind, name = ("model", key[6:]) if key.startswith("model.") else key.split(".", 2)[1:]
                tensor = file.get_tensor(key)
                if kind == "model" and name in ours:
                    with torch.no_grad():
                        ours[name].copy_(tensor)
                elif optimizer:
                    on_cpu = kind == "step" and not optimizer.defaults["fused"]     # where AdamW counts its steps
                    optimizer.state[ours[name]][kind] = tensor if on_cpu else tensor.to(ours[name].device)
            merge_adapters(fitting, float(file.metadata().get("lora_scale", 0)))
            return state
    except (SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a checkpoint of train.py, or not a whole one ({error})") from error


def match_adapters(weights, adapted, path):
    """[(weight, A, B)] of adapters, {"LAYER.lora_A.weight": (rank, in), "LAYER.lora_B.weight": (out, rank)}, and `weights`.

    Raises InputError, naming `path`, for a layer that is not there or has another shape.
    """
    fitting = []
    for layer in {name.rpartition(".lora_")[0] for name in adapted}:
        weight = weights.get(f"{layer}.weight")
        a, b = adapted.get(f"{layer}.lora_A.weight"), adapted.get(f"{layer}.lora_B.weight")
        if weight is None or a is None or b is None or len(a) != b.shape[-1] or (len(b), a.shape[-1]) != weight.shape:
            raise InputError(f"{path}: the adapter of {layer} is not of this model")
        fitting.append((weight, a, b))
    return fitting


@torch.no_grad()
def merge_adapters(fitting, scale):
    for weight, a, b in fitting:
        weight.copy_(weight.float() + scale * (b.float() @ a.float()).to(weight.device))


@torch.no_grad()
def load_adapter(folder, model):
    """Merge a PEFT folder into a model; what it holds as a whole is copied. Raises InputError where they do not fit."""
    ours = {official_name(name): parameter for name, parameter in model.named_parameters()}
    trained, scale = read_adapter(folder, list(ours))
    for name in ours.keys() & trained.keys():
        tensor = trained.pop(name)
        if tensor.shape != ours[name].shape:
            raise InputError(f"{folder}: {name} {tuple(tensor.shape)} is not of this model")
        ours[name].copy_(tensor)
    merge_adapters(match_adapters(ours, trained, folder), scale)


def export_adapter(run, folder):
    """Write what a run's newest checkpoint (or the checkpoint `run`) trains as a PEFT folder, unmerged. Raises InputError."""
    path, folder = Path(run), Path(folder)
    path, run = (path, path.parent.parent) if path.suffix == ".safetensors" else (latest_checkpoint(path), path)
    settings = read_settings(run)
    if path is None:
        raise InputError(f"{run}: a run without a checkpoint yet")
    try:
        with safe_open(path, framework="pt") as file:
            trained = {key.split(".", 1)[1]: file.get_tensor(key) for key in file.keys() if key.startswith("model.")}
            scale = float(file.metadata().get("lora_scale", 0))
        tensors, config = peft_files(trained, scale, settings["model"], settings.get("lora_dropout", 0.0))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        write(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: the adapter of {path} cannot be written there ({error})") from error


def trained_parameters(model):
    """{official name: parameter} of what trains."""
    return {official_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
