"""Whole runs that start from the weights of another one."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mm15_megatron.parity.compare import FP32_SCALAR
from mm15_megatron.parity.layouts import Layout, parse_layout
from mm15_megatron.parity.ranks import RankFailure

from .runs import records, run_arguments

Arguments = Callable[..., list[str]]

ONE = Layout(1, {})
DENSE: list[str] = []
SPARSE = ["moe.num_moe_experts=4", "moe.moe_capacity_group_size=32"]


def _options(layout: str) -> tuple[int, list[str]]:
    """Ranks and arguments of a layout."""
    found = ONE if layout == "one" else parse_layout(layout)
    return found.world_size, [f"{path}={str(value).lower()}" for path, value in found.settings.items()]


@pytest.mark.parametrize(
    ("model", "source", "layout"),
    [
        (DENSE, "one", "one"),
        (DENSE, "tp2", "tp2"),
        (DENSE, "tp2", "pp2"),
        (DENSE, "one", "dp2-distopt"),
        (SPARSE, "tp2sp-etp1", "one"),
    ],
)
def test_the_first_loss_is_the_held_out_loss_of_the_source(
    model: list[str], source: str, layout: str, arguments: Arguments, tmp_path: Path
) -> None:
    """The source measured it on the rows that the new run trains on first; bitwise in the same layout."""
    stored = [*model, "data.shuffle=none"]
    world, split = _options(source)
    validation = ["train.validation_interval=3", "train.validation_steps=1"]
    code, _ = run_arguments(
        [*arguments(run_dir="source"), *stored, *split, "train.steps=3", *validation], world_size=world
    )
    assert code == 0
    held_out = records(tmp_path / "source")[-1]["validation/loss"]
    others = [one for one in arguments() if not one.startswith("data.sources=")]
    on_held = [one.replace("validation_", "") if one.startswith("data.validation_") else one for one in others]
    world, split = _options(layout)
    begun = ["train.steps=3", "train.seed=5", f"checkpoint.init_from={tmp_path / 'source'}"]
    code, log = run_arguments([*on_held, *stored, *split, *begun], world_size=world)
    assert code == 0
    record = records(tmp_path / "run")[0]
    if source == layout:
        assert record["train/loss"] == held_out
    assert abs(record["train/loss"] - held_out) <= FP32_SCALAR
    assert abs(record["train/loss"] - records(tmp_path / "source")[0]["train/loss"]) > 0.1  # it had learnt something
    assert record["data/consumed_rows"] == 8
    assert f"of {tmp_path / 'source'}/checkpoints/step_00000003, step 3, named by the tracker" in log


def test_a_resumed_run_is_the_straight_one(arguments: Arguments, tmp_path: Path) -> None:
    """Killed three steps after its start from other weights, it goes on bitwise for five; the weights are its own."""
    assert run_arguments(arguments("train.steps=3", run_dir="source"))[0] == 0
    begun = ["train.steps=8", "checkpoint.save_interval=3", f"checkpoint.init_from={tmp_path / 'source'}"]
    assert run_arguments(arguments(*begun, run_dir="straight"))[0] == 0
    with pytest.raises(RankFailure, match="the process died without a word"):
        run_arguments(arguments(*begun), trap=("step 4/", signal.SIGKILL, 0))
    code, log = run_arguments(arguments(*begun))
    assert code == 0
    assert "go on from step_00000003" in log
    assert f"checkpoint.init_from = {tmp_path / 'source'} had no part in it" in log
    names = ("step", "train/loss", "train/grad_norm", "data/consumed_rows", "lr/language")
    seen = [[record[name] for name in names] for record in records(tmp_path / "run")]
    assert seen == [[record[name] for name in names] for record in records(tmp_path / "straight")]
    assert len(seen) == 8


def test_a_larger_image_interpolates_the_positions(arguments: Arguments, tmp_path: Path) -> None:
    """Two pipeline stages, one with the tables; the start-up block names them, and the run trains and resumes."""
    assert run_arguments(arguments("train.steps=3", run_dir="source"))[0] == 0
    folder = tmp_path / "source" / "checkpoints" / "step_00000003"
    larger = ["vision.image_size=112", "parallel.pipeline_model_parallel_size=2", f"checkpoint.init_from={folder}"]
    code, log = run_arguments(arguments("train.steps=3", *larger), world_size=2)
    assert code == 0
    assert f"of {folder}, step 3\n" in log
    tables = "connector.position_embedding 4 x 4 -> 8 x 8, vision_encoder.position_embedding 4 x 4 -> 8 x 8\n"
    assert f"interpolated       {tables}" in log
    assert run_arguments(arguments("train.steps=4", *larger), world_size=2)[0] == 0
    assert all(math.isfinite(record["train/loss"]) for record in records(tmp_path / "run"))


def test_a_wrong_path_is_found_before_a_weight_exists(arguments: Arguments, tmp_path: Path) -> None:
    """On every rank, with the path."""
    absent = f"checkpoint.init_from={tmp_path / 'absent'}"
    with pytest.raises(RankFailure, match=r"(?s)rank 0.*CheckpointError: .*absent does not exist.*rank 1.*CheckpointE"):
        run_arguments(arguments("train.steps=3", absent, "language.ffn_hidden_size=100000000"), world_size=2)
