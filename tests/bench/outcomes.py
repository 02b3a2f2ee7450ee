"""Recorded outcomes for tests of what is made of them; the numbers are made up."""

from __future__ import annotations

from typing import Any

from mm15_megatron.bench.cases import Case
from mm15_megatron.bench.kernels import CLASSES
from mm15_megatron.bench.outcome import CaseOutcome

PARTS = ("parameters", "gradients", "optimizer", "activations", "total")


def figures(*, tflops: float, tokens: float = 1000.0, on_gpu: bool = True) -> dict[str, Any]:
    """What ``measure_case`` would return."""
    return {
        "step_seconds": [1.5, 1.5],
        "median_step_seconds": 1.5,
        "tokens_per_second": tokens,
        "tiles_per_second": 40.0,
        "model_tflops": tflops,
        "losses": [10.8, 10.1],
        "problem": None,
        "memory": {
            "estimated_bytes": dict.fromkeys(PARTS, 2.0**30),
            "measured_bytes": dict.fromkeys(PARTS, 2.0**31) if on_gpu else {},
            "measured_over_estimated": dict.fromkeys(PARTS, 2.0) if on_gpu else {},
            "max_reserved_bytes": 2.0**32 if on_gpu else None,
        },
        "beside_bare": None,
        "profile": {
            "problem": None,
            "milliseconds": dict.fromkeys(CLASSES, 10.0),
            "shares": dict.fromkeys(CLASSES, 1 / len(CLASSES)),
            "window_milliseconds": 100.0,
            "busy_milliseconds": 90.0,
            "idle_share": 0.1,
            "gaps_over_10_us": 12.5,
            "longest_gaps": [{"microseconds": 321.0, "after": "a", "before": "b"}],
            "host_waits": {"cudaStreamSynchronize": {"calls": 3.0, "milliseconds": 1.0}},
            "kernels": [],
        },
    }


def ran(case: Case, *, tflops: float, tokens: float = 1000.0, layers: int = 7, on_gpu: bool = True) -> CaseOutcome:
    """A case that ran."""
    return CaseOutcome(case, "ran", layers=layers, figures=figures(tflops=tflops, tokens=tokens, on_gpu=on_gpu))
