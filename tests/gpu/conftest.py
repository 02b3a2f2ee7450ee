"""Tests that need a CUDA device: they collect everywhere and skip with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from mm15_megatron.config.schema import ParallelConfig
from mm15_megatron.parallel.rendezvous import Rendezvous
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import Topology, build_topology, close_topology

from .evidence import assert_computed_in, watched
from .models import STEPS, Runs, engine_config, losses, model_of, parts_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and skip it where there is no device."""
    here = [item for item in items if "/tests/gpu/" in str(item.path)]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"no CUDA device (torch {torch.__version__})"))


@pytest.fixture(scope="module")
def cuda_rank() -> Iterator[Topology]:
    """megatron-core's process groups of a one-rank NCCL job."""
    topology = build_topology(ParallelConfig(device="cuda"), place=Rendezvous("single", 0, 1, 0, 1, ""))
    seed_everything(1, topology=topology)
    yield topology
    close_topology()


@pytest.fixture(scope="module")
def bf16_runs(cuda_rank: Topology) -> Callable[[str], Runs]:
    """Fifty losses of a preset with Transformer Engine in bf16, and of the same once more; taken once a file."""
    runs: dict[str, Runs] = {}

    def once(preset: str) -> list[float]:
        parts = parts_of(cuda_rank, engine_config(None, preset))
        with watched(model_of(parts)) as seen:
            found = losses(parts, STEPS)
        assert_computed_in(None, seen)
        return found

    def twice(preset: str) -> Runs:
        if preset not in runs:
            runs[preset] = once(preset), once(preset)
        return runs[preset]

    return twice
