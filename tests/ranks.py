"""Runs train.py and infer.py on several ranks without starting Python anew for each: python tests/ranks.py < RUNS

RUNS: a JSON list of {"ranks": how many, 0: one process without torchrun, "program": "train", "flags": [...], "patch": Python that each rank
executes first; it knows `rank`, and `at_call`, `fail` and `kill` to make faults}. Prints as JSON for each run the exit statuses and the standard errors of its ranks.
"""
import faulthandler
import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import embedded  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import torch  # noqa: E402
import torch.distributed  # noqa: E402
from commands import at_call  # noqa: E402, F401

import infer  # noqa: E402, F401
import train  # noqa: E402
from extras import evaluate, plots  # noqa: E402, F401
from extras.cli import run  # noqa: E402


def fail(error):
    raise error


def kill(number):
    os.kill(os.getpid(), number)


def gradients(path, dtype, *tiles):
    """Write the loss and the gradients of a step in `dtype`, of a page for each number of tiles; the projector and the LLM are trained."""
    import random

    from small_data import mixed_rows

    from data import PageDataset, group_rows_into_pages
    from model import InternVL
    ranks = sys.modules.get("extras.distributed")
    model = InternVL.from_pretrained("tiny", "cpu").to(getattr(torch, dtype))
    model.dtype = getattr(torch, dtype)
    trained = [*model.projector.parameters(), *model.language.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    examples = []
    for number, (page, most) in enumerate(zip(group_rows_into_pages(mixed_rows(len(tiles))), tiles)):
        page.resume, page.images = (0, 0, number), page.images * bool(most)
        dataset = PageDataset(model, max(1, most))
        examples.append(dataset.light(dataset[page]))
    tokens, step = sum(example.answer_tokens for example in examples), train.forward_backward
    batches = [[example] for example in examples]
    if ranks:
        step = ranks.of_this_rank(step, len(batches))
        dealt = random.Random(0).choices(range(ranks.RANKS), k=len(batches))           # also unevenly
        batches = [[example] if to == ranks.RANK else [ranks.seen(example)] for to, [example] in zip(dealt, batches)]
    loss = step(model, batches, tokens, 0)
    if ranks:
        ranks.sum_gradients(trained, loss)
    torch.save([loss, *(p.grad for p in trained)], f"{path}/{ranks.RANK if ranks else 'one'}.pt")


def child(rank, ranks, port, program="train", flags=(), patch=""):
    train.LONGEST_ANSWER = 4
    plots.draw_curve = plots.draw_samples = lambda *_: None         # pictures take most of the time
    if ranks:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({name: str(value) for name, value in place.items()})
    exec(patch, globals() | {"rank": rank})
    sys.argv = [f"{program}.py", *map(str, flags)]
    start = importlib.import_module("extras.distributed").run_together if ranks else run
    start((lambda: gradients(*flags)) if program == "gradients" else sys.modules[program].main)


def fork(errors, **settings):
    """Start a rank -> its process."""
    process = os.fork()
    if process:
        return process
    signal.alarm(int(os.environ.get("LONGEST", 60)))                                                # a rank that hangs ends with -14
    os.dup2(errors.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY) if settings.get("program") != "infer" else errors.fileno(), 1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
    faulthandler.dump_traceback_later(55, file=sys.stderr)
    status = 1
    try:
        child(**settings)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def main():
    torch.set_num_threads(1)
    done = []
    for settings in json.load(sys.stdin):
        files = [tempfile.TemporaryFile() for _ in range(settings["ranks"] or 1)]
        store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)          # as torchrun's
        processes = [fork(file, rank=rank, port=store.port, **settings) for rank, file in enumerate(files)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        texts = [file.seek(0) or file.read().decode() for file in files]
        done.append({"status": codes, "err": [[line for line in text.splitlines() if line.strip() and "%|" not in line] for text in texts]})
    print(json.dumps(done))


if __name__ == "__main__":
    main()
