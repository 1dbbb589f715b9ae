"""InternLM-XComposer2: prompts, labels, logits, gradients, answers and files are those of others' code; every command works.

The reference is transformers' CLIP and Llama, with partial LoRA added in tests/xcomposer.py.
"""
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import call, infer, refuses, train
from conftest import ROOT, real
from family import CONFIGS
from hub import serve
from PIL import Image
from reference import all_logits, loss_of
from safetensors.torch import load_file
from transformers import CLIPVisionConfig
from xcomposer import Reference, make_composer, official_tensors

from data import Page, PageDataset
from extras.formats import read_entry
from model import InputError, InternVL
from model.checkpoint import BINARY, about_parameters, fingerprint
from model.config import Config
from model.generate import generate, penalize
from model.lora import add_adapters
from model.names import file_names
from model.prompt import IGNORE_INDEX, write_conversation, write_page
from model.tiny.pages import draw_page
from model.tokenizer import load_tokenizer
from train import choose_parts

OPEN, END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_composer(tmp_path_factory.mktemp("xcomposer") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return InternVL.from_pretrained(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


def images_of(count, size=70):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


CASES = {"one image": [("<image>What is it?", None, [1])], "two images": [("<image> and <image><image>: which?", None, [1, 1, 1])], "no image": [("Who are you?", None, [])],
         "history": [("<image>Who signed it?", "W. Jones", [1]), ("And the <image> date?", "1993", [1]), ("Sure?", None, [])]}


def case(model, name):
    turns = CASES[name]
    prompt = write_conversation(model.tokenizer, model.config.tokens_per_tile, turns, model.config.template)
    return images_of(sum(len(tiles) for *_, tiles in turns)), prompt


# --------------------------------------------------------------------------------------------------------- against others' code

@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_references(model, reference, name):
    tiles, prompt = case(model, name)
    with torch.no_grad():
        assert (all_logits(model, model.pack([(tiles, prompt)])) - reference(tiles, prompt)).abs().max() < 1e-4


@pytest.mark.parametrize("name, penalty", [*((name, 1.0) for name in CASES), ("one image", 1.3), ("no image", 1.3), ("history", 1.005)])
def test_greedy_tokens_are_the_references(model, reference, name, penalty):
    tiles, prompt = case(model, name)
    ends = model.tokenizer.convert_tokens_to_ids([END, "</s>"])
    seen = set() if len(tiles) else set(prompt.ids)
    found = [token for [token] in generate(model, [(tiles, prompt)], 12, repetition_penalty=penalty)]
    assert found == reference.answer(tiles, prompt, 12, penalty, seen, ends)
    assert penalty < 1.1 or found != [token for [token] in generate(model, [(tiles, prompt)], 12, repetition_penalty=1.0)]


def test_penalty_divides_above_zero_multiplies_below_and_holds_for_a_chat_as_for_its_prompt(model):
    assert penalize(torch.tensor([[2.0, -2.0, 3.0]]), [{0, 1}], 2.0).tolist() == [[1.0, -4.0, 3.0]]
    chat = model.chat(max_new_tokens=6, repetition_penalty=1.3)
    first = chat.ask("Who?")
    chat.ask("And?")                                        # its past is in the cache, and counts
    prompt = write_conversation(model.tokenizer, 25, [("Who?", first, []), ("And?", None, [])], model.config.template)
    assert [token for [token] in generate(model, [([], prompt)], 6, repetition_penalty=1.3)] == chat.report["tokens"]
    assert model.chat().settings["repetition_penalty"] == 1.005


def sample_page(**more):
    return Page("p", [Image.fromarray(images_of(1)[0].permute(1, 2, 0).numpy())], instruction="", **more)


def test_loss_and_gradients_are_the_references(model, reference, folder):
    model = InternVL.from_pretrained(folder, "cpu", "float32")
    choose_parts(model, "projector,llm,vision")
    [example] = [PageDataset(model)[sample_page(questions=["What is it?", "Who?"], answers=["January 8", "Nobody"], follows={1})]]
    tiles, prompt = example.tiles, example.prompt
    loss = loss_of(model, [(tiles, prompt)])
    logits, labels = reference(tiles, prompt), torch.tensor(prompt.labels)
    expected = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
    assert abs(loss - expected) / len(labels[labels >= 0]) < 1e-5
    loss.backward()
    expected.backward()
    clip, llama = dict(reference.clip.named_parameters()), reference.llama
    first = next(name for name in clip if name.endswith("layers.0.self_attn.q_proj.weight"))
    block, theirs, partial = model.language.blocks[0], llama.model.layers[0], lambda name: reference.plora[f"model/layers/0/{name}"]
    q, k, v = (partial(f"self_attn/{part}_proj") for part in "qkv")
    for ours, grad in (
            (model.projector.up.weight, reference.projector[0].weight.grad), (model.vision.blocks[0].attention.query.weight, clip[first].grad),
            (block.attention.query.weight, theirs.self_attn.q_proj.weight.grad), (block.mlp_down.weight, theirs.mlp.down_proj.weight.grad),
            (block.attention.partial_qkv.a, q[0].grad + k[0].grad + v[0].grad), (block.attention.partial_qkv.b[1], k[1].grad),
            (block.attention.partial_out.a, partial("self_attn/o_proj")[0].grad), (block.partial_up.b[0], partial("mlp/up_proj")[1].grad)):
        assert ours.grad.abs().max() > 0 and (ours.grad - grad).norm() / grad.norm() < 1e-4


def test_a_page_equals_its_separate_samples_in_float64(model, folder):
    model = InternVL.from_pretrained(folder, "cpu", "float32").double()
    model.dtype = torch.float64
    choose_parts(model, "lora")
    model.requires_grad_(True)
    dataset, asked = PageDataset(model), [("What is it?", "A cat"), ("Who?", "Nobody"), ("When?", "1993")]
    together = dataset[sample_page(questions=[q for q, _ in asked], answers=[a for _, a in asked])]
    alone = [dataset[sample_page(questions=[q], answers=[a])] for q, a in asked]
    grads = []
    for examples in ([together], alone):
        model.zero_grad()
        losses = [loss_of(model, [(example.tiles, example.prompt)]) for example in examples]
        sum(losses).backward()
        grads.append((sum(losses).item(), [p.grad.clone() for p in model.parameters()]))
    (a, first), (b, second) = grads
    assert abs(a - b) < 1e-9 and max((x - y).abs().max() for x, y in zip(first, second)) < 1e-9
    assert len(together.prompt.ids) < sum(len(example.prompt.ids) for example in alone)
    packed = loss_of(model, [(example.tiles, example.prompt) for example in (together, alone[1])])        # two pages in a row
    assert abs(packed - a - losses[1]) < 1e-9


def test_partial_lora_acts_on_image_tokens_alone_and_has_dropout_only_while_it_is_trained(folder):
    model = InternVL.from_pretrained(folder, "cpu", "float32")
    layer, x = model.language.blocks[0].partial_gate.train(), torch.randn(4, 128)
    images = torch.tensor([[0.0], [1], [1], [0]])
    [y] = layer(x, images, torch.zeros(4, 160))
    assert y[1].abs().max() > 0 and not y[[0, 3]].any() and torch.equal(layer(x, images, torch.zeros(4, 160))[0], y)
    layer.requires_grad_(True)
    assert not torch.equal(layer(x, images, torch.zeros(4, 160))[0], y)
    assert layer(x, None, x)[0] is x
    add_adapters(model, rank=2, targets="llm,vision")
    assert sum(".adapter.a" in name for name, _ in model.named_parameters()) == 2 * 7 + 2 * 6
    assert not any("partial" in name and "adapter" in name for name, _ in model.named_parameters())


# ------------------------------------------------------------------------------------------------------------ prompts, labels

def test_prompts_have_the_published_lengths_and_ids():
    tokenizer = load_tokenizer(real("family/tokenizers/internlm2"))
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    if tokenizer.convert_tokens_to_ids(END) != 92542:       # InternVL's files give other names to the two pieces
        names = {"start": tokenizer.convert_ids_to_tokens(92543), "end": tokenizer.convert_ids_to_tokens(92542)}
    else:
        names = {}
    for name, length in (("internlm-xcomposer2-vl-7b", 137), ("internlm-xcomposer2-7b", 105)):
        template = replace(read_small(CONFIGS[name]["config"]).template, **names)
        prompt = write_conversation(tokenizer, 4, [("<image>What is the date?", None, [1])], template)
        assert prompt.images.index(True) == length and prompt.ids[length + 4] == 1
        assert prompt.ids[-10:] == [505, 410, 2554, 345, 92542, 364, 92543, 525, 11353, 364]
    text = write_conversation(tokenizer, 4, [("What?", None, [])], template)
    assert text.ids[:4] == [1, 1, 92543, 9081]


def read_small(config):
    with tempfile.TemporaryDirectory() as place:
        Path(place, "config.json").write_text(json.dumps(config))
        return Config.read(Path(place, "config.json"))


def test_text_behind_an_image_begins_anew_and_typed_tokens_stay_text(model):
    tokenizer, begin = model.tokenizer, model.tokenizer.bos_token_id
    _, prompt = case(model, "two images")
    starts = [i for i in range(1, len(prompt.ids)) if prompt.images[i - 1] and not prompt.images[i]]
    assert sum(prompt.images) == 75 and [prompt.ids[i] for i in starts] == [begin] * 2          # none between two images without text
    assert prompt.ids.count(begin) == 3 and prompt.ids[:2].count(begin) == 1
    typed = write_conversation(tokenizer, 25, [(f"{END}{OPEN}</s><s>[UNUSED_TOKEN_3]", None, [])], model.config.template)
    assert typed.ids[:2] == [begin, begin] and typed.ids.count(begin) == 2 and 2 not in typed.ids
    assert typed.ids.count(tokenizer.convert_tokens_to_ids(END)) == 2 and typed.ids.count(tokenizer.convert_tokens_to_ids(OPEN)) == 3
    branches, _ = write_page(tokenizer, 25, [1], [[("A?", None)], [("B?", None)]], template=model.config.template)
    assert [branches.ids[branches.branches.index(branch)] for branch in (1, 2)] == [begin, begin]


def official_labels(ids, end, header):
    """The masks of its own `mask_human_targets`; `header`: the tokens from an end to the answer, 6 in the whole vocabulary."""
    labels, last, ends = list(ids), 0, 0
    for i, token in enumerate(ids):
        if token == end:
            if ends % 2 == 0:
                labels[last:i + header] = [IGNORE_INDEX] * (i + header - last)
            else:
                last = i + 1
            ends += 1
    return labels


def test_samples_and_labels_are_those_of_its_own_preprocessing(model):
    tokenizer, draw, dataset = model.tokenizer, random.Random(0), PageDataset(model)
    end, start, begin = (tokenizer.convert_tokens_to_ids(token) for token in (END, OPEN, "<s>"))
    plain = lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids    # noqa: E731
    words = ["What is", " the date?", "日期", "\n", " a  b ", "W. Jones", "1,234.56", "Who"]
    for _ in range(60):
        turns, images = [], draw.randrange(3)
        for number in range(draw.randint(1, 3)):
            question = "".join(draw.choices(words, k=3)) + "?"
            where = draw.randrange(3) if number == 0 and images else 0
            if where == 1 or number == 0 and images and where == 0:
                question = "<ImageHere>" * images + question.lstrip()       # white space around an image that comes first is not kept
            elif where == 2:
                question = "Is " + " or ".join(["<ImageHere>"] * images) + question
            turns += [{"from": "user", "value": question},
                      {"from": "assistant", "value": "".join(draw.choices(words, k=2)) + "."}]
        row = read_entry({"id": "0", "image": ["a.png"] * images, "conversations": turns})
        page = Page("p", [], instruction="", questions=[q for q, _ in row["turns"]], answers=[a for _, a in row["turns"]],
                    follows=set(range(1, len(row["turns"]))), question_start=row["question_start"], history=row["history"])
        found, _ = dataset.write(page, [1] * images)
        ids = [begin]
        for user, assistant in itertools.batched(turns, 2) if hasattr(itertools, "batched") else zip(turns[::2], turns[1::2]):
            ids.append(start)
            parts = ("user\n" + user["value"].strip()).split("<ImageHere>")
            for number, part in enumerate(parts):
                ids += [0] * 25 * (number > 0) + plain(part)
            ids += [end, *plain("\n"), start, *plain("assistant\n" + assistant["value"].strip()), end, *plain("\n")]
        ids.append(2)
        masked = [IGNORE_INDEX if image else label for image, label in zip(found.images, official_labels(ids, end, 3 + len(plain("assistant\n"))))]
        assert (found.ids, found.labels) == (ids, masked)


def test_a_question_that_is_too_long_leaves_no_trace(model):
    page = sample_page(questions=["What?", "x " * 40_000, "y " * 700, "Who?"], answers=["A", "B", "C", "D"])
    whole, left_out = PageDataset(model, max_length=500).write(page, [1])
    page = sample_page(questions=["What?", "Who?"], answers=["A", "D"])
    assert left_out == [1, 2] and whole == PageDataset(model, max_length=500).write(page, [1])[0]


def test_both_formats_are_read(model):
    own = read_entry({"id": "7", "image": ["a.png", "b.png"], "conversations": [
        {"from": "user", "value": "<ImageHere> <ImageHere> Compare."}, {"from": "assistant", "value": "Same."}]})
    lists = read_entry({"id": "8", "conversations": [["<img>a.png</img>What?", "A cat."], ["Sure?", "Yes."]]})
    assert own["images"] == ["a.png", "b.png"] and own["turns"] == [("Compare.", "Same.")]
    assert lists["images"] == ["a.png"] and lists["turns"] == [("What?", "A cat."), ("Sure?", "Yes.")]


# --------------------------------------------------------------------------------------------------------------- files

def test_published_tensors():
    for name, positions in (("internlm-xcomposer2-vl-7b", 1226), ("internlm-xcomposer2-7b", 257)):
        config = read_small(CONFIGS[name]["config"])
        with torch.device("meta"):
            model = config.model_class(config)
        named = file_names(model.state_dict(), config.language.decoder)
        shapes = {name: (sum(len(model.get_parameter(one)) for one in ours), *model.get_parameter(ours[0]).shape[1:]) for name, ours in named.items()}
        tower, expected = "vit.vision_tower.vision_model.", {}
        expected |= {f"{tower}embeddings.class_embedding": (1024,), f"{tower}embeddings.patch_embedding.weight": (1024, 3, 14, 14),
                     f"{tower}embeddings.position_embedding.weight": (positions, 1024), "model.tok_embeddings.weight": (92544, 4096), "output.weight": (92544, 4096),
                     "model.norm.weight": (4096,), "vision_proj.0.weight": (4096, 1024), "vision_proj.2.weight": (4096, 4096)}
        expected |= {f"vision_proj.{i}.bias": (4096,) for i in (0, 2)} | {f"{tower}pre_layrnorm.{end}": (1024,) for end in ("weight", "bias")}
        for i in range(24):
            layer = f"{tower}encoder.layers.{i}."
            for part, out, into in (*((f"self_attn.{p}", 1024, 1024) for p in ("q_proj", "k_proj", "v_proj", "out_proj")), ("mlp.fc1", 4096, 1024), ("mlp.fc2", 1024, 4096)):
                expected |= {f"{layer}{part}.weight": (out, into), f"{layer}{part}.bias": (out,)}
            expected |= {f"{layer}layer_norm{n}.{end}": (1024,) for n in (1, 2) for end in ("weight", "bias")}
        for i in range(32):
            layer = f"model.layers.{i}."
            for part, out, into in (("attention.wqkv", 6144, 4096), ("attention.wo", 4096, 4096), ("feed_forward.w1", 14336, 4096), ("feed_forward.w3", 14336, 4096),
                                    ("feed_forward.w2", 4096, 14336)):
                expected |= {f"{layer}{part}.weight": (out, into), f"{layer}{part}.Plora_A.weight": (256, into), f"{layer}{part}.Plora_B.weight": (out, 256)}
            expected |= {f"{layer}{norm}.weight": (4096,) for norm in ("attention_norm", "ffn_norm")}
        assert shapes == expected and len(shapes) == 940
        count = sum(p.numel() for p in model.parameters())
        assert sum(p.numel() for name, p in model.named_parameters() if "partial" in name) == 603_979_776
        assert round(count / 1e9, 3) == (8.667 if positions == 1226 else 8.666) and 0.99 < about_parameters(config) / count <= 1


def test_a_pickle_that_would_run_code_is_refused_in_one_line(folder, tmp_path):
    for file in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(folder / file, tmp_path / file)

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))
    good = official_tensors(folder)
    wide = torch.as_strided(torch.zeros(1), (1 << 40, 128), (0, 0))
    for content, message in ((good | {"output.weight": Hostile()}, "refused, it holds more than tensors"), (["x"], "refused"),
                             (good | {"output.weight": "text"}, "'output.weight' is not a tensor"), (good | {"output.weight": good["output.weight"].to_sparse()}, "is not a tensor"),
                             (good | {"output.weight": wide}, "wrong shape"), (good | {"more": torch.zeros(1)}, "1 unexpected")):
        torch.save(content, tmp_path / BINARY)
        with pytest.raises(InputError, match=message) as refused:
            InternVL.from_pretrained(tmp_path, "cpu")
        assert "\n" not in str(refused.value) and not (tmp_path / "was-run").exists()
    torch.save(good, tmp_path / BINARY)
    whole = (tmp_path / BINARY).read_bytes()
    (tmp_path / BINARY).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="or is not whole"):
        InternVL.from_pretrained(tmp_path, "cpu")


def test_another_value_in_a_bin_file_gives_another_fingerprint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(folder)
    [*_, path] = sorted((tmp_path / "copy").glob("*.bin"))
    tensors = torch.load(path, weights_only=True)
    tensors[max(tensors)].view(-1)[0] += 1e-3
    torch.save(tensors, path)
    assert fingerprint(tmp_path / "copy") != fingerprint(folder)


def test_a_position_table_of_another_size_is_stretched(folder, tmp_path, model):
    for file in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(folder / file, tmp_path / file)
    tensors, name = official_tensors(folder), "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
    table = torch.randn(1 + 24 * 24, 64)
    torch.save(tensors | {name: table, "vit.vision_tower.vision_model.embeddings.position_ids": torch.arange(577)}, tmp_path / BINARY)
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
    clip = CLIPVisionEmbeddings(CLIPVisionConfig(hidden_size=64, num_attention_heads=2, image_size=336, patch_size=14))
    clip.position_embedding.weight.data = table
    expected = clip.interpolate_pos_encoding(torch.empty(1, 26, 64), 70, 70)[0]
    assert torch.allclose(InternVL.from_pretrained(tmp_path, "cpu").vision.position, expected, atol=1e-6)
    torch.save(tensors | {name: table[:500]}, tmp_path / BINARY)
    with pytest.raises(InputError, match="wrong shape"):
        InternVL.from_pretrained(tmp_path, "cpu")


def test_bin_files_come_from_the_hub_and_an_interrupted_download_is_completed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "root" / "models" / "internlm" / "small")
    code = ("from model import InternVL\nimport huggingface_hub, pathlib\nfor _ in range(2):\n    print(len(InternVL.from_pretrained('internlm/small', 'cpu').state_dict()))\n"
            "    [path.unlink() for path in pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE).rglob('*00002-of-00002.bin')]")
    with serve(tmp_path / "root") as address:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")},
                              capture_output=True, text=True, timeout=120)
    first, again = done.stdout.split()
    assert first == again and done.stderr.count("to download") == 1


@pytest.mark.parametrize("edit, message", [
    ({"img_size": 336}, "4KHD and 2.5 are not supported, take internlm/internlm-xcomposer2-vl-7b"), ({"bias": True}, "bias True"), ({"torch_dtype": "int8"}, "torch_dtype int8"),
    ({"plora_rank": 0}, "plora_rank"), ({"vision_config": 3}, "not an InternVL2 config")])
def test_what_cannot_be_built_is_refused(edit, message):
    with pytest.raises(InputError, match=message) as refused:
        read_small(CONFIGS["internlm-xcomposer2-vl-7b"]["config"] | edit)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------------------- every command

@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two pages in its own format, and in PaddleMIX's."""
    folder, own, lists = tmp_path_factory.mktemp("rows"), [], []
    for page in range(2):
        image, asked = draw_page(random.Random(page))
        image.save(folder / f"{page}.png")
        for question, answer in asked[:3]:
            own.append({"id": str(page), "image": [f"{page}.png"], "conversations": [
                {"from": "user", "value": f"<ImageHere> {question}"}, {"from": "assistant", "value": answer}]})
            lists.append({"id": str(page), "conversations": [[f"<img>{page}.png</img>{question}", answer]]})
    (folder / "own.json").write_text(json.dumps(own))
    (folder / "lists.json").write_text(json.dumps(lists))
    return folder


def test_every_command_works(folder, rows, tmp_path, capsys, monkeypatch):
    def run(program, *flags, stdin=""):
        status, out, err = call(program, capsys, monkeypatch, *flags, stdin=stdin)
        assert status == 0, err
        return out

    page, fit = rows / "0.png", ("--model", folder, "--device", "cpu", "--workers", 0, "--eval-pages", 1, "--eval-every", 2, "--warmup", 0, "--schedule", "constant")
    for parts, data in (("projector", "own"), ("lora", "lists"), ("projector,llm", "own"), ("all", "own")):
        more = ("--recipe", "xcomposer2-lora") if parts == "lora" else ("--recipe", "xcomposer2-full") if parts == "projector,llm" else ()
        file = rows / f"{data}.json"
        run(train, *fit, *more, "--train", parts, "--lr", 1e-3, "--data", file, "--eval-data", file, "--steps", 2, "--save-every", 2, "--out", tmp_path / parts)
        run(train, "--resume", tmp_path / parts, "--steps", 3)
        losses = [line["train_loss"] for line in map(json.loads, (tmp_path / parts / "metrics.jsonl").read_text().splitlines()) if "train_loss" in line]
        assert len(losses) == 3
        before, after = official_tensors(folder), official_tensors(tmp_path / parts)
        assert before.keys() == after.keys() and {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"projector": {"vision_proj"}, "lora": {"model"}, "projector,llm": {"vision_proj", "model", "output"}, "all": {"vision_proj", "model", "output", "vit"}}[parts]
        assert any("Plora" in name for name in before if not torch.equal(before[name], after[name])) == (parts in ("projector,llm", "all"))
    tuned, ask = tmp_path / "lora", ("--device", "cpu", "--max-new-tokens", 4)
    answer = json.loads(run(infer, "--model", tuned, *ask, "--image", page, "--json", "What is the total?"))
    assert answer["tiles"] == [1]
    both = ("--image", page, "--image", rows / "1.png")
    placed = json.loads(run(infer, "--model", tuned, *ask, *both, "--json", "Is <ImageHere> older than <ImageHere>?"))
    assert placed["prompt_tokens"] > answer["prompt_tokens"] + 25
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "Is <ImageHere> older than <ImageHere>?", "images": [str(page), str(rows / "1.png")]}))
    assert json.loads(run(infer, "--model", tuned, *ask, "--questions", tmp_path / "asked.jsonl"))["tokens"] == placed["tokens"]
    run(infer, "--model", tuned, *ask, "--image", page, "--int8", "--repetition-penalty", 1.2, "--attend", tmp_path / "a.png", "--show", tmp_path / "s.png", "What is the total?")
    assert run(infer, "--model", tuned, *ask, "--image", page, stdin="What is the total?\nWho?\n")
    assert run(infer, "--model", tuned, *ask, "--batch", 2, "--evaluate", rows / "own.json")
    Image.new("RGB", (30, 30)).save(tmp_path / "v.gif", save_all=True, append_images=[Image.new("RGB", (30, 30), "red")] * 3)
    assert "not trained on videos" in refuses(infer, capsys, monkeypatch, "--model", tuned, *ask, "--video", tmp_path / "v.gif", "What?")
    assert "--explain follows InternVL" in refuses(infer, capsys, monkeypatch, "--model", tuned, *ask, "--image", page, "--explain", tmp_path / "e.html", "What?")
    assert "transformers has no class" in refuses(train, capsys, monkeypatch, "--export", tuned, tmp_path / "transformers", "--format", "transformers")
    for layout in ("official", "peft"):
        run(train, "--export", tuned if layout != "peft" else tuned / "checkpoints" / "step-0000003.safetensors", tmp_path / layout, "--format", layout)
        assert json.loads(run(infer, "--model", tmp_path / layout, *ask, "--image", page, "--json", "What is the total?"))["tokens"] == answer["tokens"], layout
    exported = load_file(tmp_path / "official" / "model.safetensors")
    assert exported.keys() == official_tensors(folder).keys() and not list((tmp_path / "official").glob("*.bin*"))
