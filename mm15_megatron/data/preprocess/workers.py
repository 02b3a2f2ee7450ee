"""Processes that read units, one at a time each, and what becomes of a document that ends or stalls its process.

Native decoders (PDFium, FFmpeg, image codecs) may crash or run for ever on a hostile file, which no ``except`` catches.
So every worker keeps a journal in memory that it shares with this process: the number and name of the document that it
is about to touch. When a worker dies, or its journal stands still for too long and it is ended, this process

- notes the document on disk (``deaths.py``) and puts the unit behind the others, to be read again from its beginning by
  a fresh worker; the other workers do not notice;
- from the second death at one document on, has it passed over, unread, and counted by its reason (``reader died``,
  ``reader ran past 600 s``) with its name, like everything else that is left out;
- ends the job with an error that names the documents when a unit has too many of them, or when workers die twice on
  the way to a document, so that none can be blamed.

A document that always kills is thus left out by any number of workers, of any run: the bytes are the same. One that
does so only sometimes (the kernel is short of memory and takes the largest process) is read at the second attempt; if
it is lost all the same, the account says so. A death counts only if this process lived to see it: killing the whole
job, or telling a worker to end (SIGTERM), blames nobody. A rank of an MPI job has workers like any other process. A job
without workers reads in this process, which is not protected.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import Any, Final, TypeVar

from mm15_megatron.data.formats.base import Unit
from mm15_megatron.data.preprocess.deaths import BETWEEN, Death, Deaths, Limits
from mm15_megatron.errors import DataError, MM15Error

Result = TypeVar("Result")

_CONTEXT: Final = multiprocessing.get_context("spawn")
_TOLD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG: Final = 1
_NO_MEMORY: Final = 112  # an exit code
_HEAD: Final = struct.Struct("=qi")
_ENTRY: Final = 1024
_LOOKS: Final = 4
"""The journals are looked at so often within a time limit, and at least every second."""


class Journal:
    """Where a reader stands, readable by another process also after its death.

    Two entries are written in turn and then counted, so the last one counted is always whole.
    """

    def __init__(self) -> None:
        self._entries: Any = RawArray(ctypes.c_char, 2 * _ENTRY)
        self._turn: Any = RawValue(ctypes.c_ulonglong, 0)
        self.write(0, BETWEEN)

    @property
    def turn(self) -> int:
        """How often it was written."""
        return int(self._turn.value)

    def write(self, place: int, where: str) -> None:
        """Say which document is touched next: its number in the unit, and its name, ``BETWEEN`` before it is known."""
        raw = where.encode("utf-8", "backslashreplace")[: _ENTRY - _HEAD.size]
        turn = self.turn + 1
        at = turn % 2 * _ENTRY
        self._entries[at : at + _HEAD.size + len(raw)] = _HEAD.pack(place, len(raw)) + raw
        self._turn.value = turn

    def read(self) -> tuple[int, str]:
        """Return what was written last, by a process that has ended since."""
        at = self.turn % 2 * _ENTRY
        place, length = _HEAD.unpack(self._entries[at : at + _HEAD.size])
        raw = self._entries[at + _HEAD.size : at + _HEAD.size + length]
        return place, raw.decode("utf-8", "replace")


Task = tuple[int, Unit]
"""A unit and its number."""

Work = Callable[[int, Unit, Journal, Mapping[int, str]], Result]
"""Reads a unit (number, unit, journal to keep, reasons of the documents to pass over by their place)."""


def run_units(
    work: Work[Result], tasks: Sequence[Task], *, workers: int, folder: Path, limits: Limits
) -> Iterator[Result]:
    """Yield the results of all tasks as they come.

    Args:
        work: can be sent to other processes.
        tasks: what is to be read.
        workers: processes; 0 = this one, unprotected.
        folder: where deaths are noted, ``NNNNNN.deaths.json`` for each unit that has some.
        limits: how much is borne.

    Raises:
        DataError: whatever ``work`` raises of it, and for too many deaths.
        RuntimeError: with the text of any other error in a worker.
    """

    def deaths(task: Task) -> Deaths:
        return Deaths(folder / f"{task[0]:06d}.deaths.json", task[1], limits=limits)

    if workers == 0:
        for task in tasks:
            yield work(*task, Journal(), deaths(task).lost)
        return
    waiting, crew = deque(tasks), list[_Worker]()
    try:
        while waiting or any(worker.task for worker in crew):
            for worker in _idle(work, crew, workers=workers, needed=len(waiting)):
                task = waiting.popleft()
                worker.give(task, lost=deaths(task).lost)
            busy = [worker for worker in crew if worker.task is not None]
            ready = wait([worker.pipe for worker in busy], timeout=_look_after(limits))
            for worker in busy:
                try:
                    if worker.pipe in ready:
                        yield worker.result()
                    elif worker.stalled(limits.document_seconds):
                        raise worker.ended_for(limits.document_seconds)
                except _Died as died:
                    crew.remove(worker)
                    deaths(died.task).add(died.death, how=died.how)
                    waiting.append(died.task)
    finally:
        for worker in crew:
            worker.end()


def _look_after(limits: Limits) -> float | None:
    return min(1.0, limits.document_seconds / _LOOKS) if limits.document_seconds else None


def _idle(work: Work[Any], crew: list[_Worker], *, workers: int, needed: int) -> list[_Worker]:
    """Return at most ``needed`` workers that have nothing to do, new ones among them."""
    idle = [worker for worker in crew if worker.task is None][:needed]
    new = [_Worker(work) for _ in range(min(needed - len(idle), workers - len(crew)))]
    crew += new
    return idle + new


class _Died(Exception):  # noqa: N818 - what happened to a worker; it never leaves this file
    """A worker is no more.

    Args:
        task: what it was doing.
        death: at which document.
        how: for people.
    """

    def __init__(self, task: Task, death: Death, how: str) -> None:
        super().__init__(how)
        self.task, self.death, self.how = task, death, how


class _Worker:
    """A process that reads units."""

    def __init__(self, work: Work[Any]) -> None:
        self.task: Task | None = None
        self._journal = Journal()
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_serve, args=(work, theirs, self._journal, os.getpid()), daemon=True, name="reader"
        )
        self._process.start()
        theirs.close()

    def give(self, task: Task, *, lost: Mapping[int, str]) -> None:
        self.task = task
        self._journal.write(0, BETWEEN)  # it is idle and does not write
        # a worker that still starts has no journal to stand still: its time begins when it writes
        self._idle_turn = self._turn = self._journal.turn
        self._since = 0.0
        try:
            self.pipe.send((*task, lost))
        except OSError:  # it died between two units: its pipe is found at its end
            return

    def result(self) -> Any:
        """Return what it answers; raises _Died if it cannot."""
        assert self.task is not None
        try:
            found, error = self.pipe.recv()
        except (EOFError, OSError):
            raise self._found_dead() from None
        self.task = None
        if error is not None:
            raise error
        return found

    def stalled(self, seconds: float) -> bool:
        """Whether its journal stands still for longer than this; 0 = never."""
        turn, now = self._journal.turn, time.monotonic()
        if turn != self._turn:
            self._turn, self._since = turn, now
        return bool(seconds) and turn != self._idle_turn and now - self._since > seconds

    def ended_for(self, seconds: float) -> _Died:
        """End it; return its death."""
        assert self.task is not None
        self.end()
        return _Died(self.task, Death.by_time(*self._journal.read(), seconds=seconds), f"{seconds:g} s at one document")

    def _found_dead(self) -> _Died:
        assert self.task is not None
        self._process.join()
        code = self._process.exitcode or 0
        names = {one.value: one.name for one in signal.Signals}
        how = names.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}"
        how = "out of memory" if code == _NO_MEMORY else how
        self.pipe.close()
        if code < 0 and -code in _TOLD:
            raise DataError(
                f"a worker that read {self.task[1].name} was told to end ({how})",
                fix="the same command goes on with the units left",
            )
        return _Died(self.task, Death(*self._journal.read()), how)

    def end(self) -> None:
        """Whatever it does."""
        self.pipe.close()
        self._process.kill()
        self._process.join()


# --- In the worker


def _serve(work: Work[Any], pipe: Connection[Any, Any], journal: Journal, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the first process hears it too, and ends its workers
    _end_with(parent)
    while True:
        try:
            number, unit, lost = pipe.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = work(number, unit, journal, lost), None
        except MemoryError:
            os._exit(_NO_MEMORY)  # the polite form of being killed for it
        except MM15Error as error:
            answer = None, error
        except Exception:  # noqa: BLE001 - a fault of the program, which the first process raises
            answer = None, RuntimeError(f"in a worker that read {unit.name}:\n{traceback.format_exc()}")
        pipe.send(answer)


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent: alone it would write into the parts of the next run."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
