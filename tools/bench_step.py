"""Measure what our training step adds to a bare megatron-core loop over the same layers, batches and optimizer.

    python tools/bench_step.py [--preset P] [section.field=value ...] [--steps 20] [--output PATH]

Both loops run in this process on the same model, one after the other, step by step in turn, so that a machine that
slows down slows both. The bare loop is what megatron-core's own documentation shows: its schedule, its vocabulary-
parallel cross-entropy, its ``finalize_model_grads`` with a token count, ``optimizer.step()``. Ours adds the weighted
loss with its z-loss, the normalisation by real targets, the router figures and the check that skips a bad step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from mm15_megatron.batch import MMBatch
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
from mm15_megatron.training.step import StepParts, set_gradient_hook, train_step

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


def bare_step(parts: StepParts, batches: Sequence[MMBatch]) -> None:
    """One step of a plain megatron-core loop."""
    set_gradient_hook(parts, partial(_finalise_bare, parts=parts, batches=batches))
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    cfg = parts.cfg
    get_forward_backward_func()(
        forward_step_func=_bare_forward,
        data_iterator=iter(batches),
        model=list(parts.chunks),
        num_microbatches=len(batches),
        seq_length=cfg.data.seq_length * cfg.train.micro_batch_size,
        micro_batch_size=1,
        forward_only=False,
    )
    parts.optimizer.step()


def _finalise_bare(chunks: Sequence[Any], *, parts: StepParts, batches: Sequence[MMBatch]) -> None:
    tokens = sum(int(batch.loss_mask_T.sum()) for batch in batches if batch.loss_mask_T is not None)
    count = torch.tensor([tokens], dtype=torch.int, device=parts.topology.device)
    finalize_model_grads(list(chunks), num_tokens=count, pg_collection=parts.topology.groups)


def _bare_forward(batches: Iterator[MMBatch], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)

    def loss(logits_1TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        losses_1T = vocab_parallel_cross_entropy(logits_1TV.float(), batch.labels_T[None])
        total = (losses_1T[0] * batch.loss_mask_T).sum()
        return total, batch.loss_mask_T.sum().int(), {"loss": total.detach()}

    return chunk(batch), loss


def our_step(parts: StepParts, batches: Sequence[MMBatch]) -> None:
    """One step of the trainer."""
    train_step(parts, iter(batches), num_microbatches=len(batches))


def measure(parts: StepParts, batches: Sequence[MMBatch], *, steps: int) -> dict[str, list[float]]:
    """Seconds of ``steps`` steps of each loop, in turn, after two of each that do not count."""
    loops = {"bare": bare_step, "ours": our_step}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for step in range(steps + 2):
        for name in ("bare", "ours") if step % 2 else ("ours", "bare"):
            started = time.perf_counter()
            loops[name](parts, batches)
            if parts.topology.device.type == "cuda":
                torch.cuda.synchronize()
            if step >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(cfg: RunConfig, seconds: dict[str, list[float]], *, command: str) -> tuple[str, dict[str, Any]]:
    """Markdown text and figures."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True)]
    ratio, low, high = statistics.median(ratios), *statistics.quantiles(ratios, n=4)[::2]
    machine = machine_facts()
    lines = [
        "# Our training step against a bare megatron-core loop",
        "",
        f"`{command}` on {machine['processor']}, {machine['cores']} cores.",
        "",
        "Same model, batches and optimizer in one process, steps of both in turn; the docstring of the tool says what "
        "each loop does.",
        "",
        "| loop | median seconds a step |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in medians.items()),
        "",
        f"ours / bare: **{ratio:.3f}** (median of {len(ratios)} pairs, quartiles {low:.3f} and {high:.3f})",
    ]
    figures = {
        "ratio": ratio,
        "quartiles": [low, high],
        "median_seconds": medians,
        "options": {"language": vars(cfg.language), "data.seq_length": cfg.data.seq_length},
        "command": command,
        "machine": machine,
        "versions": library_versions(),
    }
    return "\n".join(lines) + "\n", figures


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
        cfg = apply_overrides(resolve(arguments.preset), [*DEFAULTS, *arguments.options])
        with ExitStack() as stack:
            parts, batches = build(cfg, stack)
            seconds = measure(parts, batches, steps=arguments.steps)
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    text, figures = report(cfg, seconds, command=" ".join(["python", "tools/bench_step.py", *sys.argv[1:]]))
    print(text, end="")
    if arguments.output is not None:
        arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
        write_report(arguments.output.with_suffix(".json"), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
