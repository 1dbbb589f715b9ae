"""How small can the weights be? A byte each: every output of a linear layer has its own scale, x W^T = (x Q^T) s.

Weights only: activations keep their dtype, embeddings, norms and the projector are left as they are. Rounding to the nearest
of 255 levels, the largest weight of a row at 127. Source: LLM.int8() (arXiv 2208.07339), section 2.1, "Absmax quantization",
here a row of the weight at a time.
"""
import torch
import torch.nn.functional as F
from torch import nn

from model.layers import Linear

FEW_ROWS = 8                            # up to which the CPU's int8 kernel beats widening the weight first


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 (out, in) with a float32 scale (out,)."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x):                                                           # (..., in) -> (..., out)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() <= FEW_ROWS * x.shape[-1]:
            y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.weight, self.scale.to(x.dtype))
            y = y.view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        # widened for this product alone; the scale goes to the weight, which is smaller than what many rows make of it
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None]
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def to_int8(model):
    """Replace the linear layers of vision encoder and language model, one after another, in place; for answering only."""
    for part in (model.vision, model.language):
        for module in list(part.modules()):
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    setattr(module, name, Int8Linear(child))
    return model
