"""What we write opens elsewhere and answers the same; what PEFT writes opens here."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import call, refuses, train
from conftest import real
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from reference import page_prompt, reference_model, reference_pixels, transformers_tensors
from safetensors.torch import load_file, save_file
from small_data import mixed_rows
from test_lora import LLM_LEAVES, example, logits
from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLForConditionalGeneration, Qwen2Tokenizer

from data import PageDataset, group_rows_into_pages
from extras.export import transformers_files
from model import InputError, InternVL
from model.checkpoint import TINY
from model.config import Config
from model.generate import generate
from model.images import load_image
from model.names import official_name
from model.prompt import IMAGE_TOKEN
from model.tiling import tile_page

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
    """(Pillow image, question) pairs about drawn pages."""
    return [(load_image(page.images[0]), page.questions[0]) for page in group_rows_into_pages(mixed_rows(4))]


def our_answers(model, count=12):
    answers = []
    for image, question in asked():
        tiles = tile_page(image, 12, 128)
        prompt, _ = page_prompt(model.tokenizer, 64, [len(tiles)], [question])
        answers.append([step[0] for step in generate(model, [(tiles, prompt)], count)])
    return answers


def their_answers(reference, tokenizer, count=12):
    answers = []
    for image, question in asked():
        tiles = tile_page(image, 12, 128)
        prompt, _ = page_prompt(tokenizer, 64, [len(tiles)], [question])
        ids = torch.tensor([prompt.ids])
        out = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=reference_pixels(tiles),
                                 max_new_tokens=count, do_sample=False)
        answers.append(out[0, len(prompt.ids):].tolist())
    return answers


def test_a_finished_run_its_checkpoint_and_its_exports_are_one_model(make_run, export):
    run = make_run(*RUN)
    answers = our_answers(InternVL.from_pretrained(run, "cpu"))
    assert answers != our_answers(InternVL.from_pretrained("tiny", "cpu"))
    assert our_answers(InternVL.from_pretrained(run / "checkpoints" / "step-0000003.safetensors", "cpu")) == answers
    official = export(run, "official")
    assert load_file(official / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()
    assert our_answers(InternVL.from_pretrained(official, "cpu")) == answers
    reference = reference_model(InternVL.from_pretrained(official, "cpu"))               # loads strictly, by its own key map
    reference.generation_config.eos_token_id = InternVL.from_pretrained("tiny", "cpu").tokenizer.eos_token_id
    reference.generation_config.pad_token_id = 0
    assert their_answers(reference, InternVL.from_pretrained("tiny", "cpu").tokenizer) == answers
    (run / "model.safetensors").unlink()                                                # interrupted: the checkpoint is merged
    assert our_answers(InternVL.from_pretrained(run, "cpu")) == answers
    adapter = export(run, "peft")
    assert our_answers(InternVL.from_pretrained(adapter, "cpu")) == answers


@pytest.mark.parametrize("layout", ["transformers", "native"])           # two names of one layout
def test_the_transformers_folder_opens_in_transformers_and_answers_the_same(make_run, export, layout):
    folder = export(make_run(*RUN), layout)
    model = InternVL.from_pretrained(folder.parent / "run", "cpu")
    theirs, info = InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = transformers_tensors({official_name(name): tensor for name, tensor in model.state_dict().items()})
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    tokenizer, processor = Qwen2Tokenizer.from_pretrained(folder), GotOcr2ImageProcessorPil.from_pretrained(folder)
    assert their_answers(theirs, tokenizer) == our_answers(model)
    for image, question in asked():                                                     # the folder's own recipe for a prompt
        tiles = tile_page(image, 12, 128)
        pixels = processor(image.convert("RGB"), return_tensors="pt").pixel_values
        assert (pixels - reference_pixels(tiles)).abs().max() < 1e-6
        text = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                                             tokenize=False, add_generation_prompt=True)
        span = tokenizer.start_image_token + tokenizer.context_image_token * 64 * len(tiles) + tokenizer.end_image_token
        ids = tokenizer(text.replace(IMAGE_TOKEN, span), add_special_tokens=False).input_ids
        assert ids == page_prompt(model.tokenizer, 64, [len(tiles)], [question])[0].ids


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
    assert their_answers(peft, model.tokenizer) == our_answers(model) != our_answers(InternVL.from_pretrained("tiny", "cpu"))


@pytest.mark.parametrize("pattern, whole", [
    (rf"model\.language_model\..*\.({LLM_LEAVES})", None),
    (r"model\.vision_tower\..*\.(k_proj|q_proj|v_proj|projection_layer|fc1|fc2)", ["multi_modal_projector"]),
    (r"model\.vision_tower\..*\.(q_proj|v_proj)|.*linear_1", None),              # no key: its third of qkv stays as it is
])
def test_an_adapter_that_peft_wrote_opens_here(tmp_path, pattern, whole):
    tiny = InternVL.from_pretrained("tiny", "cpu")
    page = example(tiny)
    page.page.questions, page.page.answers = page.page.questions[:1], page.page.answers[:1]
    page = PageDataset(tiny, 4)[page.page]
    peft = get_peft_model(reference_model(tiny), LoraConfig(r=3, lora_alpha=7, target_modules=pattern, modules_to_save=whole, use_rslora=whole is None))
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
    ("base_model_name_or_path is empty", lambda config, tensors: config.update(base_model_name_or_path=None)),
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


def test_an_export_carries_a_model_card_and_goes_to_the_hub(tmp_path, capsys, monkeypatch):
    run, sent = tmp_path / "run", []
    status, _, err = call(train, capsys, monkeypatch, "--tiny", "--train", "lora", "--steps", 2, "--accumulate", 2, "--eval-every", 2, "--eval-pages", 4, "--out", run)
    assert status == 0, err
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, exist_ok: sent.append(name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, repo_id, folder_path: sent.append(sorted(file.name for file in Path(folder_path).iterdir())))
    status, out, err = call(train, capsys, monkeypatch, "--export", run / "checkpoints" / "step-0000002.safetensors", tmp_path / "out", "--push-to-hub", "me/mine")
    assert status == 0 and sent == ["me/mine", ["README.md", "config.json", "curve.png", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]], err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: tiny" in card and "| lora_rank | 16 |" in card and "| domain | negative |" in card and "| step | val_loss | exact_match | anls |" in card and "(curve.png)" in card
    def offline(self, name, exist_ok):
        raise OSError("no route to host")
    monkeypatch.setattr(HfApi, "create_repo", offline)
    assert "me/mine: cannot be uploaded (no route to host)" in refuses(train, capsys, monkeypatch, "--export", run, tmp_path / "again", "--push-to-hub", "me/mine")
