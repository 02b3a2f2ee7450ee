"""The whole run, with its real loader, computes the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
