"""What is Qwen2? A decoder that reads a row of tokens: image tokens and words alike.

One shape of attention serves everything: the queries of new tokens over the keys of what came before and of themselves.
A token sees every earlier token of its page that belongs to the prefix (branch 0) or to its own branch:

                        keys  prefix | question 1 | question 2
    queries  prefix           causal |            |                 first call: plain causal, no mask, the long part
             question 1       all    | causal     |                 second call: all branches at once,
             question 2       all    |            | causal          a small mask [branches, prefix + branches]

The branches of a page in training, the next turn of a chat and one decoded token are the same call with another mask.

Source: Qwen2 technical report (arXiv 2407.10671), section 2; grouped-query attention arXiv 2305.13245; rotary positions
arXiv 2104.09864; SwiGLU arXiv 2002.05202.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.layers import Linear, RMSNorm


class Cache:
    """Keys and values of one page's tokens so far, in every layer; `reserve` makes room before they are put in."""

    def __init__(self, config, capacity, device, dtype):
        shape = (config.layers, config.kv_heads, capacity, config.head_width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.branches = torch.empty(0, dtype=torch.long)            # of each token held

    def put(self, layer, start, k, v):
        """Store (K, n, d) keys and values from token `start` on; return those of all tokens up to there."""
        stop = start + k.shape[1]
        self.keys[layer, :, start:stop], self.values[layer, :, start:stop] = k, v
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def reserve(self, more):
        """Make room for `more` tokens beside those held."""
        held = len(self.branches)
        if held + more > self.keys.shape[2]:
            for name, old in (("keys", self.keys), ("values", self.values)):
                new = old.new_empty((*old.shape[:2], held + more, old.shape[3]))
                new[:, :, :held] = old[:, :, :held]
                setattr(self, name, new)

    def truncate(self, tokens):
        """Forget all but the first `tokens`; their room stays."""
        self.branches = self.branches[:tokens]


@dataclass
class LookBack:
    """What the new tokens of one page may see."""
    tokens: int                         # how many they are in the row
    queries: int                        # how many of them look back: all, but in the last layer
    causal: int                         # the first of these, the prefix of a page: plain causal, no mask
    mask: torch.Tensor | None           # for the others, bool (queries - causal, past + tokens); None: all they see is allowed
    held: torch.Tensor                  # int64 (past + tokens,), on the CPU: the branch of every token
    cache: Cache | None

    @property
    def past(self):
        """Tokens of the page that were read before."""
        return len(self.held) - self.tokens


def look_back(branches, cache=None, device="cpu", places=None):
    """Plan the attention of one page's new tokens.

    `branches`: int64 (n,) on the CPU, 0 for the prefix, 1, 2, ... for the questions. With a `cache`, what it holds is the
    page's past. `places`: int64 (m,) on the CPU, the new tokens that look back; None: all of them.
    """
    past = cache.branches if cache else branches[:0]
    held = torch.cat([past, branches])
    ends = (branches != 0).nonzero()
    causal = 0 if len(past) or places is not None else int(ends[0]) if len(ends) else len(branches)
    looking = len(past) + (torch.arange(causal, len(branches)) if places is None else places)
    mask = (held == 0) | (held == held[looking, None])              # the prefix, or the token's own branch,
    mask &= torch.arange(len(held)) <= looking[:, None]             # and nothing later
    mask = None if mask.all() else mask.to(device, non_blocking=True)
    return LookBack(len(branches), causal + len(looking), causal, mask, held, cache)


def rotation(positions, head_width, theta, dtype):
    """Cosine and sine of every token's rotary angles, each (L, head_width) of `dtype`; angles are float32."""
    frequency = 1 / theta ** (torch.arange(0, head_width, 2, device=positions.device).float() / head_width)
    angle = positions[:, None].float() * frequency                  # (L, head_width / 2)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn (heads, L, d) queries or keys by their positions: pairs are (i, i + d/2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_width = layer, config.head_width
        self.query = Linear(config.width, config.heads * config.head_width)
        self.key = Linear(config.width, config.kv_heads * config.head_width)
        self.value = Linear(config.width, config.kv_heads * config.head_width)
        self.out = Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, x, cos, sin, pages, rows):                                    # (L, D); rows: A of them look back
        q, k, v = (rearrange(part(of), "l (h d) -> h l d", d=self.head_width)
                   for part, of in ((self.query, x[rows]), (self.key, x), (self.value, x)))
        q, k = rotate(q, cos[rows], sin[rows]), rotate(k, cos, sin)                 # (H, A, d), (K, L, d)
        queries, tokens = [page.queries for page in pages], [page.tokens for page in pages]
        split = zip(q.split(queries, 1), k.split(tokens, 1), v.split(tokens, 1), pages)
        seen = [self.attend(*qkv, page) for *qkv, page in split]
        return self.out(rearrange(torch.cat(seen, dim=2), "1 h a d -> a (h d)"))    # (A, D)

    def attend(self, q, k, v, page):
        """One page: q (H, queries, d), k and v (K, tokens, d) -> (1, H, queries, d)."""
        if page.cache:
            k, v = page.cache.put(self.layer, page.past, k, v)                      # (K, past + n, d)
        q, k, v, n = q[None], k[None], v[None], page.causal
        seen = []
        if n > 0:
            seen.append(F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], is_causal=True, enable_gqa=True))
        if n < page.queries:
            if page.mask is not None:
                seen.append(F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=page.mask, enable_gqa=True))
            else:                       # a decoded token: heads that share a key head stand in one row, no key is expanded
                shared = rearrange(q[:, :, n:], "1 (k g) n d -> 1 k (g n) d", k=k.shape[1])
                found = F.scaled_dot_product_attention(shared, k, v)
                seen.append(rearrange(found, "1 k (g n) d -> 1 (k g) n d", n=page.queries - n))
        return torch.cat(seen, dim=2)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp_gate = Linear(config.width, config.mlp_width, bias=False)
        self.mlp_up = Linear(config.width, config.mlp_width, bias=False)
        self.mlp_down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x, cos, sin, pages, rows=slice(None)):                        # (L, D)
        x = x[rows] + self.attention(self.attention_norm(x), cos, sin, pages, rows)
        y = self.mlp_norm(x)
        return x + self.mlp_down(F.silu(self.mlp_gate(y)) * self.mlp_up(y))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocabulary, bias=False)             # stored on its own, never tied
        self.recompute = False          # blocks keep their input alone and are run again in the backward pass

    def forward(self, x, positions, pages, rows=slice(None), last_pages=None):
        """Embedded row (L, D), int64 positions (L,), one LookBack a page -> (L, D), ready for `head`.

        With `rows`, int64 (A,), and one LookBack a page for these alone: (A, D). What the last layer makes of other tokens
        nobody reads, so there it is not computed: of a page's 3,400 tokens a few dozen (2 % of a training step's work).
        """
        cos, sin = rotation(positions, self.config.head_width, self.config.rope_theta, x.dtype)
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, cos, sin, pages, use_reentrant=False) if self.recompute else block(x, cos, sin, pages)
        x = self.blocks[-1](x, cos, sin, last_pages or pages, rows)         # not run again: the backward pass begins here
        for page in pages:
            if page.cache:
                page.cache.branches = page.held
        return self.norm(x)
