"""The report holds every case, measured or not, and can be read while the benchmark still runs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

from mm15_megatron.bench.cases import Case, Device
from mm15_megatron.bench.outcome import CaseOutcome
from mm15_megatron.bench.report import LEFT_OUT, Report, content, markdown, plain
from mm15_megatron.bench.slices import choose_slice
from mm15_megatron.bench.targets import judge
from mm15_megatron.bench.trace import breakdown
from mm15_megatron.presets import resolve

from .outcomes import ran

PRESETS = {"dense": "mm1_30b", "moe": "mm1_3b_moe"}


def report(*, on_gpu: bool = True) -> Report:
    dense = choose_slice(resolve("mm1_30b"), device="cuda", memory=139 * 2**30, margin=0.12, micro_batches=4, fp8=True)
    outcomes = [
        ran(Case("dense"), tflops=480.0, on_gpu=on_gpu),
        CaseOutcome(
            Case("dense", "tensorwise"), "failed", "RuntimeError: a kernel", traceback="Traceback ...", layers=7
        ),
        CaseOutcome(Case("dense", "mxfp8"), "not run", "needs Blackwell: capability 10.0"),
        CaseOutcome(Case("moe"), "not run", "out of time: about 46 s needed, 3 s of 450 s left"),
    ]
    device = Device("cuda", "NVIDIA H200", 139 * 2**30, driver="580.1", cuda="13.0", compile_problem="no C compiler")
    products = [{"name": "8192 cubed", "m": 8192, "n": 8192, "k": 8192, "tflops": 800.0, "runs": 9}]
    return Report(
        command="python tools/bench_gpu.py",
        environment={"A_VARIABLE": "1"},
        budget_seconds=450.0,
        spent_seconds=447.0,
        device=device,
        peak=products,
        peak_tflops=800.0,
        slices={"dense": dense, "moe": "not even 2 layers fit"},
        presets=PRESETS,
        outcomes=outcomes,
        targets=judge(outcomes, peak_tflops=800.0, device="cuda", presets=PRESETS),
    )


def test_markdown_tells_what_was_measured_what_failed_and_what_was_left_out():
    text = markdown(report())
    assert "INTERRUPTED OR STILL RUNNING" in text
    assert "NVIDIA H200, 139.0 GiB free, driver 580.1, CUDA 13.0" in text
    assert "**met**: 30B slice, bf16" in text
    assert "60.0%: 480 of 800 TFLOP/s" in text
    assert "| dense-bf16 | 7 | 1.5 | 1000 | 40.0 | 480 | 60.0% | 10.800 to 10.100 | ran |" in text
    assert "2.0 (2.00)" in text
    assert "- dense-fp8-tensorwise: FAILED: RuntimeError: a kernel" in text
    assert "- dense-fp8-mxfp8: not run: needs Blackwell" in text
    assert "- moe-bf16: not run: out of time" in text
    assert "**moe** (mm1_3b_moe): not run: not even 2 layers fit" in text
    assert "kernels.compile_fusions is off in every case: no C compiler" in text
    assert "10.0%" in text
    assert "cudaStreamSynchronize 3" in text
    assert "A_VARIABLE=1" in text
    assert LEFT_OUT in text
    assert "communication" in LEFT_OUT


def test_json_keeps_tracebacks_and_everything_else():
    found = content(report())
    by_name = {case["name"]: case for case in found["cases"]}
    assert by_name["dense-fp8-tensorwise"]["traceback"] == "Traceback ..."
    assert by_name["dense-bf16"]["model_tflops"] == 480.0
    assert found["slices"]["moe"] == {"not_run": "not even 2 layers fit"}
    assert found["slices"]["dense"]["leaves_out"]
    assert found["measured_peak_tflops"] == 800.0
    assert not found["complete"]
    assert [target["verdict"] for target in found["targets"]] == ["met", "not judged", "not judged", "not judged"]
    assert found["date"] == report().date
    assert re.fullmatch("[0-9a-f]{40}", found["commit"] or 40 * "0")


def test_both_loops_stand_in_a_table():
    found = report()
    seconds = {"bare": [1.0, 2.0, 3.0], "ours": [1.01, 2.02, 3.03]}
    bare = {"seconds": seconds, "ratio": 1.01, "quartiles": [1.01, 1.01], "problem": None}
    first, *others = found.outcomes
    found.outcomes = [replace(first, figures=first.figures | {"beside_bare": bare}), *others]
    assert "| dense-bf16 | 2 | 2.02 | 1.010 | 1.010 to 1.010 |" in markdown(found)
    problem = {"beside_bare": {"problem": "out of memory: no"}}
    found.outcomes = [replace(first, figures=first.figures | problem), *others]
    assert "| dense-bf16 |  |  | out of memory: no |  |" in markdown(found)


def test_a_profile_without_kernels_is_no_idle_device():
    found = report()
    first, *others = found.outcomes
    empty = breakdown([], device="cuda", steps=2)
    found.outcomes = [replace(first, figures=first.figures | {"profile": empty}), *others]
    assert "| dense-bf16 | the profiler recorded no kernel |" in markdown(found)
    assert "Stillness" not in markdown(found)


def test_on_the_cpu_the_memory_table_is_left_out():
    assert "Memory, GiB" in markdown(report())
    assert "Memory, GiB" not in markdown(report(on_gpu=False))


def test_files_are_replaced_whole(tmp_path: Path):
    output = tmp_path / "results" / "gpu-h200"
    report().write(output)
    first = (tmp_path / "results" / "gpu-h200.md").read_text(encoding="utf-8")
    finished = report()
    finished.complete = True
    finished.write(output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["gpu-h200.json", "gpu-h200.md"]
    assert "INTERRUPTED" in first
    assert ": complete, 7.5 of 7.5 minutes" in (tmp_path / "results" / "gpu-h200.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "results" / "gpu-h200.json").read_text(encoding="utf-8"))["complete"]


def test_numbers_that_are_not_finite_become_text():
    assert plain({"loss": [1.0, math.nan], 2: (math.inf,)}) == {"loss": [1.0, "nan"], "2": ["inf"]}
