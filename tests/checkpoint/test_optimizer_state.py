"""Where AdamW's step count is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mm15_megatron.checkpoint.optimizer_state import _create_moments


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (False, "cpu")])
def test_the_step_count_lies_where_the_kernel_reads_it(fused: bool, place: str) -> None:
    """torch's fused kernel refuses a count on another device than the parameter's."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3, device="meta"))])
    optimizer.param_groups[0]["fused"] = fused
    _create_moments(optimizer)
    (state,) = optimizer.state.values()
    assert state["step"].device.type == place
    assert {state[kind].device.type for kind in ("exp_avg", "exp_avg_sq")} == {"meta"}
