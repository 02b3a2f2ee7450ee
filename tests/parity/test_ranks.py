"""Ranks as processes: forks of one server on the CPU, fresh ones for GPUs, and what a failing rank tells."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from mm15_megatron.parity.ranks import RankFailure, rank_place, run_on_ranks


def who() -> tuple[int, int, bool, bool]:
    """Rank, world, whether the ranks are joined, and whether torch would refuse CUDA in this process."""
    place = rank_place()
    joined = torch.distributed.is_initialized()
    return place.rank, place.world_size, joined, torch.cuda._is_in_bad_fork()


def loads_megatron() -> bool:
    """Whether megatron-core was imported before this rank asked for it."""
    return "megatron.core.models.gpt" in sys.modules


def raises_on(rank: int) -> int:
    """Fail on one rank."""
    if rank_place().rank == rank:
        raise ValueError(f"rank {rank} does not like {os.getpid()}")
    return rank


def test_ranks_on_the_cpu_are_joined_forks() -> None:
    assert [found[:3] for found in run_on_ranks(who, 2)] == [(0, 2, True), (1, 2, True)]
    assert run_on_ranks(loads_megatron, 1) == [True]


def test_ranks_on_gpus_start_afresh() -> None:
    """A fork of a process that asked for devices may not use CUDA; joining is left to the rank, after its device."""
    assert run_on_ranks(who, 2, device="cuda") == [(0, 2, False, False), (1, 2, False, False)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_failing_rank_is_named(device: str) -> None:
    with pytest.raises(RankFailure, match=r"--- rank 1 ---[\s\S]*ValueError: rank 1 does not like"):
        run_on_ranks(raises_on, 2, device=device, rank=1)
