"""What a case of the benchmark found: ratios to its peers, figures with a limit, and what could not be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mm15_megatron.bench.data.turns import Spread


@dataclass(frozen=True)
class Comparison:
    """Ours beside one peer at the same work.

    Attributes:
        what: the work, in a few words.
        unit: of ``ours`` and ``theirs``; more is better.
        peer: who they are.
        ours: rate, median.
        theirs: rate, median.
        ratio: ours divided by theirs, from pairs of turns.
        at_least: the ratio that is aimed at; None = shown for the record.
    """

    what: str
    unit: str
    peer: str
    ours: float
    theirs: float
    ratio: Spread
    at_least: float | None = None

    @property
    def verdict(self) -> str:
        """Return how the ratio stands to its target."""
        if self.at_least is None:
            return ""
        return f"{self.at_least:g}: {'met' if self.ratio.median >= self.at_least else 'missed'}"


@dataclass(frozen=True)
class Figure:
    """A figure of ours alone; less is better.

    Attributes:
        what: what was measured.
        unit: of the values.
        value: median and quartiles.
        at_most: what is aimed at; None = shown for the record.
    """

    what: str
    unit: str
    value: Spread
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """Return how the value stands to its target."""
        if self.at_most is None:
            return ""
        return f"{self.at_most:g}: {'met' if self.value.median <= self.at_most else 'missed'}"


@dataclass(frozen=True)
class CaseResult:
    """What a case found.

    Attributes:
        work: sentences that say exactly what each contender did, on what.
        comparisons: ours beside the peers.
        figures: of ours alone.
        skipped: peers that were not measured, and why.
        not_run: why nothing was measured; empty if something was.
        versions: versions of libraries that took part, besides those that every record names.
        details: more figures, as JSON.
    """

    work: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    figures: tuple[Figure, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    not_run: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return plain values for the record."""
        rows = {
            name: [asdict(one) | {"verdict": one.verdict} for one in found]
            for name, found in (("comparisons", self.comparisons), ("figures", self.figures))
        }
        return {
            "work": list(self.work),
            **rows,
            "skipped": dict(self.skipped),
            "not_run": self.not_run,
            "versions": dict(self.versions),
            "details": dict(self.details),
        }


@dataclass(frozen=True)
class Request:
    """Sizes of the work and what else a case has to know; a smaller request is for trying out.

    Attributes:
        folder: where a case may write; it removes what it wrote.
        rounds: timed turns of each contender.
        pictures: source photos, and screenshots, that take part.
        workers: processes of preprocessing and of the loaders.
        megatron_lm: a checkout of Megatron-LM; None = its tool is not measured.
        text_mib: size of the text that is preprocessed, MiB.
        documents: documents of the dataset that is opened.
        chunk_documents: documents that are packed together.
        plan_documents: documents of the epoch that is planned.
        samples: image-text pairs of the dataset that the loaders read.
        batches: batches that a loader's turn is timed over.
    """

    folder: Path
    rounds: int
    pictures: int
    workers: int
    megatron_lm: Path | None
    text_mib: float
    documents: int
    chunk_documents: int
    plan_documents: int
    samples: int
    batches: int
