"""How do the parts meet? Pages are packed into one row; image tokens take their places among the embedded words.

    page -> tiles (N, 3, 448, 448) -> vision (N, 1024, 1024) -> projector (N, 256, 896) -> image tokens \\
    questions -----------------------------------> prompt (L) -> embedding (L, 896) ----- splice -----> decoder (L, 896)
                                                                                answers only -> head (A, 151655) -> loss

Source: InternVL 1.5 (arXiv 2404.16821), section "Overall Architecture"; `modeling_internvl_chat.py` beside the weights.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn

from model import checkpoint
from model.config import Config
from model.language import Decoder, page_mask
from model.names import PARTS, part_of
from model.projector import Projector
from model.prompt import IGNORE_INDEX
from model.vision import VisionEncoder

VISION_TILES = 16                       # at most: fills a large GPU with 16,400 rows; 0.3 GB of activations in bfloat16


@dataclass
class PromptTensors:
    """A Prompt as tensors on the CPU, made in a worker process; a single copy takes it to the device."""
    numbers: torch.Tensor               # int64: ids, positions, branches, image_index, targets, answer_index of `Batch`
    sizes: list[int]                    # how many numbers each of them has
    span: tuple[int, int]               # tokens of branch 0, and the last branch: what the host decides by
    answer_tokens: int

    @classmethod
    def of(cls, prompt):
        ids, labels, positions, branches, images = map(torch.tensor, vars(prompt).values())
        images, answers = images.nonzero()[:, 0], (labels != IGNORE_INDEX).nonzero()[:, 0]
        columns = ids, positions, branches, images, labels[answers], answers - 1        # predicted by the token before
        span = prompt.branches.count(0), max(prompt.branches)
        return cls(torch.cat(columns), list(map(len, columns)), span, len(answers))


@dataclass
class Batch:
    """Several pages, one after another in one row; nothing is padded."""
    tiles: torch.Tensor                 # uint8 (N, 3, 448, 448), of all pages
    ids: torch.Tensor                   # int64 (L,)
    positions: torch.Tensor             # int64 (L,), from 0 in every page
    image_index: torch.Tensor           # int64 (256 N,): where in the row the image tokens go
    targets: torch.Tensor               # int64 (A,): the answer tokens, those in the loss
    answer_index: torch.Tensor          # int64 (A,): where in the row each target is predicted, one place before it
    branches: list[torch.Tensor]        # int64, one tensor per page,
    spans: list[tuple[int, int]]        # and of each page on the host: tokens of branch 0, and the last branch
    image_tokens: torch.Tensor | None = None    # (256 N, D), if the tiles are encoded already


class InternVL(nn.Module):
    """The model with its `tokenizer`; it computes in `dtype` on `device`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.projector = Projector(config)
        self.language = Decoder(config.language)
        self.dtype = torch.float32
        self.tokenizer = None
        self.sharded = False            # weights are split over processes, which gather them equally often
        # cuDNN's attention, torch's first choice on Hopper and Blackwell, plans 23 to 37 ms for every new number of
        # queries and keys, and nearly every page and every decoded token has a new one
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.drawn = ()                 # parts that were drawn, not read: checkpoints hold them, trained or frozen

    @classmethod
    def from_pretrained(cls, name, device=None, dtype=None, init=(), seed=0, allow_changed=False):
        """Load a model with its tokenizer from a Hub id, a model, run or adapter folder, or a checkpoint.

        `device`: a GPU if there is one, else the CPU. `dtype`: bfloat16 on a GPU, float32 on a CPU. `init`: parts (of
        PARTS in names.py) that are drawn from `seed` instead of read; with None they stay empty. `allow_changed`: read
        an unfinished run although its base model changed since it was trained. Raises InputError for that, and for a
        file that is missing, truncated or of another model.
        """
        folder, overlays, without = checkpoint.resolve(name, init, allow_changed)
        config = Config.read(folder / checkpoint.CONFIG)
        with torch.device("meta"):
            model = (config.model_class or cls)(config)
        checkpoint.load(model, folder, overlays, without, device, dtype)
        model.drawn = tuple(init)
        if seed is not None:
            model.init_weights(seed, init)
        return model

    @classmethod
    def from_scratch(cls, name, seed=0, device=None, dtype=None):
        """Random weights, drawn from `seed`, for the configuration and tokenizer in a model folder."""
        return cls.from_pretrained(name, device, dtype, PARTS, seed)

    @torch.no_grad()
    def init_weights(self, seed, parts=PARTS):
        """Draw every matrix of some parts from `seed`: scaled normal, residual outputs smaller with depth. Vectors are
        1, biases 0. Values that a constructor gives do not count."""
        generator = torch.Generator().manual_seed(seed)

        def normal(parameter, deviation):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)

        drawn = {name: parameter for name, parameter in self.named_parameters() if part_of(name) in parts}
        # the position as large as the patches' vectors, or the content drowns it
        inputs = {"language.embedding.weight": 0.03, "vision.class_token": 0.5, "vision.position": 0.5}
        for name, parameter in drawn.items():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            elif name not in inputs:
                stack = self.vision if name.startswith("vision") else self.language
                depth = 2 * len(stack.blocks) if name.endswith((".attention.out.weight", ".mlp_down.weight")) else 1
                normal(parameter, 0.8 / math.sqrt(parameter[0].numel()) / math.sqrt(depth))
        for name in [name for name in inputs if name in drawn]:
            normal(drawn[name], inputs[name])

    def save_pretrained(self, folder):
        """Write a model folder in the official layout, each tensor in its dtype as loaded; adapters are merged."""
        checkpoint.save(self, folder)

    def chat(self, **settings):
        """A conversation with this model: `chat.ask("What is the total?", image)`. See `model.chat.Chat`."""
        from model.chat import Chat
        return Chat(self, **settings)

    @property
    def device(self):
        return self.language.embedding.weight.device

    def pack(self, pages):
        """Put pages into one row, on the model's device; pinned memory is copied asynchronously.

        `pages`: (tiles, prompt) pairs; tiles uint8 (n, 3, S, S), prompt a Prompt or PromptTensors. Raises ValueError if
        the number of image tokens of a prompt is not that of its tiles.
        """
        device, per_tile, size = self.device, self.config.tokens_per_tile, self.config.vision.tile_pixels
        row, start = [], 0
        for tiles, prompt in pages:
            prompt = prompt if isinstance(prompt, PromptTensors) else PromptTensors.of(prompt)
            numbers = prompt.numbers.to(device, non_blocking=True)
            ids, positions, branches, images, targets, answers = numbers.split(prompt.sizes)
            if len(images) != len(tiles) * per_tile:
                raise ValueError(f"{len(tiles)} tiles make {len(tiles) * per_tile} image tokens, "
                                 f"but the prompt has {len(images)}")
            row.append((ids, positions, images + start, targets, answers + start, branches, prompt.span))
            start += len(ids)
        *columns, branches, spans = zip(*row)
        tiles = [torch.as_tensor(tiles).to(device, non_blocking=True) for tiles, _ in pages if len(tiles)]
        tiles = torch.cat(tiles) if tiles else torch.empty(0, 3, size, size, dtype=torch.uint8, device=device)
        return Batch(tiles, *map(torch.cat, columns), list(branches), list(spans))

    def encode_images(self, tiles):
        """uint8 tiles (N, 3, 448, 448) -> image tokens (256 N, D); equal parts of `VISION_TILES` limit the memory."""
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            patches = torch.cat([self.vision(part, self.dtype) for part in tiles.chunk(-(-len(tiles) // VISION_TILES))])
        return self.projector(patches).flatten(0, 1)                            # (N, 256, D) -> (256 N, D)

    def forward(self, batch, caches=None):
        """A batch -> logits (A, V) at its `answer_index`, in the model's dtype; the head runs on these tokens only.

        `caches`: one KVCache per page with the tokens read before; the tokens of this batch are added to it.
        """
        x = self.language.embedding(batch.ids).to(self.dtype)                   # (L, D)
        if len(batch.tiles):
            image_tokens = self.encode_images(batch.tiles) if batch.image_tokens is None else batch.image_tokens
            x = x.index_copy(0, batch.image_index, image_tokens)                # image tokens take their places
        elif self.sharded and self.training:                    # a black tile, of which nothing is used
            x = x + 0 * self.encode_images(batch.tiles.new_zeros(1, *batch.tiles.shape[1:])).sum()
        caches = caches or [None] * len(batch.branches)
        pages = [page_mask(*page) for page in zip(batch.branches, caches, batch.spans)]
        x = self.language(x, batch.positions, pages, batch.answer_index, batch.image_index)     # (A, D)
        return self.language.lm_head(x)                                         # (A, V)
