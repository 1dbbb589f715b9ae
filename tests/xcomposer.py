"""Small checkpoints of InternLM-XComposer2, and a reference put together from transformers' CLIP and Llama.

Tensors are renamed and cut here by hand; nothing of model/names.py is used. Partial LoRA is added to Llama by hooks.
"""
import json
import shutil

import torch
import torch.nn.functional as F
from family import CONFIGS, VOCABULARIES, cut_wqkv
from reference import randomise
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from model import InternVL
from model.tokenizer import load_tokenizer

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FUSED = {"self_attn.q_proj": ("attention.wqkv", 0), "self_attn.k_proj": ("attention.wqkv", 1), "self_attn.v_proj": ("attention.wqkv", 2),
         "self_attn.o_proj": ("attention.wo", None), "mlp.gate_proj": ("feed_forward.w1", None), "mlp.up_proj": ("feed_forward.w3", None),
         "mlp.down_proj": ("feed_forward.w2", None)}


def small_config():
    config = dict(CONFIGS["internlm-xcomposer2-vl-7b"]["config"])
    return config | {
        "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 160, "img_size": 70,
        "vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96},
        "plora_rank": 8, "plora_alpha": 12, "torch_dtype": "float32"}


def make_composer(folder, binary=True):
    """Write a random checkpoint as published: .bin files with their index, and a tokenizer that names no special tokens but three."""
    folder.mkdir(parents=True)
    shutil.copyfile(VOCABULARIES / "internlm2" / "tokenizer.model", folder / "tokenizer.model")
    settings = json.loads((VOCABULARIES / "internlm2" / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder")
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = small_config() | {"vocab_size": len(load_tokenizer(folder))}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    randomise(InternVL.from_scratch(folder, seed=0, device="cpu")).save_pretrained(folder)
    if binary:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, files = sorted(tensors), {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"pytorch_model-{number:05}-of-00002.bin"
            torch.save({name: tensors[name] for name in part}, folder / file)
            files |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def official_tensors(folder):
    """All tensors of a folder's weight files."""
    files = [*folder.glob("*.bin")]
    found = [torch.load(file, weights_only=True) for file in files] if files else [load_file(file) for file in folder.glob("*.safetensors")]
    return {name: tensor for part in found for name, tensor in part.items()}


class Reference(torch.nn.Module):
    def __init__(self, folder, dtype=torch.float32):
        super().__init__()
        config, official = json.loads((folder / "config.json").read_text()), official_tensors(folder)
        tower = {"image_size": config["img_size"], "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | config["vision_config"]
        self.clip = CLIPVisionModel(CLIPVisionConfig(**tower))
        prefix = "vit.vision_tower."
        found = {name.removeprefix(prefix): tensor for name, tensor in official.items() if name.startswith(prefix)}
        if "embeddings.class_embedding" in self.clip.state_dict():          # newer versions of transformers
            found = {name.removeprefix("vision_model."): tensor for name, tensor in found.items()}
        missing, unexpected = self.clip.load_state_dict(found, strict=False)
        assert not unexpected and all("post_layernorm" in name for name in missing), (missing, unexpected)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.llama = LlamaForCausalLM(LlamaConfig(
            vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"], num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=config["rms_norm_eps"],
            max_position_embeddings=config["max_position_embeddings"], rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False, attention_bias=False, pad_token_id=2))
        llama, self.mask, self.plora = {}, None, torch.nn.ParameterDict()
        for name in self.llama.state_dict():
            layer = next((layer for layer in FUSED if layer in name), None)
            theirs = (name.replace("embed_tokens", "tok_embeddings").replace("lm_head", "output").replace("input_layernorm", "attention_norm")
                      .replace("post_attention_layernorm", "ffn_norm"))
            if layer:
                theirs, part = name.replace(layer, FUSED[layer][0]), FUSED[layer][1]
                a, b = (official[theirs.replace(".weight", f".Plora_{side}.weight")] for side in "AB")
                cut = (lambda tensor: tensor) if part is None else lambda tensor, part=part: cut_wqkv(tensor, heads, kv_heads)[part]
                self.add_partial(name.removesuffix(".weight"), a, cut(b), config["plora_alpha"] / config["plora_rank"])
                llama[name] = cut(official[theirs])
            else:
                llama[name] = official[theirs]
        self.llama.load_state_dict(llama)
        width = config["hidden_size"]
        self.projector = torch.nn.Sequential(torch.nn.Linear(config["vision_config"]["hidden_size"], width), torch.nn.GELU(), torch.nn.Linear(width, width))
        self.projector.load_state_dict({name.removeprefix("vision_proj."): official[name] for name in official if name.startswith("vision_proj.")})
        assert len(official) == len(found) + 4 + len(llama) - 4 * config["num_hidden_layers"] + 10 * config["num_hidden_layers"] + 2 * config["num_hidden_layers"]
        self.to(dtype).eval()

    def add_partial(self, name, a, b, scale):
        self.plora[name.replace(".", "/")] = torch.nn.ParameterList([a, b])

        def hook(module, inputs, output):
            if self.mask is None:
                return output
            x, (a, b) = inputs[0], self.plora[name.replace(".", "/")]
            output = output.clone()
            output[self.mask] += scale * F.linear(F.linear(x[self.mask], a), b)
            return output
        self.llama.get_submodule(name).register_forward_hook(hook)

    def embed(self, tiles, prompt):
        dtype = self.projector[0].weight.dtype
        pixels = torch.as_tensor(tiles).float() / 255
        pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
        x = self.llama.model.embed_tokens(torch.tensor([prompt.ids]))
        mask = torch.tensor([prompt.images])
        if len(tiles):
            patches = self.clip(pixels.to(dtype), output_hidden_states=True).hidden_states[-1][:, 1:]
            x = x.masked_scatter(mask[..., None], self.projector(patches))
        return x, mask

    def forward(self, tiles, prompt):
        """Logits (L, V) of a prompt without branches, or of one branch."""
        x, self.mask = self.embed(tiles, prompt)
        return self.llama(inputs_embeds=x).logits[0]

    @torch.no_grad()
    def answer(self, tiles, prompt, most, penalty=1.0, seen=(), ends=()):
        x, self.mask = self.embed(tiles, prompt)
        found, cache = [], None
        while len(found) < most and not (found and found[-1] in ends):
            out = self.llama(inputs_embeds=x, past_key_values=cache, use_cache=True)
            logits, cache, self.mask = out.logits[0, -1], out.past_key_values, None
            for token in {*seen, *found}:
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            found.append(int(logits.argmax()))
            x = self.llama.model.embed_tokens(torch.tensor([[found[-1]]]))
        return found
