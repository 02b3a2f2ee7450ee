"""Held-out loss of the current weights."""

from __future__ import annotations

import time

from mm15_megatron.batch import RankView
from mm15_megatron.data.loader import build_loader
from mm15_megatron.data.open_order import OpenOrder
from mm15_megatron.training.step import StepParts, evaluate_step
from mm15_megatron.training.watchdog import Watchdog


def held_out_figures(
    parts: StepParts, *, view: RankView, opened: OpenOrder, watchdog: Watchdog
) -> dict[str, float | int | None]:
    """Measure the held-out loss over ``train.validation_steps`` global batches (every rank must call).

    The rows are the first ones of the validation order, the same every time and in every layout. A loader has one
    position and no way back, so each validation builds its own over the sources that stay open, and
    ``data.num_workers`` processes start anew; the seconds show what that costs.

    Returns:
        ``validation/loss``, the mean loss of a target; ``validation/loss/SOURCE`` of each held-out source; and
        ``validation/seconds``, the wall time with the loader's start and end.
    """
    started = time.perf_counter()
    watchdog.enter("validation: open the loader")
    cfg = parts.cfg
    loader = build_loader(cfg, view=view, validation=True, opened=opened)
    try:
        units = cfg.train.global_batch_size
        rounds = sum(loader.step(step * units).micro_batches for step in range(cfg.train.validation_steps))
        sums = evaluate_step(parts, watchdog.watched(loader, phase="validation"), num_microbatches=rounds)
    finally:
        loader.close()
    names = (source.name for source in opened.order.sources)
    by_source = {
        f"validation/loss/{name}": loss / weight if weight else None
        for name, (loss, weight) in zip(names, sums.by_source, strict=True)
    }
    return {"validation/loss": sums.loss, **by_source, "validation/seconds": time.perf_counter() - started}
