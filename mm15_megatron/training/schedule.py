"""The learning-rate schedule: pure functions of the number of the step, skipped steps included."""

from __future__ import annotations

import math

from megatron.core.optimizer import MegatronOptimizer

from mm15_megatron.config.schema import RunConfig


def learning_rate_factor(step: int, cfg: RunConfig) -> float:
    """Return the share of the peak learning rate: linear warm-up from 0, then cosine to the floor, or constant.

    Args:
        step: number of the step, counted from 1. A step that updated nothing counts too, so the schedule follows the
            rows consumed, not the updates applied (MM1: 0 before the first step, 1 at step 2000, 0.1 at 200000).
        cfg: reads ``schedule`` and ``train.steps``.

    Source: MM1 section 3.4 and appendix; the cosine's exact form is AXLearn's.
    """
    schedule = cfg.schedule
    if step < schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.decay == "constant":
        return 1.0
    end = schedule.decay_steps or cfg.train.steps
    passed = min(1.0, (step - schedule.warmup_steps) / (end - schedule.warmup_steps))
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * passed))


def apply_schedule(optimizer: MegatronOptimizer, cfg: RunConfig, *, step: int) -> float:
    """Set every parameter group's learning rate and weight decay for step ``step`` (from 1, skipped steps included).

    megatron-core leaves both to the scheduler: a group only carries its peak (``max_lr``) and its decay multiplier
    (``wd_mult``).

    Returns:
        The share of the peak that was applied.
    """
    factor = learning_rate_factor(step, cfg)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["max_lr"]
        group["weight_decay"] = cfg.optimizer.weight_decay * group["wd_mult"]
    return factor
