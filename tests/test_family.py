"""Every size of the family: configurations, tensors, logits, gradients, prompts and tokens are those of others' code.

The small checkpoints of tests/family.py have the official layout and true ratios; the reference is transformers' own.
"""
import copy
import functools
import json
import random
import re

import pytest
import torch
import torch.nn.functional as F
from family import CONFIGS, KINDS, VOCABULARIES, cut_wqkv, make_folder, official_tensors, reference_of
from reference import all_logits, loss_of, page_prompt, reference_pixels
from safetensors.torch import load_file, save_file

from model import InputError, InternVL
from model.checkpoint import INDEX, about_parameters, shard
from model.config import Config
from model.generate import generate
from model.language import Decoder, KVCache, page_mask
from model.lora import adapters, add_adapters
from model.names import file_names
from model.prompt import SYSTEM, SYSTEM_25, TEMPLATES, write_conversation
from model.tokenizer import load_tokenizer
from train import choose_parts


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A function: name of a kind -> folder of a small random checkpoint, made once."""
    made, root = {}, tmp_path_factory.mktemp("family")

    def folder(name):
        return made.setdefault(name, None) or made.update({name: make_folder(name, root / name)}) or made[name]
    return folder


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


# ---------------------------------------------------------------------------------------------------------- configurations

def architecture(name):
    config = CONFIGS[name]["config"]
    keys = ("architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    return config["vision_config"]["hidden_size"], *(str(config["llm_config"].get(key)) for key in keys)


def test_published_configurations_give_the_published_tensors(tmp_path):
    seen = {}
    for name, known in CONFIGS.items():
        if name.startswith("internlm-"):
            continue
        config = Config.read(write_config(tmp_path, known["config"]))
        if architecture(name) not in seen:
            with torch.device("meta"):
                model = InternVL(config)
            sizes = {stored: sum(2 * model.get_parameter(one).numel() for one in ours)
                     for stored, ours in file_names(model.state_dict(), config.language.decoder).items()}
            seen[architecture(name)] = sizes
        sizes = seen[architecture(name)]
        files = shard(sizes)
        assert (len(sizes), sum(sizes.values()) // 2) == (known["tensors"], known["parameters"]), name
        assert known["files"] in (None, len(set(files.values()))), name
        assert 0.99 < 2 * about_parameters(config) / sum(sizes.values()) <= 1
        if name == "InternVL2-8B":                                                  # the boundaries of the published index
            last = {file: stored for stored, file in files.items()}
            assert [name.removeprefix("language_model.model.") for name in last.values()] == [
                "layers.8.attention.wo.weight", "layers.19.feed_forward.w1.weight", "layers.30.feed_forward.w3.weight", "mlp1.3.bias"]
    assert len(CONFIGS) == 32


@pytest.mark.parametrize("name, edit, message", [
    ("InternVL3-8B", lambda c: c["llm_config"].update(architectures=["InternLM3ForCausalLM"], model_type="internlm3"), "nearest one that works is OpenGVLab/InternVL3-8B"),
    ("InternVL3_5-8B", lambda c: c["llm_config"].update(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe"), "nearest one that works is OpenGVLab/InternVL3_5-38B"),
    ("InternVL3_5-8B", lambda c: c["llm_config"].update(architectures=["GptOssForCausalLM"], model_type="gpt_oss"), "nearest one that works is OpenGVLab/InternVL3_5-14B"),
    ("InternVL3_5-2B", lambda c: c.update(flash_mode=True), "Flash variant.*without -Flash"),
    ("InternVL3-1B", lambda c: c.update(model_type="internvl"), "take the model without -HF"),
    ("internlm-xcomposer2-7b", lambda c: c.update(img_size=336), "4KHD and 2.5 are not supported"),
    ("InternVL2-8B", lambda c: c["llm_config"].update(bias=True), "llm_config.bias is True"),
    ("InternVL2-40B", lambda c: c["llm_config"].update(attention_bias=True), "llm_config.attention_bias is True"),
    ("InternVL3-1B", lambda c: c.update(pad2square=True), "pad2square is True"),
    ("InternVL2-8B", lambda c: c.update(template="internvl_zh"), "template is 'internvl_zh'"),
    ("InternVL3_5-1B", lambda c: c["llm_config"].update(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling is yarn, expected dynamic"),
    ("InternVL2-4B", lambda c: c["llm_config"]["rope_scaling"]["long_factor"].pop(), "do not divide"),
], ids=lambda value: value if isinstance(value, str) and value in CONFIGS else "")
def test_what_cannot_be_built_is_refused_in_one_line(tmp_path, name, edit, message):
    config = copy.deepcopy(CONFIGS[name]["config"])
    edit(config)
    with pytest.raises(InputError, match=message) as refused:
        Config.read(write_config(tmp_path, config))
    assert "\n" not in str(refused.value)


def test_the_system_sentence_is_that_of_the_configuration_or_of_conversation_py(tmp_path):
    config = CONFIGS["Mini-InternVL-Chat-2B-V1-5"]["config"]
    assert Config.read(write_config(tmp_path, config)).template.system == SYSTEM
    (tmp_path / "conversation.py").write_text("raise SystemExit  # read, not executed\nregister(Conversation(name='Hermes-2', system_message='no'))\n"
                                              "register(Conversation(name='internlm2-chat', system_message='You are InternLM (书生·浦语).', roles=('a', 'b')))\n")
    assert Config.read(tmp_path / "config.json").template.system == "You are InternLM (书生·浦语)."
    assert Config.read(write_config(tmp_path, config | {"system_message": "Mine."})).template.system == "Mine."
    (tmp_path / "conversation.py").unlink()
    assert Config.read(write_config(tmp_path, CONFIGS["InternVL3-1B"]["config"])).template == TEMPLATES["internvl2_5"]        # its system_message is null


@pytest.mark.parametrize("parameters, flags, lr, decay", [
    (0.9e9, {}, "projector=4e-05,vision=1e-05", 0.01), (8.1e9, {}, "projector=4e-05,vision=1e-05", 0.05), (26e9, {}, "projector=2e-05,vision=1e-05", 0.05),
    (26e9, {"untyped": ["vision"]}, "projector=4e-05,vision=1e-05", 0.05), (26e9, {"untyped": [], "weight_decay": 0.1}, "projector=4e-05,vision=1e-05", 0.1)])
def test_rates_and_decay_are_the_official_ones_for_a_size_where_none_are_typed(parameters, flags, lr, decay):
    from types import SimpleNamespace

    from extras import recipes
    from train import rates_of
    args = SimpleNamespace(**{"lr": "projector=4e-05,vision=1e-05", "weight_decay": None, "untyped": ["projector", "vision"], "train": "projector,vision"} | flags)
    recipes.fit_to_size(args, rates_of(args.lr), parameters)
    assert (args.lr, args.weight_decay) == (lr, decay)


# ------------------------------------------------------------------------------------------------------- against transformers

CASES = {"one image": ("<image>\nWhat is the date?", [1]), "twelve tiles": ("<image>\nWho signed it?", [12]), "two images": ("Image-1: <image>\nImage-2: <image>\nWhat?", [2, 1]),
         "Chinese": ("<image>\n这张发票的总金额是多少？", [1]), "no image": ("What is 12 times 7?", [])}


def sample(model, case, answer="January 8, 1993."):
    question, tiles = CASES[case]
    prompt = write_conversation(model.tokenizer, model.config.tokens_per_tile, [(question, answer, tiles)], model.config.template)
    return torch.randint(256, (sum(tiles), 3, 64, 64), dtype=torch.uint8), prompt


def reference_logits(reference, tiles, ids):
    pixels = {"pixel_values": reference_pixels(tiles).to(reference.dtype)} if len(tiles) else {}
    return reference(input_ids=torch.tensor([ids]), **pixels).logits[0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def merged_gradients(reference, model, name):
    """The reference's gradient of the weight of one of our linear layers."""
    part = {"query": "q", "key": "k", "value": "v", "out": "o", "mlp_gate": "gate", "mlp_up": "up", "mlp_down": "down"}[name.split(".")[-1]]
    layer, language = reference.model.language_model.layers[int(name.split(".")[2])], model.config.language
    rows = language.heads * language.head_width, language.kv_heads * language.head_width, language.kv_heads * language.head_width
    if language.decoder == "Phi3" and part in "qkv":
        return layer.self_attn.qkv_proj.weight.grad.split(rows)["qkv".index(part)]
    if language.decoder == "Phi3" and part in ("gate", "up"):
        return layer.mlp.gate_up_proj.weight.grad.chunk(2)[part == "up"]
    return getattr(layer.self_attn if part in "qkvo" else layer.mlp, f"{part}_proj").weight.grad


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_gradients_and_answers_equal_transformers(folder_of, kind, tmp_path):
    torch.manual_seed(0)
    model, reference = InternVL.from_pretrained(folder_of(kind), "cpu"), reference_of(folder_of(kind))
    for case in CASES:
        tiles, prompt = sample(model, case)
        with torch.no_grad():
            ours, theirs = all_logits(model, model.pack([(tiles, prompt)])), reference_logits(reference, tiles, prompt.ids)
        assert (ours - theirs).abs().max() < 1e-4, case
        tiles, prompt = sample(model, case, None)
        answer, ids = [token for [token] in generate(model, [(tiles, prompt)], 16)], list(prompt.ids)
        with torch.no_grad():
            for _ in answer:
                ids.append(reference_logits(reference, tiles, ids)[-1].argmax().item())
        assert ids[len(prompt.ids):] == answer, case
    add_adapters(model, rank=3, alpha=6, dropout=0.0)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.b.weight, std=0.05)
    choose_parts(model, "projector,lora")
    model.save_pretrained(tmp_path / "merged")
    reference = reference_of(tmp_path / "merged")
    tiles, prompt = sample(model, "two images")
    loss = loss_of(model, [(tiles, prompt)])
    expected = F.cross_entropy(reference_logits(reference, tiles, prompt.ids)[:-1], torch.tensor(prompt.labels[1:]), ignore_index=-100, reduction="sum")
    assert abs(loss.item() - expected.item()) < 1e-5 * len(prompt.ids)
    (loss / 10).backward(), (expected / 10).backward()
    theirs = reference.model.multi_modal_projector
    for name, native in (("norm", theirs.layer_norm), ("up", theirs.linear_1), ("out", theirs.linear_2)):
        assert relative(getattr(model.projector, name).weight.grad, native.weight.grad) < 1e-4
    for name, adapter in adapters(model).items():
        whole = merged_gradients(reference, model, name)
        assert relative(adapter.a.weight.grad, 2 * adapter.b.weight.T @ whole) < 1e-4 and relative(adapter.b.weight.grad, 2 * whole @ adapter.a.weight.T) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_equals_its_separate_samples(folder_of, kind):
    model = InternVL.from_pretrained(folder_of(kind), "cpu", torch.float64)
    tiles, template, size = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), model.config.template, model.config.tokens_per_tile
    questions, answers = ["What is the date?", "Who?", "这张发票？"], ["January 8, 1993.", "W. Jones", "一九九三年"]
    from model.prompt import write_page
    page, _ = write_page(model.tokenizer, size, [2], [[turn] for turn in zip(questions, answers)], template=template)
    alone = [write_conversation(model.tokenizer, size, [(f"<image>\n{question}", answer, [2])], template) for question, answer in zip(questions, answers)]
    choose_parts(model, "projector")
    model.double()
    gradients = []
    for prompts in ([page], alone):
        model.zero_grad()
        loss = sum(loss_of(model, [(tiles, prompt)]) for prompt in prompts)
        loss.backward()
        gradients.append(torch.cat([loss[None], *(p.grad.flatten() for p in model.projector.parameters())]))
    assert relative(*gradients) < 1e-10
    open_page, _ = write_page(model.tokenizer, size, [2], [[(question, None)] for question in questions], template=template)
    together = list(generate(model, [(tiles, open_page)], 5))
    for i, question in enumerate(questions):
        prompt = write_conversation(model.tokenizer, size, [(f"<image>\n{question}", None, [2])], template)
        assert [token for [token] in generate(model, [(tiles, prompt)], 5)] == [step[i] for step in together if step[i] is not None]


def test_phi_3_reads_long_texts_with_its_long_factors(folder_of):
    """Beyond 4,096 tokens, and while an answer crosses that border: the keys read before keep their rotation."""
    model, reference = InternVL.from_pretrained(folder_of("InternVL2-4B"), "cpu"), reference_of(folder_of("InternVL2-4B"))
    language, draw = model.language, torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (4200,), generator=draw)
    with torch.no_grad():
        ours = language.lm_head(language(language.embedding(ids), torch.arange(4200), [page_mask(torch.zeros(4200, dtype=torch.long))]))
        assert (ours - reference(input_ids=ids[None]).logits[0]).abs().max() < 1e-4
        cache, theirs, zero = KVCache(model.config.language, 4110, "cpu", torch.float32), None, torch.zeros(1, dtype=torch.long)
        for start, stop in ((0, 4088), *((i, i + 1) for i in range(4088, 4104))):
            ours = language.lm_head(language(language.embedding(ids[start:stop]), torch.arange(start, stop), [page_mask(zero.expand(stop - start), cache)]))
            out = reference(input_ids=ids[None, start:stop], past_key_values=theirs, use_cache=True)
            theirs = out.past_key_values
            assert (ours - out.logits[0]).abs().max() < 1e-4, start
    short, long = (language(language.embedding(ids[:n]), torch.arange(n), [page_mask(zero.expand(n))])[4090] for n in (4096, 4097))
    assert (short - long).abs().max() > 1e-2


def test_a_chat_beyond_the_border_reads_its_texts_anew(folder_of):
    """A turn that is too long for the short factors equals a chat that begins with it: nothing of the cache is kept."""
    model = InternVL.from_pretrained(folder_of("InternVL2-4B"), "cpu")
    chat, question = model.chat(max_new_tokens=3), "What? " * 1400
    chat.ask("Who?")
    chat.ask(question)
    assert chat.read == chat.report["prompt_tokens"] > 4096
    chat.ask("Who?")
    assert chat.read < 40
    chat.undo()
    chat.undo()
    chat.ask("Who?")
    assert chat.read == chat.report["prompt_tokens"] < 100


def test_dynamic_scaling_begins_beyond_the_positions(tmp_path):
    from dataclasses import replace

    from transformers import LlamaConfig, LlamaForCausalLM
    config = Config.read(write_config(tmp_path, CONFIGS["InternVL2_5-26B"]["config"])).language
    config = replace(config, width=64, layers=2, heads=4, kv_heads=2, mlp_width=96, vocabulary=99, max_positions=50)
    reference = LlamaForCausalLM(LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=50,
        rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters={"rope_type": "dynamic", "factor": 2.5, "rope_theta": 5e7}))
    decoder = Decoder(config)
    assert config.rope == {"rope_type": "dynamic", "factor": 2.5} and config.rope_theta == 5e7
    names = {name: stored.removeprefix("language_model.") for stored, [name] in file_names([f"language.{name}" for name in decoder.state_dict()], "Llama").items()}
    reference.load_state_dict({names[f"language.{name}"]: tensor for name, tensor in decoder.state_dict().items()})
    for length in (50, 51, 90):
        ids = torch.randint(99, (length,))
        with torch.no_grad():
            ours = decoder.lm_head(decoder(decoder.embedding(ids), torch.arange(length), [page_mask(torch.zeros(length, dtype=torch.long))]))
            assert (ours - reference(input_ids=ids[None]).logits[0]).abs().max() < 1e-5, length


# --------------------------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_several_files_is_saved_bit_for_bit(folder_of, kind, tmp_path):
    folder = folder_of(kind)
    InternVL.from_pretrained(folder, "cpu").save_pretrained(tmp_path)
    files = {file.name for file in folder.iterdir()}
    assert files == {file.name for file in tmp_path.iterdir()} and INDEX in files and len(list(folder.glob("*.safetensors"))) > 2
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)
    index, names = json.loads((folder / INDEX).read_text()), official_tensors(folder)
    assert index["weight_map"].keys() == names.keys() and index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in names.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(folder / file)[name], names[name])


def test_official_names_are_those_of_the_fact_sheet(folder_of):
    shapes = {kind: {name: tuple(tensor.shape) for name, tensor in official_tensors(folder_of(kind)).items()} for kind in ("InternVL2-2B", "InternVL2-4B", "InternVL3_5-38B")}
    internlm, phi, qwen = ({re.sub(r".*layers\.0\.", "", name): shape for name, shape in of.items() if "layers.0." in name and name.startswith("language")} for of in shapes.values())
    assert internlm == {"attention.wqkv.weight": (256, 128), "attention.wo.weight": (128, 128), "feed_forward.w1.weight": (160, 128), "feed_forward.w3.weight": (160, 128),
                        "feed_forward.w2.weight": (128, 160), "attention_norm.weight": (128,), "ffn_norm.weight": (128,)}
    assert phi == {"self_attn.qkv_proj.weight": (576, 192), "self_attn.o_proj.weight": (192, 192), "mlp.gate_up_proj.weight": (320, 192), "mlp.down_proj.weight": (192, 160),
                   "input_layernorm.weight": (192,), "post_attention_layernorm.weight": (192,)}
    assert qwen["self_attn.q_norm.weight"] == qwen["self_attn.k_norm.weight"] == (32,) and qwen["self_attn.q_proj.weight"] == (256, 160) and len(qwen) == 11
    vision = {name.split("layers.0.")[1] for name in shapes["InternVL3_5-38B"] if "encoder.layers.0." in name}
    assert {"attn.q_norm.weight", "attn.k_norm.weight", "norm1.weight", "attn.qkv.weight", "attn.proj.bias"} <= vision and not {"norm1.bias", "attn.qkv.bias"} & vision
    assert {"language_model.model.tok_embeddings.weight", "language_model.output.weight", "language_model.model.norm.weight"} < shapes["InternVL2-2B"].keys()


def test_the_rows_of_wqkv_are_the_golden_ones():
    """Two key heads, two queries for each, width 4: q rows 0-7 and 16-23, k 8-11 and 24-27, v 12-15 and 28-31."""
    from model.names import join_rows, split_rows
    whole = torch.arange(32.0)[:, None].expand(32, 3)
    q, k, v = (part[:, 0].int().tolist() for part in split_rows(whole, [16, 8, 8], 2, "InternLM2"))
    assert (q, k, v) == ([*range(8), *range(16, 24)], [*range(8, 12), *range(24, 28)], [*range(12, 16), *range(28, 32)])
    assert torch.equal(join_rows(split_rows(whole, [16, 8, 8], 2, "InternLM2"), 2, "InternLM2"), whole)
    assert all(torch.equal(a, b) for a, b in zip(cut_wqkv(whole, 4, 2), split_rows(whole, [16, 8, 8], 2, "InternLM2")))


@pytest.mark.parametrize("trouble, prepare", [
    ("model-00003-of-00006.safetensors: not found", lambda f: (f / "model-00003-of-00006.safetensors").unlink()),
    ("not an index of weights", lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')),
    ("not an index of weights", lambda f: (f / INDEX).write_text("[]")),
    ("model.safetensors: not found; a model folder holds its weights in model.safetensors, or in files named by", lambda f: (f / INDEX).unlink()),
    (r"1 duplicate \(mlp1.3.bias in model-00005-of-00006.safetensors and model-00006", lambda f: copy_tensor(f, "mlp1.3.bias", 6, 5)),
    (r"1 unexpected \(lora.weight\)", lambda f: copy_tensor(f, "mlp1.3.bias", 6, 5, "lora.weight")),
    (r"wqkv.weight \(7, 3\) instead of \(256, 128\)", lambda f: copy_tensor(f, "language_model.model.layers.1.attention.wqkv.weight", 3, 3, value=torch.ones(7, 3))),
])
def test_several_files_that_do_not_fit_are_one_line(folder_of, tmp_path, trouble, prepare):
    import shutil
    folder = shutil.copytree(folder_of("InternVL2-2B"), tmp_path / "model")
    prepare(folder)
    with pytest.raises(InputError, match=trouble):
        InternVL.from_pretrained(folder, "cpu")


def copy_tensor(folder, name, source, target, new=None, value=None):
    source, target = (folder / f"model-0000{number}-of-00006.safetensors" for number in (source, target))
    all_of = official_tensors(folder)
    save_file(load_file(target) | {new or name: all_of[name] if value is None else value}, target, {"format": "pt"})


def test_a_model_in_several_files_comes_from_the_hub_after_its_size_is_printed(folder_of, tmp_path):
    import os
    import shutil
    import subprocess
    import sys

    from conftest import ROOT
    from hub import serve
    shutil.copytree(folder_of("InternVL2-2B"), tmp_path / "root" / "models" / "OpenGVLab" / "InternVL2-2B")
    code = "from model import InternVL\nfor _ in range(2): print(len(InternVL.from_pretrained('OpenGVLab/InternVL2-2B', 'cpu').state_dict()))"
    with serve(tmp_path / "root") as address:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")},
                              capture_output=True, text=True, timeout=120)
    first, again = done.stdout.split()
    assert first == again and done.stderr.count("OpenGVLab/InternVL2-2B: about 0.0 GB to download") == done.stderr.count("to download") == 1


def test_a_model_or_a_step_that_does_not_fit_says_what_would(folder_of, monkeypatch, capsys):
    from extras import memory
    from model import checkpoint
    model = InternVL.from_pretrained(folder_of("InternVL2-2B"), "cpu")
    monkeypatch.setattr(memory, "device_memory", lambda device: 1e6)
    memory.step_gb(model, 1, 1)
    assert "a step on pages of 1 tiles needs about" in (err := capsys.readouterr().err) and "--checkpoint-activations" in err and "--train lora" in err and "use --shard" in err
    monkeypatch.setattr(checkpoint, "device_memory", lambda device: 2e6)
    with pytest.raises(InputError, match="GB of weights, this machine has .* take --dtype bfloat16, a smaller model"):
        InternVL.from_pretrained(folder_of("InternVL2-2B"), "cpu")
    InternVL.from_pretrained(folder_of("InternVL2-2B"), "cpu", "bfloat16")


# ---------------------------------------------------------------------------------------------------------------------- LoRA

LEAVES = {"InternVL2-2B": ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
          "InternVL2-4B": ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"],
          "InternVL3_5-1B": [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "down", "up")]}


def adapted(folder, leaves):
    """The tensors of a folder, and rank 3 adapters of the official layers: {layer: (A, B)}."""
    tensors = official_tensors(folder)
    layers = [name.removesuffix(".weight") for name in tensors if name.startswith("language") and name.removesuffix(".weight").endswith(tuple(leaves))]
    draw = torch.Generator().manual_seed(0)
    return tensors, {layer: (torch.randn(3, tensors[f"{layer}.weight"].shape[1], generator=draw) * 0.1,
                             torch.randn(len(tensors[f"{layer}.weight"]), 3, generator=draw) * 0.1) for layer in sorted(layers)}


def write_like(folder, source, tensors, **more):
    folder.mkdir()
    for file in source.iterdir():
        if not file.name.startswith("model"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | more
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", LEAVES)
def test_official_adapters_are_read_and_written_through_fused_layers(folder_of, kind, tmp_path):
    """As PEFT writes them, and as the official script leaves them in a folder; both equal the weights merged by hand."""
    tensors, layers = adapted(folder_of(kind), LEAVES[kind])
    merged = tensors | {f"{layer}.weight": tensors[f"{layer}.weight"] + 2 * b @ a for layer, (a, b) in layers.items()}
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder_of(kind)), "r": 3, "lora_alpha": 6, "target_modules": LEAVES[kind]}))
    save_file({f"base_model.model.{layer}.lora_{side}.weight": tensor for layer, pair in layers.items() for side, tensor in zip("AB", pair)}, peft / "adapter_model.safetensors")
    left = {}
    for name, tensor in tensors.items():
        layer, wrapped = name.removesuffix(".weight"), name.replace("language_model.", "language_model.base_model.model.")
        left[wrapped.replace(".weight", ".base_layer.weight") if layer in layers else wrapped] = tensor
        for side, part in zip("AB", layers.get(layer, ())):
            left[wrapped.replace(".weight", f".lora_{side}.default.weight")] = part
    official = write_like(tmp_path / "official", folder_of(kind), left, use_llm_lora=3)
    for source in (peft, official):
        InternVL.from_pretrained(source, "cpu").save_pretrained(tmp_path / f"{source.name}-merged")
        found = official_tensors(tmp_path / f"{source.name}-merged")
        assert found.keys() == merged.keys() and all(torch.allclose(found[name], merged[name], atol=1e-6) for name in merged)
        assert json.loads((tmp_path / f"{source.name}-merged" / "config.json").read_text())["use_llm_lora"] == 0


@pytest.mark.parametrize("kind", LEAVES)
def test_trained_adapters_are_exported_under_the_official_names(folder_of, kind, tmp_path):
    from model.lora import fused_layers
    from model.names import official_name
    model = InternVL.from_pretrained(folder_of(kind), "cpu")
    add_adapters(model, rank=2, alpha=4, dropout=0.0)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.b.weight)
    trained = {official_name(name): tensor.detach() for name, tensor in model.named_parameters() if ".adapter." in name}
    done = fused_layers(trained, model.config.language)
    ranks = {len(tensor) for name, tensor in done.items() if "lora_A" in name} | {tensor.shape[1] for name, tensor in done.items() if "lora_B" in name}
    assert ranks == {2 if kind == "InternVL3_5-1B" else 6} and len(done) == 2 * 2 * len(LEAVES[kind])
    model.save_pretrained(tmp_path)
    before, after = official_tensors(folder_of(kind)), official_tensors(tmp_path)
    for layer in {name.rpartition(".lora_")[0] for name in done}:
        delta = 2 * done[f"{layer}.lora_B.weight"] @ done[f"{layer}.lora_A.weight"]
        assert torch.allclose(before[f"{layer}.weight"] + delta, after[f"{layer}.weight"], atol=1e-5), layer


# ------------------------------------------------------------------------------------------------------------ tokens, prompts

@pytest.mark.parametrize("name", ["internlm2", "phi3"])
def test_tokens_are_those_of_sentencepiece(name):
    tokenizer = load_tokenizer(VOCABULARIES / name)
    golden = json.loads((VOCABULARIES / "golden.json").read_text(encoding="utf-8"))[name]
    for text, ids in golden.items():
        assert tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids, text
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    specials = ["<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</box>"] if name == "internlm2" else ["<|user|>", "<|end|>", "<img>", "</box>", "</s>"]
    for special in specials:
        ids = tokenizer(f"x{special}y", add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.convert_tokens_to_ids(special) not in ids and tokenizer.decode(ids) == f"x{special}y"      # typed, it is plain text
    assert len(tokenizer) == tokenizer.convert_tokens_to_ids("</box>") + 1
    assert sum(file.stat().st_size for file in VOCABULARIES.rglob("*")  if file.is_file()) < 100_000


real_tokenizer = functools.cache(load_tokenizer)


VECTORS = {                             # of the fact sheet, one image token in place of 256
    ("internlm2", "internlm2-chat", "user"): [92542, 92543, 1008, 364, 92544, 92546, 92545, 364, 3993, 505, 410, 2554, 345, 92542, 92543, 525, 11353, 364, 32380, 262, 294, 328, 262, 2645, 308, 281, 92542],
    ("internlm2", "internvl2_5", "user"): [60355, 92542, 364, 92543, 1008, 364, 92544, 92546, 92545, 364, 3993, 505, 410, 2554, 345, 92542, 364, 92543, 525, 11353, 364, 32380, 262, 294, 328, 262, 2645, 308, 281, 92542, 364],
    ("phi3", "phi3-chat", "user"): [30267, 32007, 32010, 32011, 32013, 32012, 13, 5618, 338, 278, 2635, 29973, 32007, 32001, 29967, 15623, 653, 29871, 29947, 29892, 29871, 29896, 29929, 29929, 29941, 29889, 32007]}


@pytest.mark.parametrize("name, template, _", VECTORS)
def test_prompts_of_the_real_vocabularies_are_those_of_the_fact_sheet(name, template, _):
    from conftest import real
    tokenizer = real_tokenizer(real("family/tokenizers") / name)
    ids = write_conversation(tokenizer, 1, [("<image>\nWhat is the date?", "January 8, 1993.", [1])], TEMPLATES[template]).ids
    expected = VECTORS[name, template, _]
    assert ids[-len(expected):] == expected and ids[:2] == ([1, 92543] if name == "internlm2" else [1, 29871])


def official_sample(tokenizer, template, system, turns, tiles, beginning, swallowing):
    """(ids, labels) of a conversation as the official code writes and masks it: one text, special tokens found in it."""
    newline, strip = "\n" if template == "internvl2_5" else "", str.strip if template == "internlm2-chat" else str
    images = "".join(f"<img>{'<IMG_CONTEXT>' * 4 * n}</img>\n" for n in tiles)
    if template == "phi3-chat":
        text = f"<|system|>\n{system}<|end|>"
        text += "".join(f"<|user|>\n{images * (not i)}{q}<|end|><|assistant|>\n\0{a}<|end|>\0" for i, (q, a) in enumerate(turns))
    else:
        text = f"<|im_start|>system\n{system}<|im_end|>{newline}"
        text += "".join(f"<|im_start|>user\n{strip(images * (not i) + q)}<|im_end|>{newline}<|im_start|>assistant\n\0{strip(a)}<|im_end|>\0{newline}" for i, (q, a) in enumerate(turns))
    ids, labels, in_loss, swallow = list(beginning), [-100] * len(beginning), False, False
    for piece in re.split(r"(\0|<\|(?:im_start|im_end|system|user|assistant|end)\|>|</?img>|<IMG_CONTEXT>)", text):
        if piece == "\0":
            in_loss = not in_loss
        elif re.fullmatch(r"<\|\w+\|>|</?img>|<IMG_CONTEXT>", piece):
            ids.append(tokenizer.convert_tokens_to_ids(piece))
            labels.append(ids[-1] if in_loss else -100)
            swallow = piece in swallowing
        elif piece := piece.lstrip() if swallow else piece:
            new = tokenizer(piece, add_special_tokens=False).input_ids
            ids, labels, swallow = ids + new, labels + (new if in_loss else [-100] * len(new)), False
    return ids, labels


@pytest.mark.parametrize("name, template", [("internlm2", "internlm2-chat"), ("internlm2", "internvl2_5"), ("phi3", "phi3-chat"), ("tiny", "Hermes-2"), ("tiny", "internvl2_5")])
def test_200_random_conversations_equal_the_official_rule(name, template):
    from types import SimpleNamespace

    from data import Page, PageDataset
    from model.checkpoint import TINY
    tokenizer, draw = load_tokenizer(TINY if name == "tiny" else VOCABULARIES / name), random.Random(0)
    beginning = {"internlm2": ["<s>"], "phi3": ["<s>", "▁"]}.get(name, [])
    beginning = tokenizer.convert_tokens_to_ids(beginning) if beginning else []
    words = ["What", " is", " the", " total", "?", " 1993", "12,50", "\n", "  ", "日期是什么", "总金额", "，", "é", "🙂", "\t", " I'll", "<", "|", " $", "x"]
    config = SimpleNamespace(template=TEMPLATES[template], tokens_per_tile=4, language=SimpleNamespace(max_positions=10 ** 6))
    dataset = PageDataset(SimpleNamespace(tokenizer=tokenizer, config=config), max_length=None)
    for _ in range(200):
        turns = [tuple("".join(draw.choice(words) for _ in range(draw.randint(1, 9))) for _ in range(2)) for _ in range(draw.randint(1, 4))]
        # where an answer begins with white space, the official code may merge it with the end of its header
        turns = [(f"a{question}", f"b{answer}") for question, answer in turns]
        tiles, system = [draw.randint(1, 13) for _ in range(draw.randint(0, 3))], draw.choice([None, "You are a clerk."])
        expected = official_sample(tokenizer, template, system or TEMPLATES[template].system, turns, tiles, beginning, {"<|end|>", "<|user|>", "<|system|>", "<|assistant|>"})
        page = Page("x", [], questions=[q for q, _ in turns], answers=[a for _, a in turns], follows={*range(1, len(turns))}, system=system)
        prompt, _ = dataset.write(page, tiles)
        assert (prompt.ids, prompt.labels) == expected


def test_branches_of_phi_3_begin_alike(folder_of):
    """What follows a special token loses its white space, in every branch; typed tokens stay text."""
    tokenizer = load_tokenizer(VOCABULARIES / "phi3")
    from model.prompt import write_page
    for tiles in ([], [1]):
        together, _ = write_page(tokenizer, 2, tiles, [[("  Who?", "a")], [(" <|end|> What?", None)]], template=TEMPLATES["phi3-chat"])
        for number, (question, answer) in enumerate([("  Who?", "a"), (" <|end|> What?", None)], 1):
            alone = write_conversation(tokenizer, 2, [("<image>\n" * len(tiles) + question, answer, tiles)], TEMPLATES["phi3-chat"])
            assert [i for i, b in zip(together.ids, together.branches) if b in (0, number)] == alone.ids


def test_llama_3_begins_with_its_first_token(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    built = Tokenizer(models.BPE({"<|begin_of_text|>": 0, "a": 1, "b": 2}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.add_special_tokens(["<|begin_of_text|>", "<|im_start|>", "<|im_end|>"])
    built.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    prompt = write_conversation(load_tokenizer(tmp_path), 1, [("ab", None, [])], replace_system(TEMPLATES["internlm2-chat"], "b"))
    assert prompt.ids[:2] == [0, 3] and prompt.ids.count(0) == 1


def replace_system(template, system):
    from dataclasses import replace
    return replace(template, system=system)


def test_ids_are_looked_up_and_never_computed(folder_of):
    model = InternVL.from_pretrained(folder_of("InternVL2-2B"), "cpu")
    prompt, _ = page_prompt(model.tokenizer, 4, [1], ["What?"])
    assert prompt.ids.count(model.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")) == 4
    assert SYSTEM != SYSTEM_25 and TEMPLATES["internvl2_5"].system == SYSTEM_25
