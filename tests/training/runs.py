"""Whole runs on preloaded ranks: the entry point's steps, with what was printed and the exit code handed back."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from mm15_megatron.config.parse import parse_run
from mm15_megatron.config.validate import validate
from mm15_megatron.parity.ranks import rank_place, run_on_ranks
from mm15_megatron.presets import REGISTRY
from mm15_megatron.training import loop
from mm15_megatron.training.run import Run
from mm15_megatron.training.signals import StopRequest


class _Trap(io.StringIO):
    """A log that sends a signal to a process the moment a line is written."""

    def __init__(self, trigger: str, number: signal.Signals, pid: int) -> None:
        super().__init__()
        self.trigger, self.number, self.pid = trigger, number, pid

    def write(self, text: str) -> int:
        if text.startswith(self.trigger):
            os.kill(self.pid, self.number)
        return super().write(text)


def run_on_rank(
    argv: list[str],
    trap: tuple[str, signal.Signals, int] | None = None,
    prepare: Callable[[Run], None] | None = None,
    log_file: Path | None = None,
) -> tuple[int, str]:
    """Run a command line on this rank; rank 0 writes to ``log_file`` what must outlive it."""
    place = rank_place()
    pids: list[int] = [0] * place.world_size
    torch.distributed.all_gather_object(pids, os.getpid())
    log = _Trap(trap[0], trap[1], pids[trap[2]]) if trap else io.StringIO()
    sys.stdout = log if log_file is None or place.rank else log_file.open("w", buffering=1, encoding="utf-8")
    os.register_at_fork(before=lambda: log.write("this process forks\n"))
    parsed = parse_run(argv, presets=REGISTRY)
    validate(parsed.config, world_size=place.world_size)
    with StopRequest() as request, ExitStack() as stack:
        run = Run.build(parsed.config, origins=parsed.origins, place=place, stack=stack)
        if prepare is not None:
            prepare(run)
        return loop.run(run, request=request), log.getvalue()


def run_arguments(
    argv: list[str],
    *,
    world_size: int = 1,
    trap: tuple[str, signal.Signals, int] | None = None,
    prepare: Callable[[Run], None] | None = None,
) -> tuple[int, str]:
    """Run a command line on ``world_size`` ranks.

    Args:
        argv: the arguments.
        world_size: ranks.
        trap: (start of a log line, signal, rank): when rank 0 writes the line, the rank gets the signal.
        prepare: called on every rank between building and training.

    Returns:
        The exit code of the loop, equal on all ranks, and what rank 0 wrote.
    """
    results = run_on_ranks(run_on_rank, world_size, argv=argv, trap=trap, prepare=prepare)
    assert len({code for code, _ in results}) == 1
    return results[0]


def records(run_dir: Path) -> list[dict[str, float]]:
    """The JSONL records of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
