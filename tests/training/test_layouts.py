"""The whole run, with its real loader, computes the same in every layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from mm15_megatron.batch import MMBatch
from mm15_megatron.training.run import Feed, Run

from ..helpers.parity import FP32_SCALAR
from .runs import records, run_arguments

Arguments = Callable[..., list[str]]

LAYOUTS = {
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "dp2-dist-opt-overlap": [
        "parallel.use_distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ],
    "tp2-encoder-tp": ["parallel.tensor_model_parallel_size=2", "parallel.encoder_parallel=tensor"],
}
# AdamW's epsilon above the rounding noise of small gradients, as in the parity harness.
FEW_STEPS = ["train.steps=4", "train.validation_interval=2", "train.validation_steps=2", "optimizer.adam_eps=1e-5"]
RAMP = ["train.rampup_batch_size=[4,4,16]", "schedule.decay_steps=6", "optimizer.adam_eps=1e-5"]


@pytest.fixture(scope="module")
def reference() -> dict[str, list[dict[str, float]]]:
    """Records of the one-rank runs, taken once."""
    return {}


def _losses(seen: list[dict[str, float]]) -> list[float]:
    """Training and held-out losses, in order."""
    return [record[name] for record in seen for name in ("train/loss", "validation/loss") if name in record]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_equals_one_rank(
    layout: str, arguments: Arguments, tmp_path: Path, reference: dict[str, list[dict[str, float]]]
) -> None:
    """Losses and held-out losses of every step agree; so do rows, targets and tiles."""
    if not reference:
        assert run_arguments(arguments(*FEW_STEPS, run_dir="one"))[0] == 0
        reference["one"] = records(tmp_path / "one")
    assert run_arguments(arguments(*FEW_STEPS, *LAYOUTS[layout]), world_size=2)[0] == 0
    one, two = reference["one"], records(tmp_path / "run")
    assert _losses(two) == pytest.approx(_losses(one), abs=FP32_SCALAR)
    assert len(_losses(one)) == 6
    for name in ("data/consumed_rows", "data/fill", "train/targets", "speed/model_tflop"):
        assert [record[name] for record in two] == [record[name] for record in one], name


def _note_rows(run: Run, *, folder: str) -> None:
    """Have each rank write down the rows it takes, by step (the ranks of a test are forks: the class is its own)."""
    take, rank = Feed.__next__, run.topology.place.rank

    def noting(feed: Feed) -> MMBatch:
        batch = take(feed)
        with Path(folder, f"{run.topology.data_size}-{rank}").open("a") as notes:
            notes.writelines(f"{run.state.step + 1} {row.row}\n" for row in batch.rows)
        return batch

    Feed.__next__ = noting


def _noted(folder: Path) -> dict[int, list[int]]:
    """The rows of each step, in order."""
    found: dict[int, list[int]] = {}
    for line in (line for notes in folder.iterdir() for line in notes.read_text().splitlines()):
        step, row = map(int, line.split())
        found.setdefault(step, []).append(row)
    return {step: sorted(found[step]) for step in sorted(found)}


def test_replicas_come_and_go(arguments: Arguments, tmp_path: Path) -> None:
    """Two replicas, then one, then four: every step takes the rows of the undisturbed run, with its losses."""
    shared = ["schedule.decay_steps=15", "optimizer.adam_eps=1e-5", "train.micro_batch_size=1"]
    shared += ["train.global_batch_size=4", "data.row_dealing=balanced"]
    (tmp_path / "noted").mkdir()
    (tmp_path / "straight").mkdir()
    note = functools.partial(_note_rows, folder=str(tmp_path / "noted"))
    for steps, ranks in ((5, 2), (10, 1), (15, 4)):
        assert run_arguments(arguments(*shared, f"train.steps={steps}"), world_size=ranks, prepare=note)[0] == 0
    note = functools.partial(_note_rows, folder=str(tmp_path / "straight"))
    assert run_arguments(arguments(*shared, "train.steps=15", run_dir="one"), prepare=note)[0] == 0
    rows = _noted(tmp_path / "noted")
    assert rows == _noted(tmp_path / "straight")
    assert [row for step in rows.values() for row in step] == list(range(15 * 4))
    one, many = records(tmp_path / "one"), records(tmp_path / "run")
    assert _losses(many) == pytest.approx(_losses(one), abs=FP32_SCALAR)
    norms = [[record["train/grad_norm"] for record in found] for found in (many, one)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * FP32_SCALAR)


def test_ramp_goes_on_in_another_layout(arguments: Arguments, tmp_path: Path) -> None:
    """Begun on two stages and gone on with on two replicas: the rows and the losses of an undisturbed rank."""
    assert run_arguments(arguments(*RAMP, "train.steps=6", run_dir="one"))[0] == 0
    assert run_arguments(arguments(*RAMP, "train.steps=3", *LAYOUTS["pp2"]), world_size=2)[0] == 0
    code, log = run_arguments(arguments(*RAMP, "train.steps=6"), world_size=2)
    assert code == 0
    assert "go on from step_00000003" in log
    one, two = records(tmp_path / "one"), records(tmp_path / "run")
    assert [record["data/global_batch"] for record in one] == [4, 4, 4, 4, 8, 8]
    for name in ("step", "data/global_batch", "data/consumed_rows", "train/targets", "data/fill"):
        assert [record[name] for record in two] == [record[name] for record in one], name
    assert _losses(two) == pytest.approx(_losses(one), abs=FP32_SCALAR)
