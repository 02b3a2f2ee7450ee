"""Where a run stands: what a checkpoint stores beside the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from mm15_megatron.batch import RowRecord
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.topology import Topology


@dataclass(frozen=True)
class Counts:
    """What a set of rows held.

    Attributes:
        text_tokens: tokens that are neither image slots nor padding.
        image_slots: tokens owned by image tiles.
        substituted: images that did not decode and were replaced.
    """

    text_tokens: int = 0
    image_slots: int = 0
    substituted: int = 0

    @property
    def tokens(self) -> int:
        """Real tokens: text and image slots, no padding."""
        return self.text_tokens + self.image_slots


@dataclass(frozen=True)
class TrainState:
    """Counters of a run since its start, over all ranks.

    Attributes:
        step: optimizer steps taken, skipped ones included; what the learning-rate schedule counts.
        consumed: rows (or samples, ``data.batch_unit``) of the training order that were used; the one number from which
            the data resumes.
        text_tokens: as in :class:`Counts`.
        image_slots: as in :class:`Counts`.
        substituted: as in :class:`Counts`.
        skipped_steps: steps that updated nothing: loss or gradients were not finite, or no row had a target.
    """

    step: int = 0
    consumed: int = 0
    text_tokens: int = 0
    image_slots: int = 0
    substituted: int = 0
    skipped_steps: int = 0

    def after(self, counts: Counts, *, units: int, applied: bool) -> TrainState:
        """Return the state after one more step."""
        return TrainState(
            step=self.step + 1,
            consumed=self.consumed + units,
            text_tokens=self.text_tokens + counts.text_tokens,
            image_slots=self.image_slots + counts.image_slots,
            substituted=self.substituted + counts.substituted,
            skipped_steps=self.skipped_steps + (not applied),
        )

    def as_dict(self) -> dict[str, int]:
        """Return the counters as plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainState:
        """Read what :meth:`as_dict` wrote.

        Raises:
            CheckpointError: a counter is missing, unknown or no whole number.
        """
        names = {f.name for f in fields(TrainState)}
        if values.keys() != names or not all(isinstance(value, int) for value in values.values()):
            raise CheckpointError(
                f"the run's counters are {dict(values)}, expected whole numbers for {sorted(names)}",
                fix="restore state.json of the checkpoint, or name another one in `latest`",
            )
        return TrainState(**values)


def global_counts(rows: Iterable[RowRecord], *, topology: Topology) -> Counts:
    """Add up what this step's rows held, over all ranks (every rank must call).

    The ranks of one data-parallel place hold the same rows, so the first of them counts the tokens; a bad image is
    reported by exactly one of them (``RowRecord.substituted``).
    """
    rows = tuple(rows)
    counts_tokens = topology.is_first_stage and topology.tile_rank == 0
    sums = torch.tensor(
        [
            sum(row.text_tokens for row in rows) if counts_tokens else 0,
            sum(row.image_slots for row in rows) if counts_tokens else 0,
            sum(len(row.substituted) for row in rows),
        ],
        device=topology.device,
    )
    torch.distributed.all_reduce(sums)
    return Counts(*sums.tolist())
