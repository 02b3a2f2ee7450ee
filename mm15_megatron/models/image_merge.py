"""Put the tokens of image tiles into the slots the packed row keeps for them.

T: tokens of the packed row; N: tiles; P: slots of a tile; H: language width.
"""

from __future__ import annotations

import torch


def merge_image_tokens(text_T1H: torch.Tensor, tokens_NPH: torch.Tensor, slots_NP: torch.Tensor) -> torch.Tensor:
    """Return the row with ``tokens_NPH`` written over the slots.

    The number of tiles may be zero: the gradient of the (dummy) tile is then an exact zero, never 0 * inf.

    Args:
        text_T1H: embedded row; what stands at the slots is overwritten.
        tokens_NPH: language tokens of the tiles.
        slots_NP: positions in T, each at most once.
    """
    tokens = tokens_NPH.reshape(-1, 1, text_T1H.shape[-1]).to(text_T1H.dtype)
    return torch.index_copy(text_T1H, 0, slots_NP.reshape(-1), tokens)
