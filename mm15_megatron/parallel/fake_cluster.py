"""One rank of a cluster that does not exist: every group is fake, every parameter has a shape and no storage.

A rank of 512 is built in a fraction of a second on a laptop, so that a layout can be counted before it is paid for.
Nothing is computed and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mm15_megatron.config.schema import ParallelConfig
from mm15_megatron.errors import ConfigError
from mm15_megatron.parallel import cpu_emulation
from mm15_megatron.parallel.rendezvous import Rendezvous
from mm15_megatron.parallel.topology import Topology, build_topology, close_topology

_META = torch.device("meta")
_ALLOCATIONS = ("empty", "zeros", "ones", "full", "randn")


@dataclass(frozen=True)
class Coordinates:
    """What decides which parameters a rank holds.

    Attributes:
        pipeline: its stage.
        tensor: its rank in the tensor-parallel group.
        expert: its rank in the expert-parallel group.
        expert_tensor: its rank in the group an expert is split over.
    """

    pipeline: int
    tensor: int
    expert: int
    expert_tensor: int


def coordinates(rank: int, parallel: ParallelConfig, *, world_size: int) -> Coordinates:
    """Return the place of a rank, in megatron-core's order: tensor, context, data ranks inside a pipeline stage."""
    stage, within = divmod(rank, world_size // parallel.pipeline_model_parallel_size)
    tensor = parallel.tensor_model_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size or tensor
    return Coordinates(
        pipeline=stage,
        tensor=within % tensor,
        expert=within // expert_tensor % parallel.expert_model_parallel_size,
        expert_tensor=within % expert_tensor,
    )


def distinct_ranks(parallel: ParallelConfig, *, world_size: int) -> tuple[int, ...]:
    """Return the first rank of every set of ranks that hold the same parameters.

    Together they hold the whole model: what a rank of another data-parallel replica holds, one of these holds too.
    """
    first: dict[Coordinates, int] = {}
    for rank in range(world_size):
        first.setdefault(coordinates(rank, parallel, world_size=world_size), rank)
    return tuple(first.values())


@contextmanager
def fake_rank(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[Topology]:
    """Make this process one rank of a fake cluster; inside, modules are built on the meta device.

    Many ranks can be built one after another. Where there is no GPU megatron-core needs the CPU emulation, which stays
    installed afterwards; everything else is as it was before.

    Args:
        parallel: a validated layout; its device is not used.
        rank: which rank to be.
        world_size: ranks of the cluster.

    Raises:
        ConfigError: there is no such rank, or this process is part of a real job.
        BackendError: a CUDA device is in use here; hide it with CUDA_VISIBLE_DEVICES=''.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size}", fix="give a rank below the world size")
    if torch.distributed.is_initialized():
        raise ConfigError(
            "this process is part of a job and cannot pretend to be in another", fix="leave the job with close_topology"
        )
    cpu_emulation.install()
    place = Rendezvous("fake", rank, world_size, rank % 8, 8, "")
    with _patched({(torch.cuda, "current_device"): lambda: _META}), _AllocateOnMeta():
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            topology = build_topology(replace(parallel, device="cpu"), place=place)
            yield replace(topology, device=_META)
        finally:
            close_topology()


@contextmanager
def _patched(patches: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
    former = {(owner, name): getattr(owner, name) for owner, name in patches}
    try:
        for (owner, name), value in patches.items():
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), value in former.items():
            setattr(owner, name, value)


class _AllocateOnMeta(TorchFunctionMode):
    """Give tensors that name no device the meta device; small constants (torch.tensor, arange) stay real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ in _ALLOCATIONS and kwargs.get("device") is None:
            kwargs["device"] = _META
        return func(*args, **kwargs)
