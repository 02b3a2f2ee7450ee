"""How many rows a step has, and which rank takes which: pure functions of the rows consumed so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.dealing import deal_evenly, deal_in_order
from mm15_megatron.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The dealing of rows to ranks.

    A step takes the next ``rows_of_step(consumed)`` rows, whatever the number of ranks; :mod:`.dealing` says which of
    them each rank takes.

    Attributes:
        global_batch_size: rows of a step.
        micro_batch_size: rows of one forward pass on one rank.
        data_size: data-parallel ranks.
        rampup: (start, increment, rows): the batch grows from ``start`` by ``increment`` in equal shares of ``rows``.
        row_dealing: balanced | round_robin.

    Raises:
        ConfigError: if a batch size that occurs cannot be split over ranks and micro-batches.
    """

    global_batch_size: int
    micro_batch_size: int
    data_size: int
    rampup: tuple[int, int, int] | None = None
    row_dealing: str = "balanced"

    def __post_init__(self) -> None:
        """Check that every batch size of the run can be split."""
        sizes = [self.global_batch_size]
        if self.rampup:
            start, increment, rows = self.rampup
            growth = self.global_batch_size - start
            if start < 1 or increment < 1 or rows < 1 or growth < 0 or growth % increment:
                raise ConfigError(
                    f"train.rampup_batch_size {self.rampup} does not reach global_batch_size {self.global_batch_size}",
                    fix="choose start and increment so that start + k * increment is the global batch size",
                )
            sizes = [*range(start, self.global_batch_size, increment), self.global_batch_size]
        unit = self.micro_batch_size * self.data_size
        uneven = [size for size in sizes if unit < 1 or size < 1 or size % unit]
        if uneven:
            raise ConfigError(
                f"batches of {uneven} rows cannot be split over {self.data_size} data-parallel ranks x "
                f"micro-batches of {self.micro_batch_size} rows",
                fix=f"use multiples of {unit} for train.global_batch_size and train.rampup_batch_size",
            )

    def rows_of_step(self, consumed: int) -> int:
        """Return the rows of the step that starts after ``consumed`` rows."""
        if self.rampup is None or consumed >= self.rampup[2]:
            return self.global_batch_size
        start, increment, rows = self.rampup
        increments = (self.global_batch_size - start) // increment
        return start + consumed * increments // rows * increment

    def micro_batches_per_step(self, consumed: int) -> int:
        """Return the micro-batches each rank runs in the step that starts after ``consumed`` rows."""
        return self.rows_of_step(consumed) // (self.micro_batch_size * self.data_size)

    def micro_batches(
        self, consumed: int, data_rank: int, *, tiles_R: npt.NDArray[np.int64]
    ) -> tuple[tuple[int, ...], ...]:
        """Return the row indices of each micro-batch of one rank, for the step that starts after ``consumed`` rows.

        Args:
            consumed: rows consumed so far.
            data_rank: the rank.
            tiles_R: int64 [R], tiles of each row of the step.
        """
        shape = {"data_size": self.data_size, "micro_batch_size": self.micro_batch_size}
        balanced = self.row_dealing == "balanced"
        dealt_DKM = deal_evenly(tiles_R, **shape) if balanced else deal_in_order(len(tiles_R), **shape)
        return tuple(tuple(rows) for rows in (consumed + dealt_DKM[data_rank]).tolist())
