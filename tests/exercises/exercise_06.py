"""6. Where do positions go? Rotary angles with complex numbers

Attention does not know where a token stands; Qwen2 turns each query and key by an angle that grows with its position. A pair
of numbers is turned like one complex number: multiply by cos + i sin.

Hint: the pairs are (x[i], x[i + d/2]), not neighbours. The frequency of pair i is 1 / theta ** (2 i / d). Why does the product
of a turned query and a turned key depend on the distance alone? See `rotate` in model/language.py, arXiv 2104.09864.
"""
import torch


def turn(x, positions, theta=1e6):
    """(L, d) queries or keys of one head, positions (L,) -> turned, (L, d)."""
    raise NotImplementedError("write me")


def test_only_the_distance_matters():
    q, k = torch.randn(1, 64, dtype=torch.float64), torch.randn(1, 64, dtype=torch.float64)
    near, far = ((turn(q, torch.tensor([p + 3])) @ turn(k, torch.tensor([p])).T).item() for p in (0, 1000))
    assert abs(near - far) < 1e-6 and abs(near - (q @ k.T).item()) > 1e-6


def test_it_is_the_models_rotation():
    from model.language import apply_rotary, rotary_cos_sin
    x, positions = torch.randn(1, 50, 64), torch.randint(0, 4000, (50,))
    expected = apply_rotary(x, *rotary_cos_sin(positions, 64, 1e6, torch.float32))[0]
    torch.testing.assert_close(turn(x[0], positions), expected, rtol=1e-3, atol=1e-3)
