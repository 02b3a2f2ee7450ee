"""Memory that a process and its children own, at its peak."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Final

import psutil

_EVERY_SECONDS: Final = 0.05


class OwnMemory:
    """Context manager that looks again and again; mapped files and shared pages are not counted.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> OwnMemory:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look a last time."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            self.peak = max(self.peak, sum(map(_owned, (me, *me.children(recursive=True)))))
            if self._done.wait(_EVERY_SECONDS):
                return


def _owned(process: psutil.Process) -> int:
    try:
        found = process.memory_info()
    except psutil.Error:  # it ended meanwhile
        return 0
    return int(found.rss - found.shared)
