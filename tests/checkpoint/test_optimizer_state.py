"""Where AdamW's step count is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mm15_megatron.checkpoint.optimizer_state import _create_moments, get_step, set_step
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.parity.trace import build_parts

from ..helpers.layouts import debug_config


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (False, "cpu")])
def test_the_step_count_lies_where_the_kernel_reads_it(fused: bool, place: str) -> None:
    """torch's fused kernel refuses a count on another device than the parameter's."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3, device="meta"))])
    optimizer.param_groups[0]["fused"] = fused
    _create_moments(optimizer)
    (state,) = optimizer.state.values()
    assert state["step"].device.type == place
    assert {state[kind].device.type for kind in ("exp_avg", "exp_avg_sq")} == {"meta"}


def _counts(alike: bool) -> int | str:
    parts = build_parts(parse_layout("dp2").apply(debug_config()))
    set_step(parts.optimizer, 4 if alike else 4 + parts.topology.place.rank)
    try:
        return get_step(parts.optimizer)
    except CheckpointError as error:
        return error.problem
    finally:
        close_topology()


def test_ranks_that_counted_apart_are_refused() -> None:
    """One count is stored for the whole optimizer."""
    assert run_on_ranks(_counts, 2, alike=True) == [4, 4]
    assert run_on_ranks(_counts, 2, alike=False) == ["parameters were updated different numbers of times: [4, 5]"] * 2
