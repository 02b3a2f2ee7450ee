"""The learning-rate schedule: golden values, and what the optimizer's groups get."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from mm15_megatron.config.schema import RunConfig, ScheduleConfig, TrainConfig
from mm15_megatron.training.schedule import apply_schedule, learning_rate_factor

MM1 = RunConfig()


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.0), (1, 0.0005), (1000, 0.5), (2000, 1.0), (101_000, 0.55), (200_000, 0.1), (250_000, 0.1)],
)
def test_mm1_golden(step: int, factor: float) -> None:
    """Warm-up over 2000 updates, cosine to a tenth at 200k, flat afterwards."""
    assert learning_rate_factor(step, MM1) == pytest.approx(factor, abs=1e-12)


def test_variants() -> None:
    """Constant after the warm-up; a floor of zero; an end before the run's; no warm-up at all."""
    train = TrainConfig(steps=100)
    constant = RunConfig(train=train, schedule=ScheduleConfig(warmup_steps=10, decay="constant"))
    assert [learning_rate_factor(step, constant) for step in (5, 10, 100)] == [0.5, 1.0, 1.0]
    zero = RunConfig(train=train, schedule=ScheduleConfig(warmup_steps=0, min_lr_ratio=0.0, decay_steps=50))
    assert learning_rate_factor(0, zero) == 1.0
    assert learning_rate_factor(25, zero) == pytest.approx(0.5)
    assert learning_rate_factor(50, zero) == learning_rate_factor(100, zero) == pytest.approx(0.0, abs=1e-15)


@dataclass
class Groups:
    """The one attribute of an optimizer that the schedule touches."""

    param_groups: list[dict[str, Any]] = field(default_factory=list)


def test_groups_follow_their_peak_and_their_decay() -> None:
    """Each group scales its own peak; norms and biases are not decayed whatever the optimizer's default was."""
    cfg = replace(MM1, optimizer=replace(MM1.optimizer, weight_decay=0.1))
    optimizer = Groups([{"max_lr": 1e-3, "wd_mult": 1.0}, {"max_lr": 8e-5, "wd_mult": 0.0, "weight_decay": 0.1}])
    assert apply_schedule(optimizer, cfg, step=1000) == 0.5  # type: ignore[arg-type]
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 4e-5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
