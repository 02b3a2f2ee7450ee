"""What the routers of one model chunk saw in a step, and the weight of a token's router loss in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BALANCE, Z, DROPPED, LOAD = 0, 1, 2, 3
"""Columns of ``RouterLedger.totals``; the last E columns hold how many tokens wanted each expert."""


class RouterLedger:
    """Adds up losses and loads of the sparse layers of a chunk, without asking the device for a value.

    Args:
        layers: global indices (from 0) of the chunk's sparse layers.
        experts: E.
        device: where the sums live.

    Attributes:
        layers: as given.
        totals: fp64 [layers, 3 + E]: sums over the real tokens of this rank since :meth:`begin`.
        loss_scale: fp32 scalar, what a token's router loss weighs beside a target's while gradients are still sums.
            These are divided by the targets of the global batch at the end, and router losses by its tokens, so it is
            targets / tokens.
    """

    def __init__(self, layers: Sequence[int], *, experts: int, device: torch.device | int) -> None:
        self.layers = tuple(layers)
        self.loss_scale = torch.zeros((), device=device)
        self.totals = torch.zeros(len(self.layers), 3 + experts, dtype=torch.float64, device=device)

    def begin(self, *, loss_scale: torch.Tensor) -> None:
        """Start a step."""
        self.loss_scale = loss_scale
        self.totals.zero_()

    def add(
        self, layer: int, *, balance: torch.Tensor, z: torch.Tensor, wanted_E: torch.Tensor, dropped: torch.Tensor
    ) -> None:
        """Enter one micro-batch of one layer: sums of the losses, choices for each expert, choices refused."""
        row = torch.cat((torch.stack((balance, z, dropped.to(balance.dtype))), wanted_E))
        self.totals[self.layers.index(layer)] += row
