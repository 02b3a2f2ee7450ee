"""What became of a case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm15_megatron.bench.cases import Case


@dataclass(frozen=True)
class CaseOutcome:
    """One case, measured or not.

    Attributes:
        case: what it is.
        status: ran, failed or not run; a case whose loss is no training's failed, and keeps its figures.
        reason: why it failed or was not run, in one line.
        traceback: all of the error.
        layers: decoder layers of its slice.
        settings: options that differ from the slice's, by path.
        seconds: wall seconds of the case, its process included.
        figures: what ``measure_case`` returned; empty if it gave nothing.
    """

    case: Case
    status: str
    reason: str = ""
    traceback: str = ""
    layers: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of a case that ran."""
        return float(self.figures["model_tflops"])

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of a case that ran."""
        return float(self.figures["tokens_per_second"])

    def content(self) -> dict[str, Any]:
        """Return plain values for the report."""
        return {
            "name": self.case.name,
            "family": self.case.family,
            "precision": self.case.precision,
            "status": self.status,
            "reason": self.reason,
            "traceback": self.traceback,
            "layers": self.layers,
            "settings": dict(self.settings),
            "wall_seconds": self.seconds,
            **self.figures,
        }
