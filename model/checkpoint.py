"""How do file names map to ours? The border: what is loaded is checked here, and official names are known only here.

A *model folder* has the official layout: config.json, the tokenizer's files and one model.safetensors.
A *run folder* is what train.py writes: settings.json, checkpoints/, and when the run has ended also a model folder.
A *checkpoint* in it holds the trained tensors, in float32, and the optimizer's state; the rest is in the run's base model.
Only safetensors and JSON are read or written. FACTS: "Checkpoint".
"""
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

OFFICIAL_NAMES = {                      # of modules; a block's number stands for #
    "vision.class_token": "vision_model.embeddings.class_embedding",
    "vision.position": "vision_model.embeddings.position_embedding",
    "vision.patch": "vision_model.embeddings.patch_embedding",
    "vision.blocks.#.attention_norm": "vision_model.encoder.layers.#.norm1",
    "vision.blocks.#.attention.qkv": "vision_model.encoder.layers.#.attn.qkv",
    "vision.blocks.#.attention.out": "vision_model.encoder.layers.#.attn.proj",
    "vision.blocks.#.attention_scale": "vision_model.encoder.layers.#.ls1",
    "vision.blocks.#.mlp_norm": "vision_model.encoder.layers.#.norm2",
    "vision.blocks.#.mlp_up": "vision_model.encoder.layers.#.mlp.fc1",
    "vision.blocks.#.mlp_down": "vision_model.encoder.layers.#.mlp.fc2",
    "vision.blocks.#.mlp_scale": "vision_model.encoder.layers.#.ls2",
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
    "language.head": "language_model.lm_head",
}
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WEIGHTS, CONFIG, SETTINGS, CHECKPOINTS = "model.safetensors", "config.json", "settings.json", "checkpoints"
BESIDE_WEIGHTS = (                      # what else makes a model folder complete, for us and for the official code
    CONFIG, "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "configuration_*.py", "modeling_*.py", "conversation.py")
TINY = Path(__file__).parent / "tiny"


def official_name(name):
    """'vision.blocks.7.mlp_up.weight' -> 'vision_model.encoder.layers.7.mlp.fc1.weight'."""
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
        from model.internvl import initialise                       # only here: internvl.py imports this file
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
        load_checkpoint(path, model)
    return model


def find(name, seed=None):
    """Where a model is -> (model folder, checkpoints to lay over it, seed of random weights or None)."""
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
        folder, overlays, seed = find(settings["model"], settings["seed"] if settings["from_scratch"] else None)
        return folder, [*overlays, trained], seed
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
        if not {"model", "seed", "from_scratch"} <= settings.keys():
            raise ValueError("model, seed or from_scratch is missing")
        return settings
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{run}: not a run folder ({error}); expected the --out of an earlier run") from error


def download(name, files):
    """Bring a model's files from the Hub into its cache; return the folder. Raises InputError where they cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except RepositoryNotFoundError as error:
        raise InputError(f"{name}: neither a local folder nor a model on the Hub; check the name, or log in with "
                         "'hf auth login' if it is private") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"{name}: the Hub cannot be reached and the model is not in the cache; connect to the network, "
                         "or give a local folder with --model") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
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
        return Qwen2Tokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be read ({error}); expected vocab.json and merges.txt, "
                         "or tokenizer.json, and tokenizer_config.json") from error


# ----------------------------------------------------------------------------------------------------------------- saving

def save(model, folder):
    """Write a model folder. See `InternVL.save_pretrained`."""
    folder = Path(folder)
    tensors = {official_name(ours): tensor.detach().to("cpu", model.stored_dtypes[ours]).contiguous()
               for ours, tensor in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in BESIDE_WEIGHTS:
            for file in model.folder.glob(pattern):
                if file.resolve() != (folder / file.name).resolve():
                    shutil.copyfile(file, folder / file.name)
        write(tensors, folder / WEIGHTS, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be written there ({error})") from error


def write(tensors, path, metadata):
    """Write a safetensors file beside its place and rename it, so that the place never holds half a file."""
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata)
    os.chmod(beside, 0o644)                                         # the library makes it readable by its owner alone
    os.replace(beside, path)


def latest_checkpoint(run):
    """The newest checkpoint file of a run, or None."""
    return max(Path(run, CHECKPOINTS).glob("step-*.safetensors"), default=None)


def save_checkpoint(path, model, optimizer, state):
    """Write the trained tensors, the optimizer's state of each, and `state` (plain JSON values) into one file."""
    path.parent.mkdir(exist_ok=True)
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    write({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, {"state": json.dumps(state)})


def load_checkpoint(path, model, optimizer=None):
    """Lay a checkpoint's trained tensors over a model; with an `optimizer` restore it too. Returns the saved `state`.

    Raises InputError for a file that does not fit the model. Trained tensors take the dtype of the model's parameters.
    """
    ours = {official_name(name): parameter for name, parameter in model.named_parameters()}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                name = key.split(".", 1)[1] if key.startswith("model.") else key.split(".", 2)[2]
                tensor = file.get_tensor(key)
                if name not in ours or tensor.shape not in (ours[name].shape, torch.Size([])):
                    raise InputError(f"{path}: {name} {tuple(tensor.shape)} is not of this model")
                if key.startswith("model."):
                    with torch.no_grad():
                        ours[name].copy_(tensor)
                elif optimizer:
                    kind, parameter = key.split(".", 2)[1], ours[name]
                    on_cpu = kind == "step" and not optimizer.defaults["fused"]     # where AdamW counts its steps
                    optimizer.state[parameter][kind] = tensor if on_cpu else tensor.to(parameter.device)
            return json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: not a checkpoint of train.py, or not a whole one ({error})") from error


def trained_parameters(model):
    """{official name: parameter} of what trains."""
    return {official_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
