"""Layers that compute in the dtype of what they are given.

Frozen weights are stored in bfloat16 on a GPU, trained weights in float32. Casting a weight where it is used lets both
meet in one forward pass without autocast: activations keep one dtype from the first layer to the last, and the gradient
of a float32 weight arrives in float32. For a weight that already has the dtype the cast does nothing.
"""
import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """x W^T + b, computed in the dtype of x."""

    def __init__(self, *sizes, **more):
        super().__init__(*sizes, **more)
        self.adapter = None             # lora.py may put one here

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, weight, bias)
        return y if self.adapter is None else y + self.adapter(x)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistics are float32 inside `F.rms_norm`, whatever the dtype. (arXiv 1910.07467)"""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
