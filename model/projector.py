"""What is trained? The projector: pixel shuffle and an MLP turn patches into tokens that the language model reads.

4,482,816 parameters in InternVL2-1B. Source: InternVL 1.5 (arXiv 2404.16821), section "Overall Architecture".
"""
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from model.layers import LayerNorm, Linear


class Projector(nn.Module):
    """(N, 1024, 1024) patches -> (N, 256, 896) image tokens, in the dtype of the patches."""

    def __init__(self, config):
        super().__init__()
        merged = config.vision.width * config.shuffle ** 2          # 4 patches side by side: 4096
        self.shuffle, self.grid = config.shuffle, config.vision.grid
        self.token_grid = (self.grid // self.shuffle,) * 2          # rows and columns of its tokens over a tile
        self.summary = (f"{self.shuffle} x {self.shuffle} neighboring patches are joined to {merged:,} numbers, and an "
                        "MLP maps them to the width of the language model")         # for the page of --explain
        self.norm = LayerNorm(merged, eps=1e-5)
        self.up = Linear(merged, config.language.width)
        self.out = Linear(config.language.width, config.language.width)

    def forward(self, patches):
        # 2 x 2 neighboring patches become one token; both grids are row by row
        x = rearrange(patches, "n (h rh w rw) d -> n (h w) (rh rw d)", w=self.grid // self.shuffle,
                      rh=self.shuffle, rw=self.shuffle)             # (N, 256, 4096)
        return self.out(F.gelu(self.up(self.norm(x))))              # (N, 256, 896)
