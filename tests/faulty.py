"""Trains through a Hub that refuses, stalls and breaks off: python tests/faulty.py ROOT FOLDER

ROOT holds datasets/zhangfaen/DocumentVQA. One run without faults, three with, one that gives up and goes on. Prints as JSON each
run's status, pages and training losses, and how many faults of which kind there were.
"""
import collections
import json
import os
import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from hub import serve  # noqa: E402

KINDS = (429, 500, 502, 503, "close", "stall", "cut")


def main():
    root, folder = map(Path, sys.argv[1:])
    draw, rate, seen = random.Random(0), [0.0], collections.Counter()

    def faults(path):
        if draw.random() >= rate[0]:
            return None
        kind = draw.choice(KINDS)
        seen[str(kind)] += 1
        return kind

    with serve(root, faults) as address:
        os.environ |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
        import embedded  # noqa: F401

        import data
        import train
        from extras.cli import run
        data.retry.__defaults__ = (60,)                             # seconds at the start: a stall of 1.5 is long beside 7
        sleep, shown, pages = time.sleep, [], []
        time.sleep = lambda seconds: (shown.append(seconds), sleep(min(seconds, 0.02)))         # pauses are counted, not waited
        train.check_step = lambda step, loss, norm, examples, *_: pages.extend(e.page.name for e in examples)

        def attempt(name, *flags):
            pages.clear()
            shown.clear()
            sys.argv = ["train.py", *flags] if flags else [
                "train.py", "--model", "tiny", "--data", "zhangfaen/DocumentVQA", "--device", "cpu", "--workers", "0", "--max-tiles", "1",
                "--accumulate", "4", "--epochs", "3", "--eval-every", "0", "--look-ahead", "16", "--out", str(folder / name)]
            status = 0
            try:
                run(train.main)
            except SystemExit as end:
                status = end.code
            path = folder / name / "metrics.jsonl"
            losses = [json.loads(line)["train_loss"] for line in path.read_text().splitlines()] if path.exists() else []
            told[name + " resumed" * bool(flags)] = {"status": status, "pages": list(pages), "losses": losses, "pauses": len(shown)}

        told = {}
        attempt("quiet")
        for i in range(3):
            rate[0] = 0.2
            attempt(f"faulty {i}")
        rate[0], data.MID_RUN = 0.0, 5
        opened = data.ParquetRows.read

        def breaking(self, start):                                  # the network is gone after 60 rows
            for number, row in opened(self, start):
                if number == 60:
                    rate[0] = 1.0
                    raise ConnectionResetError("the line broke")
                yield number, row
        data.ParquetRows.read = breaking
        attempt("gone")
        rate[0], data.ParquetRows.read = 0.0, opened
        attempt("gone", "--resume", str(folder / "gone"))
    print(json.dumps(told | {"faults": seen}))


if __name__ == "__main__":
    main()
