"""What is InternViT? A vision transformer over the patches of one tile; tiles do not see each other.

Source: InternVL (arXiv 2312.14238), `modeling_intern_vit.py`. Differences from a textbook ViT: layer scale on both
residual branches, no norm after the last block, an exact GELU. InternViT-6B has RMSNorm, also on queries and keys.
"""
import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.layers import LayerNorm, Linear, RMSNorm

# mean and standard deviation of ImageNet's colors, RGB: the encoder was trained on pixels normalized with them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache        # made once: a copy of unpinned memory to a GPU waits for all that the GPU has to do before it
@torch.inference_mode(False)
def pixel_constants(device, *colors):
    mean, deviation = (torch.tensor(c, device=device).view(3, 1, 1) for c in colors)
    # 255 as a tensor: CUDA replaces a division by a Python number with a product with its rounded reciprocal
    return torch.tensor(255.0, device=device), mean, deviation


def normalize(tiles, dtype, mean=IMAGENET_MEAN, deviation=IMAGENET_STD):
    """uint8 (N, 3, S, S) -> `dtype` of the same shape, computed in float32 on the tiles' own device."""
    white, mean, deviation = pixel_constants(tiles.device, mean, deviation)
    return ((tiles.float() / white - mean) / deviation).to(dtype)


class Attention(nn.Module):
    """Every patch attends to every patch of its tile."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.query_norm = RMSNorm(config.width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.out = Linear(config.width, config.width)

    def forward(self, x):                                                           # (N, 1025, D)
        q, k, v = self.qkv(x).chunk(3, dim=-1)                                      # (N, 1025, D)
        q, k = self.query_norm(q), self.key_norm(k)                                 # over all heads together
        q, k, v = (rearrange(part, "n l (h d) -> n h l d", h=self.heads) for part in (q, k, v))     # (N, H, 1025, d)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(x, "n h l d -> n l (h d)"))


class Block(nn.Module):
    """(N, 1025, D) -> (N, 1025, D): attention, then the MLP, each with a norm before it and a scale behind it."""

    def __init__(self, config):
        super().__init__()
        norm = RMSNorm if config.rms_norm else LayerNorm
        self.attention_norm = norm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.layer_scale_1 = nn.Parameter(torch.ones(config.width))               # layer scale, arXiv 2103.17239
        self.mlp_norm = norm(config.width, config.norm_eps)
        self.mlp_up = Linear(config.width, config.mlp_width)
        self.mlp_down = Linear(config.mlp_width, config.width)
        self.layer_scale_2 = nn.Parameter(torch.ones(config.width))

    def forward(self, x):                                                           # (N, 1025, D)
        x = x + self.layer_scale_1.to(x.dtype) * self.attention(self.attention_norm(x))
        return x + self.layer_scale_2.to(x.dtype) * self.mlp_down(F.gelu(self.mlp_up(self.mlp_norm(x))))


class VisionEncoder(nn.Module):
    """uint8 tiles (N, 3, 448, 448) -> (N, 1024, 1024): one vector of `dtype` per patch, row by row."""

    def __init__(self, config):
        super().__init__()
        self.patch = nn.Conv2d(3, config.width, config.patch_pixels, stride=config.patch_pixels)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, 1 + config.grid ** 2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.gradient_checkpointing = False     # keep only the input of each block; run it again in the backward pass

    def forward(self, tiles, dtype):
        x = normalize(tiles, dtype)
        x = F.conv2d(x, self.patch.weight.to(dtype), self.patch.bias.to(dtype), stride=self.patch.stride)
        x = rearrange(x, "n d h w -> n (h w) d")                                    # (N, 1024, D)
        x = torch.cat([self.class_token.to(dtype).expand(len(x), -1, -1), x], dim=1) + self.position.to(dtype)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing else block(x)
        return x[:, 1:]                                                             # the class token is not used
