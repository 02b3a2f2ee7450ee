"""What a person sees of long work: a bar that rewrites its line on a terminal, plain lines in a log, else nothing."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 24


def clock(seconds: float) -> str:
    """Return a duration such as ``2:05`` or ``1:02:05``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Steps of a run, or pieces of another work, with rate and time left.

    Args:
        total: steps of the whole run.
        done: steps taken before this process started; they do not count for the rate.
        noun: what a step is called.
        enabled: False keeps every rank but one silent.
        stream: where to write; a terminal gets a bar, anything else plain lines.
    """

    def __init__(
        self, total: int, *, done: int = 0, noun: str = "step", enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self._total, self._first, self._noun = total, done, noun
        self._enabled = enabled
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._open_line = False

    def update(self, done: int, text: str) -> None:
        """Show that ``done`` steps are taken, followed by ``text``."""
        if not self._enabled:
            return
        spent = time.monotonic() - self._started
        taken = done - self._first
        pace = spent / taken if taken else 0.0
        timing = f"{self._rate(pace)}, {clock(pace * (self._total - done))} left"
        if not self._terminal:
            self._write(f"{self._noun} {done}/{self._total} | {text} | {timing}\n")
            return
        filled = _WIDTH * done // max(self._total, 1)
        self._write(f"\r\x1b[K[{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{self._total} {text} | {timing}")
        self._open_line = True

    def _rate(self, pace: float) -> str:
        """Seconds a step, or steps a second where they are many."""
        return f"{1 / pace:.0f} {self._noun}s/s" if 0 < pace < 0.02 else f"{pace:.2f} s/{self._noun}"

    def line(self, text: str) -> None:
        """Write a line of its own; the bar goes on below it."""
        if self._enabled:
            self._write(("\n" if self._open_line else "") + text + "\n")
            self._open_line = False

    def close(self) -> None:
        """End the bar's line."""
        if self._enabled and self._open_line:
            self._write("\n")
            self._open_line = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
