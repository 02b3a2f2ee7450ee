"""One case in a fresh process: build the slice, take the trainer's own steps on it, time, profile and weigh them."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mm15_megatron.accounting import memory_estimate, planned_tiles_per_row, step_flops
from mm15_megatron.batch import MMBatch
from mm15_megatron.bench.bare import pair_ratio, seconds_in_turn
from mm15_megatron.bench.cases import PROFILED_STEPS, WARM_UP_STEPS
from mm15_megatron.bench.rows import full_rows
from mm15_megatron.bench.trace import breakdown
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.build import build_chunks
from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.rendezvous import Rendezvous
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology, close_topology
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.schedule import apply_schedule
from mm15_megatron.training.step import StepOutput, StepParts, train_step

Say = Callable[[str], None]
# Whatever launched the benchmark: it measures one device.
_ALONE = Rendezvous("single", 0, 1, 0, 1, "")


@dataclass
class Scale:
    """Bytes allocated on the device when each part had been built; empty on the CPU, where nothing counts them.

    Attributes:
        device: cpu or cuda.
        marks: bytes by mark, in order.
    """

    device: str
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Note what is allocated now."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.marks[name] = float(torch.cuda.memory_allocated())

    def note_state(self, parts: StepParts) -> None:
        """Note the bytes of what the optimizer made in its first step."""
        if self.device == "cuda":
            self.marks["state"] = float(state_bytes(parts))


def build(cfg: RunConfig, stack: ExitStack, *, scale: Scale) -> tuple[StepParts, list[MMBatch]]:
    """Build model, optimizer at the peak learning rate, and the micro-batches of one step, on the device."""
    stack.callback(close_topology)
    topology = build_topology(cfg.parallel, place=_ALONE)
    seed_everything(cfg.train.seed, topology=topology)
    scale.mark("start")
    chunks = build_chunks(cfg, stages=topology.stages)
    scale.mark("parameters")
    wrapped = wrap_chunks(cfg, chunks)
    scale.mark("gradients")
    optimizer = build_optimizer(cfg, wrapped)
    scale.mark("masters")
    apply_schedule(optimizer, cfg, step=max(1, cfg.schedule.warmup_steps))
    batches = [local_batch(row, topology=topology, image_size=cfg.vision.image_size) for row in full_rows(cfg)]
    scale.mark("rows")
    parts = StepParts(cfg, topology, wrapped, optimizer)
    if parts.graphs is not None:
        stack.callback(parts.graphs.close)
    return parts, batches


def warm_up_steps(cfg: RunConfig) -> int:
    """Steps before anything is timed: libraries are loaded, kernels chosen, graphs captured and replayed once."""
    return max(WARM_UP_STEPS, cfg.kernels.cuda_graph_warmup_steps + 2 if cfg.kernels.cuda_graph_scope else 0)


def measure_case(cfg: RunConfig, *, steps: int, beside_bare: bool, say: Say) -> dict[str, Any]:
    """Measure one configuration; every step takes the same rows.

    Args:
        cfg: a configuration of one rank.
        steps: timed steps, after a warm-up and before two profiled ones.
        beside_bare: at the end, also time as many steps in turn with a bare megatron-core loop over the same model.
        say: takes progress.

    Returns:
        Plain values: seconds, rates, losses, memory, profile.
    """
    started = time.perf_counter()
    scale = Scale(cfg.parallel.device)
    with ExitStack() as stack:
        parts, batches = build(cfg, stack, scale=scale)
        say(f"built in {time.perf_counter() - started:.1f} s")
        first = _step(parts, batches)
        scale.mark("first step")
        scale.note_state(parts)
        if scale.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        outputs = [first, *(_step(parts, batches) for _ in range(warm_up_steps(cfg) - 1))]
        say(f"warm after {time.perf_counter() - started:.1f} s, loss {outputs[-1].loss:.4f}")
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            outputs.append(_step(parts, batches))
            seconds.append(time.perf_counter() - begin)
        memory = weigh(cfg, scale)
        profiled, more = _profile(parts, batches)
        outputs += more
        bare = _beside_bare(parts, batches, steps=steps, say=say) if beside_bare else None
    return {
        "build_and_warm_up_seconds": time.perf_counter() - started - sum(seconds),
        **rates(cfg, seconds),
        "losses": [output.loss for output in outputs],
        "grad_norm": outputs[-1].grad_norm,
        "steps_applied": sum(output.applied for output in outputs),
        "problem": problem_of([output.loss for output in outputs], applied=[output.applied for output in outputs]),
        "memory": memory,
        "profile": profiled,
        "beside_bare": bare,
    }


def _beside_bare(parts: StepParts, batches: Sequence[MMBatch], *, steps: int, say: Say) -> dict[str, Any]:
    """Return seconds of both loops and the ratio of their pairs, or why there is none."""
    try:
        seconds = seconds_in_turn(parts, batches, pairs=max(2, steps))
    except torch.OutOfMemoryError as error:  # the bare loop keeps fp32 copies of the logits
        return {"problem": f"out of memory: {error}"}
    ratio = pair_ratio(seconds)
    say(f"ours / bare: {ratio.median:.3f}")
    return {"seconds": seconds, "ratio": ratio.median, "quartiles": [ratio.low, ratio.high], "problem": None}


def _step(parts: StepParts, batches: Sequence[MMBatch]) -> StepOutput:
    output = train_step(parts, iter(batches), num_microbatches=len(batches))
    _wait(parts)
    return output


def _wait(parts: StepParts) -> None:
    if parts.topology.device.type == "cuda":
        torch.cuda.synchronize()


def _profile(parts: StepParts, batches: Sequence[MMBatch]) -> tuple[dict[str, Any], list[StepOutput]]:
    """Profile two steps. On a GPU the device alone is recorded, so that the host is hardly slowed down."""
    device = parts.topology.device.type
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        outputs = [train_step(parts, iter(batches), num_microbatches=len(batches)) for _ in range(PROFILED_STEPS)]
        _wait(parts)
    with tempfile.TemporaryDirectory(prefix="profile") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return breakdown(events, device=device, steps=PROFILED_STEPS), outputs


def rates(cfg: RunConfig, seconds: Sequence[float]) -> dict[str, Any]:
    """Return what ``seconds`` of steps mean: tokens and tiles a second, model TFLOP/s with the encoder counted."""
    rows = cfg.train.global_batch_size
    tiles = rows * planned_tiles_per_row(cfg)
    flops, median = step_flops(cfg, rows=rows, tiles=tiles), statistics.median(seconds)
    return {
        "step_seconds": list(seconds),
        "median_step_seconds": median,
        "tokens_per_second": rows * cfg.data.seq_length / median,
        "tiles_per_second": tiles / median,
        "model_tflops": flops.total / median / 1e12,
        "step_tflop": {
            "language": flops.language / 1e12,
            "vision": flops.vision / 1e12,
            "connector": flops.connector / 1e12,
        },
    }


def problem_of(losses: Sequence[float], *, applied: Sequence[bool]) -> str | None:
    """Return why the steps are no training, or None: every loss is finite, every step applied, the last loss lower."""
    if not all(math.isfinite(loss) for loss in losses):
        return f"a loss is not finite: {', '.join(f'{loss:.4g}' for loss in losses)}"
    if not all(applied):
        return f"{len(applied) - sum(applied)} of {len(applied)} steps were skipped: gradients were not finite"
    if losses[-1] >= losses[0]:
        return f"the loss did not fall on the same rows: {losses[0]:.4f} at first, {losses[-1]:.4f} at last"
    return None


def weigh(cfg: RunConfig, scale: Scale) -> dict[str, Any]:
    """Return estimated and measured bytes, part by part, and the ratio of the two.

    Activations are the peak of a step above what its first one left behind, workspaces included.
    """
    estimate = memory_estimate(cfg, world_size=1)
    estimated = {
        "parameters": estimate.parameters,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "activations": estimate.activations,
        "total": estimate.total,
    }
    measured: dict[str, float] = {}
    reserved = None
    if scale.device == "cuda":
        peak, reserved = float(torch.cuda.max_memory_allocated()), float(torch.cuda.max_memory_reserved())
        measured = measured_parts(scale.marks, peak=peak)
    return {
        "estimated_bytes": estimated,
        "measured_bytes": measured,
        "measured_over_estimated": {
            name: value / estimated[name] for name, value in measured.items() if estimated[name] > 0
        },
        "max_reserved_bytes": reserved,
    }


def state_bytes(parts: StepParts) -> int:
    """Return the bytes of the optimizer's state tensors, without the masters that it was built with."""
    assert parts.optimizer is not None, "a training step needs an optimizer"
    states = [state for part in parts.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured_parts(marks: Mapping[str, float], *, peak: float) -> dict[str, float]:
    """Return bytes by part from what was allocated when each had been built, and from the peak of later steps.

    What the first step leaves behind is the optimizer's state; the rest of it are FP8 copies of weights, which
    ``accounting`` counts as parameters too.
    """
    left_behind = marks["first step"] - marks["rows"] - marks["state"]
    return {
        "parameters": marks["parameters"] - marks["start"] + left_behind,
        "gradients": marks["gradients"] - marks["parameters"],
        "optimizer": marks["masters"] - marks["gradients"] + marks["state"],
        "activations": peak - marks["first step"],
        "total": peak,
    }
