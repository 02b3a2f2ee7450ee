"""The ledger: what a run was trained on, line by line, summing exactly to the rows it consumed.

A line is a source; two more hold what belongs to no source: rows that several sources share, and rows without samples
that fill a step up. Of a row, its number and its padding go to the line that owns it (its only source, or one of these
two); of a sample, its tokens and images go to its source. So over all lines the rows are the rows consumed, and text
tokens, image slots and padding together are rows x ``data.seq_length``.

Every rank holds the same ledger: a step's counts are summed over the ranks and added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.errors import CheckpointError

if TYPE_CHECKING:  # the dry run of the data needs no torch
    from mm15_megatron.batch import RowRecord

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

COUNTS: Final = (
    "rows", "padding", "samples", "image_samples", "text_tokens", "image_slots", "images", "substituted",
)  # fmt: skip
"""Whole numbers of a line: rows it owns and their padding tokens; samples, those with an image, their tokens that are
text and that tiles own, their images, and how many of these did not decode and were replaced."""
SUMS: Final = ("loss", "target_weight")
"""Weighted sum of the losses of a line's targets, and the sum of their weights, over all steps with a finite loss."""

SHARED: Final = "several sources"
EMPTY: Final = "no source"

_ROWS, _PADDING, _SAMPLES, _IMAGE_SAMPLES, _TEXT, _SLOTS, _IMAGES, _SUBSTITUTED = range(len(COUNTS))


def count_rows(rows: Iterable[RowRecord], *, sources: int, tokens: bool = True) -> Int64:
    """Count what rows hold.

    Args:
        rows: the rows.
        sources: sources of the mixture.
        tokens: count rows, samples and tokens; False counts substituted images alone, which another rank of the same
            rows does not report.

    Returns:
        int64 [sources + 2, counts].
    """
    found = np.zeros((sources + 2, len(COUNTS)), np.int64)
    for row in rows:
        for replaced in row.substituted:
            found[replaced.source, _SUBSTITUTED] += 1
        if not tokens:
            continue
        of = {sample.source for sample in row.samples}
        owner = of.pop() if len(of) == 1 else sources + (not of)
        found[owner, [_ROWS, _PADDING]] += (1, row.padding)
        for sample in row.samples:
            values = (1, sample.images > 0, sample.text_tokens, sample.image_slots, sample.images)
            found[sample.source, _SAMPLES : _IMAGES + 1] += values
    return found


@dataclass(frozen=True)
class Ledger:
    """What was consumed since the start of a run, over all ranks.

    Attributes:
        names: the sources, then :data:`SHARED` and :data:`EMPTY`.
        kinds: the kind of each source, the modality; empty for the two others.
        contents: digest of the files of each source; empty for the two others.
        counts: int64 [lines, counts].
        sums: float64 [lines, 2].
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    contents: tuple[str, ...]
    counts: Int64
    sums: Float64

    @classmethod
    def empty(cls, names: Sequence[str], kinds: Sequence[str], contents: Sequence[str]) -> Ledger:
        """Return the ledger of a run that consumed nothing."""
        lines = (*names, SHARED, EMPTY)
        return cls(
            lines,
            (*kinds, "", ""),
            (*contents, "", ""),
            np.zeros((len(lines), len(COUNTS)), np.int64),
            np.zeros((len(lines), len(SUMS)), np.float64),
        )

    @property
    def sources(self) -> int:
        """Sources of the mixture."""
        return len(self.names) - 2

    @property
    def rows(self) -> int:
        """Rows consumed."""
        return int(self.counts[:, _ROWS].sum())

    @property
    def tokens(self) -> int:
        """Tokens consumed, padding included."""
        return int(self.counts[:, [_PADDING, _TEXT, _SLOTS]].sum())

    def after(self, counts: Int64, *, loss: Float64) -> Ledger:
        """Return the ledger after one more step.

        Args:
            counts: int64 [lines, counts] of the step, over all ranks.
            loss: float64 [sources, 2], weighted sum of losses and sum of weights; not finite = a step that was skipped.
        """
        sums = self.sums.copy()
        if np.isfinite(loss).all():
            sums[: self.sources] += loss
        return replace(self, counts=self.counts + counts, sums=sums)

    def column(self, name: str) -> Int64:
        """Return one of :data:`COUNTS` of every line."""
        return self.counts[:, COUNTS.index(name)]

    def mean_losses(self) -> list[float | None]:
        """Return the mean loss of the targets of each source over the whole run; None where there was none."""
        losses, weights = self.sums[: self.sources].T.tolist()
        return [loss / weight if weight else None for loss, weight in zip(losses, weights, strict=True)]

    def by_kind(self) -> dict[str, Int64]:
        """Return the counts of each modality, int64 [counts]: sources of one kind together."""
        kinds = list(dict.fromkeys(kind for kind in self.kinds if kind))
        return {kind: self.counts[[k == kind for k in self.kinds]].sum(axis=0) for kind in kinds}

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "counts": list(COUNTS),
            "sums": list(SUMS),
            "lines": [
                {"name": name, "kind": kind, "content": content, "counts": counts, "sums": sums}
                for name, kind, content, counts, sums in zip(
                    self.names, self.kinds, self.contents, self.counts.tolist(), self.sums.tolist(), strict=True
                )
            ],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Ledger:
        """Read what :meth:`as_dict` wrote.

        Raises:
            CheckpointError: it was not written by this version, or is damaged.
        """
        try:
            if values["counts"] != list(COUNTS) or values["sums"] != list(SUMS):
                raise ValueError(f"columns {values['counts']} and {values['sums']}")
            lines = values["lines"]
            found = Ledger(
                tuple(str(line["name"]) for line in lines),
                tuple(str(line["kind"]) for line in lines),
                tuple(str(line["content"]) for line in lines),
                np.array([line["counts"] for line in lines], dtype=np.int64).reshape(len(lines), len(COUNTS)),
                np.array([line["sums"] for line in lines], dtype=np.float64).reshape(len(lines), len(SUMS)),
            )
            if found.names[-2:] != (SHARED, EMPTY) or (found.counts < 0).any():
                raise ValueError(f"lines {found.names}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's ledger cannot be read: {error!r}",
                fix="restore state.json of the checkpoint, or name another one in `latest`",
            ) from error
        return found

    def renamed(self, names: Sequence[str]) -> Ledger:
        """Return the same lines under the names that the sources, which are the same, have now."""
        return replace(self, names=(*names, SHARED, EMPTY))


@dataclass(frozen=True)
class Seen:
    """How far a run has come in one source: a pure function of what it consumed.

    Attributes:
        epochs: how often each document was shown.
        left_out: documents left out of rows, by reason, in the chunks begun; in a later epoch they count again.
        truncated_tokens: tokens cut off the end of documents, in the chunks begun.
    """

    epochs: float
    left_out: Mapping[str, int]
    truncated_tokens: int


def ledger_text(ledger: Ledger, seen: Sequence[Seen], *, seq_length: int) -> str:
    """Return the ledger as lines of text: a table by source, a table by modality, what was left out, and the sums."""
    heads = ("source", "rows", "samples", "text tokens", "image tokens", "padding", "images", "epochs", "loss")
    lines: list[tuple[str, ...]] = [heads]
    epochs = [f"{one.epochs:.3f}" for one in seen] + ["", ""]
    losses = ["" if loss is None else f"{loss:.4f}" for loss in ledger.mean_losses()] + ["", ""]
    for number, name in enumerate(ledger.names):
        if number < ledger.sources or ledger.counts[number].any():
            lines.append((name, *_cells(ledger.counts[number]), epochs[number], losses[number]))
    lines.append(("all", *_cells(ledger.counts.sum(axis=0)), "", ""))
    kinds = ledger.by_kind()
    if len(kinds) > 1:
        lines += [(f"all {kind}", *_cells(counts), "", "") for kind, counts in kinds.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join((name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))))
        for name, *cells in lines
    ]
    for name, one in zip(ledger.names, seen, strict=False):
        if one.left_out or one.truncated_tokens:
            reasons = "".join(f", {count:,} x {reason}" for reason, count in one.left_out.items())
            shown.append(f"left out of {name}: {one.truncated_tokens:,} tokens of truncated documents{reasons}")
    if replaced := int(ledger.column("substituted").sum()):
        shown.append(f"{replaced:,} images did not decode and were replaced")
    shown.append(f"{ledger.rows:,} rows x {seq_length:,} = {ledger.tokens:,} tokens, padding included")
    return "\n".join(["ledger", *(f"  {line.rstrip()}" for line in shown)])


def _cells(counts: Int64) -> tuple[str, ...]:
    return tuple(f"{int(counts[at]):,}" for at in (_ROWS, _SAMPLES, _TEXT, _SLOTS, _PADDING, _IMAGES))
