"""The processes that mpiexec, or srun with MPI, started for one job of preprocessing (mpi4py)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

from mm15_megatron.errors import DataError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


class Ranks(Protocol):
    """The ranks of a job: each takes every ``size``-th unit, the first one puts the parts together."""

    @property
    def rank(self) -> int:
        """Which one this is."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Give a value to every rank, and take those of all, in order; every rank must call."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """Return the value."""
        return [value]


class MPIRanks:
    """The world of an MPI job."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise DataError(
                f"an MPI launcher started this process, but mpi4py cannot be imported: {error}",
                fix="install mpi4py and the launcher's MPI library, or start one process with --workers",
            ) from error
        self._world = MPI.COMM_WORLD
        self.rank, self.size = int(self._world.Get_rank()), int(self._world.Get_size())

    def gather(self, value: Any) -> list[Any]:
        """Give a value to every rank, and take those of all, in order."""
        return list(self._world.allgather(value))


def discover() -> Ranks:
    """Return the ranks that this process belongs to.

    Raises:
        DataError: mpi4py is absent under an MPI launcher, or srun started several processes without MPI.
    """
    sizes = [int(os.environ[name]) for name in _MPI_SIZES if name in os.environ]
    if any(size > 1 for size in sizes) or "PMIX_RANK" in os.environ:
        return MPIRanks()
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and not sizes:
        raise DataError(
            f"srun started {tasks} processes that do not know of each other",
            fix="use srun --mpi=pmix (or pmi2), or mpiexec",
        )
    return Alone()
