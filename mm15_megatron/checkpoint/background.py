"""Write checkpoints while the training goes on: in a process of its own beside each rank, spawned once, never forked.

A snapshot is copied into memory that both processes see, and the training goes on; the processes beside the ranks have
a process group of their own and take the snapshot to disk exactly as the ranks themselves would (``save.py``): they
exchange what lies scattered, write, prove, publish and move the tracker. One snapshot is on its way at a time.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing

from mm15_megatron.checkpoint.save import Snapshot, write_snapshot
from mm15_megatron.checkpoint.staging import Place, Staging
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel import cpu_emulation
from mm15_megatron.parallel.rendezvous import Rendezvous
from mm15_megatron.utils.processes import leave_with_parent
from mm15_megatron.utils.ranks import on_rank_zero

_DEVICES = "CUDA_VISIBLE_DEVICES"
_PATIENCE = 60.0  # seconds that a run which ends early leaves to what is on its way

Prepare = Callable[[], None]


class GivenUp(CheckpointError):
    """A snapshot was not written because another rank's was not."""


@dataclass(frozen=True)
class Written:
    """What became of a snapshot.

    Attributes:
        step: its step.
        folder: where it was published; "" if it was not.
        seconds: from the snapshot to a tracked checkpoint.
        error: why it was not published; None if it was.
    """

    step: int
    folder: str
    seconds: float
    error: CheckpointError | None = None


@dataclass(frozen=True)
class _Job:
    """A snapshot whose tensors lie in shared memory.

    Attributes:
        snapshot: without the data of its tensors.
        places: by key.
        memory: the shared memory; None = as for the job before.
    """

    snapshot: Snapshot
    places: Mapping[str, Place]
    memory: torch.Tensor | None


@dataclass(frozen=True)
class _Phase:
    """What a writer does next."""

    name: str


@dataclass(frozen=True)
class _Meeting:
    """Where the processes beside the ranks meet."""

    host: str
    port: int
    rank: int
    world_size: int
    timeout: timedelta


class BackgroundWriter:
    """This rank's end of the process beside it (every rank must make one, together).

    Args:
        place: where this rank stands in the job.
        timeout_minutes: a collective of the writers that waits longer ends the save.
        prepare: called in the new process before it serves; picklable.
    """

    def __init__(self, place: Rendezvous, *, timeout_minutes: int, prepare: Prepare | None = None) -> None:
        timeout = timedelta(minutes=timeout_minutes)
        # as the ranks met: under torchrun and in sbatch scripts MASTER_ADDR is rank 0's host
        named = os.environ.get("MASTER_ADDR") or socket.gethostname()
        host = on_rank_zero(lambda: "127.0.0.1" if place.local_world_size == place.world_size else named)
        self._store = None
        if place.rank == 0:
            self._store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = on_rank_zero(lambda: self._store.port if self._store is not None else 0)
        context = torch.multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        meeting = _Meeting(host, port, place.rank, place.world_size, timeout)
        self._process = context.Process(target=_serve, args=(theirs, meeting, prepare), daemon=True)
        with _without_devices():
            self._process.start()
        theirs.close()
        self._staging = Staging()
        self._began = 0.0
        self._step: int | None = None
        self._phase = ""
        self._outcome: str | CheckpointError | None = None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is on its way."""
        return self._step is not None

    @property
    def ready(self) -> bool:
        """Whether it is known what became of the snapshot."""
        while self.busy and self._outcome is None and wait([self._pipe, self._process.sentinel], timeout=0.0):
            self._hear()
        return self._outcome is not None

    def submit(self, snapshot: Snapshot) -> None:
        """Copy a snapshot and send it on its way; the live tensors may change afterwards."""
        assert not self.busy, "one snapshot at a time"
        self._began, self._step = time.monotonic(), snapshot.step
        self._phase, self._outcome = "", None
        try:
            places, grown = self._staging.hold(snapshot.contents.data())
        except CheckpointError as error:
            self._process.kill()
            self._outcome = error
            return
        bare = replace(snapshot, contents=snapshot.contents.without_data())
        with suppress(OSError):  # the process is gone: ``result`` sees that it ended, and with what
            self._pipe.send(_Job(bare, places, self._staging.memory if grown else None))

    @property
    def failed(self) -> bool:
        """Whether it is known that the snapshot will not arrive."""
        return self.ready and isinstance(self._outcome, CheckpointError)

    @property
    def phase(self) -> str:
        """What the process did when it was last heard of."""
        return self._phase

    def give_up(self) -> None:
        """End a snapshot that will not arrive because another rank's will not, and the process, which may hang."""
        if self._outcome is None:
            self._process.kill()
            self._outcome = GivenUp(
                f"the checkpoint of step {self._step} was given up", fix="another rank's report says why"
            )

    def result(self) -> Written:
        """Wait for the snapshot to arrive, and return what became of it."""
        assert self._step is not None, "no snapshot is on its way"
        while self._outcome is None:
            wait([self._pipe, self._process.sentinel])
            self._hear()
        step, self._step = self._step, None
        took = time.monotonic() - self._began
        if isinstance(self._outcome, CheckpointError):
            return Written(step, "", took, self._outcome)
        return Written(step, self._outcome, took)

    def _hear(self) -> None:
        """Take what the process says next, or that it is gone."""
        try:
            if self._pipe.poll():
                said: _Phase | str | CheckpointError = self._pipe.recv()
                if isinstance(said, _Phase):
                    self._phase = said.name
                else:
                    self._outcome = said
                return
        except (EOFError, OSError):
            pass
        self._process.join()
        code = self._process.exitcode or 0
        self._outcome = CheckpointError(
            f"the process that wrote the checkpoint of step {self._step} ended with {code}",
            fix="look for what killed it (memory of the machine?)" if code < 0 else "its own words stand in this log",
        )

    def close(self) -> None:
        """End the process and give its memory back; what is on its way may still arrive, for a while."""
        if self.busy:
            deadline = time.monotonic() + _PATIENCE
            while not self.ready and time.monotonic() < deadline:
                wait([self._pipe, self._process.sentinel], timeout=deadline - time.monotonic())
        self._pipe.close()
        self._process.join(timeout=0.0 if self._outcome is None and self.busy else 10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._staging.release()


@contextmanager
def _without_devices() -> Iterator[None]:
    """Have processes that start here see no device: those are the ranks', and all that is written is in host memory.

    megatron-core asks for devices when it is imported, before the new process could say so itself.
    """
    before = os.environ.get(_DEVICES)
    os.environ[_DEVICES] = ""
    try:
        yield
    finally:
        del os.environ[_DEVICES]
        if before is not None:
            os.environ[_DEVICES] = before


# --- The process beside a rank


def _serve(pipe: Connection[Any, Any], meeting: _Meeting, prepare: Prepare | None) -> None:
    """Write one snapshot after the other until the rank closes its end or is gone."""
    # what stops a run reaches the rank, which finishes what is on its way
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    leave_with_parent()
    cpu_emulation.install()
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    alone = _meet(meeting)
    memory = torch.empty(0, dtype=torch.uint8)
    while True:
        try:
            job: _Job = pipe.recv()
        except (EOFError, OSError):
            return
        memory = memory if job.memory is None else job.memory
        pipe.send(_write(job, memory, tell=lambda phase: pipe.send(_Phase(phase))) if alone is None else alone)


def _meet(meeting: _Meeting) -> GivenUp | None:
    """Join the other writers; return why that was not possible."""
    try:
        store = torch.distributed.TCPStore(meeting.host, meeting.port, is_master=False, timeout=meeting.timeout)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=meeting.rank, world_size=meeting.world_size, timeout=meeting.timeout
        )
    except RuntimeError as error:
        return GivenUp(
            f"the processes that write checkpoints could not meet at {meeting.host}: {error}",
            fix="another rank's report may say why; or set checkpoint.async_save=false",
        )
    return None


def _write(job: _Job, memory: torch.Tensor, *, tell: Callable[[str], None]) -> str | CheckpointError:
    contents = job.snapshot.contents.with_data({key: place.view(memory) for key, place in job.places.items()})
    try:
        return str(write_snapshot(replace(job.snapshot, contents=contents), tell=tell))
    except CheckpointError as error:
        return error
    except RuntimeError as error:  # a neighbour is gone
        return GivenUp(
            f"the checkpoint of step {job.snapshot.step} was given up: {error}",
            fix="another rank's report says why; the previous checkpoint is untouched",
        )
