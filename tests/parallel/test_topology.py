"""What a layout asks of its devices."""

from __future__ import annotations

import pytest

from mm15_megatron.config.schema import ParallelConfig
from mm15_megatron.parallel.topology import launch_order

IN_ORDER = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"device": "cuda"}, {}),
        ({"device": "cuda", "tensor_model_parallel_size": 2}, IN_ORDER),
        ({"device": "cuda", "tensor_model_parallel_size": 2, "overlap_moe_expert_parallel_comm": True}, {}),
        ({"device": "cpu", "tensor_model_parallel_size": 2}, {}),
    ],
)
def test_collectives_start_before_the_products_beside_them(layout: dict[str, object], expected: dict[str, str]) -> None:
    assert launch_order(ParallelConfig(**layout)) == expected
