"""What is made of seconds, losses and bytes."""

from __future__ import annotations

import math

import pytest
import torch

from mm15_megatron.accounting import planned_tiles_per_row, step_flops
from mm15_megatron.bench.fresh import Failure, FreshProcesses
from mm15_megatron.bench.measure import Scale, measured_parts, problem_of, rates, warm_up_steps, weigh
from mm15_megatron.bench.peak import Product, look_at, measure, products_of
from mm15_megatron.bench.run import MEASURE, short_name
from mm15_megatron.bench.slices import one_device
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.errors import BackendError
from mm15_megatron.presets import resolve


def test_rates_follow_from_the_median_step():
    cfg = resolve("debug_moe")
    found = rates(cfg, [0.5, 4.0, 1.0])
    assert found["median_step_seconds"] == 1.0
    assert found["tokens_per_second"] == 8 * 128
    assert found["tiles_per_second"] == 8 * planned_tiles_per_row(cfg)
    assert found["model_tflops"] == step_flops(cfg, rows=8, tiles=8 * planned_tiles_per_row(cfg)).total / 1e12
    assert sum(found["step_tflop"].values()) == pytest.approx(found["model_tflops"])


def test_losses_that_are_no_training_are_named():
    assert problem_of([3.0, 2.9], applied=[True, True]) is None
    assert "not finite" in str(problem_of([3.0, math.nan, 2.0], applied=[True] * 3))
    assert "1 of 2 steps were skipped" in str(problem_of([3.0, 2.0], applied=[True, False]))
    assert "did not fall on the same rows: 2.0000 at first, 2.5000 at last" in str(
        problem_of([2.0, 2.5], applied=[True, True])
    )


def test_memory_is_weighed_part_by_part():
    marks = {"start": 1.0, "parameters": 11.0, "gradients": 31.0, "masters": 51.0, "rows": 52.0}
    assert measured_parts(marks | {"first step": 92.0, "state": 35.0}, peak=112.0) == {
        "parameters": 10.0 + 5.0,
        "gradients": 20.0,
        "optimizer": 20.0 + 35.0,
        "activations": 20.0,
        "total": 112.0,
    }


def test_the_cpu_counts_no_bytes():
    scale = Scale("cpu")
    scale.mark("start")
    found = weigh(resolve("debug_dense"), scale)
    assert scale.marks == {}
    assert found["measured_bytes"] == {}
    assert found["estimated_bytes"]["total"] > 0


def test_products_are_those_of_the_model():
    products = products_of(resolve("mm1_30b"), square=8192)
    assert [(p.m, p.k, p.n) for p in products] == [
        (8192, 8192, 8192),
        (4096, 7168, 3 * 7168),
        (4096, 7168, 7168),
        (4096, 7168, 2 * 19200),
        (4096, 19200, 7168),
        (4096, 7168, 49152),
    ]


def test_a_product_is_timed_on_the_cpu():
    (found,) = measure([Product("small", 32, 16, 8)], device="cpu", seconds=0.0)
    assert found.tflops > 0
    assert found.runs == 5


def test_device_names_become_file_names():
    assert short_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert short_name("NVIDIA H200") == "h200"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_absent_is_refused():
    with pytest.raises(BackendError, match="finds no usable CUDA device"):
        look_at("cuda")


def test_the_bare_loop_is_timed_on_the_same_model():
    """As on a GPU, on a model that a CPU trains in a moment."""
    processes, said = FreshProcesses(preload=()), []
    cfg = one_device(resolve("debug_moe"), device="cpu", micro_batches=2)
    found = processes.call(MEASURE, seconds=200.0, say=said.append, cfg=cfg, steps=3, beside_bare=True)
    processes.close()
    assert not isinstance(found, Failure), found.traceback
    bare = found["beside_bare"]
    assert bare["problem"] is None
    assert {loop: len(seconds) for loop, seconds in bare["seconds"].items()} == {"bare": 3, "ours": 3}
    low, high = bare["quartiles"]
    assert 0 < low <= bare["ratio"] <= high
    assert said[-1] == f"ours / bare: {bare['ratio']:.3f}"


def test_graphs_are_captured_before_anything_is_timed():
    cfg = apply_overrides(resolve("debug_dense"), ["kernels.cuda_graph_warmup_steps=4"])
    assert warm_up_steps(cfg) == 3
    assert warm_up_steps(apply_overrides(cfg, ["kernels.cuda_graph_scope=[mlp]"])) == 6
