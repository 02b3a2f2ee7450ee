"""RMSNorm and LayerNorm for the local backend.

megatron-core's own torch wrapper refuses sequence parallelism. Ours marks its weights, so that megatron-core sums their
gradients over the tensor-parallel group when activations are sharded along the sequence.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch.nn import functional as F


class LocalNorm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as ``config.normalization`` says.

    Args:
        config: gives the normalisation, the dtype of the weights and whether activations are sequence-parallel.
        hidden_size: size of the last dimension.
        eps: added to the mean square or to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.is_rms = config.normalization == "RMSNorm"
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = (
            None if self.is_rms else nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` [..., hidden_size]; the result has the dtype of ``x``."""
        if self.is_rms:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
