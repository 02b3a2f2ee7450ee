"""The feed-forward block of a sparse layer on megatron-core's mixture of experts.

T: tokens of the micro-batch; H: width of the decoder.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class PaddingFreeDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's all-to-all dispatcher for a routing map in which padding goes nowhere.

    The dropless original takes tokens x top-k for granted.
    """

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Count what is really sent.

        The fused permutation cannot put nothing back into its place: of padding alone, one token goes to an expert and
        comes back with its gate, 0.
        """
        if self.config.moe_permute_fusion:
            routing_map = routing_map.clone()
            routing_map[0, 0] |= ~routing_map.any()
            self.routing_map = routing_map
        tokens_per_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert


class SparseFeedForward(MoELayer):
    """Router, experts and dispatch; each tensor-parallel rank routes its own shard of the tokens.

    Under sequence parallelism activations arrive sharded. Without it they are cut here and put together again, so that
    no token is computed twice; megatron-core refuses that layout. The router's gradient is then a sum over the group,
    which ``parallel/reduce.py`` takes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        assert pg_collection is not None, "the layer's spec carries its groups"
        self.cuts_tokens = pg_collection.tp.size() > 1 and not config.sequence_parallel
        if self.cuts_tokens:
            config = copy.copy(config)
            config.sequence_parallel = True
        super().__init__(config, submodules, layer_number=layer_number, pg_collection=pg_collection)
        self.token_dispatcher = PaddingFreeDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )
        for parameter in self.experts.parameters():
            # Experts have their own data-parallel group. megatron-core says so for EP > 1 alone, which is wrong
            # whenever the tensor-parallel sizes of experts and of the rest differ.
            parameter.allreduce = False
            # Inside the group that adds up the gradient norm no two ranks hold the same expert's same slice.
            parameter.tensor_model_parallel = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: tuple[torch.Tensor, ...] | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Send every real token through its experts.

        Args:
            hidden_states: [T, 1, H], this rank's shard under sequence parallelism.
            intermediate_tensors: as in megatron-core.
            padding_mask: bool [1, T] with the same tokens, True = padding.

        Returns:
            The output in the layout of ``hidden_states``, 0 for padding, and no bias.
        """
        hidden_states, padding_mask = self.own_tokens(hidden_states, padding_mask)
        return super().forward(hidden_states, intermediate_tensors, padding_mask)

    def own_tokens(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cut this rank's tokens out of [T, 1, H] and their padding out of [1, T], unless they arrive sharded."""
        if not self.cuts_tokens:
            return hidden_states, padding_mask
        hidden_states = scatter_to_sequence_parallel_region(hidden_states, group=self.tp_group)
        if padding_mask is not None:
            padding_mask = padding_mask.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        return hidden_states, padding_mask

    def postprocess(self, output: torch.Tensor, shared_expert_output: torch.Tensor | None) -> torch.Tensor:
        """Put the tokens back into their order, and together again what :meth:`own_tokens` cut."""
        output = super().postprocess(output, shared_expert_output)
        if not self.cuts_tokens:
            return output
        return gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False, group=self.tp_group)

    @property
    def copies_received_tokens(self) -> bool:
        """Whether received tokens are copied (sorted or gathered) before the first matrix product reads them."""
        return self.num_local_experts > 1 or self.token_dispatcher.tp_size > 1
