"""What is read from the events of a profile: work, pauses, waits of the host."""

from __future__ import annotations

import pytest

from mm15_megatron.bench.kernels import ATTENTION, COPIES, FP8_CASTS, MATRIX, NORMS
from mm15_megatron.bench.trace import Span, breakdown, device_spans, host_waits, stillness, time_by_class


def event(name: str, ts: float, dur: float, *, cat: str = "kernel", tid: int = 7, ph: str = "X") -> dict:
    return {"ph": ph, "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid, "args": {"stream": tid}}


# Two steps of a GPU: microseconds, a second stream, runtime calls of the host, and what a trace holds besides.
GPU_EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    event("cudaLaunchKernel", 90, 5, cat="cuda_runtime", tid=1),
    event("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", 100, 200),
    event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", 305, 95),
    event("Memcpy DtoD (Device -> Device)", 350, 100, cat="gpu_memcpy", tid=8),
    event("Memcpy DtoH (Device -> Pageable)", 450, 2, cat="gpu_memcpy"),
    event("cudaStreamSynchronize", 400, 60, cat="cuda_runtime", tid=1),
    event("void transformer_engine::(anonymous namespace)::amax_kernel<8, true>", 552, 48),
    event("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", 700, 400),
    event("cudaDeviceSynchronize", 1000, 100, cat="cuda_runtime", tid=1),
    event("ac2g", 100, 0, cat="ac2g", ph="s"),
]


def test_work_of_a_gpu_is_its_kernels_and_copies():
    spans = device_spans(GPU_EVENTS, device="cuda")
    assert [span.name.split()[0] for span in spans] == [
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7",
        "Memcpy",
        "Memcpy",
        "void",
        "void",
    ]
    times = time_by_class(spans)
    assert {name: time for name, time in times.items() if time} == {
        MATRIX: 200,
        ATTENTION: 95,
        COPIES: 102,
        FP8_CASTS: 48,
        NORMS: 400,
    }


def test_pauses_are_counted_across_streams():
    still = stillness(device_spans(GPU_EVENTS, device="cuda"))
    assert still.window == 1000
    # 100-300, 305-452 (two streams overlap), 552-600, 700-1100; the pause of 5 us is too short to be counted
    assert still.busy == 200 + 147 + 48 + 400
    assert still.idle_share == pytest.approx(1 - 795 / 1000)
    assert still.gaps == 2
    assert [gap.length for gap in still.longest] == [100, 100]
    assert still.longest[0].after.startswith("Memcpy DtoH")
    assert "amax" in still.longest[0].before


def test_work_inside_other_work_makes_no_pause():
    inside = [Span("long", 0, 100), Span("short", 10, 20), Span("later", 150, 160)]
    still = stillness(inside)
    assert (still.window, still.busy, still.gaps) == (160, 110, 1)
    assert still.longest[0].after == "long"


def test_no_work_at_all():
    assert stillness([]).idle_share == 0
    assert breakdown([], device="cuda", steps=2)["busy_milliseconds"] == 0


def test_waits_of_the_host_are_counted():
    assert host_waits(GPU_EVENTS) == {
        "Memcpy DtoH": (1, 2.0),
        "cudaStreamSynchronize": (1, 60.0),
        "cudaDeviceSynchronize": (1, 100.0),
    }


def test_breakdown_is_for_one_step():
    found = breakdown(GPU_EVENTS, device="cuda", steps=2)
    assert found["milliseconds"][MATRIX] == pytest.approx(0.1)
    assert found["shares"][MATRIX] == pytest.approx(200 / 845)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["window_milliseconds"] == pytest.approx(0.5)
    assert found["gaps_over_10_us"] == 1
    assert found["host_waits"]["cudaStreamSynchronize"] == {"calls": 0.5, "milliseconds": pytest.approx(0.03)}
    assert found["kernels"][0]["class"] == NORMS
    assert found["kernels"][0]["microseconds"] == 400


def test_operators_of_the_cpu_count_without_those_they_call():
    events = [
        event("aten::linear", 0, 100, cat="cpu_op"),
        event("aten::addmm", 10, 80, cat="cpu_op"),
        event("aten::copy_", 20, 5, cat="cpu_op"),
        event("aten::copy_", 85, 5, cat="cpu_op"),
        event("aten::mul", 50, 30, cat="cpu_op", tid=9),
        event("python", 0, 500, cat="python_function"),
    ]
    times: dict[str, float] = {}
    for span in device_spans(events, device="cpu"):
        times[span.name] = times.get(span.name, 0) + span.length
    assert times == {"aten::linear": 20, "aten::addmm": 70, "aten::copy_": 10, "aten::mul": 30}


def test_operators_that_touch_are_told_apart():
    events = [event("aten::mm", 0, 10, cat="cpu_op"), event("aten::add", 10, 5, cat="cpu_op")]
    assert [(span.name, span.start, span.end) for span in device_spans(events, device="cpu")] == [
        ("aten::mm", 0, 10),
        ("aten::add", 10, 15),
    ]
