"""Self-attention of the decoder and of the encoder on megatron-core's linear layers.

The decoder sees packed rows: R rows of S tokens lie end to end as one sequence of T tokens with cumulative segment
bounds (megatron-core's THD format), and no token attends across a bound. The encoder sees a batch of tiles and attends
everywhere.

S, B: sequence and batch of an encoder batch; T: tokens of a packed row; N: heads of this rank; M: key/value heads of
this rank; K: head dimension; H: width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import nn
from torch.nn import functional as F

from mm15_megatron.models.rope import RotaryTable, apply_rotary


@dataclass
class PackedRows(PackedSeqParams):
    """megatron-core's packed-row parameters with the rotary table and, on the CPU, the segments as Python ints.

    Attributes:
        rotary: angles of the T tokens; None = no rotation.
        segments: (start, stop) of every non-empty segment, on the CPU only: there the bounds cost no synchronisation.
    """

    rotary: RotaryTable | None = None
    segments: tuple[tuple[int, int], ...] | None = None


def packed_rows(bounds_G: torch.Tensor, *, max_segment: int, rotary: RotaryTable | None) -> PackedRows:
    """Describe a packed row to the attention layers.

    Args:
        bounds_G: int32 [G], cumulative bounds padded with T (``MMBatch.segment_bounds_G``).
        max_segment: upper bound of a segment's length.
        rotary: angles of the tokens.
    """
    segments = None
    if bounds_G.device.type == "cpu":
        segments = tuple((a, b) for a, b in pairwise(bounds_G.tolist()) if b > a)
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=bounds_G,
        cu_seqlens_kv=bounds_G,
        max_seqlen_q=max_segment,
        max_seqlen_kv=max_segment,
        rotary=rotary,
        segments=segments,
    )


class LocalCoreAttention(nn.Module):
    """Scaled dot-product attention from torch: per segment on packed rows, over the whole sequence otherwise.

    The constructor takes what megatron-core passes to a core attention; a softmax scale of None means K ** -0.5.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [T, N, K] on packed rows, else [S, B, N, K].
            key: the same with M heads; N is a multiple of M.
            value: as ``key``.
            attention_mask: not used: masks follow from the bounds and from the layer's mask type.
            attn_mask_type: not used, fixed at construction.
            attention_bias: not used.
            packed_seq_params: bounds of the packed row; None for an encoder batch.

        Returns:
            [T, N * K] on packed rows, else [S, B, N * K].
        """
        if packed_seq_params is None:
            return self._batched(query, key, value)
        if packed_seq_params.segments is not None:
            return self._per_segment(query, key, value, packed_seq_params.segments)
        if query.dtype == torch.float32:
            return self._masked(query, key, value, packed_seq_params.cu_seqlens_q)
        return self._varlen(query, key, value, packed_seq_params)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend with [..., heads, tokens, K] operands."""
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=q.shape[-3] != k.shape[-3]
        )

    def _batched(self, q_SBNK: torch.Tensor, k_SBMK: torch.Tensor, v_SBMK: torch.Tensor) -> torch.Tensor:
        out_BNSK = self._attend(*(x.permute(1, 2, 0, 3) for x in (q_SBNK, k_SBMK, v_SBMK)))
        return out_BNSK.permute(2, 0, 1, 3).flatten(2)

    def _per_segment(
        self, q_TNK: torch.Tensor, k_TMK: torch.Tensor, v_TMK: torch.Tensor, segments: tuple[tuple[int, int], ...]
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_TNK, k_TMK, v_TMK))
        parts = [self._attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in segments]
        return torch.cat(parts, dim=2)[0].transpose(0, 1).flatten(1)

    def _masked(
        self, q_TNK: torch.Tensor, k_TMK: torch.Tensor, v_TMK: torch.Tensor, bounds_G: torch.Tensor
    ) -> torch.Tensor:
        """fp32 on a GPU, for parity runs: varlen kernels know half precision alone, so the mask is explicit."""
        token_T = torch.arange(q_TNK.shape[0], device=q_TNK.device, dtype=bounds_G.dtype)
        segment_T = torch.bucketize(token_T, bounds_G[1:], right=True)
        allowed_TT = segment_T[:, None] == segment_T[None]
        if self.causal:
            allowed_TT = allowed_TT & (token_T[:, None] >= token_T[None])
        q, k, v = (x.transpose(0, 1)[None] for x in (q_TNK, k_TMK, v_TMK))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed_TT, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1).flatten(1)

    def _varlen(self, q_TNK: torch.Tensor, k_TMK: torch.Tensor, v_TMK: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        # Imported here: the kernel runs on CUDA alone.
        from torch.nn.attention.varlen import varlen_attn

        # Key/value heads are repeated because the kernel of torch 2.11 does not group queries by itself.
        groups = q_TNK.shape[1] // k_TMK.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_TMK, v_TMK))
        bounds, longest = rows.cu_seqlens_q, rows.max_seqlen_q
        window = (-1, 0) if self.causal else (-1, -1)
        out_TNK = varlen_attn(q_TNK, k, v, bounds, bounds, longest, longest, scale=self.scale, window_size=window)
        return out_TNK.flatten(1)


class PackedSelfAttention(SelfAttention):
    """megatron-core's self-attention parameters with rotation by position ids.

    The projections, their sharding and the optional query/key norms are megatron-core's. The forward pass is ours
    because megatron-core's own applies RoPE from the bounds and refuses packed rows in its local core attention.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedRows | None = None,
        **unused: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Project, rotate, attend, project back.

        Args:
            hidden_states: [T, 1, H] (a packed row) or [S, B, H] (an encoder batch); under sequence parallelism the
                first dimension is this rank's shard.
            attention_mask: not used.
            packed_seq_params: the packed row; None for an encoder batch.
            unused: arguments of megatron-core's attention that have no meaning here (inference contexts, its RoPE).

        Returns:
            The output in the layout of ``hidden_states``, and the projection's bias (added by the caller) or None.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if packed_seq_params is not None:
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
            if packed_seq_params.rotary is not None:
                query = apply_rotary(query, packed_seq_params.rotary)
                key = apply_rotary(key, packed_seq_params.rotary)
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        else:
            context = self.core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                attention_bias=None,
                packed_seq_params=packed_seq_params,
            )
        if packed_seq_params is not None:
            context = context.reshape(context.shape[0], 1, -1)
        return self.linear_proj(context)
