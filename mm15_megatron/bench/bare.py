"""A bare megatron-core loop over our layers: what our own step is held against.

It is what megatron-core's own documentation shows: its schedule, its vocabulary-parallel cross-entropy, its
``finalize_model_grads`` with the token count that the schedule sums, ``optimizer.step()`` with its gradient norm and
clipping.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from mm15_megatron.batch import MMBatch
from mm15_megatron.training.step import StepParts, train_step

LOOPS = ("bare", "ours")


@dataclass(frozen=True)
class PairRatio:
    """Ours divided by bare over pairs of steps: median and quartiles."""

    median: float
    low: float
    high: float


def pair_ratio(values: dict[str, list[float]]) -> PairRatio:
    """Divide each of our steps by the bare one of its pair; two pairs at least."""
    ratios = [ours / bare for ours, bare in zip(values["ours"], values["bare"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return PairRatio(statistics.median(ratios), low, high)


def bare_step(parts: StepParts, batches: Sequence[MMBatch]) -> None:
    """One step of a plain megatron-core loop."""
    for chunk in parts.chunks:
        chunk.module.config.finalize_model_grads_func = finalize_model_grads
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


def run_step(loop: str, parts: StepParts, batches: Sequence[MMBatch]) -> None:
    """Take one step of a loop and wait for the device."""
    (bare_step if loop == "bare" else our_step)(parts, batches)
    if parts.topology.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_in_turn(parts: StepParts, batches: Sequence[MMBatch], *, pairs: int) -> dict[str, list[float]]:
    """Time ``pairs`` steps of each loop, in turn, after one of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for pair in range(pairs + 1):
        for name in LOOPS if pair % 2 else reversed(LOOPS):
            started = time.perf_counter()
            run_step(name, parts, batches)
            if pair:
                seconds[name].append(time.perf_counter() - started)
    return seconds
