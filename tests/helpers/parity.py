"""The parity harness in the form of tests: five steps, one learning rate. See ``mm15_megatron/parity``."""

from __future__ import annotations

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parity import compare as comparison
from mm15_megatron.parity import trace as tracing
from mm15_megatron.parity.compare import FP32_SCALAR, Difference
from mm15_megatron.parity.trace import Trace

__all__ = ["FP32_SCALAR", "Difference", "Trace", "compare", "trace"]


def trace(cfg: RunConfig, *, world_size: int, steps: int = 5, prepare: tracing.Prepare | None = None) -> Trace:
    """Run a layout on real ranks."""
    return tracing.trace(cfg, world_size=world_size, plan=tracing.Plan(steps), prepare=prepare)


def compare(reference: Trace, other: Trace, *, learning_rate: float) -> Difference:
    """Compare with the tolerances of fp32; every part of the model has one learning rate."""
    rates = dict.fromkeys(("language", "connector", "vision"), learning_rate)
    return comparison.compare(reference, other, rates=rates)
