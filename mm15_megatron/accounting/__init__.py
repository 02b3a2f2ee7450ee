"""Parameters, FLOPs, memory and cost of a configuration, computed without torch.

Symbols: h, width of the decoder; q and kv, summed widths of its query and key/value heads; f, inner width of a
feed-forward block; V, padded vocabulary; s, tokens of a row; d, width of the encoder; n, patches of a tile; C, channels
of the connector.

Model FLOPs follow Megatron's convention: a multiply-add is 2, causal attention is halved and sees the whole row, the
backward pass is twice the forward pass, and recomputation does not count. What a frozen module need not compute is left
out, and so is the class token (one of 730 tokens).
"""

from __future__ import annotations

from mm15_megatron.accounting.flops import (
    ForwardFlops,
    StepFlops,
    connector_forward_flops,
    device_peak_tflops,
    layer_forward_flops,
    output_forward_flops,
    planned_tiles_per_row,
    step_flops,
    vision_forward_flops,
)
from mm15_megatron.accounting.memory import (
    LOSS_CHUNK_TOKENS,
    MemoryEstimate,
    memory_estimate,
)
from mm15_megatron.accounting.parameters import (
    LanguageParameters,
    ModelParameters,
    built_vision_layers,
    connector_parameters,
    language_parameters,
    learning_rate_law,
    model_parameters,
    padded_vocab_size,
    resolved_learning_rate,
    sparse_layers,
    vision_parameters,
    vision_tower_parameters,
)
from mm15_megatron.accounting.pipeline import (
    chunk_layers,
    pipeline_layer_split,
    stage_costs,
    stage_layers,
)

__all__ = [
    "LOSS_CHUNK_TOKENS",
    "ForwardFlops",
    "LanguageParameters",
    "MemoryEstimate",
    "ModelParameters",
    "StepFlops",
    "built_vision_layers",
    "chunk_layers",
    "connector_forward_flops",
    "connector_parameters",
    "device_peak_tflops",
    "language_parameters",
    "layer_forward_flops",
    "learning_rate_law",
    "memory_estimate",
    "model_parameters",
    "output_forward_flops",
    "padded_vocab_size",
    "pipeline_layer_split",
    "planned_tiles_per_row",
    "resolved_learning_rate",
    "sparse_layers",
    "stage_costs",
    "stage_layers",
    "step_flops",
    "vision_forward_flops",
    "vision_parameters",
    "vision_tower_parameters",
]
