"""Kills a run of train.py with SIGKILL again and again, resuming each time: python tests/killed.py DATA FOLDER KILLS

torch is imported once; every run is a fork of this process, begun before any thread exists. Writes FOLDER/whole, the run that nobody
disturbed, and FOLDER/run; prints where each kill came, and whether workers outlived it, as JSON.
"""
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import datasets  # noqa: E402, F401
import embedded  # noqa: E402, F401
import fsspec  # noqa: E402, F401
import torch  # noqa: E402
from pyarrow import parquet  # noqa: E402, F401

import train  # noqa: E402
from extras import plots, run_folder  # noqa: E402
from extras.cli import run  # noqa: E402

STEPS, LONGEST = 56, 3                            # of the run; of an attempt, so that however fast, 25 do not reach the end
PHASES = {"check_step": 0.05, "evaluate": 0.2, "save_checkpoint": 0.01, "main": 1.0}     # seconds they take, about


def attempt(flags, log, phase=None, call=0, delay=0.0):
    """Run train.py in a fork; SIGKILL it `delay` seconds after the `call`-th call of the function `phase`.

    Returns its status, and whether workers of it are still alive.
    """
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        try:
            return status, os.killpg(child, 0) is None
        except ProcessLookupError:
            return status, False
    os.setpgid(0, 0)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    calls, steps, step = [], [], train.check_step

    def limited(*arguments):
        steps.append(None)
        if phase and len(steps) > LONGEST:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    train.check_step = limited
    owner = run_folder if phase == "save_checkpoint" else train
    function = getattr(owner, phase) if phase else None

    def killing(*arguments, **more):
        calls.append(None)
        if len(calls) == call:
            threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
        return function(*arguments, **more)

    if phase:
        setattr(owner, phase, killing)
    sys.argv = ["train.py", *flags]
    status = 1
    try:
        run(train.main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def main():
    source, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    plots.draw_curve = plots.draw_samples = lambda *_: None         # pictures would take most of the time
    def flags(name):
        new = ["--model", "tiny", "--data", source, "--device", "cpu", "--workers", "2", "--look-ahead", "16", "--max-tiles", "1",
               "--accumulate", "2", "--steps", str(STEPS), "--eval-every", "3", "--eval-pages", "2", "--save-every", "2",
               "--keep", "2", "--lr", "1e-3", "--out", str(folder / name)]
        return new if not (folder / name / "settings.json").exists() else ["--resume", str(folder / name)]
    assert attempt(flags("whole"), folder / "whole.log")[0] == 0
    draw, moments = random.Random(0), []
    while len(moments) < kills:
        phase = list(PHASES)[len(moments) % len(PHASES)]
        status, orphans = attempt(flags("run"), folder / "run.log", phase, 1 if phase != "check_step" else draw.randint(1, 3),
                         draw.random() * PHASES[phase])
        assert status in (0, signal.SIGKILL), (folder / "run.log").read_text()[-3000:]
        assert status != 0, f"the run came to its end after {len(moments)} kills"
        moments.append([phase, orphans])
    assert attempt(flags("run"), folder / "run.log")[0] == 0
    assert not [path.name for path in (folder / "run").rglob("*") if path.suffix in (".part", ".lock")]
    print(json.dumps(moments))


if __name__ == "__main__":
    main()
