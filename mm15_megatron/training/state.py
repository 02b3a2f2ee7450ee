"""Where a run stands: what a checkpoint stores beside the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mm15_megatron.batch import RowRecord
from mm15_megatron.data.ledger import Ledger, count_rows
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.training.stability import Course

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrainState:
    """Counters of a run since its start, over all ranks.

    Attributes:
        step: optimizer steps taken, skipped ones included; what the learning-rate schedule counts.
        consumed: rows (or samples, ``data.batch_unit``) of the training order that were used; the one number from which
            the data resumes.
        skipped_steps: steps that updated nothing: loss or gradients were not finite, or no row had a target.
        ledger: what the consumed rows held.
        course: the last losses, by which the next one is judged.
    """

    step: int
    consumed: int
    skipped_steps: int
    ledger: Ledger
    course: Course = Course()

    @classmethod
    def start(cls, ledger: Ledger) -> TrainState:
        """Return the state of a run that has taken no step."""
        return cls(0, 0, 0, ledger)

    def after(self, counts: Int64, *, loss: Float64, units: int, applied: bool, course: Course) -> TrainState:
        """Return the state after one more step.

        Args:
            counts: what its rows held (:func:`global_counts`).
            loss: float64 [sources, 2], weighted sum of the losses of each source and sum of the weights.
            units: rows or samples that it consumed.
            applied: whether it updated the weights.
            course: the last losses, its own included.
        """
        return TrainState(
            step=self.step + 1,
            consumed=self.consumed + units,
            skipped_steps=self.skipped_steps + (not applied),
            ledger=self.ledger.after(counts, loss=loss),
            course=course,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the counters as plain values."""
        return {
            "step": self.step,
            "consumed": self.consumed,
            "skipped_steps": self.skipped_steps,
            "ledger": self.ledger.as_dict(),
            "course": self.course.as_dict(),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainState:
        """Read what :meth:`as_dict` wrote.

        Raises:
            CheckpointError: a counter is missing, unknown or no whole number, or the ledger cannot be read.
        """
        names = {"step", "consumed", "skipped_steps"}
        counters = {name: value for name, value in values.items() if name not in ("ledger", "course")}
        if counters.keys() != names or not all(type(value) is int for value in counters.values()):
            raise CheckpointError(
                f"the run's counters are {counters}, expected whole numbers for {sorted(names)}",
                fix="restore state.json of the checkpoint, or name another one in `latest`",
            )
        try:
            course = Course.from_dict(values["course"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the last losses of the run cannot be read: {type(error).__name__}: {error}",
                fix="restore state.json of the checkpoint, or name another one in `latest`",
            ) from error
        return TrainState(**counters, ledger=Ledger.from_dict(values.get("ledger", {})), course=course)


def global_counts(rows: Iterable[RowRecord], *, sources: int, topology: Topology) -> Int64:
    """Count what this step's rows held, over all ranks (every rank must call).

    The ranks of one data-parallel place hold the same rows, so the first of them counts the tokens; a bad image is
    reported by exactly one of them (``RowRecord.substituted``).

    Returns:
        int64 [sources + 2, counts], as :func:`~mm15_megatron.data.ledger.count_rows`, equal on every rank.
    """
    mine = count_rows(rows, sources=sources, tokens=topology.is_first_stage and topology.tile_rank == 0)
    total = torch.from_numpy(mine).to(topology.device)
    torch.distributed.all_reduce(total)
    return total.cpu().numpy()
