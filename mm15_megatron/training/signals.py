"""SIGTERM and SIGUSR1: finish what runs, save, and leave with a code that a scheduler can tell from a failure."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch

EXIT_INTERRUPTED = 75
"""Exit code of a run that was asked to stop and saved: start the same command again to go on (EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal until the loop asks; a context manager that restores the former handlers.

    It is entered before the run is built: a signal in the meantime must not end the process half-way.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        """Install the handlers (main thread only)."""
        self._former = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, *, device: torch.device) -> str:
        """Return the name of a signal that any rank received, or "" (every rank must call; all return the same)."""
        number = torch.tensor(self.received, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(number.item())).name if number.item() else ""
