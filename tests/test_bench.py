"""The benchmarks compare like with like: same loss, same gradient, same bytes; their arithmetic is the paper's."""
import json
import sys

import bench_data
import bench_step
import pytest
import torch

from model.checkpoint import TINY
from model.config import Config


@pytest.mark.official
def test_both_steps_of_the_benchmark_do_the_same_work(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--model", str(TINY), "--device", "cpu", "--tiles", "3", "--pages", "2", "--questions", "2.5",
                                      "--their-rows", "2", "--passes", "1", "--json"])
    bench_step.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["loss_difference"] < 1e-5 and found["gradient_difference"] < 1e-4
    assert {"speed_ratio", "memory_ratio", "questions_per_second", "model_flops_utilisation", "estimated_gb"} < found.keys()


@pytest.mark.official
def test_every_ablation_has_the_same_loss(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--model", str(TINY), "--device", "cpu", "--ablate", "--passes", "1", "--json"])
    bench_step.main()
    losses = {name: way["loss"] for name, way in json.loads(capsys.readouterr().out.splitlines()[-1]).items()}
    half = losses.pop("bfloat16")
    assert max(losses.values()) - min(losses.values()) < 1e-5 and abs(half - losses["float32"]) < 0.1 and len(losses) == 5


@pytest.mark.parametrize("tiles, questions, tflop", [(13, 1, 15.91), (13, 3.87, 16.12)])
def test_the_floor_is_the_sum_done_by_hand(tiles, questions, tflop):
    """Vision 0.724 TFLOP a tile; decoder 0.716 GFLOP a token forward and as much backward."""
    from model.tokenizer import load_tokenizer

    class Model:
        config, tokenizer = Config(), load_tokenizer(TINY)

    pages = [(torch.empty(tiles, 0), asked) for _, asked in bench_step.make_pages(type("M", (), {"config": Config.read(TINY / "config.json")}), 100, 1, questions)]
    assert bench_step.floor(Model.config, bench_step.prompts(Model, pages)) / 1e14 == pytest.approx(tflop, rel=0.03)


def test_the_loader_of_the_benchmark_hands_on_the_usual_bytes(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_data.py", "--passes", "1"])
    threads = torch.get_num_threads()
    bench_data.main()
    torch.set_num_threads(threads)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| PNG", "| JPEG"))]
    assert len(table) == 6 and all("| True |" in line for line in table)
