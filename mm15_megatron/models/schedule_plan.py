"""A chunk's forward and backward pass cut into nodes, so that one micro-batch communicates while another computes.

With ``parallel.overlap_moe_expert_parallel_comm`` megatron-core's schedules ask a chunk for such a plan instead of
calling it: every sparse layer becomes attention and routing, dispatch, experts and combination, and the all-to-all of
one micro-batch's forward pass runs beside the other's backward pass. The nodes call the parts of a layer one by one,
past ``forward``. Four things that ``forward`` does would get lost on that way and are put back here:

- the router learns which tokens are padding;
- without sequence parallelism a sparse layer cuts its rank's tokens out;
- the norm behind the last layer is applied when that layer is dense, too;
- logits keep their dtype (an fp32 copy of them would be the largest tensor of the step).

And one tensor must not be freed early: see :class:`_LayerPlan`.

T: tokens of the micro-batch; H: width of the decoder; V: this rank's share of the vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import (
    TransformerLayerSchedulePlan,
    TransformerModelChunkSchedulePlan,
)
from megatron.core.models.gpt.fine_grained_callables import PostProcessNode, TransformerLayerNode
from megatron.core.pipeline_parallel.utils import get_comp_stream
from megatron.core.transformer.transformer_layer import TransformerLayer

from mm15_megatron.models.sparse_layer import SparseFeedForward


def _attend_and_route(
    layer: TransformerLayer, node: TransformerLayerNode, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a sparse layer up to the all-to-all: attention, norm, router, tokens sorted by expert.

    Args:
        layer: the layer.
        node: the node this runs in; what the combination needs later is left in it.
        hidden_states: [T, 1, H].

    Returns:
        Tokens in the order in which they are sent, and their gates.
    """
    chunk, sparse = node.chunk_state, layer.mlp
    assert isinstance(sparse, SparseFeedForward), "a dense layer has no router"
    hidden_states, _ = layer._forward_attention(
        hidden_states=hidden_states, attention_mask=None, packed_seq_params=chunk.packed_seq_params
    )
    normed = layer._forward_pre_mlp_layernorm(hidden_states)
    normed, padding_mask = sparse.own_tokens(normed, chunk.padding_mask)
    gates, routing_map = sparse.route(normed, padding_mask.transpose(0, 1))
    tokens, gates = sparse.preprocess(normed, gates, routing_map)
    node.layer_state.residual = node.detach(hidden_states)
    return tokens, gates


def _dense_and_norm(layer: TransformerLayer, node: TransformerLayerNode, hidden_states: torch.Tensor) -> torch.Tensor:
    """Run the feed-forward block of the chunk's last layer, and the norm behind it where the chunk has one."""
    output = layer._forward_mlp(hidden_states)
    norm = node.chunk_state.model.decoder.final_layernorm
    return output if norm is None else norm(output)


class _LayerPlan(TransformerLayerSchedulePlan):
    """The nodes of one layer.

    An input is freed once its node has run, also that of the experts' node. A rank with a single expert neither sorts
    nor gathers what it received: the received tokens themselves are the input of the expert's first matrix product,
    whose backward pass reads them again. They are kept.
    """

    def _build_callable_nodes(self, event: Any, comp_stream: Any, comm_stream: Any, extra_args: dict[str, Any]) -> None:
        super()._build_callable_nodes(event, comp_stream, comm_stream, extra_args)
        layer = self.layer
        if isinstance(layer.mlp, SparseFeedForward):
            self.attn.submodule = partial(_attend_and_route, layer)
            self.mlp.free_input = layer.mlp.copies_received_tokens
        elif extra_args["is_last_layer"]:
            self.mlp.submodule = partial(_dense_and_norm, layer)


class _Logits(PostProcessNode):
    """The output layer."""

    def forward_impl(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [1, T, V] in the dtype of ``hidden_states`` [T, 1, H]."""
        state = self.chunk_state
        return self.gpt_model._postprocess(
            hidden_states=hidden_states,
            input_ids=None,
            position_ids=None,
            labels=None,
            rotary_pos_emb=None,
            rotary_pos_cos=None,
            rotary_pos_sin=None,
            decoder_input=state.decoder_input,
            packed_seq_params=state.packed_seq_params,
        )


class ChunkPlan(TransformerModelChunkSchedulePlan):
    """The nodes of one chunk for one micro-batch; megatron-core's schedules run it (``run``).

    Args: those of ``GPTModel.forward``.
    """

    def __init__(self, model: torch.nn.Module, **inputs: Any) -> None:
        super().__init__(model, **inputs)
        if self.post_process is not None:
            self.post_process = _Logits(model, self.state, self.event, get_comp_stream())

    def _build_layer_schedule_plan(self, module: torch.nn.Module | None, comp_stream: Any, comm_stream: Any) -> None:
        if module is None:
            return
        last = len(module.layers) - 1
        self._transformer_layers += [
            _LayerPlan(
                layer,
                self.event,
                self.state,
                comp_stream,
                comm_stream,
                {"is_first_layer": index == 0, "is_last_layer": index == last},
            )
            for index, layer in enumerate(module.layers)
        ]
