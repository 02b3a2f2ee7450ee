"""Layer specs of the decoder and of the encoder for either backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mm15_megatron.models.attention import PackedSelfAttention
from mm15_megatron.models.backend import Backend
from mm15_megatron.models.context_parallel import HeadExchange
from mm15_megatron.models.router import RoutingRules, RowRouter
from mm15_megatron.models.router_ledger import RouterLedger
from mm15_megatron.models.sparse_layer import SparseFeedForward


def dense_layer_spec(
    backend: Backend, *, mask: AttnMaskType, qk_layernorm: bool = False, exchanges_heads: bool = False
) -> ModuleSpec:
    """One pre-norm layer: norm, self-attention, residual, norm, MLP, residual.

    Args:
        backend: the classes to build it from; a backend with a fused norm + linear gets identity norms before them.
        mask: causal for the decoder, no_mask for the encoder.
        qk_layernorm: a norm on the queries and on the keys, per head.
        exchanges_heads: the tokens of a row are spread over a context-parallel group.
    """
    fused = backend.norm_column_linear is not None
    into_linear = backend.norm_column_linear or backend.column_linear
    head_norm = backend.norm if qk_layernorm else None
    core = backend.core_attention
    if exchanges_heads:
        core = ModuleSpec(module=HeadExchange, params={"inner": backend.core_attention})
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=into_linear,
            core_attention=core,
            linear_proj=backend.row_linear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=into_linear, linear_fc2=backend.row_linear))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else backend.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused else backend.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


@dataclass
class SparseSpec:
    """What megatron-core's ``build_module`` reads of a ModuleSpec.

    Not a ModuleSpec: megatron-core hands groups to its own classes alone and warns, for every layer, of any other.
    """

    submodules: MoESubmodules
    params: dict[str, ProcessGroupCollection]
    module: type = SparseFeedForward


def sparse_layer_spec(
    backend: Backend, dense: ModuleSpec, *, rules: RoutingRules, ledger: RouterLedger, groups: ProcessGroupCollection
) -> ModuleSpec:
    """The dense layer with experts in place of its MLP, and its norm before them (the router needs its output too)."""
    experts = ModuleSpec(
        module=backend.experts,
        submodules=MLPSubmodules(linear_fc1=backend.expert_column_linear, linear_fc2=backend.expert_row_linear),
    )
    router = partial(RowRouter, rules=rules, ledger=ledger)
    mlp = SparseSpec(MoESubmodules(experts=experts, router=router), params={"pg_collection": groups})
    submodules = replace(dense.submodules, mlp=mlp, pre_mlp_layernorm=backend.norm)
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def block_spec(backend: Backend, layers: Sequence[ModuleSpec]) -> TransformerBlockSubmodules:
    """Layers followed by the backend's norm (which is built only where the block asks for one)."""
    return TransformerBlockSubmodules(layer_specs=list(layers), layer_norm=backend.norm)
