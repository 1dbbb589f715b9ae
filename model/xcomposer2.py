"""InternLM-XComposer2: how little does another vision-language model need? An image tower, a projector, one more rule.

    image -> 490 x 490 -> CLIP ViT-L/14 (1, 1225, 1024) -> projector (1, 1225, 4096) -> image tokens \\
    questions --------------------------------------------> prompt (L) -> embedding (L, 4096) --- splice ---> InternLM2

An image is one square, whatever its shape. Partial LoRA, low-rank weights beside five matrices of InternLM2, acts on
image tokens only. Their places travel with the row; in decoding, where none are read, nothing is computed.

Source: InternLM-XComposer2 (arXiv 2401.16420), section 3; `modeling_internlm_xcomposer2.py`, `modeling_internlm2.py`
and `build_mlp.py` beside the weights; openai/clip-vit-large-patch14-336.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import language, names
from model.checkpoint import RESIZED
from model.config import READERS, SUPPORTED, VISION, Config, LanguageConfig, VisionConfig, numbers, read_language
from model.internvl import InternVL
from model.layers import LayerNorm, Linear
from model.prompt import IMAGE_CLOSE, IMAGE_OPEN, IMAGE_TOKEN, Prompt, PromptBuilder, Template
from model.tokenizer import TURNS
from model.vision import normalize

# ------------------------------------------------------------------------------------------------------- vision encoder


class Attention(nn.Module):
    """Every patch attends to every patch of its image."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (Linear(config.width, config.width) for _ in range(4))

    def forward(self, x):                                                           # (N, 1226, D)
        q, k, v = (rearrange(layer(x), "n l (h d) -> n h l d", h=self.heads)
                   for layer in (self.query, self.key, self.value))
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)"))


class VisionBlock(nn.Module):
    """(N, 1226, D) -> (N, 1226, D): attention, then the MLP with QuickGELU, each with a norm before it."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp_up = Linear(config.width, config.mlp_width)
        self.mlp_down = Linear(config.mlp_width, config.width)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        y = self.mlp_up(self.mlp_norm(x))
        return x + self.mlp_down(y * torch.sigmoid(1.702 * y))


class ClipEncoder(nn.Module):
    """uint8 images (N, 3, 490, 490) -> (N, 1225, 1024): the last block's output, without the class token."""

    def __init__(self, config):
        super().__init__()
        self.mean, self.deviation = config.mean, config.deviation
        self.patch = nn.Conv2d(3, config.width, config.patch_pixels, stride=config.patch_pixels, bias=False)
        self.class_token = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(1 + config.grid ** 2, config.width))
        self.pre_norm = LayerNorm(config.width, config.norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.gradient_checkpointing = False

    def forward(self, images, dtype):
        x = normalize(images, dtype, self.mean, self.deviation)
        x = F.conv2d(x, self.patch.weight.to(dtype), stride=self.patch.stride)
        x = rearrange(x, "n d h w -> n (h w) d")                                    # (N, 1225, D)
        x = torch.cat([self.class_token.to(dtype).expand(len(x), 1, -1), x], dim=1) + self.position.to(dtype)
        x = self.pre_norm(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing else block(x)
        return x[:, 1:]


def resize(table, rows):
    """A position table (1 + n * n, D) with `rows` rows, for images of another size: bicubic, in float32."""
    side = math.isqrt(max(len(table) - 1, 1))
    if table.ndim != 2 or len(table) in (rows, 0) or side ** 2 != len(table) - 1:
        return table                                                    # it fits, or its shape will be refused
    grid = rearrange(table[1:].float(), "(h w) d -> 1 d h w", h=side)
    grid = F.interpolate(grid, [math.isqrt(rows - 1)] * 2, mode="bicubic")
    return torch.cat([table[:1].float(), rearrange(grid, "1 d h w -> (h w) d")])


class Projector(nn.Module):
    """(N, 1225, 1024) -> (N, 1225, 4096)."""

    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.vision.width, config.language.width)
        self.out = Linear(config.language.width, config.language.width)

    def forward(self, patches):
        return self.out(F.gelu(self.up(patches)))


# ------------------------------------------------------------------------------------------------------ language model

class PartialLoRA(nn.Module):
    """What is added to a layer's output at image tokens: B A x. Several layers that read the same x share A."""

    def __init__(self, config, width_in, *widths_out):
        super().__init__()
        self.scale = config.partial_alpha / config.partial_rank
        self.a = nn.Parameter(torch.zeros(config.partial_rank, width_in))
        self.b = nn.ParameterList(torch.zeros(width, config.partial_rank) for width in widths_out)

    def forward(self, x, images, *outputs):
        """x (L, in), `images` (L, 1), 1 at image tokens and else 0, or None -> the layers' outputs, each (L, out)."""
        if images is None:
            return outputs
        x = F.dropout(x, 0.05, self.training and self.a.requires_grad)          # as published; not while it is frozen
        low = F.linear(x, self.a.to(x.dtype)) * images * self.scale
        return [y + F.linear(low, b.to(x.dtype)) for y, b in zip(outputs, self.b)]


class PartialAttention(language.Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        own, shared = config.heads * config.head_width, config.kv_heads * config.head_width
        self.partial_qkv = PartialLoRA(config, config.width, own, shared, shared)
        self.partial_out = PartialLoRA(config, own, config.width)

    def project(self, x, row):
        parts = self.partial_qkv(x, row.images, self.query(x), self.key(x), self.value(x))
        q, k, v = (rearrange(part, "l (h d) -> h l d", d=self.head_width) for part in parts)
        return language.apply_rotary(q, row.cos, row.sin), language.apply_rotary(k, row.cos, row.sin), v


class PartialBlock(language.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.attention = PartialAttention(config, layer)
        self.partial_gate, self.partial_up = (PartialLoRA(config, config.width, config.mlp_width) for _ in range(2))
        self.partial_down = PartialLoRA(config, config.mlp_width, config.width)

    def forward(self, x, row, rows=slice(None)):
        # image tokens as a mask (L, 1), 1 or 0, of the dtype of x; None in decoding. A row without images has a mask of
        # zeros, so that every trained weight gets a gradient on every rank
        images = None if row.images is None else x.new_zeros(len(x), 1).index_fill(0, row.images, 1)
        seen = self.attention(self.attention_norm(x), row._replace(images=images))
        [seen] = self.attention.partial_out(seen, images, self.attention.out(seen))
        x, images = (x + seen)[rows], images if images is None else images[rows]
        y = self.mlp_norm(x)
        [gate], [up] = self.partial_gate(y, images, self.mlp_gate(y)), self.partial_up(y, images, self.mlp_up(y))
        y = F.silu(gate) * up
        return x + self.partial_down(y, images, self.mlp_down(y))[0]


class XComposer2(InternVL):
    """InternVL's methods on other parts."""

    def __init__(self, config):
        super().__init__(config)
        self.vision, self.projector = ClipEncoder(config.vision), Projector(config)
        self.language.blocks = nn.ModuleList(
            PartialBlock(config.language, layer) for layer in range(config.language.layers))


# -------------------------------------------------------------------------------------------------------------- prompt

class Builder(PromptBuilder):
    """Writes nothing around an image. In a chat, the text behind one begins with "<s>" again, a prompt without any with
    two. A sample for training has no system turn but that of the data; it ends with "</s>", which is in the loss, as is
    the end of the line before it."""

    def __init__(self, tokenizer, tokens_per_tile, template, system, is_sample, has_images):
        self.is_sample, self.has_images = is_sample, has_images
        super().__init__(tokenizer, tokens_per_tile, template, system)
        if is_sample and system is None:
            self.prompt, self.position = Prompt(), 0
            self.append(list(tokenizer("").input_ids), False)

    def start(self, role):
        if role == "system" and not (self.is_sample or self.has_images):
            self.special("<s>")
        return super().start(role)

    def special(self, token, count=1, in_loss=False):
        if token == IMAGE_TOKEN:
            self.append([0] * count, False, image=True)
        elif token not in (IMAGE_OPEN, IMAGE_CLOSE):
            super().special(token, count, in_loss)

    def append(self, ids, in_loss, image=False):
        # the token before position 6 is entry 5 of the row if it is an image: these are in the prefix alone
        if ids and not (image or self.is_sample) and self.position and self.prompt.images[self.position - 1]:
            ids = [self.tokenizer.bos_token_id, *ids]
        super().append(ids, in_loss, image)

    def reply(self, answer, last=False):
        super().reply(answer)
        if last and self.is_sample:
            self.prompt.labels[-1] = self.prompt.ids[-1]
            self.special("</s>", in_loss=True)


class ComposerTemplate(Template):
    def builder(self, tokenizer, tokens_per_tile, system, tiles, branches):
        is_sample = any(turns[-1][1] is not None for turns in branches)
        return Builder(tokenizer, tokens_per_tile, self, system, is_sample, any(tiles))


NAME = "InternLM-XComposer (浦语·灵笔)"
SYSTEM = (
    f"You are an AI assistant whose name is {NAME}.\n"
    f"- {NAME} is a {{}}conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    f"- {NAME} can understand and communicate fluently in the language chosen by the user such as English and 中文.")
SYSTEM_VL = SYSTEM.format("multi-modality ") + (
    f"\n- {NAME} is capable of comprehending and articulating responses effectively based on the provided image.")
TEMPLATE = ComposerTemplate(
    SYSTEM.format(""), start=TURNS[0], end=TURNS[1], gap="\n", strip=True, line="", stops=("</s>",))


# ------------------------------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class ClipConfig(VisionConfig):
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)           # of the colors of CLIP's training, RGB
    deviation: tuple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PartialConfig(LanguageConfig):
    partial_rank: int = 256             # B A is scaled by alpha / rank
    partial_alpha: int = 256


class XComposer2Config(Config):
    model_class, tiled, repetition_penalty = XComposer2, False, 1.005


# published sizes, which the published config.json lacks
CLIP = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "patch_size": 14, "layer_norm_eps": 1e-5}
DECODER = "InternLM2-XComposer2"


def read_config(official):
    """The Config of an official config.json of VL-7B (490 pixels) or 7B (224). Raises ValueError."""
    size, bias, dtype = (official.get(key) for key in ("img_size", "bias", "torch_dtype"))
    if size not in (490, 224) and "vision_config" not in official or bias or dtype not in SUPPORTED[""]["torch_dtype"]:
        raise ValueError(f"img_size is {size}, bias {bias}, torch_dtype {dtype}; 4KHD and 2.5 are not supported, take "
                         "internlm/internlm-xcomposer2-vl-7b")
    vision = CLIP | official.get("vision_config", {}) | {"image_size": size}
    decoder = read_language(official | {"architectures": ["InternLM2ForCausalLM"]})
    partial = numbers({"plora_rank": 256, "plora_alpha": 256} | official, {
        "partial_rank": ("plora_rank", 16_384), "partial_alpha": ("plora_alpha", 16_384)})
    return XComposer2Config(
        ClipConfig(**numbers(vision, VISION)), PartialConfig(**vars(decoder) | partial | {"decoder": DECODER}),
        shuffle=1, thumbnail=False, max_tiles=1, stored_dtype=dtype,
        template=TEMPLATE if size == 224 else replace(TEMPLATE, system=SYSTEM_VL))


# ------------------------------------------------------------------------------------------------------ tensors' names

# our name of a partial LoRA: the layer that has it; its matrices: query, key and value have a B each
PARTIAL = {"attention.partial_qkv": "attention.wqkv", "attention.partial_out": "attention.wo",
           "partial_gate": "feed_forward.w1", "partial_up": "feed_forward.w3", "partial_down": "feed_forward.w2"}
SIDES, TOWER = ("a", "b.0", "b.1", "b.2"), "vit.vision_tower.vision_model"
NAMES = (
    (("language", ""), ("embedding", "model.tok_embeddings"), ("norm", "model.norm"), ("lm_head", "output")),
    (("language.blocks.#", "model.layers.#"), *names.FUSED["InternLM2"][1][1:], *(
        (f"{ours}.{side}", f"{layer}.Plora_{side[0].upper()}.weight")
        for ours, layer in PARTIAL.items() for side in SIDES)),
    (("projector", "vision_proj"), ("up", "0"), ("out", "2")),
    (("vision", TOWER), ("class_token", "embeddings.class_embedding"),
     ("position", "embeddings.position_embedding.weight"), ("patch", "embeddings.patch_embedding"),
     ("pre_norm", "pre_layrnorm")),
    (("vision.blocks.#", f"{TOWER}.encoder.layers.#"),
     *((part, f"self_attn.{part[10]}_proj") for part in names.QKV), ("attention.out", "self_attn.out_proj"),
     ("mlp_up", "mlp.fc1"), ("mlp_down", "mlp.fc2"), ("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")))
# tensors that InternVL lacks keep our names in a run's checkpoints
OWN = [f"language.blocks.#.{part}.{side}" for part in PARTIAL for side in SIDES]
OWN += ["vision.pre_norm", *(f"vision.blocks.#.{part}" for part in names.QKV)]

READERS["internlmxcomposer2"] = read_config
RESIZED[DECODER, "vision.position"] = resize
names.FUSED[DECODER] = NAMES
for table in (names.OFFICIAL, names.OURS, names.TRANSFORMERS):
    table.update(zip(OWN, OWN))
names.PART_OF.update(model="llm", output="llm", vit="vision", vision_proj="projector")
