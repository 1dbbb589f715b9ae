"""How fast is one optimizer step, and how lean? Ours beside transformers' own InternVL: same weights, same pages, interleaved.

    python tests/bench_step.py --model FOLDER                                   4 questions about a page of 1 tile
    python tests/bench_step.py --model FOLDER --tiles 13 --questions 3.87 --pages 8 --device cuda
    python tests/bench_step.py --model FOLDER --ablate                          what each trick adds
    python tests/bench_step.py --model FOLDER --grow cost.png                   cost as questions and tiles grow, as a picture

FOLDER is read for its config.json and tokenizer; the weights are random, the tiles noise. Theirs is the usual step: one question
a row with its own copy of the page, rows padded to one length, the same frozen parts, AdamW on the projector. Memory is the
most that is held above the loaded weights. Model FLOPs utilisation counts the work that cannot be avoided (`floor`) against the
rate of a large matrix product measured in the same run. Not collected by pytest.
"""
import argparse
import ctypes
import gc
import json
import platform
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
import torch.nn.functional as F
import transformers
from reference import page_prompt, randomise, reference_model, reference_pixels

from data import INSTRUCTION
from extras.memory import held_gb, peak_gb, step_gb
from model import InternVL
from model.prompt import IGNORE_INDEX
from train import answer_loss, choose_parts, make_optimizer

ASKED = (("What is the total amount?", "$4,123.07"), ("Who signed the letter?", "W. Jones"), ("What is the date mentioned at the top?",
         "January 8, 1993"), ("What is the number of the invoice?", "118-A"), ("Which company is it addressed to?", "Bolelo & Sons"),
         ("How many boxes were sent?", "41"), ("What is the title of the page?", "QUARTERLY REPORT"), ("What is the fax number?", "555-0142"))


# ------------------------------------------------------------------------------------------------------------------- work

def make_pages(model, count, tiles, questions):
    """`count` pages of noise -> [(tiles, [(question, answer), ...])], `questions` a page on average."""
    generator, size, pages = torch.Generator().manual_seed(0), model.config.vision.tile_pixels, []
    for i in range(count):
        asked = [ASKED[j % len(ASKED)] for j in range(round((i + 1) * questions) - round(i * questions))]
        pages.append((torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=generator), asked))
    return pages


def prompts(model, pages, apart=False):
    """(tiles, prompt) pairs: one a page with all its questions, or `apart`, one a question."""
    groups = [(tiles, [pair]) for tiles, asked in pages for pair in asked] if apart else pages
    return [(tiles, page_prompt(model.tokenizer, model.config.tokens_per_tile, [len(tiles)], [q + INSTRUCTION for q, _ in asked],
                                [a for _, a in asked])[0]) for tiles, asked in groups]


def floor(config, examples):
    """Floating point operations of a step that cannot be avoided: matrix products, each page seen and read once.

    Frozen parts: the vision encoder forward only, the decoder forward and the same again for the gradients of its activations.
    """
    v, l, total = config.vision, config.language, 0
    patches = v.grid ** 2 + 1
    block = 2 * patches * (4 * v.width ** 2 + 2 * v.width * v.mlp_width) + 4 * patches ** 2 * v.width
    merged = v.width * config.shuffle ** 2
    attention, mlp = 2 * l.width * l.head_width * (2 * l.heads + 2 * l.kv_heads), 6 * l.width * l.mlp_width
    for tiles, prompt in examples:
        total += len(tiles) * (v.layers * block + 2 * v.grid ** 2 * 3 * v.patch_pixels ** 2 * v.width)
        total += len(tiles) * config.tokens_per_tile * (6 * merged * l.width - 2 * merged * l.width + 6 * l.width ** 2)
        tokens, prefix = len(prompt.ids), prompt.branches.count(0)
        seen = prefix ** 2 / 2 + (tokens - prefix) * prefix
        total += l.layers * (2 * attention * tokens + 3.5 * 4 * seen * l.heads * l.head_width)
        total += (l.layers - 1) * 2 * mlp * tokens                      # the last MLP runs on the answers only
        total += 4 * l.width * l.vocabulary * sum(label != IGNORE_INDEX for label in prompt.labels)
    return total


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product."""
    n = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        seconds = timed(lambda: a @ b, device)[1]
        best = max(best, 2 * n ** 3 / seconds)
    return best


# ------------------------------------------------------------------------------------------------------------------- ways

def all_logits(model, batch):
    """The loss computed from the logits of every token, as most training code does."""
    places, batch.answer_index = batch.answer_index, torch.arange(len(batch.ids), device=model.device)
    return answer_loss(model(batch).float()[places], batch.targets)


def label_logits(model, batch):
    """The loss as train.py computes it."""
    return answer_loss(model(batch), batch.targets)


class Ours:
    def __init__(self, model, pages, settings, apart=False, loss=label_logits):
        self.model, self.loss = model, loss
        self.examples = prompts(model, pages, apart)
        self.parameters = list(model.projector.parameters())
        self.optimizer = make_optimizer(model, settings)
        self.size = settings.batch_pages * (len(self.examples) // len(pages) if apart else 1)

    def step(self):
        tokens = sum(label != IGNORE_INDEX for _, prompt in self.examples for label in prompt.labels)
        total = torch.zeros((), device=self.model.device)
        for i in range(0, len(self.examples), self.size):
            loss = self.loss(self.model, self.model.pack(self.examples[i:i + self.size])) / tokens
            loss.backward()
            total += loss.detach()
        return finish(self, total)


class Theirs:
    """transformers' model; a micro-batch holds `--their-rows` questions, padded on the right."""

    def __init__(self, reference, model, pages, settings):
        self.model, self.reference = model, reference
        reference.requires_grad_(False)
        self.parameters = list(reference.model.multi_modal_projector.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay,
                                           fused=settings.device.startswith("cuda"))
        pixels = {id(tiles): reference_pixels(tiles) for tiles, _ in pages}         # its loader would have made them
        self.rows = [(pixels[id(tiles)], prompt) for tiles, prompt in prompts(model, pages, apart=True)]
        self.size = settings.their_rows or len(pages[0][1])

    def step(self):
        tokens = sum(label != IGNORE_INDEX for _, prompt in self.rows for label in prompt.labels)
        device, total = self.model.device, torch.zeros((), device=self.model.device)
        for i in range(0, len(self.rows), self.size):
            rows = self.rows[i:i + self.size]
            ids, labels, mask = (torch.nn.utils.rnn.pad_sequence([torch.tensor(of(prompt)) for _, prompt in rows], True, pad).to(device)
                                 for of, pad in ((lambda p: p.ids, 0), (lambda p: p.labels, IGNORE_INDEX), (lambda p: [1] * len(p.ids), 0)))
            pixels = torch.cat([pixels for pixels, _ in rows]).to(device, self.reference.dtype)
            logits = self.reference(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.detach()
        return finish(self, total)


def finish(way, loss):
    """The end of a step: gradient kept for comparison, weights left as they are (lr is 0), so that every step is the same."""
    way.gradient = torch.cat([parameter.grad.detach().flatten().float().cpu() for parameter in way.parameters])
    way.optimizer.step()
    way.optimizer.zero_grad()
    return loss.item()


# ---------------------------------------------------------------------------------------------------------------- measuring

def timed(work, device):
    """-> (result, seconds, most GB held above what was held before)."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)                        # what the C library keeps of freed memory would hide the next peak
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")           # the high-water mark begins anew
    before, started = held_gb(device), time.perf_counter()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, time.perf_counter() - started, peak_gb(device) - before


def measure(ways, passes, device):
    """Run every way once a pass, in turn -> {name: {seconds: [...], memory: [...], loss}}."""
    results = {name: {"seconds": [], "memory": []} for name in ways}
    for _ in range(passes):
        for name, way in ways.items():
            loss, seconds, memory = timed(way.step, device)
            results[name] |= {"loss": loss, "gradient": way.gradient}
            results[name]["seconds"].append(seconds)
            results[name]["memory"].append(memory)
    return results


def load(settings, dtype):
    """(our model, transformers' on the same weights in `dtype`, or None)."""
    model = randomise(InternVL.from_scratch(settings.model, 0, settings.device, dtype))
    reference = None if settings.ours_only else reference_model(model, whole=True).to(settings.device)
    choose_parts(model, "projector")
    if settings.compile:
        for block in [*model.vision.blocks, *model.language.blocks]:
            block.compile(dynamic=True)
    return model, reference


def compare(settings):
    model, reference = load(settings, settings.dtype)
    pages = make_pages(model, settings.pages, settings.tiles, settings.questions)
    questions = sum(len(asked) for _, asked in pages)
    needed = step_gb(model, settings.tiles - (settings.tiles > 1), settings.batch_pages)
    ways = {"ours": Ours(model, pages, settings)}
    if reference:
        ways["transformers"] = Theirs(reference, model, pages, settings)
    if settings.warm_up:
        measure(ways, 1, settings.device)
    results = measure(ways, settings.passes, settings.device)
    rate = matmul_rate(settings.device, model.dtype)
    work = floor(model.config, prompts(model, pages))
    best = {name: min(result["seconds"]) for name, result in results.items()}
    print(f"{settings.pages} pages of {settings.tiles} tiles, {questions} questions, {settings.dtype}; floor {work / 1e12:.2f} TFLOP a step; "
          f"matrix product {rate / 1e12:.2f} TFLOP/s; estimated {sum(needed.values()) - needed['in use now']:.2f} GB above the weights\n")
    print("| step | seconds, every pass | questions/s | utilisation | GB above the weights | loss |\n|---|---|---|---|---|---|")
    for name, result in results.items():
        print(f"| {name} | {' '.join(f'{s:.2f}' for s in result['seconds'])} | {questions / best[name]:.3f} | "
              f"{work / best[name] / rate:.0%} | {max(result['memory']):.2f} | {result['loss']:.6f} |")
    found = {"questions_per_second": questions / best["ours"], "model_flops_utilisation": work / best["ours"] / rate,
             "memory_gb": max(results["ours"]["memory"]), "estimated_gb": sum(needed.values()) - needed["in use now"]}
    if reference:
        ours, theirs = results["ours"], results["transformers"]
        found |= {"speed_ratio": sum(theirs["seconds"]) / sum(ours["seconds"]),
                  "memory_ratio": max(ours["memory"]) / max(theirs["memory"]),
                  "loss_difference": abs(ours["loss"] - theirs["loss"]),
                  "gradient_difference": ((ours["gradient"] - theirs["gradient"]).norm() / theirs["gradient"].norm()).item()}
        print(f"\nours is {found['speed_ratio']:.2f} times as fast with {found['memory_ratio']:.2f} of the memory; losses differ by "
              f"{found['loss_difference']:.1e}, the projector's gradients by {found['gradient_difference']:.1e} of their norm")
    return found


def ablate(settings):
    """The tricks one by one, every way in every pass."""
    model, reference = load(settings, "float32")
    pages = make_pages(model, settings.pages, settings.tiles, settings.questions)
    ways = {"transformers": Theirs(reference, model, pages, settings)} if reference else {}
    ways |= {"ours, one question a row, all logits": Ours(model, pages, settings, True, all_logits),
             "+ logits where a label is": Ours(model, pages, settings, True, label_logits),
             "+ a page once for all its questions": Ours(model, pages, settings)}
    results = measure(ways, settings.passes, settings.device)
    print("| float32, cumulative | seconds, every pass | times the row above | GB above the weights | loss |\n|---|---|---|---|---|")
    before = None
    for name, result in results.items():
        gain = f"{sum(before) / sum(result['seconds']):.2f}" if before else ""
        print(f"| {name} | {' '.join(f'{s:.2f}' for s in result['seconds'])} | {gain} | {max(result['memory']):.2f} | {result['loss']:.6f} |")
        before = result["seconds"]
    half = InternVL.from_scratch(settings.model, 0, settings.device, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    choose_parts(half, "projector")
    both = measure({"float32": Ours(model, pages, settings), "bfloat16": Ours(half, pages, settings)}, settings.passes, settings.device)
    print(f"| + frozen weights and activations in bfloat16 | {' '.join(f'{s:.2f}' for s in both['bfloat16']['seconds'])} | "
          f"{sum(both['float32']['seconds']) / sum(both['bfloat16']['seconds']):.2f} | {max(both['bfloat16']['memory']):.2f} | "
          f"{both['bfloat16']['loss']:.6f} |")
    return {name: {"seconds": r["seconds"], "memory": r["memory"], "loss": r["loss"]} for name, r in (results | both).items()}


def grow(settings):
    """Seconds a step over questions (2 tiles) and over tiles (4 questions), with the floor, into a picture."""
    from matplotlib import pyplot
    settings.ours_only = True
    model, _ = load(settings, settings.dtype)
    rate, points = matmul_rate(settings.device, model.dtype), {}
    for label, works in (("questions about a page of 2 tiles", [(n, 2, n) for n in (1, 2, 3, 4, 6, 8)]),
                         ("tiles of a page with 4 questions", [(n, n, 4) for n in settings.grow_tiles])):
        points[label] = []
        for x, tiles, questions in works:
            pages = make_pages(model, 1, tiles, questions)
            result = measure({"ours": Ours(model, pages, settings)}, settings.passes, settings.device)["ours"]
            points[label].append((x, min(result["seconds"]), floor(model.config, prompts(model, pages)) / rate))
            print(f"{label}: {x}: {points[label][-1][1]:.2f} s, floor {points[label][-1][2]:.2f} s", flush=True)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, (label, found) in zip(axes, points.items()):
        x, seconds, least = zip(*found)
        axis.plot(x, seconds, marker="o", label="measured")
        axis.plot(x, [seconds[0] * i / x[0] for i in x], color="tab:grey", linewidth=1, linestyle=":", label="in proportion")
        axis.plot(x, least, color="tab:green", linestyle="--", label="floor: matrix products at full rate")
        axis.set(xlabel=label, ylabel="seconds a step")
        axis.set_ylim(0, 1.1 * max(seconds))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(settings.grow, dpi=110)
    return points


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="OpenGVLab/InternVL2-1B", help="folder or Hub id (%(default)s)")
    parser.add_argument("--tiles", type=int, default=1, help="of every page, thumbnail included (%(default)s)")
    parser.add_argument("--questions", type=float, default=4, help="a page on average (%(default)s)")
    parser.add_argument("--pages", type=int, default=1, help="of a step (%(default)s)")
    parser.add_argument("--batch-pages", type=int, default=1, help="of our micro-batch (%(default)s)")
    parser.add_argument("--their-rows", type=int, help="questions of their micro-batch (those of a page)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--warm-up", action="store_true", help="one pass before those that count")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--grow", metavar="PICTURE.png")
    parser.add_argument("--grow-tiles", type=int, nargs="+", default=(1, 3, 5, 7, 10, 13))
    parser.add_argument("--json", action="store_true", help="print one object as the last line")
    settings = parser.parse_args()
    settings.dtype = settings.dtype or ("bfloat16" if settings.device.startswith("cuda") else "float32")
    settings.lr, settings.weight_decay, settings.beta2 = 0.0, 0.01, 0.999
    chip = torch.cuda.get_device_name() if settings.device.startswith("cuda") else f"{platform.processor() or platform.machine()}, CPU"
    print(f"{chip}, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}")
    found = ablate(settings) if settings.ablate else grow(settings) if settings.grow else compare(settings)
    if settings.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
