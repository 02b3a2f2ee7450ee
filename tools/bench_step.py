"""Measure what our training step adds to a bare megatron-core loop over the same layers, batches and optimizer.

    python tools/bench_step.py [--preset P] [section.field=value ...] [--steps 20] [--output PATH]

Both loops run in this process on the same model, one after the other, step by step in turn, so that a machine that
slows down slows both. The bare loop (``mm15_megatron/bench/bare.py``) is what megatron-core's own documentation shows:
its schedule, its vocabulary-parallel cross-entropy, its ``finalize_model_grads`` with a token count,
``optimizer.step()`` with its gradient norm and clipping. Ours adds the weighted loss with its z-loss, the normalisation
by real targets, the router figures and the check that skips a bad step. Both pass over the logits equally often
(maximum, shift, exponential, sum, normalisation, scaling) and scale the gradients in a pass of their own; ours keeps
the losses and figures for one read of the device.

After the timed steps a few of each loop are profiled, and the operators whose own time differs most are listed. What
one loop computes no differently can stand there too: the same matrix products take a few per cent more or less from one
profile to the next, so only what is larger than that says something about the loops.

Debug presets are enlarged until a step is arithmetic; others are taken as they are. On a GPU ``tools/bench_gpu.py``
measures the same ratio on slices of the large models.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mm15_megatron.batch import MMBatch
from mm15_megatron.bench.bare import LOOPS, pair_ratio, run_step
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import MM15Error
from mm15_megatron.evaluation.report import library_versions, machine_facts, write_report
from mm15_megatron.models.build import build_chunks
from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.rendezvous import discover
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology, close_topology
from mm15_megatron.parity.stream import global_batch, rank_batches
from mm15_megatron.presets import resolve
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.step import StepParts

PROFILED_STEPS, PROFILES, LISTED = 2, 3, 10

# Large enough that a step is arithmetic, small enough for a laptop.
DEFAULTS = (
    "language.num_layers=4",
    "language.hidden_size=384",
    "language.num_attention_heads=6",
    "language.num_query_groups=6",
    "language.kv_channels=64",
    "language.ffn_hidden_size=1024",
    "language.vocab_size=4096",
    "vision.hidden_size=256",
    "vision.num_attention_heads=4",
    "vision.ffn_hidden_size=1024",
    "vision.image_size=112",
    "connector.num_tokens=16",
    "connector.hidden_size=128",
    "data.seq_length=512",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
)


def build(cfg: RunConfig, stack: ExitStack) -> tuple[StepParts, list[MMBatch]]:
    """Build model, optimizer and one global batch on this rank."""
    stack.callback(close_topology)
    topology = build_topology(cfg.parallel, place=discover())
    seed_everything(cfg.train.seed, topology=topology)
    chunks = wrap_chunks(cfg, build_chunks(cfg, stages=topology.stages))
    parts = StepParts(cfg, topology, chunks, build_optimizer(cfg, chunks))
    rows = global_batch(cfg, step=0)
    wholes = rank_batches(rows, cfg, data_rank=topology.data_rank, data_size=topology.data_size)
    return parts, [local_batch(whole, topology=topology, image_size=cfg.vision.image_size) for whole in wholes]


@dataclass(frozen=True)
class Timings:
    """What the timed steps took, by loop.

    Attributes:
        seconds: of each step.
        processor: seconds that each step occupied a core: what other programs on the machine take is left out.
        page_faults: of each step: fresh memory that it touched, in pages.
    """

    seconds: dict[str, list[float]]
    processor: dict[str, list[float]]
    page_faults: dict[str, list[int]]


@dataclass(frozen=True)
class OperatorTime:
    """One operator in both loops.

    Attributes:
        name: as torch calls it.
        calls: a step, by loop.
        milliseconds: a step, its own time without that of operators it calls, by loop; the least of several profiles.
    """

    name: str
    calls: dict[str, float]
    milliseconds: dict[str, float]

    @property
    def difference(self) -> float:
        """How much more it takes in our loop, milliseconds."""
        return self.milliseconds["ours"] - self.milliseconds["bare"]


def measure(parts: StepParts, batches: Sequence[MMBatch], *, steps: int) -> Timings:
    """Time ``steps`` steps of each loop, in turn, after two of each that do not count."""
    timings = Timings(*({name: [] for name in LOOPS} for _ in range(3)))
    for step in range(steps + 2):
        for name in LOOPS if step % 2 else reversed(LOOPS):
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            started, occupied = time.perf_counter(), time.process_time()
            run_step(name, parts, batches)
            if step >= 2:
                timings.seconds[name].append(time.perf_counter() - started)
                timings.processor[name].append(time.process_time() - occupied)
                timings.page_faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    return timings


def breakdown(parts: StepParts, batches: Sequence[MMBatch]) -> list[OperatorTime]:
    """Profile both loops in turn; operators by how much their own time differs, largest first."""
    device = parts.topology.device.type
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    found: dict[str, OperatorTime] = {}
    for _ in range(PROFILES):
        for loop in LOOPS:
            with torch.profiler.profile(activities=[activity]) as profile:
                for _ in range(PROFILED_STEPS):
                    run_step(loop, parts, batches)
            for event in profile.key_averages():
                own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
                entry = found.setdefault(event.key, OperatorTime(event.key, {}, {}))
                entry.calls[loop] = event.count / PROFILED_STEPS
                entry.milliseconds[loop] = min(own / PROFILED_STEPS / 1000, entry.milliseconds.get(loop, float("inf")))
    for entry in found.values():
        for loop in LOOPS:
            entry.calls.setdefault(loop, 0.0)
            entry.milliseconds.setdefault(loop, 0.0)
    return sorted(found.values(), key=lambda entry: -abs(entry.difference))


def report(
    cfg: RunConfig, timings: Timings, operators: Sequence[OperatorTime], *, command: str
) -> tuple[str, dict[str, Any]]:
    """Markdown text and figures."""
    medians = {name: statistics.median(values) for name, values in timings.seconds.items()}
    occupied = {name: statistics.median(values) for name, values in timings.processor.items()}
    faults = {name: statistics.median(values) for name, values in timings.page_faults.items()}
    ratio, processor_ratio = pair_ratio(timings.seconds), pair_ratio(timings.processor)
    machine = machine_facts()
    lines = [
        "# Our training step against a bare megatron-core loop",
        "",
        f"`{command}` on {machine['processor']}, {machine['cores']} cores.",
        "",
        "Same model, batches and optimizer in one process, steps of both in turn; the docstring of the tool says what "
        "each loop does.",
        "",
        "| loop | seconds a step (median) | seconds of a core | page faults |",
        "|---|---|---|---|",
        *(f"| {name} | {medians[name]:.4f} | {occupied[name]:.4f} | {faults[name]:.0f} |" for name in LOOPS),
        "",
        f"ours / bare: **{ratio.median:.3f}** of the time (median of {len(timings.seconds['ours'])} pairs, quartiles "
        f"{ratio.low:.3f} and {ratio.high:.3f}); {processor_ratio.median:.3f} of the core's time (quartiles "
        f"{processor_ratio.low:.3f} and {processor_ratio.high:.3f}), which other programs disturb less",
        "",
        *_operator_lines(operators),
    ]
    figures = {
        "ratio": ratio.median,
        "quartiles": [ratio.low, ratio.high],
        "processor_ratio": processor_ratio.median,
        "processor_quartiles": [processor_ratio.low, processor_ratio.high],
        "median_seconds": medians,
        "median_processor_seconds": occupied,
        "page_faults": faults,
        "operators": [asdict(operator) for operator in operators[:LISTED]],
        "options": {"preset": cfg.preset, "language": vars(cfg.language), "data.seq_length": cfg.data.seq_length},
        "command": command,
        "machine": machine,
        "versions": library_versions(),
    }
    return "\n".join(lines) + "\n", figures


def _operator_lines(operators: Sequence[OperatorTime]) -> list[str]:
    """The operators whose own time differs most, and the sum over all."""
    total = {loop: sum(operator.milliseconds[loop] for operator in operators) for loop in LOOPS}
    rows = [
        f"| {item.name} | {item.calls['bare']:.0f} | {item.milliseconds['bare']:.2f} | {item.calls['ours']:.0f} | "
        f"{item.milliseconds['ours']:.2f} | {item.difference:+.2f} |"
        for item in operators[:LISTED]
    ]
    return [
        f"Own time of the operators whose time differs most, milliseconds a step (least of {PROFILES} profiles of "
        f"{PROFILED_STEPS} steps):",
        "",
        "| operator | calls, bare | ms | calls, ours | ms | difference |",
        "|---|---|---|---|---|---|",
        *rows,
        f"| all operators | | {total['bare']:.1f} | | {total['ours']:.1f} | {total['ours'] - total['bare']:+.2f} |",
    ]


def main() -> int:
    """Read the command line, measure, print, write."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debug_dense", help="start from this preset [debug_dense]")
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps [20]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.json")
    parser.add_argument("options", nargs="*", help="section.field=value")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        enlarged = DEFAULTS if arguments.preset.startswith("debug") else ()
        cfg = apply_overrides(resolve(arguments.preset), [*enlarged, *arguments.options])
        with ExitStack() as stack:
            parts, batches = build(cfg, stack)
            timings = measure(parts, batches, steps=arguments.steps)
            operators = breakdown(parts, batches)
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    command = " ".join(["python", "tools/bench_step.py", *sys.argv[1:]])
    text, figures = report(cfg, timings, operators, command=command)
    print(text, end="")
    if arguments.output is not None:
        arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
        write_report(arguments.output.with_suffix(".json"), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
