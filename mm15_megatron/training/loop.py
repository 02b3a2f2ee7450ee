"""The training loop: verbs, and the figures of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mm15_megatron.accounting import step_flops
from mm15_megatron.data.ledger import COUNTS, Ledger
from mm15_megatron.data.loader import StepShape
from mm15_megatron.training.optimizer import learning_rates
from mm15_megatron.training.run import Run
from mm15_megatron.training.schedule import apply_schedule
from mm15_megatron.training.signals import EXIT_INTERRUPTED, StopRequest
from mm15_megatron.training.stability import EXIT_UNSTABLE, Verdict
from mm15_megatron.training.state import global_counts
from mm15_megatron.training.step import StepOutput, train_step
from mm15_megatron.training.validate import held_out_figures


@dataclass(frozen=True)
class Taken:
    """One step that was taken.

    Attributes:
        output: what the step did.
        counts: what its rows held, over all ranks, int64 [lines of the ledger, counts].
        shape: units, rows and micro-batches of its global batch.
        factor: share of the peak learning rate.
        seconds: wall time of the step, up to the end of its work on the device.
        wait: the longest time a rank waited for data in it, seconds.
    """

    output: StepOutput
    counts: npt.NDArray[np.int64]
    shape: StepShape
    factor: float
    seconds: float
    wait: float


def run(training: Run, *, request: StopRequest) -> int:
    """Train until the last step or a signal, and wait until the last checkpoint is on disk.

    A signal is honoured before the next step, whether it came while the run was built, in a step, in a validation or
    in a save; a step is saved once, and a run that took no step saves nothing.

    Args:
        training: the run.
        request: installed before the run was built.

    Returns:
        0 when the last step is reached, EXIT_INTERRUPTED when a signal stopped the run and its last step is saved,
        EXIT_UNSTABLE when loss or gradients did (``faults``), saved too.
    """
    code = _train(training, request)
    training.saver.finish()
    if training.saver.lost:
        training.save()
    return code


def _train(training: Run, request: StopRequest) -> int:
    cfg, steps, device = training.cfg, training.cfg.train.steps, training.topology.device
    if training.state.step >= steps:
        training.progress.line(f"nothing to do: the checkpoint has {training.state.step} of {steps} steps")
        return 0
    saved_step = training.state.step
    while training.state.step < steps:
        training.watchdog.step(training.state.step + 1, batch=training.feed.text)
        if stopped_by := request.agreed(device=device):
            if training.state.step > saved_step:
                training.save()
            training.progress.line(training.ledger_text())
            training.progress.line(
                f"stopped by {stopped_by} after step {training.state.step}; the same command goes on from here"
            )
            return EXIT_INTERRUPTED
        taken = take_step(training)
        training.saver.look()
        figures = step_figures(training, taken)
        if training.writer is not None and (
            _due(training.state.step, cfg.logging.log_interval) or training.state.step == steps
        ):
            figures |= ledger_figures(training)
        held_out = training.feed.held_out
        if held_out and _due(training.state.step, cfg.train.validation_interval) and not request.agreed(device=device):
            figures |= held_out_figures(
                training.parts, view=training.topology.view, opened=held_out, watchdog=training.watchdog
            )
        report(training, taken, figures)
        if taken.output.verdict.stops:
            return _stop_unstable(training, taken.output)
        due = training.state.step == steps or _due(training.state.step, cfg.checkpoint.save_interval)
        if due or training.saver.lost:
            training.save()
            saved_step = training.state.step
    training.progress.line(training.ledger_text())
    return 0


def _stop_unstable(training: Run, output: StepOutput) -> int:
    """Save the weights as the last good step left them, and say what to do."""
    training.save()
    refused = training.state.course.refused
    training.progress.line(training.ledger_text())
    training.progress.line(
        f"stopped after step {training.state.step}: {output.verdict.problem}; {refused} steps in a row were refused "
        f"(faults.max_skips_in_a_row = {training.cfg.faults.max_skips_in_a_row}, faults.loss_spike = "
        f"{training.cfg.faults.loss_spike}). The weights are those of step {training.state.step - refused}, saved; "
        "the same command goes on behind the refused rows"
    )
    return EXIT_UNSTABLE


def take_step(training: Run) -> Taken:
    """Take one optimizer step and move the state on.

    ``train_step`` reads the device once, before the optimizer updates. The longest wait is read here, after the update:
    that ends the measured time with the work of the device. Only these two reads and the counts of the rows, which by
    then cost a round trip and no waiting, stand between one step and the next.
    """
    state, loader, topology = training.state, training.feed.loader, training.topology
    shape = loader.step(state.consumed)
    factor = apply_schedule(training.parts.optimizer, training.cfg, step=state.step + 1)
    training.feed.rows.clear()
    waited, started = loader.wait_seconds, time.perf_counter()

    def judge(loss: float, grad_norm: float) -> Verdict:
        training.watchdog.enter("update")
        return state.course.judge(loss=loss, grad_norm=grad_norm, faults=training.cfg.faults)

    training.watchdog.enter("forward and backward")
    output = train_step(training.parts, training.feed, num_microbatches=shape.micro_batches, judge=judge)
    training.watchdog.enter("figures")
    wait = torch.tensor(loader.wait_seconds - waited, dtype=torch.float64, device=topology.device)
    torch.distributed.all_reduce(wait, op=torch.distributed.ReduceOp.MAX)
    longest = float(wait.item())  # waits for the device, which otherwise still runs the optimizer
    seconds = time.perf_counter() - started
    sources = state.ledger.sources
    counts = global_counts(training.feed.rows, sources=sources, topology=topology)
    loss = np.array(output.by_source, dtype=np.float64).reshape(sources, 2)
    course = state.course  # a batch without targets says nothing about it
    if output.targets:
        course = course.after(output.loss, output.verdict, faults=training.cfg.faults)
    training.state = state.after(counts, loss=loss, units=shape.units, applied=output.applied, course=course)
    return Taken(output, counts, shape, factor, seconds, wait=longest)


def step_figures(training: Run, taken: Taken) -> dict[str, float | int | None]:
    """Return what is written for a step.

    Throughput counts real tokens (no padding) and real tiles. Model TFLOP/s of a rank is ``model_tflop`` (forward and
    backward of encoder, connector and decoder, without recomputation) / (``seconds`` x ranks); utilisation divides it
    by ``peak_tflops``.
    """
    cfg, output, seconds = training.cfg, taken.output, taken.seconds
    held = dict(zip(COUNTS, taken.counts.sum(axis=0).tolist(), strict=True))
    tokens, tiles = held["text_tokens"] + held["image_slots"], held["image_slots"] // cfg.connector.num_tokens
    tflop = step_flops(cfg, rows=taken.shape.rows, tiles=tiles).total / 1e12
    per_rank = tflop / (seconds * training.topology.place.world_size)
    return {
        "train/loss": output.loss,
        "train/z_loss": output.z_loss,
        "train/grad_norm": output.grad_norm,
        "train/targets": output.targets,
        "train/skipped_steps": training.state.skipped_steps,
        **_router_figures(output),
        **{f"lr/{module}": taken.factor * rate for module, rate in learning_rates(cfg).items()},
        "data/global_batch": taken.shape.units,
        "data/rows": taken.shape.rows,
        f"data/consumed_{cfg.data.batch_unit}": training.state.consumed,
        "data/substituted_images": int(training.state.ledger.column("substituted").sum()),
        "data/fill": tokens / (taken.shape.rows * cfg.data.seq_length),
        **_source_losses(training.state.ledger, output),
        "data/wait_share": taken.wait / seconds,
        "speed/seconds": seconds,
        "speed/tokens_per_second": tokens / seconds,
        "speed/tiles_per_second": tiles / seconds,
        "speed/model_tflop": tflop,
        "speed/model_tflops_per_rank": per_rank,
        "speed/peak_tflops": training.peak,
        "speed/utilisation": per_rank / training.peak if training.peak else None,
    }


def _source_losses(ledger: Ledger, output: StepOutput) -> dict[str, float | int | None]:
    """Mean loss of the step's targets of each source; None where it had none."""
    pairs = zip(ledger.names, output.by_source, strict=False)
    return {f"loss/{name}": loss / weight if weight else None for name, (loss, weight) in pairs}


def ledger_figures(training: Run) -> dict[str, float | int | None]:
    """What was consumed of each source since the start of the run."""
    ledger = training.state.ledger
    seen = training.feed.loader.order.seen(training.state.consumed)
    figures: dict[str, float | int | None] = {}
    for number, name in enumerate(ledger.names):
        counts = dict(zip(COUNTS, ledger.counts[number].tolist(), strict=True))
        figures |= {f"ledger/{name}/{what}": count for what, count in counts.items()}
    for name, loss, one in zip(ledger.names, ledger.mean_losses(), seen, strict=False):
        figures[f"ledger/{name}/loss"] = loss
        figures[f"ledger/{name}/epochs"] = one.epochs
        figures[f"ledger/{name}/left_out"] = sum(one.left_out.values())
    return figures


def _router_figures(output: StepOutput) -> dict[str, float | int | None]:
    """Losses, drops and loads of each sparse layer; a load is a multiple of the mean load."""
    figures: dict[str, float | int | None] = {}
    for router in output.router:
        experts = len(router.load)
        values = {
            "balance": router.balance,
            "z": router.z,
            "dropped": router.dropped,
            "max_load": max(router.load) * experts,
            "min_load": min(router.load) * experts,
        }
        figures |= {f"router/layer_{router.layer:02d}/{name}": value for name, value in values.items()}
    return figures


def report(training: Run, taken: Taken, figures: dict[str, float | int | None]) -> None:
    """Write the figures of a step, and show them when a line is due."""
    if training.writer is not None:
        training.writer.write(training.state.step, figures)
    if problem := taken.output.verdict.problem:
        what = "" if taken.output.applied else " updated nothing"
        training.progress.line(f"step {training.state.step}{what}: {problem}")
    if "validation/loss" in figures:
        training.progress.line(
            f"step {training.state.step} held-out loss {figures['validation/loss']:.4f} "
            f"({figures['validation/seconds']:.1f} s)"
        )
    if _due(training.state.step, training.cfg.logging.log_interval) or training.state.step == training.cfg.train.steps:
        training.progress.update(training.state.step, _summary(training, taken, figures))


def _summary(training: Run, taken: Taken, figures: dict[str, float | int | None]) -> str:
    peak = f" of {training.peak:g} peak" if training.peak else ""
    return (
        f"loss {taken.output.loss:.4f} | grad norm {taken.output.grad_norm:.3f} | lr {figures['lr/language']:.2e} | "
        f"{figures['speed/tokens_per_second']:.0f} tokens/s, {figures['speed/tiles_per_second']:.1f} tiles/s | "
        f"{figures['speed/model_tflops_per_rank']:.4f} TFLOP/s per rank ({figures['speed/model_tflop']:.4g} TFLOP / "
        f"({taken.seconds:.3f} s x {training.topology.place.world_size})){peak} | "
        f"data wait {figures['data/wait_share']:.0%}"
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
