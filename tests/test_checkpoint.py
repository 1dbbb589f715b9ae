"""What is saved is what was loaded, in official names; what does not fit is refused in one line."""
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hub import serve
from safetensors.torch import load_file, save_file

from model import InputError, InternVL
from model.checkpoint import atomic_replace, write_text
from model.config import Config
from model.names import official_name

NORM = "language_model.model.norm.weight"


@pytest.fixture
def folder(tiny, tmp_path):
    """A small model folder in bfloat16."""
    tiny.stored_dtypes = dict.fromkeys(tiny.stored_dtypes, torch.bfloat16)
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit):
    """Rewrite a folder's weights after `edit` has changed the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.official
def test_the_full_model_has_the_official_637_tensors():
    with torch.device("meta"):
        model = InternVL(Config())
    shapes = {official_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 637 and sum(torch.Size(shape).numel() for shape in shapes.values()) == 938_158_976
    assert shapes["vision_model.encoder.layers.23.attn.qkv.weight"] == (3072, 1024)         # as published
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 1025, 1024)
    assert shapes["vision_model.encoder.layers.0.ls2"] == (1024,)
    assert shapes["mlp1.1.weight"] == (896, 4096) and shapes["mlp1.0.bias"] == (4096,) and shapes["mlp1.3.bias"] == (896,)
    assert shapes["language_model.model.layers.23.self_attn.k_proj.bias"] == (128,)
    assert shapes["language_model.lm_head.weight"] == shapes["language_model.model.embed_tokens.weight"] == (151655, 896)
    # the file's header, as the library writes it, has the published size to the byte: names, shapes and dtype are all there
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(shapes):
        stop = start + 2 * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, stop]}
        start = stop
    length = len(json.dumps(header, separators=(",", ":")))
    assert 8 + length + -length % 8 + start == 1_876_395_376


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_load_is_bit_exact(folder, tmp_path, dtype):
    model = InternVL.from_pretrained(folder, "cpu", dtype)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)
    again = InternVL.from_pretrained(tmp_path / "again", "cpu", dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert again.tokenizer("What is it?").input_ids == model.tokenizer("What is it?").input_ids


def test_each_tensor_keeps_the_dtype_it_was_stored_in(folder, tmp_path):
    change(folder, lambda tensors: tensors.update({NORM: tensors[NORM].float() + 1e-6}))
    InternVL.from_pretrained(folder, "cpu").save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("trouble, edit", [
    (rf"1 missing \({NORM}\)", lambda t: t.pop(NORM)),
    (r"1 unexpected \(lora.weight\)", lambda t: t.update({"lora.weight": torch.ones(2)})),
    (rf"1 wrong shape \({NORM} \(7,\) instead of \(96,\)\)", lambda t: t.update({NORM: torch.ones(7)})),
    (rf"1 wrong dtype \({NORM} I64\)", lambda t: t.update({NORM: torch.ones(96, dtype=torch.int64)})),
    (r"expected \d+ tensors", lambda t: [t.clear(), t.update({"model.wte": torch.ones(2)})]),
])
def test_weights_that_do_not_fit_are_listed(folder, trouble, edit):
    change(folder, edit)
    with pytest.raises(InputError, match=trouble):
        InternVL.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", struct.pack("<Q", 1 << 62), struct.pack("<Q", 50) + b"{" * 50, None])
def test_damaged_weights_are_refused(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        InternVL.from_pretrained(folder, "cpu")


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        part, _, name = key.rpartition("__")
        (config[part] if part else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("message, prepare", [
    ("no config.json", lambda f: (f / "config.json").unlink()),
    ("not JSON", lambda f: (f / "config.json").write_text("{")),
    ("not an InternVL2 config", lambda f: (f / "config.json").write_text('{"model_type": "bert"}')),
    ("not an InternVL2 config", lambda f: (f / "config.json").write_text("[1]")),
    (r"architectures is \['InternLM3ForCausalLM'\], expected \['Qwen2.*nearest one that works is OpenGVLab/InternVL3-8B",
     lambda f: set_config(f, llm_config__architectures=["InternLM3ForCausalLM"], llm_config__model_type="internlm3")),
    ("transformers layout; export with --format official", lambda f: (f / "config.json").write_text(json.dumps(
        {"model_type": "internvl", "vision_config": {"model_type": "internvl_vision"}, "text_config": {"model_type": "qwen2"}}))),
    ("template is 'internvl_zh', expected 'Hermes-2'", lambda f: set_config(f, template="internvl_zh")),
    ("qk_normalization is 1.5", lambda f: set_config(f, vision_config__qk_normalization=1.5)),
    ("model.safetensors: not found", lambda f: (f / "model.safetensors").unlink()),
    ("tokenizer cannot be read", lambda f: (f / "tokenizer.json").write_text("{}")),
])
def test_folders_that_are_no_model_are_refused(folder, message, prepare):
    prepare(folder)
    with pytest.raises(InputError, match=message):
        InternVL.from_pretrained(folder, "cpu")


def test_names_that_are_nothing_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("no-such-folder", str(tmp_path / "file"), "a/b/c"):
        with pytest.raises(InputError, match="not found; expected a model folder"):
            InternVL.from_pretrained(name, "cpu")
    with pytest.raises(InputError, match="try --device cpu"):
        InternVL.from_pretrained("tiny", "nonsense")


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_a_model_comes_from_the_hub_and_then_from_its_cache(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "root" / "models" / "OpenGVLab" / "InternVL2-1B")
    code = "from model import InternVL; m = InternVL.from_pretrained('OpenGVLab/InternVL2-1B', 'cpu'); print(len(m.state_dict()))"
    with serve(tmp_path / "root") as address:
        online = python(code, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
        wrong = python(code.replace("1B", "9B"), HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
    count = f"{len(load_file(folder / 'model.safetensors'))}\n"
    assert online.stdout == count, online.stderr
    assert "neither a local folder nor a model on the Hub" in wrong.stderr
    offline = python(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "cache"))
    assert offline.stdout == count, offline.stderr
    nothing = python(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "empty"))
    assert "the Hub cannot be reached and the model is not in the cache" in nothing.stderr


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk full"):
        with atomic_replace(path) as beside:
            beside.write_text("ne")
            raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_random_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    model = InternVL.from_scratch("tiny", seed=3, device="cpu")
    torch.manual_seed(6)
    again, other = InternVL.from_scratch("tiny", seed=3, device="cpu"), InternVL.from_scratch("tiny", seed=4, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            assert 0.5 < tensor.std() / other.get_parameter(name).std() < 2 and not torch.equal(tensor, other.get_parameter(name))
        else:                                                           # biases, norms, layer scale
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.official
def test_random_weights_are_the_same_in_every_version_of_this_code(small_folder):
    model = InternVL.from_scratch(small_folder, seed=3, device="cpu")
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()
    assert digest[:16] == "9c2a0a49eca01dea"


def test_a_model_that_no_memory_holds_is_refused(folder):
    set_config(folder, llm_config__num_hidden_layers=1000, llm_config__intermediate_size=1_000_000, llm_config__hidden_size=65_536,
               llm_config__num_attention_heads=64, llm_config__num_key_value_heads=32)
    with pytest.raises(InputError, match="hidden_size is 65536, expected a number up to 16,384"):
        InternVL.from_scratch(folder, device="cpu")
    set_config(folder, llm_config__num_hidden_layers=200, llm_config__intermediate_size=131_072, llm_config__hidden_size=16_384,
               llm_config__num_attention_heads=64, llm_config__num_key_value_heads=32)      # within the limits
    with pytest.raises(InputError, match="GB of weights, this machine has"):
        InternVL.from_scratch(folder, device="cpu")


@pytest.mark.parametrize("key, value", [("llm_config__num_hidden_layers", 10 ** 9), ("llm_config__vocab_size", 10 ** 400), ("downsample_ratio", float("nan")),
    ("downsample_ratio", -0.5), ("vision_config__hidden_size", 64.5), ("vision_config__num_attention_heads", True), ("llm_config__rope_theta", float("inf")),
    ("llm_config__hidden_size", 0), ("vision_config__patch_size", 7), ("llm_config__num_key_value_heads", "2"), ("downsample_ratio", 0)])
def test_absurd_numbers_in_a_configuration_are_one_line(folder, key, value):
    set_config(folder, **{key: value})
    with pytest.raises(InputError, match="config.json: not an InternVL2 config") as refused:
        InternVL.from_pretrained(folder, "cpu")
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)
