"""Does the code do on this GPU what it does on a CPU, and how fast? Ten parts, one table, one JSON file; nothing is downloaded.

    python tests/gpu_check.py --out report                  all parts on one GPU, at most 8 minutes
    python tests/gpu_check.py --only 3,6                    some of them
    python tests/gpu_check.py --device cpu --small          what a CPU can run, with the embedded model; the tests do this
    python tests/gpu_check.py --model FOLDER                the shape and the tokenizer of a model folder

Pages are noise or drawn, weights are random: without --model the shape of InternVL2-1B, with the embedded tokenizer. OUT/report.json
is written after each part, so that a part that hangs or dies keeps those before it. A part that needs a GPU is counted as not run
elsewhere. Exit status 1 if a part fails. Needs torch 2.11 or later and transformers, not `datasets`. Not collected by pytest.
"""
import argparse
import copy
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from bench_step import Ours, Theirs, floor, make_pages, matmul_rate, timed
from reference import accumulate_gradients, page_prompt, randomise, reference_model
from torch.utils._python_dispatch import TorchDispatchMode

from extras.memory import AttentionKernels, attention_kernels, saved_gb, step_gb
from model import InternVL
from model.checkpoint import TINY
from model.generate import generate
from model.internvl import PromptTensors
from model.lora import add_adapters
from train import choose_parts, make_optimizer

RUN = SimpleNamespace(lr=0.0, weight_decay=0.01, beta2=0.999, batch_pages=1, their_rows=None)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")  # operations whose result the host must read


class NotRun(Exception):
    """A part cannot run on this device."""


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device, and names those that the host waits for."""

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        self.count += 1
        if name in WAITS:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


class Check:
    """The settings of a check, its models, and the figures of the part that runs."""

    def __init__(self, settings):
        self.settings, self.device, self.small = settings, settings.device, settings.small
        self.gpu, self.figures, self.models, self.failures = self.device.startswith("cuda"), {}, {}, []
        self.folder, self.drawn = Path(tempfile.mkdtemp()), {}
        self.tiles, self.tokens = (2, 4) if self.small else (13, 64)

    def shape(self, layers):
        """A model folder with a configuration of so many layers and a tokenizer."""
        source, folder = Path(self.settings.model or TINY), self.folder / f"layers-{layers}"
        if not folder.exists():
            folder.mkdir()
            for file in source.iterdir():
                if file.suffix in (".json", ".txt"):
                    shutil.copyfile(file, folder / file.name)
            config = json.loads((source / "config.json").read_text())
            if not self.small and not self.settings.model:
                config |= {"force_image_size": 448, "torch_dtype": "bfloat16"}
                config["vision_config"] |= dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, image_size=448, patch_size=14)
                config["llm_config"] |= dict(hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                                             rope_theta=1e6, max_position_embeddings=32768, vocab_size=151655)
            if not self.small:
                config["vision_config"]["num_hidden_layers"] = config["llm_config"]["num_hidden_layers"] = layers
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    def model(self, layers=24, dtype=None, device=None, train="projector"):
        """A model with random weights, the same on every device; made once."""
        device = device or self.device
        dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        key = layers, dtype, device, train
        if key not in self.models:
            if layers > 2:
                self.models = {other: model for other, model in self.models.items() if other[0] <= 2}        # one large model at a time
            if layers not in self.drawn:
                self.drawn[layers] = randomise(InternVL.from_scratch(self.shape(layers), 0, "cpu", "float32"))
            model = copy.deepcopy(self.drawn[layers]).to(device, getattr(torch, dtype))
            model.dtype = getattr(torch, dtype)
            if train == "lora":
                add_adapters(model)
            choose_parts(model, train)
            self.models[key] = model
        self.models[key].zero_grad()
        return self.models[key]

    def synchronize(self):
        if self.gpu:
            torch.cuda.synchronize()

    def expect(self, right, **figures):
        """Note figures; the part fails unless `right`."""
        self.figures |= figures
        if not right:
            self.failures.append(", ".join(f"{name} {value}" for name, value in figures.items()))


def example(model, tiles, questions, seed=0):
    """A page of noise as the loader hands it on, its memory pinned on a machine with a GPU."""
    size, generator = model.config.vision.tile_pixels, torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=generator)
    asked = [f"What is number {i} of page {seed}?" for i in range(questions)]
    prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [tiles] if tiles else [], asked, [f"${seed}.{i}" for i in range(questions)])
    prompt = PromptTensors.of(prompt)
    if torch.cuda.is_available():
        pixels, prompt.numbers = pixels.pin_memory(), prompt.numbers.pin_memory()
    return SimpleNamespace(tiles=pixels, prompt=prompt, answer_tokens=prompt.answer_tokens)


def gradient(model, examples, batch_pages=1):
    """(loss, gradient of the projector as one float32 vector on the CPU) of a step."""
    model.zero_grad()
    loss = accumulate_gradients(model, examples, batch_pages).item()
    return loss, torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.projector.parameters()])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def answers(model, tiles, questions, tokens):
    """(token ids of each step, seconds of each step) of greedy answers about a page."""
    size, generator = model.config.vision.tile_pixels, torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=generator)
    prompt, _ = page_prompt(model.tokenizer, model.config.tokens_per_tile, [tiles], [f"What is {i}?" for i in range(questions)])
    found, times, last = [], [], time.perf_counter()
    for step in generate(model, [(pixels, prompt)], tokens):        # its `tolist` waits for the device
        now = time.perf_counter()
        found.append(step)
        times.append(now - last)
        last = now
    return found, times


# ----------------------------------------------------------------------------------------------------------------- parts

def versions(check):
    """versions, switches, and the rates that bound everything: a matrix product and a copy"""
    device, n = check.device, 2 ** (22 if check.small else 28)
    figures = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if check.gpu else None,
               "device": torch.cuda.get_device_name(device) if check.gpu else "cpu"}
    check.model(2)                                                  # loading a model sets the switches
    on = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("cudnn", "flash", "mem_efficient", "math")}
    a, b = (torch.empty(n, dtype=torch.uint8, device=device) for _ in range(2))
    b.copy_(a)
    _, seconds, _ = timed(lambda: b.copy_(a), device)
    figures |= {f"{name} attention": value for name, value in on.items()}
    check.rate = matmul_rate(device, torch.bfloat16 if check.gpu else torch.float32)
    check.expect(not on["cudnn"], **figures, product_tflops=check.rate / 1e12, copy_gb_per_second=2 * n / seconds / 1e9)


def exact(check):
    """2 + 2 layers: loss, gradient and answers as on the CPU; bfloat16 near float32; 1 x 4 = 4 x 1 pages"""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ours, cpu = check.model(2, "float32"), check.model(2, "float32", "cpu")
    pages = [example(cpu, tiles, questions, seed) for seed, (tiles, questions) in enumerate(((1, 3), (2, 1), (1, 64), (1, 4)))]
    (loss, grad), (cpu_loss, cpu_grad) = gradient(ours, pages), gradient(cpu, pages)
    check.expect(abs(loss - cpu_loss) < 1e-5 * cpu_loss, loss=loss, loss_difference=abs(loss - cpu_loss))
    check.expect(relative(grad, cpu_grad) < 1e-4, gradient_difference=relative(grad, cpu_grad))
    check.expect(relative(gradient(ours, pages, 4)[1], grad) < 1e-5, micro_batch_difference=relative(gradient(ours, pages, 4)[1], grad))
    half = relative(gradient(check.model(2, "bfloat16"), pages)[1], grad)
    check.expect(half < 0.03, bfloat16_difference=half)
    text = [model(model.pack([(page.tiles, page.prompt)])).float().cpu() for model in (ours, cpu) for page in [example(cpu, 0, 2)]]
    check.expect(relative(*text) < 1e-4, text_only_difference=relative(*text))
    tokens = 4 if check.small else 16
    check.expect(answers(ours, 1, 2, tokens)[0] == answers(cpu, 1, 2, tokens)[0], tokens_compared=2 * tokens)


def kernels(check):
    """which attention kernels ran; none is math; pages of new lengths take no longer than one that repeats"""
    model, found = check.model(), {}
    for dtype in ("bfloat16", "float32"):
        small = check.model(2, dtype)
        found |= {f"{dtype} {call}": kernel for call, kernel in attention_kernels(small).items()}
        for questions in (1, 3):
            with AttentionKernels(small) as decoding:
                answers(small, 1, questions, 3)
            found |= {f"{dtype} {call}, answering {questions}": kernel for call, kernel in decoding.found.items()}
    check.expect("math" not in found.values() and not (check.gpu and "cudnn" in found.values()), **found)
    pages = [example(model, 1 + seed % check.tiles, 1 + seed % 7, seed) for seed in range(4 if check.small else 20)]
    work = [floor(model.config, [(page.tiles, lists(page))]) for page in pages]
    seconds = [step_seconds(check, model, page) for page in pages]
    again = [step_seconds(check, model, page) for page in pages]
    rest = len(pages) // 2
    ratio = sum(seconds[rest:]) / sum(again[rest:])
    check.expect(ratio < 1.3 or not check.gpu, first_time_over_second=ratio, tflops=sum(work) / sum(again) / 1e12)
    if check.gpu:
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step_seconds(check, model, pages[0])
            answers(model, 1, 1, 3)
        names = sorted({event.key for event in profiled.key_averages() if any(word in event.key.lower() for word in ("fmha", "flash", "cudnn", "attention"))})
        check.expect(names and not any("cudnn" in name and "sdpa" in name for name in names), kernel_names=names)


def lists(page):
    """What `floor` reads of a prompt."""
    ids, _, branches, _, targets, _ = page.prompt.numbers.split(page.prompt.sizes)
    return SimpleNamespace(ids=ids, branches=branches.tolist(), labels=targets.tolist())


def step_seconds(check, model, page):
    check.synchronize()
    started = time.perf_counter()
    accumulate_gradients(model, [page], 1)
    check.synchronize()
    return time.perf_counter() - started


def speed(check):
    """all layers, pages that differ: questions per second, utilization, share of the time that the GPU computes"""
    model, count = check.model(), 2 if check.small else 8
    questions = [4, 4, 4, 3] * 2
    pages = [example(model, max(1, check.tiles - i % 4), questions[i], i) for i in range(count)]
    work, asked = sum(floor(model.config, [(page.tiles, lists(page))]) for page in pages), sum(questions[:count])
    rate, best = getattr(check, "rate", None) or matmul_rate(check.device, model.dtype), 0.0
    for batch_pages in (1, 2) if check.small else (1, 4, 8):
        def step():
            check.synchronize()
            started = time.perf_counter()
            accumulate_gradients(model, pages, batch_pages)
            check.synchronize()
            return time.perf_counter() - started
        if check.gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 if check.small else 2):
            step()
        seconds = statistics.median(step() for _ in range(1 if check.small else 5))
        best = max(best, work / seconds / rate)
        check.figures |= {f"questions_per_second, {batch_pages} pages": asked / seconds, f"utilization, {batch_pages} pages": work / seconds / rate}
        if check.gpu:
            from torch.profiler import ProfilerActivity, profile
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                step()
            busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
            check.figures |= {f"busy, {batch_pages} pages": busy / seconds, f"peak_gb, {batch_pages} pages": torch.cuda.max_memory_allocated() / 1e9}
    if check.gpu:
        torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 256, True
        for block in [*model.vision.blocks, *model.language.blocks]:
            block.compile(dynamic=True)
        for _ in range(2):
            step()
        seconds = statistics.median(step() for _ in range(5))
        check.figures |= {"questions_per_second, compiled, 8 pages": asked / seconds, "utilization, compiled, 8 pages": work / seconds / rate}
        check.models.clear()                                        # the next part has blocks that are not compiled
    check.expect(best > 0.4 or not check.gpu, utilization=best)


def beside(check):
    """transformers' own InternVL with the same weights: how many times as fast, and the same loss"""
    model = check.model()
    reference = reference_model(model).to(check.device)
    ratios = []
    for questions in (1, 4):
        pages = make_pages(model, 1, check.tiles, questions)
        settings = SimpleNamespace(**vars(RUN), device=check.device)
        ours, theirs = Ours(model, pages, settings), Theirs(reference, model, pages, settings)
        losses = [way.step() for way in (ours, theirs)]
        (_, our_seconds, our_gb), (_, their_seconds, their_gb) = (timed(way.step, check.device) for way in (ours, theirs))
        ratios.append(their_seconds / our_seconds)
        check.expect(abs(losses[0] - losses[1]) < (0.02 if check.gpu else 1e-4), **{
            f"times_as_fast, {questions} questions": ratios[-1], f"loss_difference, {questions} questions": abs(losses[0] - losses[1]),
            f"memory_share, {questions} questions": our_gb / max(their_gb, 1e-9)})
    check.expect(ratios[1] > 4 or not check.gpu, times_as_fast=ratios[1])


def waits(check):
    """the host waits for the device nowhere between a page and its gradients"""
    model = check.model(2 if check.small else 24)
    pages = [example(model, min(check.tiles, 2), questions, seed) for seed, questions in enumerate((1, 3, 4))]
    accumulate_gradients(model, pages, 2)                           # constants are made once
    with Operations() as operations:
        accumulate_gradients(model, pages, 2)
    check.expect(not operations.waits, host_reads=len(operations.waits), operations_per_page=operations.count / len(pages))
    if check.gpu:
        check.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            started = time.perf_counter()
            accumulate_gradients(model, pages, 1)
            host = time.perf_counter() - started
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check.figures |= {"host_ms_per_page": 1e3 * host / len(pages)}


def memory(check):
    """estimated against measured memory, within 15 %, and one line where it does not suffice"""
    if not check.gpu:
        raise NotRun("needs a GPU: a process's peak is not that of its tensors")
    worst = 0.0
    for dtype in ("bfloat16", "float32"):
        model = check.model(24, dtype)
        for tiles, questions in ((1, 4), (7, 4), (13, 4), (13, 1), (13, 64)):
            page = example(model, tiles, questions)
            accumulate_gradients(model, [page], 1)
            model.zero_grad()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            accumulate_gradients(model, [page], 1)
            measured, needed = torch.cuda.max_memory_allocated() - before, step_gb(model, tiles - (tiles > 1), 1)["activations"]
            off = (before / 1e9 + needed) / ((before + measured) / 1e9) - 1
            check.figures |= {f"{dtype}, {tiles} tiles, {questions} questions": [before / 1e9 + needed, (before + measured) / 1e9]}
            worst = max(worst, abs(off)) if questions == 4 else worst           # the estimate is of a page with 4 questions
    check.expect(worst < 0.15, largest_error=worst)
    check.models.clear()
    torch.cuda.empty_cache()
    flags = train_flags(check, check.folder / "full", 24) + ["--max-tiles", "12", "--batch-pages", "8"]
    program = (f"import sys, torch; sys.argv = {['train.py', *flags]}; sys.path.insert(0, {str(ROOT)!r}); import train; from extras.cli import run; "
               f"torch.cuda.set_per_process_memory_fraction({6e9 / torch.cuda.mem_get_info()[1]}); run(train.main)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    check.expect(done.returncode == 2 and "Traceback" not in done.stderr, out_of_memory=done.stderr.strip().splitlines()[-1:])


def train_flags(check, out, layers=2):
    return ["--model", str(check.shape(layers)), "--from-scratch", "--data", "synthetic", "--device", check.device, "--steps", "6", "--save-every", "2",
            "--eval-every", "3", "--eval-pages", "2", "--workers", "0" if check.small else "4", "--max-tiles", "2", "--lr", "1e-3", "--out", str(out),
            *(["--accumulate", "2"] if check.small else [])]


def run_train(check, flags, metrics=None):
    """Run train.py; with `metrics` SIGKILL it once this file has three lines about steps. Returns its output."""
    log = check.folder / "train.log"
    if check.gpu:
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stdout=log.open("w"), stderr=subprocess.STDOUT)
        process.join, process.is_alive = process.wait, lambda: process.poll() is None
    else:
        server = multiprocessing.get_context("forkserver")              # forks a process without threads, which has imported torch
        server.set_forkserver_preload(["train", "gpu_check", "extras.plots"])
        process = server.Process(target=forked, args=(flags, log), daemon=True)
        before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), os.pathsep.join(sys.path[:2])      # where it imports from
        process.start()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    while metrics and process.is_alive() and (not metrics.exists() or metrics.read_text().count("train_loss") < 3):
        time.sleep(0.005)
    if metrics:
        process.kill()
    process.join(300)
    return log.read_text()


def forked(flags, log):
    import train
    from extras import plots
    plots.draw_curve = plots.draw_samples = lambda *_: None
    file = log.open("w")
    os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *flags]
    train.main()


def training(check):
    """train.py: killed after step 3 and resumed, it writes the metrics of the run that nobody disturbed"""
    output = run_train(check, train_flags(check, check.folder / "whole"))
    run = check.folder / "run"
    run_train(check, train_flags(check, run), run / "metrics.jsonl")
    killed = not (run / "model.safetensors").exists()
    run_train(check, ["--resume", str(run)])
    whole, resumed = ([json.loads(line) for line in (check.folder / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "run"))
    times = ("questions_per_second", "data_wait", "peak_gb")
    pairs = [(a[key], b[key]) for a, b in zip(whole, resumed) for key in a if key not in times]
    differs = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
    lines = [line for line in whole if "train_loss" in line]
    wait = sum(line["data_wait"] for line in lines[1:])
    check.expect(killed and len(whole) == len(resumed) and differs < (1e-3 if check.gpu else 1e-15), killed=killed, lines=len(whole), largest_difference=differs)
    check.figures |= {"data_wait_seconds": wait, "printed": [line for line in output.splitlines() if "attention kernels" in line or "a step:" in line]}
    settings = json.loads((run / "settings.json").read_text())
    check.expect(settings["batch_pages"] * settings["accumulate"] in (2, 8), batch_pages=settings["batch_pages"], accumulate=settings["accumulate"])


def answering(check):
    """tokens per second for 1, 4 and 16 questions, and no token that takes much longer than the others"""
    model = check.model()
    answers(model, 1, 1, 2)
    for questions in (1, 2) if check.small else (1, 4, 16):
        found, times = answers(model, min(check.tiles, 7), questions, check.tokens)
        later = times[2:] or times
        tokens = sum(token is not None for step in found[2:] for token in step)
        check.figures |= {f"tokens_per_second, {questions} questions": tokens / sum(later), f"first_token_seconds, {questions} questions": times[0]}
        slowest = max(later) / statistics.median(later)
        check.expect(slowest < 3 or not check.gpu, **{f"slowest_over_median, {questions} questions": slowest})
    chat = model.chat(max_tiles=1, max_new_tokens=4)
    from PIL import Image
    chat.ask("What is this?", Image.new("RGB", (64, 64), "white"))
    started = time.perf_counter()
    chat.ask("And what else?")
    check.figures |= {"second_question_seconds": time.perf_counter() - started}
    if not check.small:
        from extras.int8 import to_int8
        to_int8(model)
        found, times = answers(model, min(check.tiles, 7), 1, 16)
        check.figures |= {"tokens_per_second, --int8": (len(times) - 2) / sum(times[2:])}
        check.models.clear()


def modes(check):
    """--train lora, --train llm, --checkpoint-activations: the loss falls, recomputed gradients are the same"""
    for train, layers in (("lora", 24), ("projector,llm", 24), ("projector", 24)):
        check.models.clear()
        model = check.model(layers, train=train)
        page = example(model, min(check.tiles, 7), 4)
        optimizer = make_optimizer(model, SimpleNamespace(**vars(RUN) | {"lr": 1e-3}, device=check.device))
        if check.gpu:
            torch.cuda.reset_peak_memory_stats()
        losses = []
        for _ in range(4):
            losses.append(accumulate_gradients(model, [page], 1).item())
            optimizer.step()
            optimizer.zero_grad()
        check.expect(losses[-1] < losses[0], **{f"losses, {train}": losses})
        if check.gpu:
            check.figures |= {f"peak_gb, {train}": torch.cuda.max_memory_allocated() / 1e9}
    kept, plain = saved_gb(model, 1), gradient(model, [page])
    model.vision.gradient_checkpointing = model.language.gradient_checkpointing = True
    again = gradient(model, [page])
    check.expect(relative(again[1], plain[1]) < (1e-2 if check.gpu else 1e-6) and saved_gb(model, 1) < kept, recomputed_difference=relative(again[1], plain[1]))
    check.models.clear()


PARTS = (versions, exact, kernels, speed, beside, waits, memory, training, answering, modes)


# --------------------------------------------------------------------------------------------------------------- the check

def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def run_part(check, part):
    """Run a part -> its entry of the report."""
    check.figures, check.failures, started = {}, [], time.perf_counter()
    try:
        part(check)
        status, reason = ("FAIL", "; ".join(check.failures)) if check.failures else ("PASS", "")
    except NotRun as why:
        status, reason = "NOT RUN", str(why)
    except Exception as error:                                      # the parts after it still run
        status, reason = "FAIL", f"{type(error).__name__}: {str(error)[:500]}"
    return {"part": part.__name__, "what": part.__doc__, "status": status, "reason": reason, "seconds": round(time.perf_counter() - started, 1),
            "figures": {name: rounded(value) for name, value in check.figures.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the embedded model and small pages")
    parser.add_argument("--model", help="a folder whose shape and tokenizer are used")
    parser.add_argument("--only", help="numbers of parts, 1 to 10, comma-separated")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of report.json (%(default)s)")
    settings = parser.parse_args()
    check = Check(settings)
    numbers = [int(number) for number in settings.only.split(",")] if settings.only else range(1, len(PARTS) + 1)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    report = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if check.gpu else "cpu", "small": settings.small, "parts": {}}
    settings.out.mkdir(parents=True, exist_ok=True)
    print(f"{report['device']}, torch {torch.__version__}, commit {commit}, {report['date']}\n\n| part | result | seconds | figures |\n|---|---|---|---|")
    for number in numbers:
        done = report["parts"][number] = run_part(check, PARTS[number - 1])
        (settings.out / "report.json").write_text(json.dumps(report, indent=1))
        figures = ", ".join(f"{name} {value}" for name, value in done["figures"].items())
        print(f"| {number} {done['what']} | {done['status']} {done['reason']} | {done['seconds']} | {figures} |", flush=True)
    found = [done["status"] for done in report["parts"].values()]
    print(f"\n{found.count('PASS')} passed, {found.count('FAIL')} failed, {found.count('NOT RUN')} not run")
    shutil.rmtree(check.folder)
    sys.exit("FAIL" in found)


if __name__ == "__main__":
    main()
