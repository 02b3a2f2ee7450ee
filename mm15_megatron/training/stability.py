"""What becomes of a step whose loss or gradients are not finite, or whose loss jumps: pure functions of numbers.

Every rank has the same numbers, so every rank decides alike; and what a run remembers for it is in the checkpoint, so a
resumed run decides as the uninterrupted one would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from mm15_megatron.config.schema import FaultConfig

EXIT_UNSTABLE: Final = 3
"""Exit code of a run that stopped, saved, for its loss or gradients: to start it again is a person's decision."""

_OF_A_NORMAL: Final = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
_LEAST_SPREAD: Final = 1e-3  # of the median: a course without any noise would call everything a jump


@dataclass(frozen=True)
class Verdict:
    """What a step's numbers mean.

    Attributes:
        updates: whether the step may update the weights.
        problem: what is wrong, in a clause; empty if nothing is.
        stops: whether the run ends after the step.
    """

    updates: bool
    problem: str = ""
    stops: bool = False


Judge = Callable[[float, float], Verdict]
"""Takes the loss of a step and its gradient norm before clipping."""

WITHOUT_TARGETS: Final = Verdict(False, "no row of its batch has a target, so its loss is not a number")


def finite(loss: float, grad_norm: float) -> Verdict:
    """Refuse numbers that are none."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return Verdict(True)
    return Verdict(False, f"loss {loss}, gradient norm {grad_norm}")


@dataclass(frozen=True)
class Course:
    """The last steps of a run.

    Attributes:
        losses: of the last steps that updated the weights, oldest first, at most ``faults.loss_spike_window``.
        refused: steps in a row, up to the last one, that were refused for their numbers.
    """

    losses: tuple[float, ...] = field(default=())
    refused: int = 0

    def judge(self, *, loss: float, grad_norm: float, faults: FaultConfig) -> Verdict:
        """Say whether a step may update the weights.

        Args:
            loss: mean over the targets of its batch.
            grad_norm: before clipping.
            faults: the policies.
        """
        verdict = finite(loss, grad_norm)
        if not verdict.updates:
            return replace(verdict, stops=self._is_last(faults))
        jumped = self._jump(loss, faults)
        if not jumped or faults.loss_spike == "report":
            return Verdict(True, jumped)
        return Verdict(False, jumped, stops=faults.loss_spike == "stop" or self._is_last(faults))

    def after(self, loss: float, verdict: Verdict, *, faults: FaultConfig) -> Course:
        """Return the course with one more step."""
        if not verdict.updates:
            return Course(self.losses, self.refused + 1)
        window = faults.loss_spike_window if faults.loss_spike != "off" else 0
        return Course((*self.losses, loss)[-window:] if window else (), 0)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"losses": list(self.losses), "refused": self.refused}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Course:
        """Read what :meth:`as_dict` wrote."""
        return Course(tuple(float(loss) for loss in values["losses"]), int(values["refused"]))

    def _is_last(self, faults: FaultConfig) -> bool:
        return self.refused + 1 >= faults.max_skips_in_a_row > 0

    def _jump(self, loss: float, faults: FaultConfig) -> str:
        """Compare a loss with a full window of earlier ones; the median and its deviation ignore earlier jumps."""
        if faults.loss_spike == "off" or len(self.losses) < faults.loss_spike_window:
            return ""
        middle = statistics.median(self.losses)
        spread = _OF_A_NORMAL * statistics.median(abs(one - middle) for one in self.losses)
        spread = max(spread, _LEAST_SPREAD * abs(middle))
        away = (loss - middle) / spread if spread else 0.0
        if away <= faults.loss_spike_threshold:
            return ""
        return f"loss {loss:.4f} lies {away:.1f} deviations above the median {middle:.4f} of {len(self.losses)} steps"
