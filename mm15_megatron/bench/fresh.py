"""Fresh processes, one a measurement: nothing that fails, leaks or crashes in one reaches the next.

A process is started ahead and imports torch and megatron-core while the one before it measures, so that the isolation
costs seconds and not minutes. It does not touch the device before it is asked.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from mm15_megatron.errors import MM15Error

Say = Callable[[str], None]
_SAID, _DONE, _FAILED = "said", "done", "failed"
_CLOSING_SECONDS = 10.0


@dataclass(frozen=True)
class Failure:
    """Why a call gave no result.

    Attributes:
        kind: class of the error.
        message: its first line.
        traceback: all of it.
        too_late: it was ended because its seconds were over.
        bad_input: the error itself, if it is about the user's input.
    """

    kind: str
    message: str
    traceback: str = ""
    too_late: bool = False
    bad_input: MM15Error | None = None


class FreshProcesses:
    """Calls functions, each in a process of its own; at most one of them works at a time.

    Args:
        preload: modules that a process imports before it is asked anything.
    """

    def __init__(self, *, preload: tuple[str, ...]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._preload = preload
        self._waiting = self._start()

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._preload), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def call(self, function: str, *, seconds: float, say: Say, **arguments: Any) -> Any:
        """Return what ``function(say=..., **arguments)`` returns in a fresh process, or a :class:`Failure`.

        Args:
            function: ``module:name``, imported there and not here; arguments and result must be picklable.
            seconds: after as many the process is ended.
            say: takes the lines that the function says.
            arguments: passed on.
        """
        process, pipe = self._waiting
        self._waiting = self._start()
        deadline, patience = time.monotonic() + seconds, _CLOSING_SECONDS
        try:
            with suppress(BrokenPipeError):  # it ended while it waited; what it says of that is still to be read
                pipe.send((function, arguments))
            while pipe.poll(max(0.0, deadline - time.monotonic())):
                kind, value = pipe.recv()
                if kind != _SAID:
                    return value
                say(value)
            patience = 0.0
            return Failure("TimeoutError", f"no result after {seconds:.0f} s", too_late=True)
        except (EOFError, OSError):
            process.join(timeout=_CLOSING_SECONDS)
            return Failure("ProcessDied", f"the process ended with code {process.exitcode} and without a word")
        finally:
            _end(process, pipe, patience=patience)

    def close(self) -> None:
        """End the process that waits."""
        _end(*self._waiting, patience=0.0)


def _end(process: Any, pipe: Connection, *, patience: float) -> None:
    """Let a process leave by itself, so that the device is free when the next one begins; else end it."""
    pipe.close()
    if process.is_alive():
        process.join(timeout=patience)
    if process.is_alive():
        process.kill()
    process.join()


def _serve(pipe: Connection, preload: tuple[str, ...]) -> None:
    """Import, wait for one call, answer it."""
    import warnings

    # megatron-core warns at import about every optional library that is absent
    warnings.filterwarnings("ignore")
    try:
        for name in preload:
            import_module(name)
        where, arguments = pipe.recv()
        module, _, name = where.partition(":")
        function = import_module(module).__dict__[name]
        answer = _DONE, function(say=lambda text: pipe.send((_SAID, text)), **arguments)
    except (EOFError, KeyboardInterrupt):  # nobody asks any more
        return
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other measurements go on
        answer = _FAILED, failure_of(error)
    with suppress(BrokenPipeError):  # the asker has given up
        pipe.send(answer)


def failure_of(error: BaseException) -> Failure:
    """Describe an error for the report."""
    text = str(error).strip()
    return Failure(
        kind=type(error).__name__,
        message=text.splitlines()[0] if text else "",
        traceback="".join(traceback.format_exception(error)),
        bad_input=error if isinstance(error, MM15Error) else None,
    )
