"""Which rank this is, and actions that one rank takes for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch.distributed import Work

from mm15_megatron.errors import MM15Error

T = TypeVar("T")

# What torchrun, Open MPI's mpiexec, Hydra's (inside an allocation srun's variables count its daemons) and srun set.
_LAUNCHERS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def launched_rank() -> int:
    """Return the rank that the launcher gave this process, before or after the job is joined; 0 without a launcher."""
    said = (os.environ.get(name, "") for name in _LAUNCHERS)
    return next((int(rank) for rank in said if rank.isdigit()), 0)


def gathered_objects(mine: T) -> list[T]:
    """Return what every rank gave, in the order of ranks, on every rank (picklable values)."""
    shares: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, mine)
    return shares  # type: ignore[return-value]


def finish_transfers(transfers: Iterable[Work | None]) -> None:
    """Wait for transfers between two ranks of the default group.

    Here, because a watchdog sees by the file that a rank waits for others: torch records no transfers of gloo.

    Raises:
        RuntimeError: the other rank is gone.
    """
    for transfer in transfers:
        assert transfer is not None, "every rank is in the default group"
        transfer.wait()


def on_every_rank(action: Callable[[], T]) -> T:
    """Run ``action``, which calls no collective, on every rank; if it fails on any, every rank raises that error.

    Raises:
        MM15Error: whatever the action raised on the lowest rank where it did, with that rank's number.
        OSError: likewise.
    """
    result, error = None, None
    try:
        result = action()
    except (MM15Error, OSError) as raised:
        error = raised
    for rank, one in enumerate(gathered_objects(error)):
        if isinstance(one, MM15Error):
            raise type(one)(f"rank {rank}: {one.problem}", fix=one.fix) from error
        if one is not None:
            raise OSError(f"rank {rank}: {type(one).__name__}: {one}") from error
    return result  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 while the others wait; every rank returns its result or raises its error.

    The result must be picklable. Errors of the user's input and of the file system are shared, so that no rank is left
    waiting for one that has already failed.

    Raises:
        MM15Error: whatever the action raised.
        OSError: whatever the action raised.
    """
    outcome: list[T | MM15Error | OSError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [action()]
        except (MM15Error, OSError) as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], (MM15Error, OSError)):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]
