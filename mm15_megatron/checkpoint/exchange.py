"""State that lies scattered over ranks, as the distributed optimizer's does, on its way to the ranks that write it.

The ranges go from rank to rank on the CPU, or from one process beside a rank to another: a run that saves beside the
training copies its own ranges and goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed import Work

from mm15_megatron.errors import CheckpointError
from mm15_megatron.utils.ranks import finish_transfers, on_every_rank


@dataclass(frozen=True)
class Share:
    """A flat range of a tensor, and who holds it.

    Attributes:
        rank: in the job.
        start: first element of the flattened tensor.
        stop: one past its last.
    """

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Scattered:
    """A tensor that no rank need hold whole.

    Attributes:
        whole: what its writer will write, without data.
        writer: the rank in the job that writes it.
        shares: together they cover the tensor.
    """

    whole: ShardedTensor
    writer: int
    shares: tuple[Share, ...]

    @property
    def is_moved(self) -> bool:
        """Whether its writer does not hold all of it."""
        return [share.rank for share in self.shares] != [self.writer]

    def size_at(self, rank: int) -> int:
        """Return how many elements a rank holds."""
        return sum(share.stop - share.start for share in self.shares if share.rank == rank)


def assembled(scattered: Mapping[str, Scattered], held: Mapping[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    """Send every range to its tensor's writer (every rank must call, in a default group that moves CPU tensors).

    A rank receives what it writes and no more; each range is received where it belongs, and what a writer holds whole
    is not copied.

    Args:
        scattered: by key, the tensors that this rank writes or holds a range of.
        held: by key, the ranges that it holds, flat.

    Returns:
        The tensors that this rank writes, by key.

    Raises:
        CheckpointError: a rank has no memory for what it will write; every rank raises it.
        RuntimeError: another rank is gone.
    """
    me, transfers = torch.distributed.get_rank(), []
    mine = {key: one for key, one in scattered.items() if one.writer == me}
    rooms = on_every_rank(lambda: _rooms(mine))
    for key, one in sorted(scattered.items()):  # both ends of a pair come to their messages in the same order
        if key in rooms:
            transfers += _received(one, rooms[key], held.get(key))
        elif one.writer != me:
            transfers.append(_sent(one, held[key]))
    finish_transfers(transfers)
    data = {key: rooms[key] if key in rooms else held[key] for key in mine}
    return {key: replace(one.whole, data=data[key].view(one.whole.local_shape)) for key, one in mine.items()}


def _rooms(mine: Mapping[str, Scattered]) -> dict[str, torch.Tensor]:
    """Make room for the tensors that this rank writes and does not hold whole, flat."""
    sizes = {key: math.prod(one.whole.local_shape) for key, one in mine.items() if one.is_moved}
    try:
        return {key: torch.empty(size, dtype=mine[key].whole.dtype) for key, size in sizes.items()}
    except RuntimeError as error:
        needed = sum(mine[key].whole.dtype.itemsize * size for key, size in sizes.items())
        raise CheckpointError(
            f"no memory for {needed / 2**20:,.1f} MiB of optimizer state that this rank gathers and writes: {error}",
            fix="give the job more host memory, or spread the model over more ranks",
        ) from error


def _sent(one: Scattered, held: torch.Tensor) -> Work | None:
    """Begin to send this rank's range to the tensor's writer."""
    assert (held.dtype, len(held)) == (one.whole.dtype, one.size_at(torch.distributed.get_rank())), "as it is awaited"
    return torch.distributed.isend(held.cpu(), one.writer)


def _received(one: Scattered, room: torch.Tensor, held: torch.Tensor | None) -> list[Work | None]:
    """Begin to receive the ranges of a tensor, each where it belongs."""
    parts = {share.rank: room[share.start : share.stop] for share in one.shares}
    if held is not None:
        parts.pop(one.writer).copy_(held)
    return [torch.distributed.irecv(part, rank) for rank, part in parts.items()]
