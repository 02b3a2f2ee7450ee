"""Run a function on several gloo ranks, each a real process from one preloaded forkserver.

A forkserver imports torch and megatron-core once; every rank is then a fork of it, so a four-rank test starts in a
fraction of a second. Ranks meet through a file, use one thread each, and report their result or their traceback with
the rank's number.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch",
    "megatron.core.models.gpt",
    "megatron.core.pipeline_parallel",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "mm15_megatron.models.mm_model",
]


class RankFailure(AssertionError):
    """One or more ranks raised, died or did not finish; the message holds every traceback."""


def run_on_ranks(fn: Callable[..., Any], world_size: int, *, timeout: float = 240.0, **kwargs: Any) -> list[Any]:
    """Call ``fn(**kwargs)`` on ``world_size`` ranks of a job and return their results in rank order.

    ``fn`` and its arguments must be picklable; inside, ``rank_place()`` tells the rank. torch.distributed is
    initialised before ``fn`` runs.

    Raises:
        RankFailure: if any rank fails; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(theirs, fn, kwargs, rank, world_size, str(Path(folder) / "store")), daemon=False
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and time.monotonic() < deadline:
        # After a first failure the others usually hang in a collective: give them a moment to report, no more.
        ready = wait(list(waiting), timeout=2.0 if failures else 1.0)
        if failures and not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, "the process died without a word"
            (results if ok else failures)[rank] = value
    if not failures:
        failures = {rank: f"no answer after {timeout} s" for rank in waiting.values()}
    if failures:
        raise RankFailure("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in sorted(results)]


def _child(pipe: Connection, fn: Callable[..., Any], kwargs: dict[str, Any], rank: int, world: int, store: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(MM15_TEST_RANK=str(rank), MM15_TEST_WORLD=str(world))
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        _answer(pipe, True, fn(**kwargs))
    except BaseException:  # noqa: BLE001 - the parent prints it with the rank's number
        _answer(pipe, False, traceback.format_exc())
    finally:
        pipe.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _answer(pipe: Connection, ok: bool, value: Any) -> None:
    # Plain pickle copies tensors; multiprocessing's own would share memory with a process that is about to end.
    pipe.send_bytes(pickle.dumps((ok, value)))


def rank_place() -> Any:
    """Return this rank's :class:`Rendezvous` inside ``run_on_ranks``."""
    from mm15_megatron.parallel.rendezvous import Rendezvous

    rank, world = int(os.environ["MM15_TEST_RANK"]), int(os.environ["MM15_TEST_WORLD"])
    return Rendezvous("single", rank, world, rank, world, "")
