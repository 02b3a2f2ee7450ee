"""The two loops that the benchmark times do the same work: one step of either leaves the same parameters."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

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
        getattr(tool, f"{loop}_step")(parts, batches)
        named = parts.chunks[0].module.named_parameters()
        return {name: (p.detach() - old) for (name, p), old in zip(named, before, strict=True)}


def test_both_loops_take_the_same_step() -> None:
    (bare,), (ours,) = (run_on_ranks(parameters_after, 1, loop=loop) for loop in ("bare", "our"))
    assert bare.keys() == ours.keys()
    for name, update in bare.items():
        assert update.abs().max() > 0.1 * LEARNING_RATE, name
        assert (update - ours[name]).abs().max() <= UPDATE_SHARE * LEARNING_RATE, name


def test_report_gives_the_ratio_of_pairs() -> None:
    tool = load_tool("bench_step")
    seconds = {"bare": [1.0, 2.0, 4.0], "ours": [1.1, 2.2, 4.4]}
    text, figures = tool.report(resolve("debug_dense"), seconds, command="bench")
    assert figures["ratio"] == pytest.approx(1.1)
    assert "ours / bare: **1.100**" in text
