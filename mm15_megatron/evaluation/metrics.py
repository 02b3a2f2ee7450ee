"""Accuracy with its uncertainty, by kind of question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mm15_megatron.errors import DataError

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def exact_match(answer: str, truth: str) -> bool:
    """Whether two texts are the same but for white space at the ends and its amount inside."""
    return answer.split() == truth.split()


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson 1927): inside [0, 1], sound for few or extreme outcomes.

    Raises:
        DataError: if ``hits`` successes out of ``total`` are impossible, or there was no trial.
    """
    if total < 1 or not 0 <= hits <= total:
        raise DataError(
            f"{hits} hits of {total} questions", fix="count at least one question, and no more hits than that"
        )
    share, z2 = hits / total, _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # At the ends the exact bound is 0 or 1; rounding must not move it past the share itself.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == total else middle + half)


@dataclass(frozen=True)
class Score:
    """Right answers out of ``n``."""

    hits: int
    n: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share."""
        return wilson_interval(self.hits, self.n)

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """Plain values for a report."""
        return {
            "accuracy": round(self.accuracy, 4),
            "n": self.n,
            "hits": self.hits,
            "interval95": [round(bound, 4) for bound in self.interval],
        }


def scores_by_kind(outcomes: Iterable[tuple[str, bool]]) -> Mapping[str, Score]:
    """Count (kind, was the answer right) by kind, in the order in which kinds first appear."""
    hits: dict[str, int] = {}
    totals: dict[str, int] = {}
    for kind, right in outcomes:
        totals[kind] = totals.get(kind, 0) + 1
        hits[kind] = hits.get(kind, 0) + bool(right)
    return {kind: Score(hits[kind], total) for kind, total in totals.items()}
