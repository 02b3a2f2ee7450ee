"""Held-out loss of the current weights."""

from __future__ import annotations

import time

from mm15_megatron.batch import RankView
from mm15_megatron.data.loader import build_loader
from mm15_megatron.training.step import StepParts, evaluate_step


def held_out_figures(parts: StepParts, *, view: RankView) -> dict[str, float | int | None]:
    """Measure the held-out loss over ``train.validation_steps`` global batches (every rank must call).

    The rows are the first ones of the validation order, the same every time and in every layout. A loader has one
    position and no way back, so each validation builds its own, and ``data.num_workers`` processes start anew; the
    seconds show what that costs.

    Returns:
        ``validation/loss``, the mean loss of a target, and ``validation/seconds``, the wall time with the loader's
        start and end.
    """
    started = time.perf_counter()
    cfg = parts.cfg
    loader = build_loader(cfg, view=view, validation=True)
    try:
        units = cfg.train.global_batch_size
        rounds = sum(loader.step(step * units).micro_batches for step in range(cfg.train.validation_steps))
        loss = evaluate_step(parts, loader, num_microbatches=rounds).loss
    finally:
        loader.close()
    return {"validation/loss": loss, "validation/seconds": time.perf_counter() - started}
