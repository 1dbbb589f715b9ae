"""How much memory does a step take? Computed from tensors' sizes alone, at InternVL2-1B's full shape, without its weights.

    python tests/bench_memory.py                    the table: trainable parts x tiles, bfloat16 as on a GPU
    python tests/bench_memory.py check --tiles 1    the same count beside real steps of a small number of blocks, on a CPU
    python tests/bench_memory.py runs --model FOLDER --data FOLDER      20 real steps of every mode and recipe

A forward and a backward pass are run on tensors without contents (torch's fake tensors); every one that is made is counted
from then until it is freed. AdamW's two moments, 8 bytes a trained parameter, are added. What is not counted: the CUDA
context (about 0.5 GB), the allocator's fragments, and other kernels' workspaces than the CPU's. Not collected by pytest.
"""
import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from reference import accumulate_gradients
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from extras.memory import peak_gb
from extras.recipes import RECIPES
from extras.run_folder import read_lines
from model import InternVL
from model.config import Config
from model.lora import add_adapters
from model.prompt import Prompt
from model.vision import pixel_constants
from train import PARTS, choose_parts

IMAGE, ANSWER, QUESTIONS = 7, 6, 4              # an id for image tokens; tokens of an answer; questions of a page, as in DocumentVQA
MODES = {                                       # --train, --checkpoint-activations
    "projector": ("projector", False), "projector, recomputed": ("projector", True),
    "lora": ("lora", False), "lora, recomputed": ("lora", True), "projector,lora, recomputed": ("projector,lora", True),
    "projector,llm": ("projector,llm", False), "projector,llm, recomputed": ("projector,llm", True),
    "all": ("all", False), "all, recomputed": ("all", True),
}


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors' storages that are alive; `peak` is the most there were."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return made

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.known:
            self.known[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, id(storage))

    def freed(self, key):
        self.now -= self.known.pop(key)


def page(config, tiles, questions=QUESTIONS):
    """A page of `tiles` tiles with a prefix of 42 tokens and some questions of 24 tokens, 6 of them learned."""
    prefix = 42 + tiles * config.tokens_per_tile
    prompt = Prompt([IMAGE] * (prefix - 42) + [1] * 42, [-100] * prefix, list(range(prefix)), [0] * prefix, [i < prefix - 42 for i in range(prefix)])
    for branch in range(1, questions + 1):
        prompt.ids += [1] * 24
        prompt.labels += [-100] * (24 - ANSWER) + [1] * ANSWER
        prompt.positions += range(prefix, prefix + 24)
        prompt.branches += [branch] * 24
        prompt.images += [False] * 24
    side = config.vision.tile_pixels
    return SimpleNamespace(tiles=torch.zeros(tiles, 3, side, side, dtype=torch.uint8), prompt=prompt, answer_tokens=ANSWER * questions)


def build(config, train, gradient_checkpointing, dtype):
    torch.set_default_dtype(dtype)
    model = InternVL(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    model.dtype, model.tokenizer = dtype, SimpleNamespace(convert_tokens_to_ids=lambda token: IMAGE, unk_token_id=None)
    if "lora" in train:
        add_adapters(model)
    choose_parts(model, "projector,llm,vision" if train == "all" else train)
    model.vision.gradient_checkpointing = model.language.gradient_checkpointing = gradient_checkpointing
    return model


def computed(config, train, gradient_checkpointing, tiles, dtype=torch.bfloat16):
    """(bytes of the weights, of everything at the peak, trained parameters) of a step on one page."""
    example = page(config, tiles)
    pixel_constants(torch.device("cpu"))                            # made once, so not without contents

    def pack_for_real(pages):
        with unset_fake_temporarily():
            return InternVL.pack(SimpleNamespace(tokenizer=model.tokenizer, device="cpu", config=config), pages)

    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        model = build(config, train, gradient_checkpointing, dtype)
        model.pack = pack_for_real
        trained = [p for p in model.parameters() if p.requires_grad]
        weights, live.peak = live.now, 0
        accumulate_gradients(model, [example], 1)
        return weights, live.peak + 8 * sum(p.numel() for p in trained), sum(p.numel() for p in trained)


def table(settings):
    print("| `--train` | trained parameters | weights, GB | " + " | ".join(f"{tiles} tiles, GB" for tiles in settings.tiles) + " |\n"
          + "|---" * (3 + len(settings.tiles)) + "|")
    for name, (train, gradient_checkpointing) in MODES.items():
        results = [computed(Config(), train, gradient_checkpointing, tiles) for tiles in settings.tiles]
        print(f"| {name} | {results[0][2]:,} | {results[0][0] / 1e9:.1f} | " + " | ".join(f"{peak / 1e9:.1f}" for _, peak, _ in results) + " |", flush=True)


def measured(config, train, gradient_checkpointing, tiles):
    """(bytes counted, bytes that the process grew by) in a real float32 step, AdamW's moments added to both."""
    before = peak_gb("cpu")
    with Live() as live:
        model = build(config, train, gradient_checkpointing, torch.float32)
        live.peak = 0
        accumulate_gradients(model, [page(config, tiles)], 1)
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return live.peak + moments, 1e9 * (peak_gb("cpu") - before) + moments


def check(settings):
    """Real steps of 2 + 2 blocks at InternVL2-1B's widths beside what is computed for them, each in a process of its own."""
    config = Config()
    config = replace(config, vision=replace(config.vision, layers=2), language=replace(config.language, layers=2, vocabulary=20000))
    print("| `--train` | tiles | computed, GB | counted in a real step, GB | process grew by, GB |\n|---|---|---|---|---|")
    for name, (train, gradient_checkpointing) in MODES.items():
        for tiles in settings.tiles:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                counted, grown = pool.apply(measured, (config, train, gradient_checkpointing, tiles))
            expected = computed(config, train, gradient_checkpointing, tiles, torch.float32)[1]
            print(f"| {name} | {tiles} | {expected / 1e9:.2f} | {counted / 1e9:.2f} | {grown / 1e9:.2f} |", flush=True)


def runs(settings):
    """20 steps of every mode and every recipe through train.py, one page a step, of one tile."""
    print("| flags | trains | parameters | of | loss, step 1 → 20 | peak memory of the process, GB |\n|---|---|---|---|---|---|")
    modes = [["--train", train] for train in ("projector", "lora", "projector,lora", "llm", "vision", "all")]
    modes += [["--train", "lora", "--lora-targets", targets] for targets in ("qkv", "vision", "all-linear")]
    for flags in [*modes, ["--train", "all", "--checkpoint-activations"], *(["--recipe", recipe] for recipe in RECIPES)]:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, ROOT / "train.py", "--model", settings.model, "--data", settings.data, *flags, "--steps", "20", "--max-tiles", "1",
                                   "--accumulate", "1", "--eval-every", "0", "--save-every", "0", "--device", "cpu", "--workers", "0", "--out", f"{folder}/run"],
                                  check=True, capture_output=True, text=True)
            lines = read_lines(Path(folder, "run", "metrics.jsonl"))
        parts = [line.split() for line in done.stdout.splitlines() if line.startswith(PARTS)]
        trains = [(name, int(count.replace(",", ""))) for name, count, trains, *_ in parts if trains == "yes"]
        total = sum(int(count.replace(",", "")) for _, count, *_ in parts)
        print(f"| `{' '.join(flags)}` | {', '.join(name for name, _ in trains)} | {sum(count for _, count in trains):,} | {total:,} | "
              f"{lines[0]['train_loss']:.3f} → {lines[-1]['train_loss']:.3f} | {lines[-1]['peak_gb']:.1f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("table", "check", "runs"), default="table")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 7, 13])
    parser.add_argument("--model", default="OpenGVLab/InternVL2-1B", help="of runs")
    parser.add_argument("--data", default="zhangfaen/DocumentVQA", help="of runs")
    settings = parser.parse_args()
    globals()[settings.what](settings)
