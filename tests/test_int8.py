"""int8 weights are within half a level of the weights, take a quarter of their memory and leave the answers what they were."""
import itertools

import pytest
import torch
from published import READS, asked_pages, exact_match

from extras.int8 import Int8Linear, to_int8
from model import InternVL
from model.layers import Linear
from model.tiny.pages import SHAPES


@pytest.mark.parametrize("dtype, rows", [(torch.float32, 1), (torch.float32, 20), (torch.bfloat16, 1), (torch.bfloat16, 20)])
def test_a_layer_computes_with_weights_rounded_to_its_levels(dtype, rows):
    torch.manual_seed(0)
    linear = Linear(96, 64).requires_grad_(False).to(dtype)
    small, x = Int8Linear(linear), torch.randn(2, rows // 2, 96).to(dtype) if rows > 1 else torch.randn(1, 96).to(dtype)
    rounded = small.weight.double() * small.scale.double()[:, None]
    assert ((rounded - linear.weight.double()).abs() <= small.scale.double()[:, None] * 0.5001).all()
    expected = x.double() @ rounded.T + linear.bias.double()
    torch.testing.assert_close(small(x).double(), expected, **({"rtol": 0.02, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}))


def test_a_row_of_zeros_stays_zero():
    linear = Linear(8, 4).requires_grad_(False)
    linear.weight[1] = 0
    assert Int8Linear(linear)(torch.ones(8))[1] == linear.bias[1]


def test_all_linear_layers_of_both_towers_and_no_other_are_int8(tiny):
    before = sum(p.numel() for part in (tiny.vision, tiny.language) for m in part.modules() if isinstance(m, Linear) for p in [m.weight])
    to_int8(tiny)
    assert not any(isinstance(m, Linear) for part in (tiny.vision, tiny.language) for m in part.modules())
    assert sum(m.weight.numel() for m in tiny.modules() if isinstance(m, Int8Linear)) == before
    assert {parameter.dtype for parameter in tiny.projector.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.official
def test_the_embedded_model_still_reads(dtype, published):
    model, pages = InternVL.from_pretrained("tiny", "cpu", dtype), list(itertools.islice(asked_pages(SHAPES[0]), 16))
    whole, small = (exact_match(change(model), pages) for change in (lambda model: model, to_int8))
    assert whole >= READS[SHAPES[0]] and small >= whole - 0.1
