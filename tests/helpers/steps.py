"""Training steps on the fixed stream, for tests that save and resume between them."""

from __future__ import annotations

from mm15_megatron.parity.trace import micro_batches
from mm15_megatron.training.step import StepParts, train_step


def train_steps(parts: StepParts, first: int, count: int) -> list[tuple[float, float]]:
    """Train ``count`` steps from step ``first`` on; (loss, gradient norm) of each."""
    train, found = parts.cfg.train, []
    rounds = train.global_batch_size // train.micro_batch_size // parts.topology.data_size
    for step in range(first, first + count):
        output = train_step(parts, micro_batches(parts.cfg, parts.topology, step=step), num_microbatches=rounds)
        assert output.applied
        found.append((output.loss, output.grad_norm))
    return found
