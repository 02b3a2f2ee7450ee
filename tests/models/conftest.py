"""One gloo rank on the CPU for the tests of the model's modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mm15_megatron.config.schema import ParallelConfig
from mm15_megatron.parallel.rendezvous import Rendezvous
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import Topology, build_topology, close_topology


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    """megatron-core's process groups of a one-rank job on the CPU."""
    place = Rendezvous(launcher="single", rank=0, world_size=1, local_rank=0, local_world_size=1, init_method="")
    topology = build_topology(ParallelConfig(device="cpu"), place=place)
    seed_everything(1, topology=topology)
    yield topology
    close_topology()


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh generator with a fixed seed."""
    return torch.Generator().manual_seed(7)
