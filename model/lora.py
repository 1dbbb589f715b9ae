"""How does a large layer learn with few numbers? LoRA: its weight stays frozen, a product of two thin matrices is added.

    y = W x + b + alpha / rank * B A dropout(x)         A (rank, in) random, B (out, rank) zeros: nothing changes at first
    W <- W + alpha / rank * B A                         merged: an ordinary weight again, at no cost

Sources: LoRA (arXiv 2106.09685), section 4.1; which layers: the official `wrap_llm_lora`. A and B are float32
whatever the frozen weight is.
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import Linear

TARGETS = {                             # name -> which of the model's Linear layers get an adapter
    "llm": r"language\.blocks\..*",                                         # the seven of every block of the LLM
    "qkv": r"language\.blocks\.\d+\.attention\.(query|key|value)",
    "vision": r"vision\.blocks\..*",                                        # the four of every block, q, k and v as one
    "all-linear": r"(?!language\.lm_head).*",                                  # the projector's two as well, but not the head
}


class LoRA(nn.Module):
    """What is added to one Linear layer's output; dropout only where the model is in training mode."""

    def __init__(self, width_in, width_out, rank, alpha, dropout=0.0, device=None):
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        self.a = Linear(width_in, rank, bias=False, device=device)
        self.b = Linear(rank, width_out, bias=False, device=device)

    def forward(self, x):
        return self.b(self.a(F.dropout(x, self.dropout, self.training))) * self.scale

    def merged_delta(self):
        """What merging adds to the weight: float32 (out, in)."""
        return self.scale * (self.b.weight.float() @ self.a.weight.float())


def target_layers(model, targets):
    """{name: Linear} of the layers that `targets`, names of TARGETS with commas between, describe."""
    pattern = "|".join(TARGETS[target] for target in targets.split(","))
    return {name: module for name, module in model.named_modules()
            if isinstance(module, Linear) and re.fullmatch(pattern, name) and ".adapter." not in name}


def add_adapters(model, rank=16, alpha=32, dropout=0.05, targets="llm", seed=0):
    """Give every layer in `targets` an adapter that trains, on the layer's device; the layers stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for layer in target_layers(model, targets).values():
        layer.adapter = LoRA(layer.in_features, layer.out_features, rank, alpha, dropout, layer.weight.device)
        drawn = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)                # as PEFT
        layer.adapter.a.weight.data.copy_(drawn)
        nn.init.zeros_(layer.adapter.b.weight)


def adapters(model):
    """{name of the layer: its LoRA}."""
    return {name.removesuffix(".adapter"): module for name, module in model.named_modules() if isinstance(module, LoRA)}
