"""Held-out loss of the current weights."""

from __future__ import annotations

from mm15_megatron.batch import RankView
from mm15_megatron.data.batch_plan import BatchPlan
from mm15_megatron.data.loader import build_loader
from mm15_megatron.training.step import StepParts, evaluate_step


def held_out_loss(parts: StepParts, *, view: RankView) -> float:
    """Return the mean loss of a held-out target over ``train.validation_steps`` global batches (every rank must call).

    The rows are the first ones of the validation order, the same every time and in every layout.
    """
    cfg = parts.cfg
    plan = BatchPlan(cfg.train.global_batch_size, cfg.train.micro_batch_size, view.data_size)
    loader = build_loader(cfg, view=view, validation=True)
    try:
        batches = iter(loader)
        rounds = cfg.train.validation_steps * plan.micro_batches_per_step(0)
        return evaluate_step(parts, batches, num_microbatches=rounds).loss
    finally:
        loader.close()
