"""The benchmark from its command line on the CPU: the code that a GPU runs, on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm15_megatron.bench.kernels import MATRIX, OPTIMIZER

from ..helpers.tools import load_tool


def test_small_models_on_the_cpu_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A case that runs, one whose gradients overflow, one that needs a GPU: all three are in the report."""
    words = ["--device", "cpu", "--cases", "dense-bf16-local,moe-bf16,moe-bf16-local", "--steps", "2"]
    words += ["--option", "moe.moe_z_loss_coeff=1e38", "--output", str(tmp_path / "small-{device}")]
    assert load_tool("bench_gpu").main(words) == 1
    told = capsys.readouterr().out
    assert "dense-bf16-local: ran" in told
    assert "moe-bf16: not run: Transformer Engine layers need a CUDA device" in told
    assert "moe-bf16-local: failed" in told
    assert "not judged: 30B slice, bf16" in told
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["complete"]
    assert report["measured_peak_tflops"] > 0
    cases = {case["name"]: case for case in report["cases"]}
    assert "steps were skipped" in cases["moe-bf16-local"]["reason"]
    dense = cases["dense-bf16-local"]
    assert dense["losses"][-1] < dense["losses"][0]
    assert len(dense["losses"]) == 3 + 2 + 2
    assert len(dense["step_seconds"]) == 2
    assert dense["profile"]["milliseconds"][MATRIX] > 0
    assert dense["profile"]["milliseconds"][OPTIMIZER] > 0
    assert 0 < dense["profile"]["idle_share"] < 1
    assert dense["memory"]["measured_bytes"] == {}
    assert "| dense-bf16-local | 4 |" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_the_plan_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tool("bench_gpu").main(["--plan", "--memory-gib", "79"]) == 0
    told = capsys.readouterr().out
    assert "of 48 decoder layers" in told
    assert "dense-fp8-blockwise: kernels.transformer_impl=transformer_engine" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "dense-fp16"], "is no case"),
        (["--option", "precision.fp9=hybrid"], "has no field 'fp9'"),
        (["--budget-minutes", "0"], "--budget-minutes 0 is too little"),
    ],
)
def test_bad_input_ends_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tool("bench_gpu").main(["--plan", *words]) == 2
    assert message in capsys.readouterr().err
