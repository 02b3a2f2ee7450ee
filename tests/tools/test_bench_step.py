"""The two loops that the benchmark times do the same work: one step of either leaves the same parameters."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from mm15_megatron.bench.bare import LOOPS, run_step
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.presets import resolve

from ..helpers.tools import load_tool

# AdamW's first step is the learning rate times a sign; sums in another order turn none of the compared ones.
LEARNING_RATE, UPDATE_SHARE = 1e-3, 1e-3


def parameters_after(loop: str) -> dict[str, torch.Tensor]:
    tool = load_tool("bench_step")
    cfg = apply_overrides(resolve("debug_dense"), ["optimizer.adam_eps=1e-5", f"optimizer.lr={LEARNING_RATE}"])
    with ExitStack() as stack:
        parts, batches = tool.build(cfg, stack)
        for group in parts.optimizer.param_groups:
            group["lr"], group["weight_decay"] = group["max_lr"], 0.0
        before = [p.detach().clone() for p in parts.chunks[0].module.parameters()]
        run_step(loop, parts, batches)
        named = parts.chunks[0].module.named_parameters()
        return {name: (p.detach() - old) for (name, p), old in zip(named, before, strict=True)}


def test_both_loops_take_the_same_step() -> None:
    (bare,), (ours,) = (run_on_ranks(parameters_after, 1, loop=loop) for loop in LOOPS)
    assert bare.keys() == ours.keys()
    for name, update in bare.items():
        assert update.abs().max() > 0.1 * LEARNING_RATE, name
        assert (update - ours[name]).abs().max() <= UPDATE_SHARE * LEARNING_RATE, name


def times_of_two_steps() -> tuple[str, dict[str, object]]:
    tool = load_tool("bench_step")
    with ExitStack() as stack:
        parts, batches = tool.build(resolve("debug_dense"), stack)
        timings, operators = tool.measure(parts, batches, steps=2), tool.breakdown(parts, batches)
        text, figures = tool.report(parts.cfg, timings, operators, command="bench")
        return text, figures


def test_a_run_says_where_the_difference_goes() -> None:
    """Operators of both loops with their calls; what only one of them uses has none in the other."""
    ((text, figures),) = run_on_ranks(times_of_two_steps, 1)
    assert "| all operators | |" in text
    assert len(figures["operators"]) == 10
    differences = [abs(o["milliseconds"]["ours"] - o["milliseconds"]["bare"]) for o in figures["operators"]]
    assert differences == sorted(differences, reverse=True)
    assert all(o["calls"].keys() == {"bare", "ours"} for o in figures["operators"])


def test_report_gives_the_ratio_of_pairs() -> None:
    tool = load_tool("bench_step")
    seconds = {"bare": [1.0, 2.0, 4.0], "ours": [1.1, 2.2, 4.4]}
    processor = {"bare": [1.0, 1.0, 1.0], "ours": [1.0, 1.02, 1.04]}
    faults = {"bare": [7, 7, 7], "ours": [9, 9, 9]}
    slower = tool.OperatorTime("aten::mm", {"bare": 3.0, "ours": 4.0}, {"bare": 10.0, "ours": 12.5})
    text, figures = tool.report(
        resolve("debug_dense"), tool.Timings(seconds, processor, faults), [slower], command="bench"
    )
    assert figures["ratio"] == pytest.approx(1.1)
    assert figures["processor_ratio"] == pytest.approx(1.02)
    assert "ours / bare: **1.100**" in text
    assert "| ours | 2.2000 | 1.0200 | 9 |" in text
    assert "| aten::mm | 3 | 10.00 | 4 | 12.50 | +2.50 |" in text
