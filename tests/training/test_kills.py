"""Runs that are killed again and again, anywhere: nothing that was saved is lost, nothing half-saved is loaded."""

from __future__ import annotations

import functools
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mm15_megatron.checkpoint import exchange, publish, save, torch_dist, zarr_format
from mm15_megatron.checkpoint.background import BackgroundWriter
from mm15_megatron.checkpoint.proof import Proof, damaged_files
from mm15_megatron.checkpoint.publish import checkpoints_folder, published, step_of_name, tracked
from mm15_megatron.checkpoint.store import open_checkpoint
from mm15_megatron.data.loader import Loader
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.training import saver, step

from ..helpers.tables import FaultMatrix
from .runs import records, run_arguments, run_on_rank

Arguments = Callable[..., list[str]]

WHERE: dict[str, tuple[Any, str]] = {
    "data": (Loader, "__next__"),
    "backward": (step, "finalise_gradients"),
    "update": (step, "_update"),
    "snapshot": (saver, "take_snapshot"),
    "begin": (save, "_begin"),
    "exchange": (exchange, "_received"),
    "tensors (torch_dist)": (torch_dist, "save"),
    "tensors (zarr)": (zarr_format, "_write"),
    "proof": (save, "_prove"),
    "proof written": (save, "_write_proof"),
    "publish: sync": (publish, "sync_to_disk"),
    "publish: renamed": (publish, "_move_tracker"),
    "publish: tracked": (save, "apply_retention"),
    "publish: removal": (publish.shutil, "rmtree"),
}
"""By moment: the function at whose beginning a process dies, the n-th time it comes there."""
IN_STEPS = ("data", "backward", "update", "snapshot")
OF_RANK_ZERO = ("begin", "proof written", "publish: renamed", "publish: tracked", "publish: removal", "publish: sync")
BEHIND = 8
"""Steps of a run whose writer dies in one of the first of them."""
OFTEN = {"data": 8, "exchange": 40, "tensors (zarr)": 40, "publish: sync": 30}
"""How often a moment comes in a few steps; others come once a step."""


@dataclass(frozen=True)
class Kill:
    """One death: where, the how-manieth time, in the process of which rank or in the writer beside it."""

    moment: str
    time: int
    rank: int
    in_writer: bool

    @property
    def options(self) -> list[str]:
        """What the run is told."""
        fmt = "zarr" if "zarr" in self.moment or self.time % 4 == 0 else "torch_dist"
        return [f"checkpoint.format={fmt}", f"checkpoint.async_save={str(self.in_writer).lower()}"]


def _arm(kill: Kill) -> None:
    """Have this process die."""
    holder, name = WHERE[kill.moment]
    real, seen = getattr(holder, name), {"count": 0}

    def counted(*arguments: Any, **named: Any) -> Any:
        seen["count"] += 1
        if seen["count"] == kill.time:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(holder, name, counted)


def _run(argv: list[str], kill: Kill, log: str) -> int:
    if os.environ["MM15_PARITY_RANK"] == str(kill.rank):
        if kill.in_writer:
            saver.BackgroundWriter = functools.partial(BackgroundWriter, prepare=functools.partial(_arm, kill))
        else:
            _arm(kill)
    return run_on_rank(argv, log_file=Path(log))[0]


def _draw(rng: random.Random, *, writers: bool) -> Kill:
    moment = rng.choice(list(WHERE))
    in_writer = writers and moment not in IN_STEPS and rng.random() < 0.5
    rank = 0 if moment in OF_RANK_ZERO else rng.randrange(2)
    return Kill(moment, rng.randint(1, 3 * OFTEN.get(moment, 1)), rank, in_writer)


def _check(run_dir: Path) -> int:
    """Whatever has a checkpoint's name is whole; return the step that the tracker names."""
    folder = checkpoints_folder(run_dir)
    for checkpoint in published(folder) if folder.exists() else []:
        proof = Proof.read(checkpoint)
        assert damaged_files(checkpoint, proof, names=sorted(proof.files)) == []
        assert open_checkpoint(checkpoint).step == step_of_name(checkpoint.name)
    newest = tracked(folder)
    return 0 if newest is None else open_checkpoint(newest).step


SAMPLED = [
    Kill("publish: renamed", 1, 0, False),  # before the tracker says that there is none yet
    Kill("publish: renamed", 2, 0, True),  # the first checkpoint
    Kill("data", 9, 1, False),
    Kill("update", 2, 0, False),
    Kill("exchange", 50, 1, False),
    Kill("tensors (zarr)", 30, 1, False),
    Kill("publish: sync", 20, 0, False),
    Kill("publish: renamed", 2, 0, False),
    Kill("publish: removal", 1, 0, False),
    Kill("publish: renamed", 2, 0, True),
]


def _drawn(count: int) -> list[Kill]:
    rng = random.Random(20)
    return [_draw(rng, writers=number % 2 == 0) for number in range(count)]


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(SAMPLED, id="sampled"),
        pytest.param(_drawn(100), id="a hundred", marks=pytest.mark.soak),
    ],
)
def test_killed_again_and_again(
    kills: Sequence[Kill], arguments: Arguments, tmp_path: Path, fault_matrix: FaultMatrix
) -> None:
    """Every step of the run that got through is bitwise the undisturbed run's, and each start goes on where it must."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    shared = ["schedule.decay_steps=2000", "train.global_batch_size=4", "train.micro_batch_size=2"]
    shared += ["checkpoint.save_interval=1", "checkpoint.keep=2", "parallel.use_distributed_optimizer=true"]
    tracker, saved, moments = 0, 0, Counter()
    for kill in kills:
        before = tracker
        argv = arguments(*shared, *kill.options, f"train.steps={before + BEHIND if kill.in_writer else 2000}")
        if kill.in_writer:  # costs no run: it saves by itself from then on
            assert run_on_ranks(_run, 2, argv=argv, kill=kill, log=str(log)) == [0, 0]
        else:
            with pytest.raises(RankFailure, match=f"--- rank {kill.rank} ---\nthe process died without a word"):
                run_on_ranks(_run, 2, argv=argv, kill=kill, log=str(log))
        text = log.read_text()
        tracker = _check(run_dir)
        if kill.in_writer:
            assert re.search(
                rf"rank {kill.rank}: the process that wrote the checkpoint of step \d+ ended with -9", text
            )
            assert tracker == before + BEHIND
        promised = max([before, *map(int, re.findall(r"saved .*step_0*(\d+) ", text))])
        assert tracker >= promised, f"{kill}: step {promised} was saved, the tracker names {tracker}"
        assert f"go on from step_{before:08}" in text if before else "fresh start" in text
        saved += tracker - before
        moments[kill.moment] += 1
        who = f"{'writer of ' if kill.in_writer else ''}rank {kill.rank}"
        outcome = f"tracked: step {before} -> {tracker}, whole"
        fault_matrix(f"kill -9 of {who}", f"{kill.moment}, no. {kill.time}", outcome)
    steps = tracker + 5
    assert run_arguments(arguments(*shared, f"train.steps={steps}"), world_size=2)[0] == 0
    assert run_arguments(arguments(*shared, f"train.steps={steps}", run_dir="straight"), world_size=2)[0] == 0
    found, expected = records(run_dir), records(tmp_path / "straight")
    for what in ("step", "train/loss", "train/grad_norm", "data/consumed_rows"):
        assert [one[what] for one in found] == [one[what] for one in expected], what
    if len(kills) >= 100:
        assert len(moments) == len(WHERE)
        assert sum(count for moment, count in moments.items() if moment.startswith("publish")) >= 20
        assert saved >= 30
