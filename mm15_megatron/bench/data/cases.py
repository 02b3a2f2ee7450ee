"""The cases by name, and the run of those that were asked for.

A new case is a function from :class:`Request` to :class:`CaseResult` and one line in ``CASES``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from mm15_megatron.bench.data.images import images, tiles
from mm15_megatron.bench.data.loading import loader
from mm15_megatron.bench.data.opening import opening
from mm15_megatron.bench.data.outcome import CaseResult, Request
from mm15_megatron.bench.data.packing import packing
from mm15_megatron.bench.data.planning import planning
from mm15_megatron.bench.data.preprocess import preprocess
from mm15_megatron.bench.data.turns import others_at_work, others_watched
from mm15_megatron.errors import ConfigError, did_you_mean
from mm15_megatron.evaluation.report import commit, library_versions, machine_facts

CASES: Final[Mapping[str, Callable[[Request], CaseResult]]] = {
    "images": images,
    "tiles": tiles,
    "preprocess": preprocess,
    "open": opening,
    "loader": loader,
    "packing": packing,
    "plan": planning,
}
_LOOK_SECONDS: Final = 1.0
_CALM_LOOKS: Final = 5
QUIET: Final = 0.1
"""Cores that other programs may occupy on a machine that counts as quiet."""


@dataclass(frozen=True)
class Ran:
    """A case with the circumstances in which it was measured.

    Attributes:
        name: of the case.
        result: what it found.
        facts: command, machine, versions, commit, time, and what other programs did.
    """

    name: str
    result: CaseResult
    facts: Mapping[str, Any]

    def content(self) -> dict[str, Any]:
        """Return plain values for the record."""
        return dict(self.facts) | self.result.content()


def check_names(names: Sequence[str]) -> None:
    """Check names of cases.

    Raises:
        ConfigError: one is unknown.
    """
    for name in names:
        if name not in CASES:
            raise ConfigError(f"unknown case {name!r}", fix=did_you_mean(name, CASES))


def check_request(request: Request) -> None:
    """Check the sizes of a request.

    Raises:
        ConfigError: one is impossible.
    """
    for name in (
        "rounds",
        "pictures",
        "workers",
        "text_mib",
        "documents",
        "samples",
        "batches",
        "chunk_documents",
        "plan_documents",
    ):
        value = vars(request)[name]
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}", fix="give a positive number")
    if not request.folder.is_dir():
        raise ConfigError(f"--folder {request.folder} is no folder", fix="name one with room for the datasets")


def run_case(name: str, request: Request, *, command: str, patience: float = 0.0) -> Ran:
    """Run one case.

    Args:
        name: of the case.
        request: sizes.
        command: for the record.
        patience: seconds to wait at most until other programs leave the machine alone.
    """
    before = _wait_for_quiet(patience)
    began = time.perf_counter()
    with others_watched(every=_LOOK_SECONDS) as during:
        result = CASES[name](request)
    seconds = time.perf_counter() - began
    after = others_at_work(seconds=_LOOK_SECONDS)
    during = during or [after]
    facts = {
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "rounds": request.rounds,
        "machine": machine_facts(),
        "libraries": library_versions(),
        "commit": commit(),
        "cores_of_others": {
            "before": round(before, 2),
            "during": round(statistics.median(during), 2),
            "share_of_seconds": round(sum(one > QUIET for one in during) / len(during), 3),
            "after": round(after, 2),
        },
        "load_average_after": [round(value, 2) for value in os.getloadavg()],
    }
    return Ran(name, result, facts)


def _wait_for_quiet(patience: float) -> float:
    """Return the cores that others occupy, as soon as they have been few for a while, or after ``patience`` seconds."""
    deadline, calm = time.monotonic() + patience, 0
    while True:
        others = others_at_work(seconds=_LOOK_SECONDS)
        calm = calm + 1 if others <= QUIET else 0
        if calm == _CALM_LOOKS or time.monotonic() >= deadline:
            return others
