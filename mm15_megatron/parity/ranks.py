"""Run a function on several ranks of this machine, each a real process.

On the CPU a forkserver imports torch and megatron-core once; every rank is then a fork of it, so a four-rank job starts
in a fraction of a second. On GPUs every rank starts afresh: megatron-core asks torch for devices while it is imported,
and torch then refuses CUDA in a fork. Ranks meet through a file, use one thread each, and report their result or their
traceback with the rank's number.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mm15_megatron.errors import MM15Error

_PRELOAD = [
    "torch",
    "megatron.core.models.gpt",
    "megatron.core.pipeline_parallel",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "mm15_megatron.models.mm_model",
]
_RANK, _WORLD, _STORE = "MM15_PARITY_RANK", "MM15_PARITY_WORLD", "MM15_PARITY_STORE"


class RankFailure(RuntimeError):
    """One or more ranks raised, died or did not finish; the message holds every traceback.

    Args:
        message: the tracebacks, by rank.
        bad_input: the error about the user's input that a rank raised, if one did.
    """

    def __init__(self, message: str, *, bad_input: MM15Error | None = None) -> None:
        super().__init__(message)
        self.bad_input = bad_input


@dataclass(frozen=True)
class _Failure:
    text: str
    bad_input: MM15Error | None = None


def run_on_ranks(
    fn: Callable[..., Any], world_size: int, *, timeout: float = 240.0, device: str = "cpu", **kwargs: Any
) -> list[Any]:
    """Call ``fn(**kwargs)`` on ``world_size`` ranks of a job and return their results in rank order.

    ``fn`` and its arguments must be picklable; inside, ``rank_place()`` tells the rank. On the CPU torch.distributed is
    initialised before ``fn`` runs; on CUDA it is left to ``build_topology``, which selects the device first.

    Args:
        fn: a function of a module, called with ``kwargs``.
        world_size: ranks.
        timeout: seconds until ranks that have not answered count as failed.
        device: cpu or cuda.
        kwargs: arguments of ``fn``.

    Raises:
        RankFailure: if any rank fails; the others are ended.
    """
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            place = {_RANK: str(rank), _WORLD: str(world_size), _STORE: str(Path(folder) / "store")}
            process = context.Process(target=_child, args=(theirs, fn, kwargs, place, device), daemon=False)
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
    failures: dict[int, _Failure] = {}
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
                ok, value = False, _Failure("the process died without a word")
            (results if ok else failures)[rank] = value
    if not failures:
        failures = {rank: _Failure(f"no answer after {timeout} s") for rank in waiting.values()}
    if failures:
        text = "\n".join(f"--- rank {rank} ---\n{failure.text}" for rank, failure in sorted(failures.items()))
        raise RankFailure(text, bad_input=next((f.bad_input for f in failures.values() if f.bad_input), None))
    return [results[rank] for rank in sorted(results)]


def _child(
    pipe: Connection, fn: Callable[..., Any], kwargs: dict[str, Any], place: dict[str, str], device: str
) -> None:
    import torch

    from mm15_megatron.parallel.rendezvous import record_collectives

    torch.set_num_threads(1)
    os.environ.update(place)
    record_collectives()
    try:
        if device == "cpu":
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{place[_STORE]}", rank=int(place[_RANK]), world_size=int(place[_WORLD])
            )
        _answer(pipe, True, fn(**kwargs))
    except BaseException as error:  # noqa: BLE001 - the parent raises it with the rank's number
        _answer(pipe, False, _Failure(traceback.format_exc(), error if isinstance(error, MM15Error) else None))
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

    rank, world = int(os.environ[_RANK]), int(os.environ[_WORLD])
    return Rendezvous("single", rank, world, rank, world, f"file://{os.environ[_STORE]}")
