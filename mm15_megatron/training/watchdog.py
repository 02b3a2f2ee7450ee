"""When a rank hangs: say which one and where, and end the job so that its launcher can start it again.

A thread beside each rank sees how long the rank has been in one phase. A rank that stays too long writes a report
(``hang_report.py``) under ``<run_dir>/hangs/<start of the run>/``; ranks that have waited for a while look there and
write theirs. The lowest that wrote merges the reports into ``report.txt`` and the log, and all leave with EXIT_HANG.
The thread can do so even when the rank's own thread never returns, and a rank whose thread cannot is named for its
silence.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

import torch

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.training.hang_report import (
    RankReport,
    merged_text,
    newest_collectives,
    recorded_collectives,
    stack_of,
)
from mm15_megatron.utils.ranks import gathered_objects, on_rank_zero

EXIT_HANG: Final = 4
"""Exit code of the ranks of a job in which a rank hung: the launcher may start the job again."""

_SHARE_OF_COLLECTIVES: Final = 0.8  # of the time after which a collective itself gives up
_LOOKS_EVERY: Final = 0.25  # seconds
_JOINS_AFTER: Final = 0.25  # of the limit, from when a rank looks for reports of others
_PATIENCE: Final = (15.0, 60.0)  # seconds for the reports of the others: at least and at most
_SHARE_OF_PATIENCE: Final = 0.2  # of the limit: machines may see a new file of a shared file system late

T = TypeVar("T")


def hang_seconds(cfg: RunConfig) -> float:
    """How long a phase of a rank may last; 0 = for ever."""
    minutes = cfg.faults.hang_timeout_minutes
    if minutes is None:
        minutes = _SHARE_OF_COLLECTIVES * cfg.parallel.distributed_timeout_minutes
    return 60.0 * minutes


@dataclass(frozen=True)
class _Phase:
    """What a rank does, and in which step; what it does before the first may last."""

    step: int
    name: str


class Watchdog:
    """Watches one rank; a context manager.

    Args:
        folder: where reports go; made when there is one.
        rank: this rank.
        places: machine and process of every rank, for the report.
        seconds: how long a phase may last; 0 = for ever.
    """

    def __init__(self, folder: Path, *, rank: int, places: list[str], seconds: float) -> None:
        self._folder, self._rank, self._places, self._limit = folder, rank, places, seconds
        self._main = threading.main_thread().ident or 0
        self._phase = _Phase(0, "not begun")
        self._batch: Callable[[], str] = lambda: "none yet"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @classmethod
    def of_run(cls, cfg: RunConfig) -> Watchdog:
        """Make the watchdog of this rank (every rank must call)."""
        places = gathered_objects(f"{socket.gethostname()}, process {os.getpid()}")
        started = on_rank_zero(lambda: f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}")
        folder = Path(cfg.train.run_dir) / "hangs" / started
        return cls(folder, rank=torch.distributed.get_rank(), places=places, seconds=hang_seconds(cfg))

    def __enter__(self) -> Watchdog:
        """Begin to watch, where there is a limit."""
        if self._limit:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cease to watch."""
        self._stop.set()
        if self._limit:
            self._thread.join()

    # --- What the rank's own thread says

    def step(self, number: int, *, batch: Callable[[], str]) -> None:
        """Say that a step begins, and who can tell what its batch is made of."""
        self._batch = batch
        self._phase = _Phase(number, "start")

    def enter(self, phase: str) -> None:
        """Say that the rank begins something, which counts anew."""
        self._phase = _Phase(self._phase.step, phase)

    def watched(self, batches: Iterable[T], *, phase: str) -> Iterator[T]:
        """Yield ``batches``; each counts anew."""
        for batch in batches:
            self.enter(phase)
            yield batch

    # --- The thread beside it

    def _watch(self) -> None:
        seen, spent, last = self._phase, 0.0, time.monotonic()
        while not self._stop.wait(_LOOKS_EVERY):
            now = time.monotonic()
            # a process that stood still itself (suspended with its job) learns nothing from the clock
            spent += min(now - last, 4 * _LOOKS_EVERY)
            last = now
            if self._phase is not seen:
                seen, spent = self._phase, 0.0
            overdue = spent > self._limit and seen.step > 0
            if overdue or (spent > _JOINS_AFTER * self._limit and self._folder.exists()):
                self._report(seen, spent)

    def _report(self, phase: _Phase, seconds: float) -> None:
        """Write this rank's report, merge all if no lower rank does, and leave, whatever happens on the way."""
        try:
            report = self._own_report(phase, seconds)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._put(f"rank_{self._rank:05}.json", report.to_json())
            reports = self._collect()
            if reports[0].rank == self._rank:
                text = merged_text(reports, places=self._places)
                sys.stderr.write(text)
                sys.stderr.flush()
                self._put("report.txt", text)
            self._wait_for(lambda: (self._folder / "report.txt").exists())  # launchers end all when one has ended
        except BaseException:
            sys.stderr.write(f"rank {self._rank} hangs in step {phase.step}, {phase.name}; its report failed:\n")
            traceback.print_exc()
            raise
        finally:
            os._exit(EXIT_HANG)

    def _own_report(self, phase: _Phase, seconds: float) -> RankReport:
        stack, in_distributed = stack_of(sys._current_frames()[self._main])
        return RankReport(
            self._rank,
            phase.step,
            phase.name,
            seconds,
            batch=self._batch(),
            collectives=newest_collectives(recorded_collectives()),
            stack=stack,
            in_distributed=in_distributed,
        )

    def _put(self, name: str, text: str) -> None:
        partial = self._folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._folder / name)

    def _collect(self) -> list[RankReport]:
        """Return the reports, lowest rank first; ranks that cannot say anything are not waited for for ever."""
        self._wait_for(lambda: len(self._written()) == len(self._places))
        return [RankReport.from_json(path.read_text(encoding="utf-8")) for path in self._written()]

    def _written(self) -> list[Path]:
        return sorted(self._folder.glob("rank_*.json"))

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        least, most = _PATIENCE
        deadline = time.monotonic() + min(max(_SHARE_OF_PATIENCE * self._limit, least), most)
        while not ready() and time.monotonic() < deadline:
            time.sleep(_LOOKS_EVERY)
