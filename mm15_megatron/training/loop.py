"""The training loop: verbs, and the figures of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mm15_megatron.accounting import step_flops
from mm15_megatron.training.optimizer import learning_rates
from mm15_megatron.training.run import Run
from mm15_megatron.training.schedule import apply_schedule
from mm15_megatron.training.signals import EXIT_INTERRUPTED, StopRequest
from mm15_megatron.training.state import Counts, global_counts
from mm15_megatron.training.step import StepOutput, train_step
from mm15_megatron.training.validate import held_out_loss


@dataclass(frozen=True)
class Taken:
    """One step that was taken.

    Attributes:
        output: what the step did.
        counts: what its rows held, over all ranks.
        rows: rows of its global batch.
        factor: share of the peak learning rate.
        seconds: wall time of the step.
        wait: the longest time a rank waited for data in it, seconds.
    """

    output: StepOutput
    counts: Counts
    rows: int
    factor: float
    seconds: float
    wait: float


def run(run: Run) -> int:
    """Train until the last step or a signal.

    Returns:
        0 when the last step is reached, EXIT_INTERRUPTED when a signal stopped the run after a checkpoint.
    """
    cfg, steps = run.cfg, run.cfg.train.steps
    if run.state.step >= steps:
        run.progress.line(f"nothing to do: the checkpoint has {run.state.step} of {steps} steps")
        return 0
    with StopRequest() as request:
        while run.state.step < steps:
            taken = take_step(run)
            figures = step_figures(run, taken)
            stopped_by = request.agreed(device=run.topology.device)
            done = run.state.step == steps
            if not stopped_by and _due(run.state.step, cfg.train.validation_interval):
                figures["validation/loss"] = held_out_loss(run.parts, view=run.topology.view)
            report(run, taken, figures)
            if done or stopped_by or _due(run.state.step, cfg.checkpoint.save_interval):
                run.save()
            if stopped_by and not done:
                run.progress.line(
                    f"stopped by {stopped_by} after step {run.state.step}; the same command goes on from here"
                )
                return EXIT_INTERRUPTED
    return 0


def take_step(run: Run) -> Taken:
    """Take one optimizer step and move the state on."""
    state, loader, topology = run.state, run.feed.loader, run.topology
    rows = loader.plan.rows_of_step(state.consumed_rows)
    factor = apply_schedule(run.parts.optimizer, run.cfg, step=state.step + 1)
    run.feed.rows.clear()
    waited, started = loader.wait_seconds, time.perf_counter()
    output = train_step(run.parts, run.feed, num_microbatches=loader.plan.micro_batches_per_step(state.consumed_rows))
    seconds = time.perf_counter() - started
    wait = torch.tensor(loader.wait_seconds - waited, dtype=torch.float64, device=topology.device)
    torch.distributed.all_reduce(wait, op=torch.distributed.ReduceOp.MAX)
    counts = global_counts(run.feed.rows, topology=topology)
    run.state = state.after(counts, rows=rows, applied=output.applied)
    return Taken(output, counts, rows, factor, seconds, wait=float(wait.item()))


def step_figures(run: Run, taken: Taken) -> dict[str, float | int | None]:
    """Return what is written for a step.

    Throughput counts real tokens (no padding) and real tiles. Model TFLOP/s of a rank is ``model_tflop`` (forward and
    backward of encoder, connector and decoder, without recomputation) / (``seconds`` x ranks); utilisation divides it
    by ``peak_tflops``.
    """
    cfg, output, seconds = run.cfg, taken.output, taken.seconds
    tiles = taken.counts.image_slots // cfg.connector.num_tokens
    tflop = step_flops(cfg, rows=taken.rows, tiles=tiles).total / 1e12
    per_rank = tflop / (seconds * run.topology.place.world_size)
    return {
        "train/loss": output.loss,
        "train/z_loss": output.z_loss,
        "train/grad_norm": output.grad_norm,
        "train/targets": output.targets,
        "train/skipped_steps": run.state.skipped_steps,
        **{f"lr/{module}": taken.factor * rate for module, rate in learning_rates(cfg).items()},
        "data/global_batch": taken.rows,
        "data/consumed_rows": run.state.consumed_rows,
        "data/substituted_images": run.state.substituted,
        "data/fill": taken.counts.tokens / (taken.rows * cfg.data.seq_length),
        "data/wait_share": taken.wait / seconds,
        "speed/seconds": seconds,
        "speed/tokens_per_second": taken.counts.tokens / seconds,
        "speed/tiles_per_second": tiles / seconds,
        "speed/model_tflop": tflop,
        "speed/model_tflops_per_rank": per_rank,
        "speed/peak_tflops": run.peak,
        "speed/utilisation": per_rank / run.peak if run.peak else None,
    }


def report(run: Run, taken: Taken, figures: dict[str, float | int | None]) -> None:
    """Write the figures of a step, and show them when a line is due."""
    if run.writer is not None:
        run.writer.write(run.state.step, figures)
    if not taken.output.applied:
        run.progress.line(
            f"step {run.state.step} updated nothing: loss {taken.output.loss}, gradient norm {taken.output.grad_norm}"
        )
    if "validation/loss" in figures:
        run.progress.line(f"step {run.state.step} held-out loss {figures['validation/loss']:.4f}")
    if _due(run.state.step, run.cfg.logging.log_interval) or run.state.step == run.cfg.train.steps:
        run.progress.update(run.state.step, _summary(run, taken, figures))


def _summary(run: Run, taken: Taken, figures: dict[str, float | int | None]) -> str:
    peak = f" of {run.peak:g} peak" if run.peak else ""
    return (
        f"loss {taken.output.loss:.4f} | grad norm {taken.output.grad_norm:.3f} | lr {figures['lr/language']:.2e} | "
        f"{figures['speed/tokens_per_second']:.0f} tokens/s, {figures['speed/tiles_per_second']:.1f} tiles/s | "
        f"{figures['speed/model_tflops_per_rank']:.4f} TFLOP/s per rank ({figures['speed/model_tflop']:.4g} TFLOP / "
        f"({taken.seconds:.3f} s x {run.topology.place.world_size})){peak} | data wait {figures['data/wait_share']:.0%}"
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
