"""What do several ranks cost, and what do they bring? On a CPU, one thread for each rank, random weights at a published model's widths.

    python tests/bench_ranks.py speed                                           one rank and two, in turn: pages per second, bytes of a step
    python tests/bench_ranks.py memory --model InternVL2-26B --layers 2 2       one step with --shard: each rank's memory beside the estimate

Not collected by pytest.
"""
import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from small_data import png

from extras.run_folder import read_lines
from model import InternVL
from model.checkpoint import TINY, TOKENIZER_FILES
from model.tiny.pages import draw_page


def make_folder(folder, name, layers):
    """A model folder of a published model's widths with so many blocks of the vision encoder and of the LLM, bfloat16."""
    configs = json.loads(Path(__file__).with_name("family_configs.json").read_text(encoding="utf-8"))
    config = configs[name]["config"]
    config["vision_config"]["num_hidden_layers"], config["llm_config"]["num_hidden_layers"] = layers
    source = {"InternLM2ForCausalLM": Path(__file__).with_name("vocabularies") / "internlm2"}.get(config["llm_config"]["architectures"][0], TINY)
    folder.mkdir(parents=True)
    for file in TOKENIZER_FILES:
        if (source / file).exists():
            shutil.copyfile(source / file, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    InternVL.from_scratch(folder, seed=0, device="cpu", dtype="bfloat16").save_pretrained(folder)
    return folder


def make_pages(folder, pages, size):
    """Rows about pages of one size, so that all have the same number of tiles."""
    folder.mkdir()
    with open(folder / "rows.jsonl", "w") as file:
        for page in range(pages):
            image, asked = draw_page(random.Random(page))
            (folder / f"{page}.png").write_bytes(png(image.resize(size)))
            for question, answer in asked[:3]:
                file.write(json.dumps({"image": f"{page}.png", "question": question, "answer": answer}) + "\n")
    return folder / "rows.jsonl"


def start(ranks, *flags):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(ROOT / "train.py")]
    return subprocess.Popen([*launcher, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def loopback_bytes():
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def speed(args, folder, model, rows):
    """Pages per second of one rank and of two, the same run, in turn; the first step of each run is left out."""
    flags = ("--model", model, "--data", rows, "--device", "cpu", "--dtype", args.dtype, "--workers", 0, "--max-tiles", args.tiles, "--train", args.train,
             "--batch-pages", 1, "--accumulate", 4, "--eval-every", 0, "--save-every", 0, "--no-shuffle")

    def run(ranks, steps, name):
        before = loopback_bytes()
        process = start(ranks, *flags, "--steps", steps, "--out", folder / name)
        text = process.communicate()[0]
        assert process.returncode == 0, text[-3000:]
        return loopback_bytes() - before

    found, short, bytes_of_a_step = {1: [], 2: []}, run(2, 1, "short"), 0
    for number in range(args.rounds):
        for ranks in (1, 2) if number % 2 else (2, 1):
            sent = run(ranks, 4, f"{number}-{ranks}")
            lines = read_lines(folder / f"{number}-{ranks}" / "metrics.jsonl")[1:]
            found[ranks].append(statistics.median(4 * line["questions_per_second"] / line["questions"] for line in lines))
            bytes_of_a_step = (sent - short) / 3 if ranks == 2 else bytes_of_a_step
    one, two = (statistics.median(found[ranks]) for ranks in (1, 2))
    print(f"pages per second: one rank {one:.3f} ({', '.join(f'{x:.3f}' for x in found[1])}), two ranks {two:.3f} "
          f"({', '.join(f'{x:.3f}' for x in found[2])}): {two / one:.2f} times")
    print(f"bytes over the loopback interface in a step of two ranks: {bytes_of_a_step / 1e6:.1f} MB")


def memory(args, folder, model, rows):
    """The largest memory of each rank in one step with --shard: its own, without what it maps from files; and the printed estimate."""
    process = start(args.ranks, "--model", model, "--data", rows, "--device", "cpu", "--dtype", "bfloat16", "--workers", 0, "--max-tiles", args.tiles, "--train",
                    args.train, "--batch-pages", 1, "--accumulate", args.ranks, "--eval-every", 0, "--save-every", 0, "--steps", 1, "--shard",
                    "--checkpoint-activations", "--out", folder / "run")
    peaks = {}
    while process.poll() is None and not (folder / "run" / "metrics.jsonl").exists():
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                status = dict(line.split(":", 1) for line in path.read_text().splitlines())
                if int(status["PPid"]) == process.pid and "RssAnon" in status:
                    held = {key: int(status[key].split()[0]) / 1e6 * 1.024 for key in ("RssAnon", "RssFile")}
                    peaks[path.parent.name] = {key: max(value, peaks.get(path.parent.name, held)[key]) for key, value in held.items()}
            except (OSError, ValueError):
                continue
        time.sleep(0.05)
    text = process.communicate()[0]
    assert (folder / "run" / "metrics.jsonl").exists(), text[-3000:]
    print(re.search("estimated memory.*", text)[0])
    for number, held in enumerate(peaks.values()):
        print(f"rank {number}: at most {held['RssAnon']:.2f} GB of its own, {held['RssFile']:.2f} GB mapped from files")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--model", default="InternVL2-1B")
    parser.add_argument("--layers", nargs=2, type=int, default=(2, 2), metavar=("VISION", "LLM"))
    parser.add_argument("--tiles", type=int, default=1)
    parser.add_argument("--train", default="projector")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = make_folder(folder / "model", args.model, args.layers)
        {"speed": speed, "memory": memory}[args.what](args, folder, model, make_pages(folder / "pages", 48, (448 * args.tiles, 448)))


if __name__ == "__main__":
    main()
