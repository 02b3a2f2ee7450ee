"""The table of a check: one line a layout, and where a layout parts from one rank."""

from __future__ import annotations

from mm15_megatron.parity.compare import Difference
from mm15_megatron.parity.layouts import Layout

HEADER = (
    f"{'layout':34} {'ranks':>5} {'forward':>8} {'loss':>8} {'router':>8} {'norm':>8} {'gradient':>8} {'update':>8} "
    f"{'time':>6}  result"
)


def layout_lines(layout: Layout, *, seconds: float, difference: Difference | None, failure: str) -> str:
    """Return the line of a layout: its largest differences and the verdict, or what its ranks said."""
    start = f"{layout.name:34} {layout.world_size:5} "
    if difference is None:
        return f"{start}{'':53} {seconds:5.1f}s  FAILED\n{failure}"
    d = difference
    figures = (d.forward, d.loss, d.router, d.grad_norm, d.gradient, d.parameter)
    verdict = "equal" if d.passes else f"DIFFERS at {d.place}"
    return start + " ".join(f"{figure:8.1e}" for figure in figures) + f" {seconds:5.1f}s  {verdict}"
