"""Runs that save while they go on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mm15_megatron.batch import MMBatch
from mm15_megatron.checkpoint import publish
from mm15_megatron.checkpoint.store import open_latest
from mm15_megatron.parity.ranks import RankFailure
from mm15_megatron.training.run import Feed, Run
from mm15_megatron.training.signals import EXIT_INTERRUPTED

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
        assert writer is not None
        if self._run.topology.place.rank == 1 and self._run.state.step > 20 and not writer.busy:
            writer._process.kill()
        return super().__next__()


def _lose_the_writer(run: Run) -> None:
    run.feed = _LosesTheWriter(run)


def test_a_lost_writer_ends_the_run(
    arguments: Callable[..., list[str]], tmp_path: Path, fault_matrix: Callable[[str, str, str], None]
) -> None:
    """Every rank hears of it, and what was saved before stays."""
    argv = arguments("train.steps=100", "checkpoint.async_save=true", "checkpoint.save_interval=20")
    with pytest.raises(RankFailure, match=r"rank 1: the process that wrote the checkpoint of step \d+ ended with -9"):
        run_arguments(argv, world_size=2, prepare=_lose_the_writer)
    found = open_latest(tmp_path / "run")
    assert found is not None
    assert publish.published(found.folder.parent)[-1] == found.folder
    fault_matrix("kill -9 of rank 1's writer", "between two saves", f"the run ends, step {found.step} stays tracked")
