"""What CUDA graphs ask of a layout; ``tests/gpu/test_cuda_graphs.py`` captures and replays them."""

from __future__ import annotations

import torch
from megatron.core import num_microbatches_calculator
from megatron.core.num_microbatches_calculator import get_num_microbatches

from mm15_megatron.config.schema import ParallelConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.parallel.topology import build_topology, close_topology
from mm15_megatron.parity.ranks import rank_place, run_on_ranks
from mm15_megatron.training.cuda_graphs import check_every_rank, known_microbatches


def refusal(layers: list[int]) -> str | None:
    """What a rank of a two-stage pipeline is told about its number of dense layers."""
    build_topology(ParallelConfig(device="cpu", pipeline_model_parallel_size=2), place=rank_place())
    try:
        check_every_rank(layers=layers[torch.distributed.get_rank()])
    except BackendError as error:
        return str(error)
    finally:
        close_topology()
    return None


def test_every_rank_is_told_of_a_stage_without_dense_layers() -> None:
    assert run_on_ranks(refusal, 2, layers=[1, 2]) == [None, None]
    assert all("holds no dense layer" in str(text) for text in run_on_ranks(refusal, 2, layers=[2, 0]))


def counts() -> list[int | None]:
    """What megatron-core's counter says in a capture and after it."""
    with known_microbatches(3):
        during = get_num_microbatches()
    return [during, num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR]


def test_megatron_core_knows_the_micro_batches_of_a_capture_alone() -> None:
    assert run_on_ranks(counts, 1) == [[3, None]]
