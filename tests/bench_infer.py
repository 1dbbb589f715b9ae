"""Answering, beside transformers' own `generate` on the same random weights at the full InternVL2-1B shape.

    python tests/bench_infer.py --model OpenGVLab/InternVL2-1B --dtype bfloat16 [--rounds 2] [--tokens 64] [--questions 4] [--int8]

Prints a table: seconds to the first token and tokens a second of one question about a page of 7 tiles, of a second question
about it, and seconds of several questions about one page; each with the peak memory above the weights. The two take turns
in every round; the best of each is shown. --model is read for its config.json and tokenizer only. 4 GB of weights and
minutes of two cores in float32; not collected by pytest.
"""
import argparse
import os
import platform
import random
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
import transformers
from PIL import Image
from reference import conversation_prompt, page_prompt, randomise, reference_model, reference_pixels

from extras.int8 import to_int8
from model import InternVL
from model.generate import generate
from model.tiling import tile_page

QUESTIONS = ["What is the total amount?", "What is the date?", "Who signed it?", "What is the name of the company?"]


class Watch:
    """Wall time and, sampled, the largest memory that a block takes above what was taken before it, in GB."""

    def resident(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e9

    def __enter__(self):
        self.before = self.peak = self.resident()
        self.running, self.stamps, self.started = True, [], time.perf_counter()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        while self.running:
            self.peak = max(self.peak, self.resident())
            time.sleep(0.02)

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.started
        self.running = False
        self.thread.join()

    def token(self, *_, **__):
        """Note that a token was chosen; also the reference's stopping criterion, which never stops."""
        self.stamps.append(time.perf_counter() - self.started)
        return torch.zeros(1, dtype=torch.bool)

    @property
    def row(self):
        """(seconds to the first token, tokens a second after it, GB)."""
        return self.stamps[0], (len(self.stamps) - 1) / (self.stamps[-1] - self.stamps[0]), self.peak - self.before


def ours(model, pages, count):
    with Watch() as watch:
        tokens = []
        for step in generate(model, pages, count):
            watch.token()
            tokens.append(step[0])
    return tokens, watch


def theirs(reference, tiles, prompt, count):
    with Watch() as watch, torch.inference_mode():
        ids = torch.tensor([prompt.ids])
        out = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                                 eos_token_id=None, pad_token_id=0, pixel_values=reference_pixels(tiles).to(reference.dtype),
                                 stopping_criteria=[watch.token])
    return out[0, len(prompt.ids):].tolist(), watch


def next_question(model, page, count):
    """Rows of a conversation's first and second question."""
    chat, rows = model.chat(max_new_tokens=count, max_tiles=6), []
    for question, images in ((QUESTIONS[0], [page]), (QUESTIONS[1], [])):
        with Watch() as watch:
            chat.ask(question, *images)
        rows.append((chat.report["prefill_seconds"], chat.report["decode_tokens_per_second"], watch.peak - watch.before))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="OpenGVLab/InternVL2-1B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--questions", type=int, default=0, help="about one page, 16 tokens each; 0: leave that row out")
    parser.add_argument("--int8", action="store_true", help="at the end the same with weights of a byte")
    settings = parser.parse_args()
    model = randomise(InternVL.from_scratch(settings.model, seed=0, device=settings.device, dtype=settings.dtype))
    reference = reference_model(model, whole=True)
    page = Image.frombytes("L", (1000, 700), random.Random(0).randbytes(1000 * 700))
    tiles = torch.from_numpy(tile_page(page))
    size = model.config.tokens_per_tile
    prompt = conversation_prompt(model.tokenizer, size, [len(tiles)], [(QUESTIONS[0], None)])
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
                     platform.machine())
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{settings.dtype}, {len(tiles)} tiles, {len(prompt.ids)} tokens of prompt, {settings.tokens} decoded, {time.strftime('%Y-%m-%d')}\n")
    print("| | first token, s | tokens/s | peak, GB above the weights |\n|---|---|---|---|")
    rows = {}

    def tell(name, row):
        rows.setdefault(name, []).append(row)
        print(f"| {name} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} |", flush=True)

    for _ in range(settings.rounds):
        our_tokens, watch = ours(model, [(tiles, prompt)], settings.tokens)
        tell("ours", watch.row)
        their_tokens, watch = theirs(reference, tiles, prompt, settings.tokens)
        tell("transformers", watch.row)
    same = next((i for i, (a, b) in enumerate(zip(our_tokens, their_tokens)) if a != b), len(our_tokens))
    best = {name: [pick(column) for pick, column in zip((min, max, min), zip(*several))] for name, several in rows.items()}
    (prefill, speed, memory), (their_prefill, their_speed, their_memory) = best["ours"], best["transformers"]
    first, second = next_question(model, page, 8)
    tell("first question of a chat", first)
    tell("second question of the chat", second)
    print(f"\nfirst token {their_prefill / prefill:.2f} times as fast, decoding {speed / their_speed:.2f} times, peak {memory:.2f} "
          f"instead of {their_memory:.2f} GB; the first {same} of {len(our_tokens)} tokens are the same; a chat's second question "
          f"comes to its first token {first[0] / second[0]:.0f} times sooner")
    if settings.questions:
        asked = QUESTIONS[:settings.questions]
        _, together = ours(model, [(tiles, page_prompt(model.tokenizer, size, [len(tiles)], asked)[0])], 16)
        seconds = 0.0
        for question in asked:
            alone = conversation_prompt(model.tokenizer, size, [len(tiles)], [(question, None)])
            seconds += theirs(reference, tiles, alone, 16)[1].seconds
        print(f"{len(asked)} questions about the page, 16 tokens each: {together.seconds:.1f} s, transformers one by one {seconds:.1f} s: "
              f"{seconds / together.seconds:.2f} times")
    if settings.int8:
        del reference
        before = weights_gb(model)
        for _ in range(settings.rounds):
            tell("ours, not int8", ours(model, [(tiles, prompt)], settings.tokens)[1].row)
        to_int8(model)
        for _ in range(settings.rounds):
            tell("ours, int8", ours(model, [(tiles, prompt)], settings.tokens)[1].row)
        speeds = [max(row[1] for row in rows[name]) for name in ("ours, int8", "ours, not int8")]
        print(f"int8: {weights_gb(model):.2f} GB of weights instead of {before:.2f}, decoding {speeds[0] / speeds[1]:.2f} times as fast")


def weights_gb(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1e9


if __name__ == "__main__":
    main()
