"""Runs that save while they go on."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mm15_megatron.batch import MMBatch
from mm15_megatron.checkpoint import save, staging
from mm15_megatron.checkpoint.store import open_latest
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parity.ranks import RankFailure
from mm15_megatron.training.run import Feed, Run
from mm15_megatron.training.signals import EXIT_INTERRUPTED

from ..helpers.tables import FaultMatrix
from .runs import records, run_arguments

IN_BACKGROUND = ["checkpoint.async_save=true", "checkpoint.save_interval=2"]


def test_a_run_saves_beside_its_steps(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """Interrupted and resumed, its figures are those of a run that waits for its saves."""
    argv = arguments("schedule.decay_steps=9", *IN_BACKGROUND)
    code, log = run_arguments([*argv, "train.steps=9"], world_size=2, trap=("step 4 copied", signal.SIGTERM, 1))
    assert code == EXIT_INTERRUPTED
    assert "this process forks" not in log
    assert [f"step {step} copied in" in log for step in (2, 4, 6)] == [True, True, False]
    saved = open_latest(tmp_path / "run")
    assert saved is not None
    last = saved.step
    assert log.count("saved ") == len({2, 4, last})
    assert f"stopped by SIGTERM after step {last}" in log
    code, log = run_arguments([*argv, "train.steps=9"], world_size=2)
    assert code == 0
    final = open_latest(tmp_path / "run")
    assert final is not None
    assert final.step == 9
    waiting = arguments("schedule.decay_steps=9", "train.steps=9", run_dir="waiting")
    assert run_arguments(waiting, world_size=2)[0] == 0
    found, expected = records(tmp_path / "run"), records(tmp_path / "waiting")
    for what in ("train/loss", "train/grad_norm"):
        assert [one[what] for one in found] == [one[what] for one in expected], what


@pytest.mark.parametrize("where", ["data.num_workers=0", "data.num_workers=1"])
def test_saves_while_dali_decodes(where: str, arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """DALI's pipeline is live, in this process or in a worker's; nothing forks it, and its images are the same."""
    given = [one for one in arguments("train.steps=5") if not one.startswith(("data.decoder", "data.num_workers"))]
    argv = [*given, "data.decoder=dali", where]
    code, log = run_arguments([*argv, *IN_BACKGROUND])
    assert code == 0
    assert "this process forks" not in log
    assert log.count("saved ") == 3
    elsewhere = [one for one in argv if not one.startswith("train.run_dir")] + [f"train.run_dir={tmp_path / 'waiting'}"]
    assert run_arguments(elsewhere)[0] == 0
    found, expected = records(tmp_path / "run"), records(tmp_path / "waiting")
    assert [one["train/loss"] for one in found] == [one["train/loss"] for one in expected]


class _LosesTheWriter(Feed):
    """A real feed behind which the process beside rank 1 is killed, once the first save has arrived."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.feed.loader, run.watchdog)
        self._run = run

    def __next__(self) -> MMBatch:
        writer = self._run.saver._background
        if writer is not None and self._run.topology.place.rank == 1 and self._run.state.step > 20 and not writer.busy:
            writer._process.kill()
        return super().__next__()


def _lose_the_writer(run: Run) -> None:
    run.feed = _LosesTheWriter(run)


@pytest.mark.parametrize("last", [False, True])
def test_a_lost_writer_costs_no_step(
    last: bool, arguments: Callable[..., list[str]], tmp_path: Path, fault_matrix: FaultMatrix
) -> None:
    """Every rank hears of it, the run saves where it stands, and waits for its saves from then on."""
    interval = 100 if last else 20
    argv = arguments("train.steps=100", "checkpoint.async_save=true", f"checkpoint.save_interval={interval}")
    code, log = run_arguments(argv, world_size=2, prepare=_lose_the_writer)
    assert code == 0
    lost = re.search(r"rank 1: the process that wrote the checkpoint of step (\d+) ended with -9 \(look for .*\)", log)
    assert lost is not None
    behind = log[lost.end() :]
    assert "copied in" not in behind
    saved = [int(step) for step in re.findall(r"saved \S+step_0*(\d+) ", behind)]
    assert int(lost[1]) <= saved[0] < int(lost[1]) + interval
    assert saved[1:] == [step for step in range(20, 101, 20) if step > saved[0]]
    found = open_latest(tmp_path / "run")
    assert found is not None
    assert found.step == 100
    fault_matrix("kill -9 of rank 1's writer", f"before step {lost[1]} is saved", f"step {saved[0]} is saved instead")


def _no_room_on_rank_one(run: Run) -> None:
    def refuse(size: int) -> torch.Tensor:
        raise CheckpointError(f"no {size} bytes", fix="mend it")

    if run.topology.place.rank == 1:
        staging._shared = refuse


def test_a_rank_without_room_for_its_copy_keeps_nobody_waiting(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The writers of the others would wait for its writer until their collectives give up."""
    code, log = run_arguments(arguments("train.steps=3", *IN_BACKGROUND), world_size=2, prepare=_no_room_on_rank_one)
    assert code == 0
    assert re.search(r"rank 1: no \d+ bytes \(mend it\)\. The checkpoint before it is untouched", log)
    assert re.findall(r"saved \S+step_0*(\d+) ", log) == ["3"]


def _fill_the_disk(run: Run) -> None:
    """Every save from the second on fails, beside the training or in it."""
    run.saver._background._process.kill()
    real = save.publish.begin

    def full(folder: Path, step: int) -> Path:
        if step > 2:
            raise OSError(28, "No space left on device")
        return real(folder, step)

    save.publish.begin = full


def test_a_run_that_cannot_save_at_all_ends(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    argv = arguments("train.steps=9", *IN_BACKGROUND)
    with pytest.raises(RankFailure, match=r"step \d could not be saved: \[Errno 28\]") as failed:
        run_arguments(argv, world_size=2, prepare=_fill_the_disk)
    assert isinstance(failed.value.bad_input, CheckpointError)
