"""gpu_check runs here what a CPU can run; what needs a GPU says so and is counted as not run."""
import json
import sys

import gpu_check
import pytest


def test_all_parts_that_a_cpu_can_run_pass(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--small", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    report = json.loads((tmp_path / "report.json").read_text())
    results = {number: part["status"] for number, part in report["parts"].items()}
    assert not end.value.code and results == {str(i): "NOT RUN" if i == 7 else "PASS" for i in range(1, 11)}, report
    assert "9 passed, 0 failed, 1 not run" in capsys.readouterr().out and "GPU" in report["parts"]["7"]["reason"]
    assert report["parts"]["6"]["figures"]["host_reads"] == 0


def test_a_part_that_breaks_fails_alone_and_the_report_keeps_the_others(tmp_path, capsys, monkeypatch):
    def broken(check):
        """a part that breaks"""
        (tmp_path / "seen").write_text((tmp_path / "report.json").read_text())          # what is there while it runs
        raise RuntimeError("no such kernel")
    monkeypatch.setattr(gpu_check, "PARTS", (gpu_check.memory, broken))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--small", "--only", "1,2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert end.value.code and [part["status"] for part in report["parts"].values()] == ["NOT RUN", "FAIL"]
    assert report["parts"]["2"]["reason"] == "RuntimeError: no such kernel" and list(json.loads((tmp_path / "seen").read_text())["parts"]) == ["1"]
    assert "0 passed, 1 failed, 1 not run" in capsys.readouterr().out
