"""Layer specs of the decoder and of the encoder for either backend."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mm15_megatron.models.attention import PackedSelfAttention
from mm15_megatron.models.backend import Backend


def dense_layer_spec(backend: Backend, *, mask: AttnMaskType, qk_layernorm: bool = False) -> ModuleSpec:
    """One pre-norm layer: norm, self-attention, residual, norm, MLP, residual.

    Args:
        backend: the classes to build it from; a backend with a fused norm + linear gets identity norms before them.
        mask: causal for the decoder, no_mask for the encoder.
        qk_layernorm: a norm on the queries and on the keys, per head.
    """
    fused = backend.norm_column_linear is not None
    into_linear = backend.norm_column_linear or backend.column_linear
    head_norm = backend.norm if qk_layernorm else None
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=into_linear,
            core_attention=backend.core_attention,
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


def block_spec(backend: Backend, layer: ModuleSpec, *, num_layers: int) -> TransformerBlockSubmodules:
    """Equal layers followed by the backend's norm (which is built only where the block asks for one)."""
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=backend.norm)
