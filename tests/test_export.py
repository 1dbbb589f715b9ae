"""What we write opens elsewhere and answers the same; what PEFT writes opens here."""
import importlib.util
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import call, refuses, train
from conftest import ROOT, SHARED, real
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from reference import conversation_prompt, page_prompt, reference_model, reference_pixels, transformers_tensors
from safetensors.torch import load_file, save_file
from small_data import mixed_rows
from test_lora import LLM_LEAVES, example, logits
from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLForConditionalGeneration, Qwen2Tokenizer

from data import PageDataset, group_rows_into_pages
from extras.export import add_chat_template, transformers_files
from model import InputError, InternVL
from model.checkpoint import TINY, read_settings
from model.config import Config
from model.generate import generate
from model.images import load_image
from model.names import official_name
from model.prompt import IMAGE_TOKEN, INSTRUCTION
from model.tiling import tile_page
from model.tiny.pages import draw_page
from model.tokenizer import load_tokenizer

RUN = "--tiny", "--train", "projector,lora", "--lora-targets", "llm,vision", "--lora-rank", 4, "--lr", "projector=5e-3,lora=3e-3"


@pytest.fixture
def make_run(tmp_path, capsys, monkeypatch):
    """Runs train.py on the embedded model; returns the run folder."""
    def make(*flags, name="run"):
        status, _, err = call(train, capsys, monkeypatch, *flags, "--steps", 3, "--accumulate", 2, "--eval-every", 0, "--out", tmp_path / name)
        assert status == 0, err
        return tmp_path / name
    return make


@pytest.fixture
def export(tmp_path, capsys, monkeypatch):
    def write(run, layout):
        status, _, err = call(train, capsys, monkeypatch, "--export", run, tmp_path / layout, "--format", layout)
        assert status == 0, err
        return tmp_path / layout
    return write


def asked():
    """(Pillow image, question) pairs about drawn pages; the base knows no instruction, so three steps change its answers."""
    return [(load_image(page.images[0]), page.questions[0] + INSTRUCTION) for page in group_rows_into_pages(mixed_rows(4))]


def our_answers(model, count=12):
    answers = []
    for image, question in asked():
        tiles = tile_page(image, tile_pixels=model.config.vision.tile_pixels)
        prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [question])
        answers.append([step[0] for step in generate(model, [(tiles, prompt)], count)])
    return answers


def their_answers(reference, model, count=12):
    answers = []
    for image, question in asked():
        tiles = tile_page(image, tile_pixels=model.config.vision.tile_pixels)
        prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [question])
        ids = torch.tensor([prompt.ids])
        out = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=reference_pixels(tiles),
                                 max_new_tokens=count, do_sample=False)
        answers.append(out[0, len(prompt.ids):].tolist())
    return answers


@pytest.mark.official
def test_a_finished_run_its_checkpoint_and_its_exports_are_one_model(make_run, export):
    run = make_run(*RUN)
    answers = our_answers(InternVL.from_pretrained(run, "cpu"))
    assert answers != our_answers(InternVL.from_pretrained("tiny", "cpu"))
    assert our_answers(InternVL.from_pretrained(run / "checkpoints" / "step-0000003.safetensors", "cpu")) == answers
    official = export(run, "official")
    assert load_file(official / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()
    assert our_answers(InternVL.from_pretrained(official, "cpu")) == answers
    reference = reference_model(InternVL.from_pretrained(official, "cpu"), whole=True)               # loads strictly, by its own key map
    reference.generation_config.eos_token_id = InternVL.from_pretrained("tiny", "cpu").tokenizer.eos_token_id
    reference.generation_config.pad_token_id = 0
    assert their_answers(reference, InternVL.from_pretrained("tiny", "cpu")) == answers
    (run / "model.safetensors").unlink()                                                # interrupted: the checkpoint is merged
    assert our_answers(InternVL.from_pretrained(run, "cpu")) == answers
    adapter = export(run, "peft")
    assert our_answers(InternVL.from_pretrained(adapter, "cpu")) == answers


@pytest.mark.parametrize("layout", ["transformers", "native"])           # two names of one layout
@pytest.mark.official
def test_the_transformers_folder_opens_in_transformers_and_answers_the_same(make_run, export, layout):
    folder = export(make_run(*RUN), layout)
    model = InternVL.from_pretrained(folder.parent / "run", "cpu")
    theirs, info = InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = transformers_tensors({official_name(name): tensor for name, tensor in model.state_dict().items()})
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    tokenizer, processor = Qwen2Tokenizer.from_pretrained(folder), GotOcr2ImageProcessorPil.from_pretrained(folder)
    assert their_answers(theirs, model) == our_answers(model)
    for image, question in asked():                                                     # the folder's own recipe for a prompt
        tiles = tile_page(image, tile_pixels=model.config.vision.tile_pixels)
        pixels = processor(image.convert("RGB"), return_tensors="pt").pixel_values
        assert (pixels - reference_pixels(tiles)).abs().max() < 1e-6
        text = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                                             tokenize=False, add_generation_prompt=True)
        span = tokenizer.start_image_token + tokenizer.context_image_token * model.config.tokens_per_tile * len(tiles) + tokenizer.end_image_token
        ids = tokenizer(text.replace(IMAGE_TOKEN, span), add_special_tokens=False).input_ids
        assert ids == page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [question])[0].ids


# ---------------------------------------------------------------------------------------------------------- model cards

class Processor:
    """AutoProcessor where torchvision is missing: tokenizer and image processor of the folder, put together as there."""

    def __init__(self, folder):
        self.tokenizer, self.images = Qwen2Tokenizer.from_pretrained(folder), GotOcr2ImageProcessorPil.from_pretrained(folder)
        self.per_tile, self.decode = json.loads((Path(folder) / "processor_config.json").read_text())["image_seq_length"], self.tokenizer.decode

    @classmethod
    def from_pretrained(cls, folder):
        return cls(folder)

    def apply_chat_template(self, messages, **how):
        assert how == dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        pixels = self.images(messages[0]["content"][0]["image"], return_tensors="pt").pixel_values
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = text.replace(IMAGE_TOKEN, f"<img>{IMAGE_TOKEN * self.per_tile * len(pixels)}</img>")
        return {**self.tokenizer(text, add_special_tokens=False, return_tensors="pt"), "pixel_values": pixels}


class OfficialModel:
    """What model cards use of the official InternVLChatModel, by transformers' model with the weights of the folder."""

    @classmethod
    def from_pretrained(cls, folder, torch_dtype):
        model = cls()
        model.ours = InternVL.from_pretrained(folder, "cpu")
        model.eval = model.cuda = lambda: model
        return model

    def chat(self, tokenizer, pixels, question, generation_config):
        assert generation_config.keys() <= {"max_new_tokens", "do_sample"} and pixels.dtype == torch.bfloat16
        text = tokenizer.apply_chat_template([{"role": "user", "content": f"<image>\n{question}"}], tokenize=False, add_generation_prompt=True)
        text = text.replace("<image>", f"<img>{IMAGE_TOKEN * self.ours.config.tokens_per_tile * len(pixels)}</img>")
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = reference_model(self.ours, whole=True).generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels.float(), pad_token_id=0,
                                                              eos_token_id=tokenizer.eos_token_id, **generation_config)
        return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)


def dynamic_preprocess(image, min_num=1, max_num=6, image_size=448, use_thumbnail=False):
    return [Image.fromarray(tile.transpose(1, 2, 0)) for tile in tile_page(image, max_num, image_size, use_thumbnail)]


def build_transform(is_train, input_size):
    return lambda tile: reference_pixels(torch.tensor(list(tile.tobytes())).view(input_size, input_size, 3).permute(2, 0, 1))


@pytest.fixture
def targets(monkeypatch):
    """The programs that model cards open a folder with, as far as they are missing here. The official code needs a GPU."""
    if not importlib.util.find_spec("torchvision"):
        monkeypatch.setattr("transformers.AutoProcessor", Processor)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    for name, more in (("internvl", {}), ("internvl.model", {}), ("internvl.model.internvl_chat", {"InternVLChatModel": OfficialModel}), ("internvl.train", {}),
                       ("internvl.train.dataset", {"build_transform": build_transform, "dynamic_preprocess": dynamic_preprocess})):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**more))


@pytest.mark.official
def test_the_lines_of_a_model_card_open_its_folder(make_run, targets, tmp_path, capsys, monkeypatch):
    """Each prints the answer that the run gives, another one than that of its base model."""
    draw_page(random.Random(3))[0].save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    run = make_run("--tiny", "--train", "projector,lora", "--lr", "1e-2")
    base, answer = (InternVL.from_pretrained(name, "cpu").chat(max_new_tokens=64).ask("What is the date?", "page.png") for name in ("tiny", run))
    assert base != answer
    for layout in ("official", "transformers", "peft"):
        status, out, err = call(train, capsys, monkeypatch, "--export", run, tmp_path / layout, "--format", layout)
        card = (tmp_path / layout / "README.md").read_text()
        assert status == 0 and ("merged into these weights" in card) == (layout != "peft") == ("adapters are merged" in out), err
        for command in re.findall(r"^python train.py (.*)$", card, re.MULTILINE):
            monkeypatch.chdir(ROOT)
            assert call(train, capsys, monkeypatch, *command.replace("model/tiny", str(TINY)).replace(" base ", f" {tmp_path / 'base'} ").split())[0] == 0
            monkeypatch.chdir(tmp_path)
        [lines] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        exec(lines.replace("FOLDER", layout), {})
        assert capsys.readouterr().out.strip() == answer, layout


def test_a_chat_template_writes_the_prompts_of_this_code(tmp_path, request):
    """Whole conversations and open ones, with and without images; other programs read it from an official export."""
    for source in (TINY, SHARED / "internvl2-1b"):
        if not source.exists():
            continue
        folder = tmp_path / source.name
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        add_chat_template(folder)
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        assert tokenizer("What?").input_ids == load_tokenizer(source)("What?").input_ids
        for turns in ([("总金额 What?", None)], [("What?", "It's 7."), ("And <b>then</b>?\n", None)], [("Hm", "ok"), ("Why?", "so")]):
            for images in ([], [2], [1, 3]):
                said = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn) if text]
                said[0]["content"] = [*({"type": "image"} for _ in images), {"type": "text", "text": turns[0][0]}]
                text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=turns[-1][1] is None)
                for tiles in images:
                    text = text.replace(IMAGE_TOKEN, f"<img>{'+' * 4 * tiles}</img>", 1)
                expected = conversation_prompt(tokenizer, 4, images, turns)
                assert tokenizer(text.replace("+", IMAGE_TOKEN), add_special_tokens=False).input_ids == expected.ids


# ----------------------------------------------------------------------------------------------------------------- PEFT

class Skeleton(torch.nn.Module):
    """Linear layers and parameters under official names, as the official code's modules hold them; nothing is computed."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module = self
            for i, part in enumerate(path):
                if part not in module._modules:
                    weight = tensors.get(".".join([*path[:i + 1], "weight"]))
                    is_layer = i + 1 == len(path) and weight is not None and weight.ndim == 2
                    module.add_module(part, torch.nn.Linear(*weight.shape[::-1], bias=False) if is_layer else torch.nn.Module())
                module = module._modules[part]
            setattr(module, leaf, torch.nn.Parameter(tensor.clone()))


@pytest.mark.official
def test_peft_loads_our_adapter_on_the_official_names_and_merges_it_to_our_weights(make_run, export):
    run = make_run(*RUN)
    folder = export(run, "peft")
    base = Skeleton(load_file(TINY / "model.safetensors"))
    merged = dict(PeftModel.from_pretrained(base, folder).merge_and_unload().named_parameters())
    expected = load_file(run / "model.safetensors")
    changed = {name for name in expected if not torch.equal(expected[name], load_file(TINY / "model.safetensors")[name])}
    assert len(changed) == 7 * 2 + 4 * 2 + 6                            # two blocks each, and the projector
    for name in expected:
        assert (merged[name] - expected[name]).abs().max() < 1e-6, name


def test_peft_loads_an_llm_adapter_on_transformers_model_and_answers_the_same(make_run, export):
    run = make_run("--tiny", "--train", "lora", "--lr", "1e-2")
    folder = export(run, "peft")
    base = reference_model(InternVL.from_pretrained("tiny", "cpu"))
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = InternVL.from_pretrained("tiny", "cpu").tokenizer.eos_token_id, 0
    peft = PeftModel.from_pretrained(base, folder, key_mapping={r"^language_model\.model": "model.language_model"})
    model = InternVL.from_pretrained(run, "cpu")
    assert their_answers(peft, model) == our_answers(model)
    before = InternVL.from_pretrained("tiny", "cpu").state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    merged = dict(peft.merge_and_unload().named_parameters())
    expected = transformers_tensors({official_name(name): model.state_dict()[name] for name in changed})
    assert len(changed) == 7 * 2 and all((tensor - merged[name]).abs().max() < 1e-6 for name, tensor in expected.items())


@pytest.mark.parametrize("pattern, whole", [
    (rf"model\.language_model\..*\.({LLM_LEAVES})", None),
    (r"model\.vision_tower\..*\.(k_proj|q_proj|v_proj|projection_layer|fc1|fc2)", ["multi_modal_projector"]),
    (r"model\.vision_tower\..*\.(q_proj|v_proj)|.*linear_1", None),              # no key: its third of qkv stays as it is
])
@pytest.mark.official
def test_an_adapter_that_peft_wrote_opens_here(tmp_path, pattern, whole):
    tiny = InternVL.from_pretrained("tiny", "cpu")
    page = example(tiny)
    page.page.questions, page.page.answers = page.page.questions[:1], page.page.answers[:1]
    page = PageDataset(tiny, 4)[page.page]
    peft = get_peft_model(reference_model(tiny, whole=True), LoraConfig(r=3, lora_alpha=7, target_modules=pattern, modules_to_save=whole, use_rslora=whole is None))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "tiny"}))
    model = InternVL.from_pretrained(tmp_path / "adapter", "cpu")
    ours = logits(model, page)
    with torch.no_grad():
        theirs = peft.eval()(input_ids=torch.tensor([page.prompt.ids]), pixel_values=reference_pixels(page.tiles)).logits[0, :-1]
    assert (ours - theirs[torch.tensor(page.prompt.labels[1:]) >= 0]).abs().max() < 1e-4      # of logits up to 12
    assert (ours - logits(tiny, page)).abs().max() > 0.1
    merged = transformers_tensors({official_name(name): tensor for name, tensor in model.state_dict().items()})
    assert all((tensor - merged[name]).abs().max() < 1e-6 for name, tensor in peft.merge_and_unload().state_dict().items())


@pytest.mark.parametrize("message, change", [
    ("base_model_name_or_path is None", lambda config, tensors: config.update(base_model_name_or_path=None)),
    ("expected plain LoRA", lambda config, tensors: config.update(use_dora=True)),
    ("expected plain LoRA", lambda config, tensors: config.update(peft_type="IA3")),
    ("expected plain LoRA", lambda config, tensors: config.update(rank_pattern={"q_proj": 2})),
    ("not the description of an adapter", lambda config, tensors: config.pop("r")),
    ("1 tensors are not of this model, the first: head.lora_A.weight", lambda config, tensors: tensors.update({"head.lora_A.weight": torch.ones(2)})),
    ("self_attn.q_proj is not of this model", lambda config, tensors: tensors.update({key: t[:, :3] for key, t in tensors.items() if "0.self_attn.q_proj.lora_A" in key})),
    ("self_attn.q_proj is not of this model", lambda config, tensors: [tensors.pop(key) for key in list(tensors) if "0.self_attn.q_proj.lora_B" in key]),
])
def test_adapters_that_do_not_fit_are_refused(make_run, export, message, change):
    folder = export(make_run("--tiny", "--train", "lora"), "peft")
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        InternVL.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("parts", ["projector", "projector,llm"])
def test_what_is_no_adapter_is_not_exported_as_one(make_run, tmp_path, capsys, monkeypatch, parts):
    run = make_run("--tiny", "--train", parts, "--lr", "1e-3")
    assert f"this run has --train {parts}: use --format official or transformers" in refuses(train, capsys, monkeypatch, "--export", run, tmp_path / "out", "--format", "peft")


@pytest.mark.official
def test_the_transformers_files_of_internvl2_1b_describe_its_shape_and_its_tokens(tokenizer, tmp_path):
    with torch.device("meta"):
        model = InternVL(Config())
    model.tokenizer, model.folder = tokenizer, real("internvl2-1b")
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        shutil.copyfile(model.folder / name, tmp_path / name)
    for name, value in transformers_files(model).items():
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    with torch.device("meta"):
        theirs = InternVLForConditionalGeneration(InternVLConfig.from_pretrained(tmp_path))
    assert len(theirs.state_dict()) == 733 and sum(p.numel() for p in theirs.parameters()) == 938_158_976      # as published
    again = Qwen2Tokenizer.from_pretrained(tmp_path)
    text = again.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "总金额 What?"}]}],
                                     tokenize=False, add_generation_prompt=True)
    ids = again(text.replace(IMAGE_TOKEN, f"<img>{IMAGE_TOKEN * 256}</img>"), add_special_tokens=False).input_ids
    assert len(again) == len(tokenizer) == 151655 and ids == page_prompt(tokenizer, 256, [1], ["总金额 What?"])[0].ids


@pytest.mark.official
def test_an_export_carries_a_model_card_and_goes_to_the_hub(tmp_path, capsys, monkeypatch):
    run, sent = tmp_path / "run", []
    status, _, err = call(train, capsys, monkeypatch, "--tiny", "--train", "lora", "--steps", 2, "--accumulate", 2, "--eval-every", 2, "--eval-pages", 4, "--out", run)
    assert status == 0, err
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, exist_ok: sent.append(name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, repo_id, folder_path: sent.append(sorted(file.name for file in Path(folder_path).iterdir())))
    status, out, err = call(train, capsys, monkeypatch, "--export", run / "checkpoints" / "step-0000002.safetensors", tmp_path / "out", "--push-to-hub", "me/mine")
    assert status == 0 and sent == ["me/mine", ["README.md", "config.json", "curve.png", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]], err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: tiny" in card and "| lora_rank | 16 |" in card and f"| domain | {read_settings(run)['domain']} |" in card and "| step | val_loss | exact_match | anls |" in card and "(curve.png)" in card
    def offline(self, name, exist_ok):
        raise OSError("no route to host")
    monkeypatch.setattr(HfApi, "create_repo", offline)
    assert "me/mine: cannot be uploaded (no route to host)" in refuses(train, capsys, monkeypatch, "--export", run, tmp_path / "again", "--push-to-hub", "me/mine")
