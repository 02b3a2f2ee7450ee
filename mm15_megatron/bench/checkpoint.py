"""Checkpoints of one model in turn: ours in each format, waiting and beside the training; torch.save; the bare disk."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from mm15_megatron.batch import MMBatch
from mm15_megatron.checkpoint.background import BackgroundWriter
from mm15_megatron.checkpoint.save import Snapshot, take_snapshot, write_snapshot
from mm15_megatron.checkpoint.store import load_training, open_latest
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.training.step import StepParts, train_step

DISK, TORCH_SAVE = "the disk alone", "torch.save"
FORMATS: Final = ("torch_dist", "zarr")
_BLOCK: Final = 8 << 20

Say = Callable[[str], None]


@dataclass
class Way:
    """One way of writing the same bytes, over all rounds; the slowest rank counts.

    Attributes:
        name: what it is.
        seconds: until the bytes were on disk (ours: proven, published and tracked).
        blocked: seconds in which no step could be taken.
        phases: seconds of each phase of a save that waits, by name.
        load: seconds until a run had them back.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        num_bytes: of all ranks' tensors.
        ways: by name.
        quiet_steps: seconds of training steps while nothing was saved.
        steps_beside: seconds of steps beside a save, by format.
    """

    num_bytes: int
    ways: dict[str, Way]
    quiet_steps: list[float]
    steps_beside: dict[str, list[float]]


class Bench:
    """Measures on one model (every rank must make one, and each call).

    Args:
        parts: model and optimizer; at least one step was taken.
        batches: micro-batches of a step.
        folder: an empty folder on the file system that is measured.
        say: takes progress.
    """

    def __init__(self, parts: StepParts, batches: Sequence[MMBatch], *, folder: Path, say: Say) -> None:
        self._parts, self._batches, self._folder, self._say = parts, batches, folder, say
        self._saves = 0
        names = (DISK, TORCH_SAVE, *FORMATS, *(f"{name}, async" for name in FORMATS))
        self._measured = Measured(self._num_bytes(), {name: Way(name) for name in names}, [], {n: [] for n in FORMATS})

    def run(self, rounds: int) -> Measured:
        """Take every way once a round, in turn, after a first round of each that does not count."""
        with ExitStack() as stack:
            writer = BackgroundWriter(self._parts.topology.place, timeout_minutes=30)
            stack.callback(writer.close)
            for number in range(rounds + 1):
                for name in FORMATS:
                    self._waiting(name)
                    self._beside(name, writer)
                self._peer(DISK, _write_bare)
                self._peer(TORCH_SAVE, _write_torch)
                if number == 0:
                    self._forget()
                self._say(f"round {number} of {rounds}")
        return self._measured

    def _forget(self) -> None:
        for way in self._measured.ways.values():
            for found in (way.seconds, way.blocked, way.load, *way.phases.values()):
                found.clear()
        self._measured.quiet_steps.clear()
        for steps in self._measured.steps_beside.values():
            steps.clear()

    def _num_bytes(self) -> int:
        mine = sum(tensor.nbytes for tensor in self._snapshot("torch_dist").contents.data().values())
        total = torch.tensor(mine, dtype=torch.int64, device=self._parts.topology.device)
        torch.distributed.all_reduce(total)
        return int(total.item())

    def _config(self, fmt: str) -> RunConfig:
        cfg = self._parts.cfg
        return replace(
            cfg,
            train=replace(cfg.train, run_dir=str(self._folder / fmt)),
            checkpoint=replace(cfg.checkpoint, format=fmt, keep=1),
        )

    def _step(self) -> float:
        self._meet()
        began = time.perf_counter()
        train_step(self._parts, iter(self._batches), num_microbatches=len(self._batches))
        if self._parts.topology.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _meet(self, *, quiet_disk: bool = False) -> None:
        if quiet_disk:  # what others wrote before must not be written while this one is timed
            os.sync()
        torch.distributed.barrier()

    def _slowest(self, seconds: float) -> float:
        longest = torch.tensor(seconds, dtype=torch.float64, device=self._parts.topology.device)
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
        return float(longest.item())

    def _waiting(self, fmt: str) -> None:
        """A save for which the training waits, and a load of what it wrote."""
        way, marks = self._measured.ways[fmt], [("snapshot", 0.0)]
        self._measured.quiet_steps.append(self._slowest(self._step()))
        self._meet(quiet_disk=True)
        began = time.perf_counter()
        snapshot = self._snapshot(fmt)
        write_snapshot(snapshot, tell=lambda phase: marks.append((phase, time.perf_counter() - began)))
        taken = time.perf_counter() - began
        ends = [at for _, at in marks[1:]] + [taken]
        for (name, start), end in zip(marks, ends, strict=True):
            way.phases.setdefault(name, []).append(self._slowest(end - start))
        way.seconds.append(self._slowest(taken))
        way.blocked.append(way.seconds[-1])
        checkpoint = open_latest(self._folder / fmt)
        assert checkpoint is not None, "just published"
        self._meet()
        began = time.perf_counter()
        load_training(checkpoint, self._config(fmt), self._parts.chunks, self._parts.optimizer)
        way.load.append(self._slowest(time.perf_counter() - began))

    def _snapshot(self, fmt: str) -> Snapshot:
        """A snapshot; without a step since the last one it would be refused as stale."""
        self._saves += 1
        parts = self._parts
        assert parts.optimizer is not None, "there is an optimizer"
        arguments = {"topology": parts.topology, "step": self._saves, "data_digest": "", "progress": {}}
        return take_snapshot(self._config(fmt), parts.chunks, parts.optimizer, **arguments)

    def _beside(self, fmt: str, writer: BackgroundWriter) -> None:
        """A save beside which the training goes on."""
        way = self._measured.ways[f"{fmt}, async"]
        self._step()
        self._meet(quiet_disk=True)
        began = time.perf_counter()
        writer.submit(self._snapshot(fmt))
        way.blocked.append(self._slowest(time.perf_counter() - began))
        while self._slowest(float(not writer.ready)):
            self._measured.steps_beside[fmt].append(self._slowest(self._step()))
        written = writer.result()
        if written.error is not None:
            raise written.error
        way.seconds.append(self._slowest(written.seconds))

    def _peer(self, name: str, write: Callable[[dict[str, torch.Tensor], Path], None]) -> None:
        """Write what this rank holds into one file of its own beside the one before, which goes then, as ours do."""
        way = self._measured.ways[name]
        # copies: of tensors that are views of one buffer, torch.save writes the buffer
        tensors = {key: one.clone() for key, one in self._snapshot("torch_dist").contents.data().items()}
        path = self._folder / f"{name.replace(' ', '_')}_{torch.distributed.get_rank()}"
        new = path.with_name(f"{path.name}.new")
        self._step()  # as before ours: a virtual machine takes back memory that nobody has used for a while
        self._meet(quiet_disk=True)
        began = time.perf_counter()
        write(tensors, new)
        way.seconds.append(self._slowest(time.perf_counter() - began))
        way.blocked.append(way.seconds[-1])
        new.replace(path)


def _write_bare(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """The bytes, block by block, and a sync: what the disk takes by itself."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for tensor in tensors.values():
            content = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            for first in range(0, len(content), _BLOCK):
                block = content[first : first + _BLOCK]
                while block:
                    block = block[os.write(descriptor, block) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())


def report_lines(measured: Measured, *, ranks: int) -> list[str]:
    """Return the figures as lines of Markdown."""
    mega, rounds = measured.num_bytes / 1e6, len(measured.ways[DISK].seconds)
    median = {name: statistics.median(way.seconds) for name, way in measured.ways.items()}
    lines = [
        f"{mega:,.0f} MB of weights, masters and moments from {ranks} rank{'' if ranks == 1 else 's'}; medians of "
        f"{rounds} round{'' if rounds == 1 else 's'}, the slowest rank counts.",
        "",
        "| way | seconds | MB/s | of the disk alone | of torch.save | blocked, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in measured.ways.items():
        lines.append(
            f"| {name} | {median[name]:.2f} | {mega / median[name]:,.0f} | {median[DISK] / median[name]:.2f} | "
            f"{median[TORCH_SAVE] / median[name]:.2f} | {statistics.median(way.blocked):.2f} |"
        )
    lines.append("")
    for fmt in FORMATS:
        share = statistics.median(measured.ways[f"{fmt}, async"].blocked) / median[fmt]
        lines.append(
            f"{fmt}: a save beside the training blocks it for **{share:.1%}** of the time of one that it waits for "
            f"(target 15 %); steps beside it take {_beside_ratio(measured, fmt)}"
        )
        parts = ", ".join(f"{n} {statistics.median(v):.2f} s" for n, v in measured.ways[fmt].phases.items())
        lines.append(f"  - phases of the save that waits: {parts}; to load it {_load(measured.ways[fmt])}")
    return lines


def _beside_ratio(measured: Measured, fmt: str) -> str:
    steps = measured.steps_beside[fmt]
    if not steps:
        return "nothing longer: none was long enough to be beside it"
    ratio = statistics.median(steps) / statistics.median(measured.quiet_steps)
    return f"{ratio:.2f} times a quiet one ({len(steps)} of them)"


def _load(way: Way) -> str:
    return f"{statistics.median(way.load):.2f} s, its files checked first"


def figures_of(measured: Measured) -> dict[str, Any]:
    """Return the figures as plain values."""
    return {
        "bytes": measured.num_bytes,
        "ways": {
            name: {"seconds": way.seconds, "blocked": way.blocked, "phases": way.phases, "load": way.load}
            for name, way in measured.ways.items()
        },
        "quiet_steps": measured.quiet_steps,
        "steps_beside": measured.steps_beside,
    }
