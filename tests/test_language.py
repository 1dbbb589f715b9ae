"""The decoder is Qwen2; a page's branches are separate samples; a cache changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from model.config import LanguageConfig
from model.language import Decoder, KVCache, apply_rotary, page_mask, rotary_cos_sin
from model.names import official_name

SMALL = LanguageConfig(width=48, layers=3, heads=6, kv_heads=2, mlp_width=80, vocabulary=99, rope_theta=1e6)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    decoder = Decoder(SMALL).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5) + (parameter.ndim == 1))
    return decoder.requires_grad_(False)


def read(decoder, ids, positions, branches, cache=None):
    return decoder.lm_head(decoder(decoder.embedding(ids), positions, [page_mask(branches, cache)]))


def test_rotary_positions_turn_pairs_of_halves_as_transformers_does():
    x, (cos, sin) = torch.randn(6, 40, 8), rotary_cos_sin(torch.arange(40), 8, 1e6, torch.float32)
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos[None], sin[None])
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected[0])


def test_logits_equal_transformers_qwen2(decoder):
    config = Qwen2Config(vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                         num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    reference = Qwen2ForCausalLM(config)
    reference.load_state_dict({official_name(f"language.{name}").removeprefix("language_model."): tensor
                               for name, tensor in decoder.state_dict().items()}, strict=True)
    ids = torch.randint(99, (70,))
    with torch.no_grad():
        expected = reference.double()(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(read(decoder, ids, torch.arange(70), torch.zeros(70, dtype=torch.long)), expected, rtol=1e-5, atol=1e-5)


def test_branches_equal_separate_sequences(decoder):
    prefix, branches = torch.randint(99, (11,)), [torch.randint(99, (n,)) for n in (4, 1, 7)]
    row = torch.cat([prefix, *branches])
    positions = torch.cat([torch.arange(11), *(11 + torch.arange(len(b)) for b in branches)])
    numbers = torch.cat([torch.zeros(11, dtype=torch.long), *(torch.full((len(b),), i) for i, b in enumerate(branches, 1))])
    together = read(decoder, row, positions, numbers)[11:].split([4, 1, 7])
    for branch, logits in zip(branches, together):
        alone = torch.cat([prefix, branch])
        expected = read(decoder, alone, torch.arange(len(alone)), torch.zeros(len(alone), dtype=torch.long))[11:]
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_pages_in_a_row_do_not_see_each_other(decoder):
    ids, zeros = torch.randint(99, (20,)), torch.zeros(20, dtype=torch.long)
    positions = torch.cat([torch.arange(12), torch.arange(8)])
    row = decoder(decoder.embedding(ids), positions, [page_mask(zeros[:12]), page_mask(zeros[:8])])
    second = decoder(decoder.embedding(ids[12:]), torch.arange(8), [page_mask(zeros[:8])])
    torch.testing.assert_close(row[12:], second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1,) * 20, (15, 1, 1, 1, 1, 1), (7, 9, 4), (20,)])
def test_cached_reading_equals_reading_at_once(decoder, cuts):
    ids, zeros = torch.randint(99, (20,)), torch.zeros(20, dtype=torch.long)
    whole = read(decoder, ids, torch.arange(20), zeros)
    cache, start, parts = KVCache(SMALL, 20, "cpu", torch.float64), 0, []
    for n in cuts:
        parts.append(read(decoder, ids[start:start + n], torch.arange(start, start + n), zeros[:n], cache))
        start += n
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_the_mask_is_the_one_drawn_in_the_docstring():
    page = page_mask(torch.tensor([0, 0, 1, 1, 2]))
    assert page.causal == 2
    assert page.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert page_mask(torch.zeros(5, dtype=torch.long)).causal == 5


def test_a_row_costs_no_square_mask():
    page = page_mask(torch.tensor([0] * 3000 + [1] * 20 + [2] * 20))
    assert page.mask.shape == (40, 3040)


def test_parameters_are_629663872():
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(LanguageConfig()).parameters()) == 629_663_872


def test_the_rows_asked_for_equal_those_of_the_whole(decoder):
    prefix, lengths = 11, (4, 1, 7)
    branches = torch.cat([torch.zeros(prefix, dtype=torch.long), *(torch.full((n,), i) for i, n in enumerate(lengths, 1))])
    positions = torch.cat([torch.arange(prefix), *(prefix + torch.arange(n) for n in lengths)])
    x = decoder.embedding(torch.randint(99, (2 * len(branches),))).requires_grad_(True)
    both, pages = torch.cat([positions, positions]), [page_mask(branches), page_mask(branches)]
    asked = [torch.tensor([3, 12, 13, 22]), torch.tensor([10, 15])]             # of the prefix and of branches, in any order
    rows = torch.cat([asked[0], len(branches) + asked[1]])
    whole = decoder(x, both, pages)[rows]
    only = decoder(x, both, pages, rows)
    torch.testing.assert_close(only, whole, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(whole)
    expected, = torch.autograd.grad((whole * weights).sum(), x)
    found, = torch.autograd.grad((only * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def branch_row(prefix, lengths):
    """(branch numbers, positions) of a page with a prefix and branches of so many tokens."""
    numbers = torch.cat([torch.zeros(prefix, dtype=torch.long), *(torch.full((n,), i) for i, n in enumerate(lengths, 1))])
    return numbers, torch.cat([torch.arange(prefix), *(prefix + torch.arange(n) for n in lengths)])


def with_groups(q, k, v, page):
    """The same attention with a bool mask and shared keys, for which a GPU has no fused kernel."""
    q, k, v, causal = q[None], k[None], v[None], page.causal
    prefix = F.scaled_dot_product_attention(q[:, :, :causal], k[:, :, :causal], v[:, :, :causal], is_causal=True, enable_gqa=True)
    branches = F.scaled_dot_product_attention(q[:, :, causal:], k, v, attn_mask=page.mask, enable_gqa=True)
    return torch.cat([prefix, branches], dim=2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_heads_as_rows_and_copied_keys_equal_shared_keys_with_a_mask(decoder, monkeypatch, dtype, tolerance, on_gpu):
    page, found = page_mask(branch_row(210, (14, 1, 25))[0]), []
    qkv = [torch.randn(heads, page.tokens, 8, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)]
    weights = torch.randn(1, 6, page.tokens, 8, dtype=dtype)
    for form in (decoder.blocks[0].attention.attend, with_groups):
        with monkeypatch.context() as patch:
            if on_gpu:                                          # float32: what the code does on a GPU, on the CPU
                patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
            y = form(*qkv, page)
        found.append([y, *torch.autograd.grad((y * weights).sum(), qkv)])
    for ours, before in zip(*found):
        assert (ours - before).norm() < tolerance * before.norm()


def test_the_mask_of_all_layers_is_made_once_and_aligned():
    page = page_mask(branch_row(21, (4, 1, 7))[0])
    bias = page.bias(3, torch.bfloat16)
    assert bias is page.bias(3, torch.bfloat16) and bias.shape == (36, 33) and bias.stride() == (40, 1)
    assert torch.equal(bias == 0, page.mask.repeat(3, 1)) and set(bias.unique().tolist()) == {0, -torch.inf}


def test_what_the_host_knows_and_what_it_reads_give_the_same_mask():
    branches, _ = branch_row(5, (2, 3))
    for cache in (None, KVCache(SMALL, 0, "cpu", torch.float64)):
        known, read_back = page_mask(branches, cache, (5, 2)), page_mask(branches, cache)
        assert torch.equal(known.mask, read_back.mask) and (known.causal, known.last) == (read_back.causal, read_back.last) == (5, 2)
    cache.branches, cache.last = branches[:7], 1
    assert page_mask(torch.tensor([1]), cache, (0, 1)).mask is None                  # a page with one question: all keys are seen
    cache.branches, cache.last = branches, 2
    assert page_mask(torch.tensor([1]), cache, (0, 1)).mask.tolist() == [[True] * 7 + [False] * 3 + [True]]
