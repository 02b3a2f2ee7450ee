"""What a step takes from the order, and which rank takes which of its rows: pure functions of what was consumed.

A unit is a row, or with ``data.batch_unit = samples`` a sample; the samples of a step are packed into as many rows as
they need, and rows without samples fill the step up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm15_megatron.data.dealing import deal_evenly, deal_in_order
from mm15_megatron.data.row_order import RowRange, RowTask
from mm15_megatron.errors import ConfigError


def units_of_step(consumed: int, *, global_batch_size: int, rampup: tuple[int, int, int] | None) -> int:
    """Return the units of the step that starts after ``consumed`` units.

    Args:
        consumed: units consumed so far.
        global_batch_size: units of a step after the ramp.
        rampup: (start, increment, units): the batch grows from ``start`` by ``increment`` in equal shares of ``units``.
    """
    if rampup is None or consumed >= rampup[2]:
        return global_batch_size
    start, increment, units = rampup
    increments = (global_batch_size - start) // increment
    return start + consumed * increments // units * increment


@dataclass(frozen=True)
class BatchPlan:
    """The dealing of the rows of a step to ranks; :mod:`.dealing` says which of them each rank takes.

    Attributes:
        global_batch_size: units of a step.
        micro_batch_size: rows of one forward pass on one rank.
        data_size: data-parallel ranks.
        rampup: see :func:`units_of_step`.
        row_dealing: balanced | round_robin.
        batch_unit: rows | samples.
        micro_batch_multiple: the micro-batches of a rank in a step are a multiple of this.

    Raises:
        ConfigError: if a batch size that occurs cannot be split over ranks and micro-batches.
    """

    global_batch_size: int
    micro_batch_size: int
    data_size: int
    rampup: tuple[int, int, int] | None = None
    row_dealing: str = "balanced"
    batch_unit: str = "rows"
    micro_batch_multiple: int = 1

    def __post_init__(self) -> None:
        """Check that every batch size of the run can be split."""
        sizes = [self.global_batch_size]
        if self.rampup:
            start, increment, units = self.rampup
            growth = self.global_batch_size - start
            if start < 1 or increment < 1 or units < 1 or growth < 0 or growth % increment:
                raise ConfigError(
                    f"train.rampup_batch_size {self.rampup} does not reach global_batch_size {self.global_batch_size}",
                    fix="choose start and increment so that start + k * increment is the global batch size",
                )
            sizes = [*range(start, self.global_batch_size, increment), self.global_batch_size]
        unit = self._rows_together if self.batch_unit == "rows" else 1
        uneven = [size for size in sizes if unit < 1 or size < 1 or size % unit]
        if uneven:
            raise ConfigError(
                f"batches of {uneven} {self.batch_unit} cannot be split over {self.data_size} data-parallel ranks x "
                f"micro-batches of {self.micro_batch_size} rows"
                + (f" in multiples of {self.micro_batch_multiple}" if self.micro_batch_multiple > 1 else ""),
                fix=f"use multiples of {unit} for train.global_batch_size and train.rampup_batch_size",
            )

    @property
    def _rows_together(self) -> int:
        """The rows of a step are a multiple of this."""
        return self.micro_batch_size * self.data_size * self.micro_batch_multiple

    def units_of_step(self, consumed: int) -> int:
        """Return the units of the step that starts after ``consumed`` units."""
        return units_of_step(consumed, global_batch_size=self.global_batch_size, rampup=self.rampup)

    def filled_up(self, rows: RowRange) -> RowRange:
        """Add rows without samples until the step can be split."""
        missing = -len(rows.tasks) % self._rows_together
        if not missing:
            return rows
        after = rows.tasks[-1].row + 1
        empty = tuple(RowTask(after + i, ()) for i in range(missing))
        return RowRange((*rows.tasks, *empty), np.concatenate((rows.tiles_R, np.zeros(missing, np.int64))))

    def micro_batches(self, data_rank: int, rows: RowRange) -> tuple[tuple[RowTask, ...], ...]:
        """Return the rows of each micro-batch of one rank.

        Args:
            data_rank: the rank.
            rows: those of the step, filled up.
        """
        shape = {"data_size": self.data_size, "micro_batch_size": self.micro_batch_size}
        balanced = self.row_dealing == "balanced"
        dealt_DKM = deal_evenly(rows.tiles_R, **shape) if balanced else deal_in_order(len(rows.tasks), **shape)
        dealt: Sequence[Sequence[int]] = dealt_DKM[data_rank].tolist()
        return tuple(tuple(rows.tasks[row] for row in batch) for batch in dealt)
