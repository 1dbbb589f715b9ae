"""How small can the weights be? One byte each, and a scale for each output of a linear layer: x W^T = (x Q^T) s.

Only weights are quantized: activations keep their dtype; embeddings, norms and the projector stay as they are. Each
weight is rounded to one of 255 levels, the largest of a row to 127. Source: LLM.int8() (arXiv 2208.07339), section 2.1,
"Absmax quantization", here one row of the weight at a time.
"""
import torch
import torch.nn.functional as F
from torch import nn

from model.layers import Linear


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight (out, in) and a float32 scale (out,)."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x):                                                           # (..., in) -> (..., out)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[:-1].numel() <= 8:
            # a kernel without a public name: a decoded token of InternVL2-1B in 60 ms, 500 ms without this line
            y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.weight, self.scale.to(x.dtype))
            y = y.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)       # widened for this product alone
        return y if self.bias is None else y + self.bias.to(x.dtype)


def to_int8(model):
    """Replace the linear layers of the vision encoder and the language model, in place, for inference only."""
    for part in (model.vision, model.language):
        for module in list(part.modules()):
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    setattr(module, name, Int8Linear(child))
    return model
