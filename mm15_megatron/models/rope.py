"""Rotary position embedding by explicit position ids.

megatron-core derives the angles of a packed row from its bounds, which costs a host synchronisation in every layer.
Here the positions come with the batch (``MMBatch.position_ids_T``), so one table a forward pass serves every layer.

T: tokens of the packed row; N: heads; K: head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Rotation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_TNK, cos_T1K, sin_T1K) -> rotated x_TNK."""


def rotation(*, compiled: bool) -> Rotation:
    """Choose how heads are rotated: op by op, or fused by torch.compile at the first use.

    Queries and keys may have different numbers of heads, and rows of answers different lengths: what varies becomes a
    symbol at its first change, so that the number of compilations is small and bounded.
    """
    return torch.compile(rotate_halves, fullgraph=True) if compiled else rotate_halves


def rotate_halves(x_TNK: torch.Tensor, cos_T1K: torch.Tensor, sin_T1K: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of every head; computed in fp32, returned in the dtype of ``x_TNK``."""
    x = x_TNK.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos_T1K + rotated * sin_T1K).to(x_TNK.dtype)


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of one packed row, fp32 [T, 1, K], and how they are applied."""

    cos_T1K: torch.Tensor
    sin_T1K: torch.Tensor
    rotation: Rotation = rotate_halves


def rotary_table(
    position_ids_T: torch.Tensor, *, head_dim: int, base: float, rotation: Rotation = rotate_halves
) -> RotaryTable:
    """Angles ``position * base ** (-2i / head_dim)``, laid out for the half-rotation convention.

    Args:
        position_ids_T: integer [T], position of each token inside its segment.
        head_dim: K, even.
        base: theta.
        rotation: how the angles are applied.
    """
    device = position_ids_T.device
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = position_ids_T.to(torch.float32)[:, None] * (base**-exponents)[None, :]
    angles_T1K = torch.cat((angles, angles), dim=-1)[:, None, :]
    return RotaryTable(cos_T1K=angles_T1K.cos(), sin_T1K=angles_T1K.sin(), rotation=rotation)


def apply_rotary(x_TNK: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate the two halves of every head (the convention of Llama and of megatron-core's non-interleaved RoPE).

    Args:
        x_TNK: queries or keys [T, N, K].
        table: angles of the same T tokens.

    Returns:
        Tensor of the shape and dtype of ``x_TNK``; the rotation itself is computed in fp32.
    """
    return table.rotation(x_TNK, table.cos_T1K, table.sin_T1K)
