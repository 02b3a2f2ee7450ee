"""The loss of each source is the same in every layout, and adds up to the step's."""

from __future__ import annotations

import pytest

from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.parity.trace import build_parts, micro_batches
from mm15_megatron.training.step import StepOutput, train_step

from ..helpers.layouts import Layout, change, debug_config
from ..helpers.parity import FP32_SCALAR
from ..helpers.sources import with_sources


def _step(cfg: RunConfig) -> StepOutput:
    parts = build_parts(cfg)
    batches = [with_sources(batch) for batch in micro_batches(cfg, parts.topology, step=0)]
    output = train_step(parts, iter(batches), num_microbatches=len(batches))
    close_topology()
    return output


@pytest.fixture(scope="module")
def alone() -> StepOutput:
    return run_on_ranks(_step, 1, cfg=_config(Layout(1, {})))[0]


def _config(layout: Layout) -> RunConfig:
    two = (SourceConfig(prefix="a"), SourceConfig(prefix="b"))
    return change(layout.apply(debug_config("debug_dense")), data={"sources": two})


@pytest.mark.parametrize("name", ["tp2sp", "cp2", "pp2", "vpp2"])
def test_losses_of_sources(name: str, alone: StepOutput) -> None:
    layout = parse_layout(name)
    outputs = run_on_ranks(_step, layout.world_size, cfg=_config(layout))
    assert len(alone.by_source) == 2
    assert sum(weight for _, weight in alone.by_source) == alone.targets
    assert sum(loss for loss, _ in alone.by_source) == pytest.approx(alone.loss * alone.targets, rel=FP32_SCALAR)
    for output in outputs:
        assert [weight for _, weight in output.by_source] == [weight for _, weight in alone.by_source]
        found = [loss / weight for loss, weight in output.by_source]
        assert found == pytest.approx([loss / weight for loss, weight in alone.by_source], abs=FP32_SCALAR)
