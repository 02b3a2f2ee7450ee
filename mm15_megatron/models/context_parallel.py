"""Attention when the tokens of a row are spread over a context-parallel group: heads are exchanged for tokens.

Every rank holds T / C consecutive tokens of all its heads. Before the core attention the group exchanges them, so that
each rank sees all T tokens of 1 / C of the heads, and after it back (DeepSpeed-Ulysses; megatron-core's
``cp_comm_type=a2a``). Any core attention runs unchanged in between, packed rows included: unlike a ring, the exchange
asks nothing of the segments' lengths.

T: tokens of the packed row; C: ranks of the group; N, M: query and key/value heads of this tensor-parallel rank;
K: head dimension.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from mm15_megatron.models.attention import PackedRows


def heads_for_tokens(x_SNK: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Exchange: [T / C, N, K] of consecutive tokens -> [T, N / C, K] of consecutive heads."""
    tokens, heads, width = x_SNK.shape
    size = group.size()
    by_head = x_SNK.view(tokens, size, heads // size, width).transpose(0, 1).reshape(size * tokens, -1, width)
    return all_to_all(group, by_head)


def tokens_for_heads(x_TX: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Exchange back: [T, N K / C] -> [T / C, N K]."""
    size = group.size()
    tokens = x_TX.shape[0] // size
    received = all_to_all(group, x_TX).view(size, tokens, -1)
    return received.transpose(0, 1).reshape(tokens, -1)


class HeadExchange(nn.Module):
    """A core attention over the whole row for a share of the heads.

    Args:
        config: the decoder's; N and M of its heads belong to this tensor-parallel rank and are multiples of C.
        pg_collection: groups.
        inner: class of the core attention that runs in between.
        settings: what else megatron-core passes to a core attention, handed on to ``inner``.
    """

    def __init__(
        self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, inner: type, **settings: object
    ) -> None:
        super().__init__()
        self.group = pg_collection.cp
        share = copy.copy(config)
        share.num_attention_heads = config.num_attention_heads // self.group.size()
        share.num_query_groups = config.num_query_groups // self.group.size()
        self.inner = inner(config=share, pg_collection=pg_collection, **settings)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedRows,
        **options: object,
    ) -> torch.Tensor:
        """Attend: [T / C, N, K] queries and [T / C, M, K] keys and values -> [T / C, N K]."""
        query, key, value = (heads_for_tokens(x, self.group) for x in (query, key, value))
        context = self.inner(query, key, value, attention_mask, packed_seq_params=packed_seq_params, **options)
        return tokens_for_heads(context.reshape(context.shape[0], -1), self.group)
