"""Targets are judged by measured numbers, and only where they apply."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mm15_megatron.bench.cases import Case
from mm15_megatron.bench.outcome import CaseOutcome
from mm15_megatron.bench.targets import judge

from .outcomes import ran

PRESETS = {"dense": "mm1_30b", "moe": "mm1_3b_moe"}
BF16, TENSORWISE, BLOCKWISE, MOE = Case("dense"), Case("dense", "tensorwise"), Case("dense", "blockwise"), Case("moe")


def verdicts(*outcomes: CaseOutcome, peak: float = 800.0, device: str = "cuda", presets=PRESETS) -> list[str]:
    return [target.verdict for target in judge(outcomes, peak_tflops=peak, device=device, presets=presets)]


def beside(ratio: float, *, tflops: float = 480.0) -> CaseOutcome:
    """The plain bf16 case, timed beside a bare loop."""
    found = ran(BF16, tflops=tflops)
    bare = {"ratio": ratio, "quartiles": [ratio, ratio], "seconds": {}, "problem": None}
    return replace(found, figures=found.figures | {"beside_bare": bare})


def test_a_bare_loop_that_ran_out_of_memory_is_named():
    found = ran(BF16, tflops=480.0)
    full = replace(found, figures=found.figures | {"beside_bare": {"problem": "out of memory: 3 GiB"}})
    *_, last = judge([full], peak_tflops=800.0, device="cuda", presets=PRESETS)
    assert (last.verdict, last.text) == ("not judged", "out of memory: 3 GiB")


def test_all_met():
    outcomes = (beside(1.0299), ran(TENSORWISE, tflops=600.0, tokens=1250.0), ran(MOE, tflops=300.0))
    assert verdicts(*outcomes) == ["met"] * 4


def test_just_below_is_not_met_and_says_the_numbers():
    outcomes = (beside(1.031, tflops=479.0), ran(TENSORWISE, tflops=598.0, tokens=1249.0), ran(MOE, tflops=299.0))
    targets = judge(outcomes, peak_tflops=800.0, device="cuda", presets=PRESETS)
    assert [target.verdict for target in targets] == ["NOT MET"] * 4
    assert targets[0].text == "59.9%: 479 of 800 TFLOP/s (dense-bf16)"
    assert targets[1].text.startswith("1.249x: 1249 tokens/s (dense-fp8-tensorwise) over 1000")
    assert targets[2].text == "299 TFLOP/s (moe-bf16)"
    assert targets[3].text == "ours / bare 1.031 (quartiles 1.031 and 1.031)"


def test_the_best_case_counts():
    outcomes = (
        ran(BF16, tflops=500.0),
        ran(Case("dense", local=True), tflops=300.0, tokens=600.0),
        ran(TENSORWISE, tflops=600.0, tokens=1200.0),
        ran(BLOCKWISE, tflops=650.0, tokens=1300.0),
    )
    first, second, *_ = judge(outcomes, peak_tflops=800.0, device="cuda", presets=PRESETS)
    assert first.value == pytest.approx(500 / 800)
    assert second.value == pytest.approx(1.3)


def test_nothing_is_judged_without_its_cases():
    failed = CaseOutcome(BF16, "failed", "OutOfMemoryError: CUDA out of memory")
    assert verdicts(failed, ran(TENSORWISE, tflops=600.0)) == ["not judged"] * 4


def test_fp8_is_compared_on_the_same_slice_alone():
    assert verdicts(ran(BF16, tflops=480.0), ran(TENSORWISE, tflops=600.0, tokens=1500.0, layers=6))[1] == "not judged"


def test_targets_of_other_models_and_devices_do_not_apply():
    outcomes = (ran(BF16, tflops=480.0), ran(TENSORWISE, tflops=600.0, tokens=1250.0), ran(MOE, tflops=300.0))
    assert verdicts(*outcomes, device="cpu") == ["not judged"] * 4
    assert verdicts(*outcomes, presets={"dense": "mm1_7b", "moe": "mm1_3b_moe"}) == [
        "not judged",
        "not judged",
        "met",
        "not judged",
    ]
