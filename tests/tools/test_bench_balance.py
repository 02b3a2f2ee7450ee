"""The benchmark of the dealing: what it writes, and what the committed figures promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORST_RANK = 1.05  # the costliest rank over the mean at 32 ranks x 16 rows


def test_it_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench_balance.py", "--steps", "2", "--output", str(tmp_path / "balance")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "balance.json").read_text(encoding="utf-8"))
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 2 * len(report["results"])
    assert all(line in (tmp_path / "balance.md").read_text(encoding="utf-8").splitlines() for line in lines)
    for result in report["results"]:
        assert 1 <= result["balanced"]["total_worst"] <= result["round_robin"]["total_worst"]
        assert result["balanced"]["total_mean"] <= result["balanced"]["in_step_mean"]


def test_the_committed_figures_keep_the_promise() -> None:
    text = (ROOT / "benchmarks" / "results" / "balance-cpu.json").read_text(encoding="utf-8")
    report = json.loads(text)
    content = json.loads((ROOT / "benchmarks" / "data" / "tile_histograms.json").read_text(encoding="utf-8"))
    assert {result["profile"] for result in report["results"]} == set(content["profiles"])
    assert report["steps"] >= 200
    for result in report["results"]:
        assert result["balanced"]["total_worst"] <= WORST_RANK
