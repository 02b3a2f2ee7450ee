"""How far apart results on a GPU may be, and why. A figure without a unit is relative."""

from __future__ import annotations

from collections.abc import Sequence

from mm15_megatron.parity.compare import BF16_SCALAR, FP32_REDUCTION

__all__ = [
    "BF16",
    "BF16_GRADIENT",
    "BF16_ORDER",
    "BF16_SCALAR",
    "BF16_STEPS",
    "FORWARD",
    "FP32_REDUCTION",
    "FP8_LOSS",
    "LEARNED",
    "assert_repeats",
]

BF16 = 4e-2
"""Logits of two implementations, norm of the difference: 8 bits of mantissa, four layers, sums over a row."""
BF16_GRADIENT = 3 * BF16
"""A gradient has gone through the layers twice."""
BF16_ORDER = 1e-2
"""One layer with equal operands whose sums are taken in another order: the result is rounded once, by 2 ** -9."""
BF16_STEPS = 1e-2
"""Losses of ten steps that round differently somewhere, as a share of the first one: what is rounded moves the weights,
and they the next losses. Seen on the CPU: 6e-3 between fp32 and bf16, 4e-3 after every matrix's first weight was moved
by one unit of bf16."""
FORWARD = 1e-4
"""The loss of equal weights, computed twice by the same kernels: a forward pass has hardly any atomic sums."""
FP8_LOSS = 0.05
"""FP8 keeps 3 bits of mantissa; over fifty steps the loss of a small model stays within this share of the first one."""
LEARNED = 0.7
"""A model that sees the same rows again and again gets its loss below this share of the first one."""
OFTEN = 4.0
"""The difference of two equal runs is one draw of the noise; a third run stays within this multiple of it."""


def assert_repeats(
    found: Sequence[float], reference: Sequence[float], repeated: Sequence[float], *, floor: float
) -> None:
    """Assert that a run's losses are as near to the reference's as those of a second run of the reference.

    Sums by atomic additions (backward passes of attention and of pooling) make equal runs differ, and training carries
    that on; how much depends on the device, so it is measured.

    Args:
        found: losses of the run.
        reference: losses of the reference.
        repeated: losses of the same once more.
        floor: what is allowed anyway, as a share of the reference's first loss.
    """
    allowed = floor * abs(reference[0])
    noise = max(abs(a - b) for a, b in zip(reference, repeated, strict=True))
    for step, (loss, expected) in enumerate(zip(found, reference, strict=True)):
        assert abs(loss - expected) <= allowed + OFTEN * noise, (
            f"step {step}: a loss of {loss} instead of {expected}; {allowed:.2g} is allowed, and {OFTEN:g} times the "
            f"{noise:.2g} that two equal runs differ by: {list(found)} instead of {list(reference)}"
        )
