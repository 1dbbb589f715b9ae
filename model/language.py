"""What is Qwen2? A decoder that reads a row of image tokens and words. Its siblings differ in flags of LanguageConfig.

A token sees every earlier token of its page that belongs to the prefix (branch 0) or to its own branch:

                        keys  prefix | question 1 | question 2
    queries  prefix           causal |            |                 first call: plain causal, no mask, the long part
             question 1       all    | causal     |                 second call: all branches at once,
             question 2       all    |            | causal          a small mask [branches, prefix + branches]

The branches of a page in training, the next turn of a chat and one decoded token are the same call with another mask.
Sources: Qwen2 (arXiv 2407.10671), section 2; grouped-query attention 2305.13245; RoPE 2104.09864; SwiGLU 2002.05202;
LongRoPE 2402.13753.
"""
import math
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.layers import Linear, RMSNorm


class KVCache:
    """Keys and values of one page's tokens so far, in every layer; `grow` makes room before `update`."""

    def __init__(self, config, capacity, device, dtype):
        shape = (config.layers, config.kv_heads, capacity, config.head_width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.branches = torch.empty(0, dtype=torch.long, device=device)     # of each token held,
        self.last = 0                                                       # and the last of them, on the host

    def update(self, layer, start, k, v):
        """Store (K, n, d) keys and values from token `start` on; return those of all tokens up to there."""
        stop = start + k.shape[1]
        self.keys[layer, :, start:stop], self.values[layer, :, start:stop] = k, v
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def grow(self, more):
        """Make room for `more` tokens beside those held."""
        held = len(self.branches)
        if held + more > self.keys.shape[2]:
            for name, old in (("keys", self.keys), ("values", self.values)):
                new = old.new_empty((*old.shape[:2], held + more, old.shape[3]))
                new[:, :, :held] = old[:, :, :held]
                setattr(self, name, new)

    def crop(self, tokens):
        """Forget all but the first `tokens`; the memory stays allocated."""
        self.branches = self.branches[:tokens]


@dataclass
class PageMask:
    """What the new tokens of one page may see."""
    past: int                           # number of tokens of the page that were read before
    tokens: int                         # number of new tokens in the row
    causal: int                         # how many of them, from the first, are the prefix: plain causal, no mask
    mask: torch.Tensor | None           # of the others, bool (tokens - causal, past + tokens); None: they see all keys
    key_branches: torch.Tensor          # int64 (past + tokens,): the branch of every key
    last: int                           # the last of these branches
    cache: KVCache | None
    made: torch.Tensor | None = None    # what `bias` returns, once it was called

    def bias(self, groups, dtype):
        """The mask for the rows of heads that share keys, 0 or -inf: (groups * (tokens - causal), past + tokens)."""
        # Made once for all layers: of a bool mask each layer would make and keep a copy like this. Rows begin at
        # multiples of 8 numbers, as the memory-efficient kernel wants them; others it would copy, too.
        if self.mask is not None and self.made is None:
            rows, keys = self.mask.shape
            made = torch.zeros(groups, rows, -(-keys // 8) * 8, dtype=dtype, device=self.mask.device)[:, :, :keys]
            self.made = made.masked_fill_(~self.mask, -torch.inf).flatten(0, 1)
        return self.made


def page_mask(branches, cache=None, span=None):
    """The PageMask of one page's new tokens, on the device of `branches`; its past is in `cache`.

    `branches`: int64 (n,), 0 for the prefix, then 1, 2, ... for the questions. `span`: how many are 0, and the last;
    None: they are read from the device, and the host waits for it.
    """
    prefix, last = span or (int((branches == 0).sum()), int(branches.max()))
    past, new, mask = len(cache.branches) if cache else 0, len(branches), None
    key_branches, last = (torch.cat([cache.branches, branches]), max(last, cache.last)) if cache else (branches, last)
    causal = 0 if past else prefix
    if new - causal > 1 or new > causal and last > 1:       # one token of a page with one question sees all keys
        index = torch.arange(past + new, device=branches.device)
        mask = (key_branches == 0) | (key_branches == key_branches[past + causal:, None])   # the prefix, or the
        mask &= index <= index[past + causal:, None]                                        # own branch; nothing later
    return PageMask(past, new, causal, mask, key_branches, last, cache)


def rotary_cos_sin(positions, head_width, theta, dtype, factors=1.0, scale=1.0):
    """Cosine and sine of every token's rotary angles, each (L, head_width) of `dtype`; angles are float32."""
    frequency = theta ** (torch.arange(0, head_width, 2, device=positions.device).float() / head_width)
    angle = positions[:, None].float() * (1 / (frequency * factors))            # (L, head_width / 2)
    angle = torch.cat([angle, angle], dim=-1)
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def page_cos_sin(positions, config, pages, dtype):
    """`rotary_cos_sin` of the new tokens of all pages: cosine and sine, each (L, head_width) of `dtype`.

    `positions`: int64 (L,). Beyond `max_positions`, dynamic NTK raises theta; LongRoPE (arXiv 2402.13753) divides the
    frequencies by short or, beyond its limit, long factors. All branches of a page are rotated as its longest (the
    official code reads each alone). A cache keeps its keys as they were rotated.
    """
    rope, width, most, turned = config.rope, config.head_width, config.max_positions, []
    if not rope:
        return rotary_cos_sin(positions, width, config.rope_theta, dtype)
    for part, page in zip(positions.split([page.tokens for page in pages]), pages):
        theta, factors, scale, (prefix, *branches) = config.rope_theta, 1.0, 1.0, page.key_branches.bincount().tolist()
        length = prefix + max(branches, default=0)
        if rope["rope_type"] == "longrope":
            short = rope["original_max_position_embeddings"]
            factors = torch.tensor(rope["long_factor" if length > short else "short_factor"], device=part.device)
            scale = math.sqrt(1 + math.log(most / short) / math.log(short))
        elif length > most:
            theta *= (rope["factor"] * length / most - rope["factor"] + 1) ** (width / (width - 2))
        turned.append(rotary_cos_sin(part, width, theta, dtype, factors, scale))
    return [torch.cat(parts) for parts in zip(*turned)]


def apply_rotary(x, cos, sin):
    """Rotate (heads, L, d) queries or keys by the angles of their positions: pairs are (i, i + d/2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# what a block knows of a row beside its vectors: cosine and sine of every token's rotary angles, each (L, head width),
# a PageMask per page, and the indices of image tokens, int64 (256 N,), or None; xcomposer2.py needs these
Row = namedtuple("Row", "cos sin pages images")


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_width = layer, config.head_width
        self.query = Linear(config.width, config.heads * config.head_width, bias=config.qkv_bias)
        self.key = Linear(config.width, config.kv_heads * config.head_width, bias=config.qkv_bias)
        self.value = Linear(config.width, config.kv_heads * config.head_width, bias=config.qkv_bias)
        self.query_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.out = Linear(config.heads * config.head_width, config.width, bias=False)

    def project(self, x, row):                                  # (L, D) -> rotated (H, L, d), (K, L, d), and (K, L, d)
        q, k, v = (rearrange(layer(x), "l (h d) -> h l d", d=self.head_width)
                   for layer in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)                                 # over each head alone
        return apply_rotary(q, row.cos, row.sin), apply_rotary(k, row.cos, row.sin), v

    def forward(self, x, row):                                  # (L, D) -> (L, H d), which the block gives to `out`
        q, k, v = self.project(x, row)
        tokens = [page.tokens for page in row.pages]
        split = zip(q.split(tokens, 1), k.split(tokens, 1), v.split(tokens, 1), row.pages)
        seen = [self.attend(*qkv, page) for *qkv, page in split]
        return rearrange(torch.cat(seen, dim=2), "1 h l d -> l (h d)")

    def attend(self, q, k, v, page):
        """One page: q (H, n, d), k and v (K, n, d) of its new tokens -> (1, H, n, d)."""
        if page.cache:
            k, v = page.cache.update(self.layer, page.past, k, v)                   # (K, past + n, d)
        q, k, v, causal, groups = q[None], k[None], v[None], page.causal, q.shape[0] // k.shape[0]
        attention, seen = F.scaled_dot_product_attention, []
        if causal > 0:                                                              # the prefix: (1, H, causal, d)
            # float32 on a GPU: only "math" takes shared keys, with 0.6 GB of scores a layer; copies of them are 0.02 GB
            prefix = q[:, :, :causal], k[:, :, :causal], v[:, :, :causal]
            if copied := q.is_cuda and q.dtype == torch.float32:
                prefix = prefix[0], *(x.repeat_interleave(groups, 1) for x in prefix[1:])
            seen.append(attention(*prefix, is_causal=True, enable_gqa=not copied))
        rest = q[:, :, causal:]                                 # the branches, or decoded tokens: (1, H, m, d)
        if rest.shape[2]:               # heads that share keys are rows of one matrix: no copy, and a fused kernel
            rows = rearrange(rest, "1 (k g) m d -> 1 k (g m) d", g=groups)
            rows = attention(rows, k, v, attn_mask=page.bias(groups, q.dtype))
            seen.append(rearrange(rows, "1 k (g m) d -> 1 (k g) m d", m=rest.shape[2]))
        return torch.cat(seen, dim=2)


class Block(nn.Module):
    """(L, D) -> (L, D): attention, then the gated MLP, each with a norm before it."""

    def __init__(self, config, layer):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp_gate = Linear(config.width, config.mlp_width, bias=False)
        self.mlp_up = Linear(config.width, config.mlp_width, bias=False)
        self.mlp_down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x, row, rows=slice(None)):                                    # (L, D) -> (L, D) or (A, D)
        x = (x + self.attention.out(self.attention(self.attention_norm(x), row)))[rows]
        y = self.mlp_norm(x)
        return x + self.mlp_down(F.silu(self.mlp_gate(y)) * self.mlp_up(y))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = Linear(config.width, config.vocabulary, bias=False)          # never tied to the embedding
        self.gradient_checkpointing = False     # keep only the input of each block; run it again in the backward pass

    def forward(self, x, positions, pages, rows=slice(None), images=None):
        """Embedded row (L, D), int64 positions (L,), one PageMask per page -> (L, D), ready for `lm_head`.

        `rows`, int64 (A,): tokens whose vectors are returned, (A, D); the last MLP sees only these. `images`: of `Row`.
        """
        row = Row(*page_cos_sin(positions, self.config, pages, x.dtype), pages, images)
        for page in pages:
            page.bias(self.config.heads // self.config.kv_heads, x.dtype)               # outside the compiled blocks
        for block in self.blocks:
            arguments = x, row, rows if block is self.blocks[-1] else slice(None)
            x = checkpoint(block, *arguments, use_reentrant=False) if self.gradient_checkpointing else block(*arguments)
        for page in pages:
            if page.cache:
                page.cache.branches, page.cache.last = page.key_branches, page.last
        return self.norm(x)
