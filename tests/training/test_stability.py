"""Losses and gradients that are no numbers, losses that jump: what is refused, and when a run stops."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.distributed import DistributedDataParallel

from mm15_megatron.batch import MMBatch
from mm15_megatron.checkpoint.store import open_latest
from mm15_megatron.config.schema import FaultConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.training import step
from mm15_megatron.training.run import Feed, Run
from mm15_megatron.training.stability import EXIT_UNSTABLE, WITHOUT_TARGETS, Course, Verdict
from mm15_megatron.training.state import TrainState

from ..helpers.tables import FaultMatrix
from .runs import records, run_arguments

FAULTS = FaultConfig(max_skips_in_a_row=3, loss_spike="skip", loss_spike_window=8, loss_spike_threshold=5.0)
CALM = Course((2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.02, 1.98))


def _judge(course: Course, loss: float, norm: float = 1.0, *, faults: FaultConfig = FAULTS) -> tuple[Verdict, Course]:
    verdict = course.judge(loss=loss, grad_norm=norm, faults=faults)
    return verdict, course.after(loss, verdict, faults=faults)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_numbers_that_are_none_are_refused_up_to_a_limit(loss: float, norm: float) -> None:
    course = CALM
    for refused in (1, 2, 3):
        verdict, course = _judge(course, loss, norm)
        assert verdict == Verdict(False, f"loss {loss}, gradient norm {norm}", stops=refused == 3)
        assert course == Course(CALM.losses, refused)
    verdict, course = _judge(course, 2.0)
    assert verdict == Verdict(True)
    assert course.refused == 0, "only steps in a row count"
    without_limit = replace(FAULTS, max_skips_in_a_row=0)
    for _ in range(100):
        verdict, course = _judge(course, loss, norm, faults=without_limit)
        assert not verdict.stops


def test_a_jump() -> None:
    """Against a full window of losses; their deviation is about 0.044."""
    assert _judge(CALM, 2.2)[0] == Verdict(True)
    verdict, course = _judge(CALM, 9.0)
    assert not verdict.updates
    assert not verdict.stops
    assert verdict.problem.startswith("loss 9.0000 lies 1")
    assert "deviations above the median 2.0000 of 8 steps" in verdict.problem
    assert course.losses == CALM.losses, "what was refused is no measure"
    assert _judge(CALM, 0.1)[0] == Verdict(True), "a loss that falls is none"
    assert _judge(Course(CALM.losses[1:]), 9.0)[0] == Verdict(True), "too few losses to tell"
    assert _judge(Course((2.0,) * 8), 2.001)[0] == Verdict(True), "no noise at all is no measure"
    assert not _judge(Course((2.0,) * 8), 2.1)[0].updates


def test_what_a_jump_does() -> None:
    policies = {kind: replace(FAULTS, loss_spike=kind) for kind in ("off", "report", "skip", "stop")}
    found = {kind: _judge(CALM, 9.0, faults=faults) for kind, faults in policies.items()}
    assert found["off"] == (Verdict(True), Course())
    reported, course = found["report"]
    assert reported.updates
    assert reported.problem
    assert course.losses == (*CALM.losses[1:], 9.0)
    assert [found[kind][0].updates for kind in ("skip", "stop")] == [False, False]
    assert [found[kind][0].stops for kind in ("skip", "stop")] == [False, True]
    later = course
    assert not _judge(later, 9.0, faults=policies["skip"])[0].updates, "one jump does not make the next one normal"


def test_a_course_survives_a_checkpoint() -> None:
    course = Course((2.0, 1 / 3), 2)
    assert Course.from_dict(course.as_dict()) == course


@pytest.mark.parametrize("course", [None, {}, {"losses": ["x"], "refused": 0}, {"losses": 3, "refused": 0}])
def test_a_damaged_course_is_refused(course: object) -> None:
    values = {"step": 1, "consumed": 8, "skipped_steps": 0, "ledger": {}, "course": course}
    with pytest.raises(CheckpointError, match="the last losses of the run cannot be read"):
        TrainState.from_dict(values)


# --- Whole runs


class _Poisoned(Feed):
    """A real feed whose tiles are NaN from the fourth step on, up to a step."""

    def __init__(self, run: Run, *, until: int) -> None:
        super().__init__(run.feed.loader, run.watchdog)
        self._run, self._until = run, until

    def __next__(self) -> MMBatch:
        batch = super().__next__()
        if not 3 <= self._run.state.step < self._until or batch.tiles_N3HW is None:
            return batch
        return replace(batch, tiles_N3HW=batch.tiles_N3HW * math.nan)


def _poison_tiles(run: Run, *, until: int) -> None:
    run.feed = _Poisoned(run, until=until)


def _overflow_gradients(run: Run, *, until: int) -> None:
    """The gradient of one value of one rank is infinite, in the same steps; every loss is a number."""
    finalise = step.finalise_gradients

    def overflowing(chunks: list[DistributedDataParallel], **named: object) -> None:
        if run.topology.place.rank == 1 and 3 <= run.state.step < until:
            next(chunks[0].parameters()).main_grad.view(-1)[0] = math.inf
        finalise(chunks, **named)

    step.finalise_gradients = overflowing


@pytest.mark.parametrize(
    ("poison", "fault", "said"),
    [
        (_poison_tiles, "NaN in loss and gradients", "loss nan, gradient norm nan"),
        (_overflow_gradients, "infinite gradient of one rank", r"loss \d\.\d+, gradient norm inf"),
    ],
)
def test_a_run_that_is_no_number_any_more_stops_saved(
    poison: Callable[..., None],
    fault: str,
    said: str,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    fault_matrix: FaultMatrix,
) -> None:
    """Started again it goes on as a run that refuses the same rows and never stops."""
    argv = arguments("train.steps=9", "faults.max_skips_in_a_row=2")
    code, log = run_arguments(argv, world_size=2, prepare=functools.partial(poison, until=9))
    assert code == EXIT_UNSTABLE
    assert re.search(f"stopped after step 5: {said}; 2 steps in a row were refused", log), log
    assert "The weights are those of step 3, saved" in log
    saved = open_latest(tmp_path / "run")
    assert saved is not None
    assert (saved.step, saved.optimizer_step) == (5, 3)
    code, log = run_arguments(argv, world_size=2)
    assert code == 0
    resumed = records(tmp_path / "run")
    other = arguments("train.steps=9", run_dir="other")
    code, _ = run_arguments(other, world_size=2, prepare=functools.partial(poison, until=5))
    assert code == 0
    straight = records(tmp_path / "other")
    assert len(resumed) == len(straight) == 9
    for what in ("train/loss", "train/grad_norm", "train/skipped_steps"):
        assert [record[what] for record in resumed] == [record[what] for record in straight], what
    fault_matrix(fault, "two steps in a row", f"code {EXIT_UNSTABLE}, saved; resumes as if skipped")


@pytest.mark.parametrize("policy", ["stop", "report"])
def test_jumps_end_a_run_or_are_told(policy: str, arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """A run that stops for each jump, and is started again each time, takes the steps of one that skips them."""
    jumpy = ["faults.loss_spike_window=8", "faults.loss_spike_threshold=0.000001", "faults.max_skips_in_a_row=0"]
    jumpy += ["optimizer.lr=1e-6", "optimizer.connector_lr=1e-6"]
    argv = arguments("train.steps=20", *jumpy, f"faults.loss_spike={policy}")
    code, log = run_arguments(argv)
    stops = 0
    while code == EXIT_UNSTABLE:
        stops += 1
        (said,) = re.findall(r"stopped after step (\d+): loss \S+ lies .* deviations above the median", log)
        saved = open_latest(tmp_path / "run")
        assert saved is not None
        assert saved.step == int(said)
        code, log = run_arguments(argv)
    assert code == 0
    told = sum("deviations above the median" in line for line in log.splitlines())
    found = records(tmp_path / "run")
    if policy == "report":
        assert (stops, found[-1]["train/skipped_steps"]) == (0, 0)
        assert told > 0
        return
    skipping = arguments("train.steps=20", *jumpy, "faults.loss_spike=skip", run_dir="skipping")
    assert run_arguments(skipping)[0] == 0
    expected = records(tmp_path / "skipping")
    assert stops == expected[-1]["train/skipped_steps"] > 0
    assert [one["train/loss"] for one in found] == [one["train/loss"] for one in expected]


def test_jumps_are_judged_alike_behind_a_resumption(
    arguments: Callable[..., list[str]], tmp_path: Path, fault_matrix: FaultMatrix
) -> None:
    """At a tiny rate losses only fluctuate: with a threshold of nearly nothing about half of them are jumps."""
    policy = ["faults.loss_spike=skip", "faults.loss_spike_window=8", "faults.loss_spike_threshold=0.000001"]
    policy += ["faults.max_skips_in_a_row=0", "optimizer.lr=1e-6", "optimizer.connector_lr=1e-6"]
    straight = arguments("train.steps=20", *policy, run_dir="straight")
    code, log = run_arguments(straight, world_size=1)
    assert code == 0
    assert "updated nothing: loss " in log
    assert "deviations above the median" in log
    for steps in (11, 20):
        assert run_arguments(arguments("schedule.decay_steps=20", f"train.steps={steps}", *policy))[0] == 0
    found, expected = records(tmp_path / "run"), records(tmp_path / "straight")
    assert 0 < expected[-1]["train/skipped_steps"] < 20
    assert [one["train/skipped_steps"] for one in found] == [one["train/skipped_steps"] for one in expected]
    assert [one["train/loss"] for one in found] == [one["train/loss"] for one in expected]
    skipped = f"{expected[-1]['train/skipped_steps']:.0f} of 20 steps skipped, alike behind a resumption"
    fault_matrix("losses that jump", "steps", skipped)


def test_a_batch_without_targets_is_no_fault() -> None:
    assert not WITHOUT_TARGETS.updates
    assert not WITHOUT_TARGETS.stops
