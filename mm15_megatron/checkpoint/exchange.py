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
    """A tensor that no rank holds whole.

    Attributes:
        whole: what its writer will write, without data.
        writer: the rank in the job that writes it.
        shares: by rank in ascending order; together they cover the tensor.
    """

    whole: ShardedTensor
    writer: int
    shares: tuple[Share, ...]


def assembled(scattered: Mapping[str, Scattered], held: Mapping[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    """Send every range to its tensor's writer (every rank must call, in a default group that moves CPU tensors).

    A rank receives what it writes and no more; each range is received where it belongs.

    Args:
        scattered: by key, the tensors that this rank writes or holds a range of.
        held: by key, the ranges that it holds, flat.

    Returns:
        The tensors that this rank writes, by key.

    Raises:
        RuntimeError: another rank is gone.
    """
    me, found, transfers = torch.distributed.get_rank(), {}, []
    for key, one in sorted(scattered.items()):  # both ends of a pair come to their common keys in the same order
        if one.writer != me:
            transfers.append(torch.distributed.isend(held[key].cpu(), one.writer))
            continue
        flat = torch.empty(math.prod(one.whole.local_shape), dtype=one.whole.dtype)
        for share in one.shares:
            part = flat[share.start : share.stop]
            if share.rank == me:
                part.copy_(held[key])
            else:
                transfers.append(torch.distributed.irecv(part, share.rank))
        found[key] = replace(one.whole, data=flat.view(one.whole.local_shape))
    for transfer in transfers:
        assert transfer is not None, "every rank is in the default group"
        transfer.wait()
    return found
