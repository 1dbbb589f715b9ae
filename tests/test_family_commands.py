"""Every command works on every kind of checkpoint: training, resuming, answers, chat, evaluation, all exports."""
import json
import os
import random

import pytest
import torch
from commands import call, infer, train
from family import KINDS, make_folder, official_tensors
from reference import reference_pixels
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from model import InternVL
from model.chat import Picture
from model.prompt import write_conversation
from model.tiny.pages import draw_page

# all kinds with FAMILY=all (3 minutes); else three that have all decoders' and both vision towers' parts
SHOWN = KINDS if os.environ.get("FAMILY") == "all" else ("InternVL2-26B", "InternVL2-4B", "InternVL3_5-1B")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of two pages with three questions each."""
    folder, lines = tmp_path_factory.mktemp("rows"), []
    for page in range(2):
        image, asked = draw_page(random.Random(page))
        image.save(folder / f"{page}.png")
        lines += [{"question": question, "answers": [answer], "image": f"{page}.png"} for question, answer in asked[:3]]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    def run(program, *flags, stdin=""):
        status, out, err = call(program, capsys, monkeypatch, *flags, stdin=stdin)
        assert status == 0, err
        return out
    return run


@pytest.mark.parametrize("kind", SHOWN)
def test_every_command_works(kind, rows, run, tmp_path):
    folder, data, page = make_folder(kind, tmp_path / "model"), rows / "rows.jsonl", rows / "0.png"
    common = ("--model", folder, "--device", "cpu", "--max-tiles", 2)
    fit = ("--data", data, "--eval-data", data, "--workers", 0, "--eval-pages", 1, "--lr", 1e-3, "--eval-every", 2, "--warmup", 0, "--schedule", "constant")
    for parts in ("projector,lora", "all", *(["projector"] if os.environ.get("FAMILY") == "all" else [])):
        run(train, *common, *fit, "--train", parts, "--steps", 2, "--save-every", 2, "--out", tmp_path / parts)
        run(train, "--resume", tmp_path / parts, "--steps", 5 if parts == "all" else 3)
        losses = [line["train_loss"] for line in map(json.loads, (tmp_path / parts / "metrics.jsonl").read_text().splitlines()) if "train_loss" in line]
        assert len(losses) == (5 if parts == "all" else 3) and (parts != "all" or losses[-1] < losses[0])
    assert official_tensors(tmp_path / "all").keys() == official_tensors(folder).keys()
    ask = ("--device", "cpu", "--max-tiles", 2, "--max-new-tokens", 4)
    tuned = tmp_path / "projector,lora"
    answer = json.loads(run(infer, "--model", tuned, *ask, "--image", page, "--json", "What is the total?"))
    bare = json.loads(run(infer, "--model", tuned, *ask, "--image", page, "--json", "--system", "Be brief.", "What is the total?"))
    assert bare["prompt_tokens"] != answer["prompt_tokens"]
    run(infer, "--model", tuned, *ask, "--image", page, "--int8", "--attend", tmp_path / "a.png", "--show", tmp_path / "s.png", "What is the total?")
    assert run(infer, "--model", tuned, *ask, "--image", page, stdin="What is the total?\nWho?\n")
    run(infer, "--model", tuned, *ask, "--image", page, "--explain", tmp_path / "e.html", "What is the total?")
    assert run(infer, "--model", tuned, "--device", "cpu", "--max-tiles", 2, "--max-new-tokens", 4, "--batch", 2, "--evaluate", data)
    for layout in ("official", "transformers", "peft"):
        run(train, "--export", tuned if layout != "peft" else tuned / "checkpoints" / "step-0000003.safetensors", tmp_path / layout, "--format", layout)
    assert official_tensors(tmp_path / "official").keys() == official_tensors(folder).keys()
    for layout in ("official", "peft"):
        assert json.loads(run(infer, "--model", tmp_path / layout, *ask, "--image", page, "--json", "What is the total?"))["tokens"] == answer["tokens"], layout
    equal_in_transformers(tmp_path / "official", tmp_path / "transformers", page)


def equal_in_transformers(official, exported, page):
    """transformers opens the exported folder, reads a conversation as the same tokens, and computes the same logits."""
    model = InternVL.from_pretrained(official, "cpu")
    theirs, tokenizer = InternVLForConditionalGeneration.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    chat = model.chat(max_tiles=2)
    chat.add_image(page)
    [picture] = chat.pictures
    assert isinstance(picture, Picture)
    count = len(picture.tiles) * model.config.tokens_per_tile
    prompt = write_conversation(model.tokenizer, model.config.tokens_per_tile, [("<image>\nWhat is it?", "x", [len(picture.tiles)]), ("Who?", None, [])], model.config.template)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "x"},
                {"role": "user", "content": "Who?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = text.replace("<IMG_CONTEXT>", f"<img>{'<IMG_CONTEXT>' * count}</img>")           # as transformers' processor does
    assert tokenizer(text).input_ids == prompt.ids
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([prompt.ids]), pixel_values=reference_pixels(picture.tiles)).logits[0, -1]
        batch = model.pack([(picture.tiles, prompt)])
        batch.answer_index = torch.tensor([len(prompt.ids) - 1])
        assert (model(batch)[0] - expected).abs().max() < 1e-4
