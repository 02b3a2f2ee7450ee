"""Contenders take turns at the same work, so that a machine that slows down slows all of them."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Seconds:
    """What one turn took.

    Attributes:
        wall: seconds that passed.
        core: seconds that it occupied a core, threads and processes summed.
    """

    wall: float
    core: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several turns."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Say it for people."""
        return f"{self.median:.3g} (quartiles {self.low:.3g} and {self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles; of one value, that value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return how many times as fast ours is, from the seconds of each pair of turns.

    Raises:
        ValueError: the two have different numbers of turns.
    """
    return spread([their / our for our, their in zip(ours, theirs, strict=True)])


def timed(work: Callable[[], object]) -> Seconds:
    """Do ``work`` in this process, and time it with all its threads."""
    wall, core = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - core)


def in_turn(
    groups: Mapping[str, Mapping[str, Callable[[], object]]], *, rounds: int
) -> dict[str, dict[str, list[Seconds]]]:
    """Time every contender at every group of work, round by round; who begins changes with the round.

    Args:
        groups: work of each contender, by contender, by group; all of a group do the same.
        rounds: timed rounds, after one that does not count.

    Returns:
        Seconds of each round, by contender, by group.
    """
    found: dict[str, dict[str, list[Seconds]]] = {name: {who: [] for who in turns} for name, turns in groups.items()}
    for number in range(rounds + 1):
        for name, turns in groups.items():
            for who in list(turns) if number % 2 else reversed(list(turns)):
                seconds = timed(turns[who])
                if number:
                    found[name][who].append(seconds)
    return found


def others_at_work(*, seconds: float) -> float:
    """Return how many cores the machine's programs occupy while this process sleeps for ``seconds``."""
    before, began = _busy_seconds(), time.perf_counter()
    time.sleep(seconds)
    return (_busy_seconds() - before) / (time.perf_counter() - began)


@contextmanager
def others_watched(*, every: float) -> Iterator[list[float]]:
    """Fill the list with the cores that other programs occupy, looking ``every`` so many seconds inside the block."""
    found: list[float] = []
    done = threading.Event()

    def look() -> None:
        busy, mine, began = _busy_seconds(), tree_core_seconds(), time.perf_counter()
        while not done.wait(every):
            then, busy, mine, began = (busy, mine, began), _busy_seconds(), tree_core_seconds(), time.perf_counter()
            found.append(max(0.0, (busy - then[0] - (mine - then[1])) / (began - then[2])))

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def tree_core_seconds() -> float:
    """Return the seconds that this process, its ended children and its living descendants have occupied a core."""
    mine = os.times()
    total = mine.user + mine.system + mine.children_user + mine.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Ask the system to forget the pages of files that it holds in memory."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
