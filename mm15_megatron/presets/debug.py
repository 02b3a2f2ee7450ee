"""Presets small enough for a laptop, of the true shape: every part of the family, splitting over two ranks."""

from __future__ import annotations

from dataclasses import replace

from mm15_megatron.presets.preset import Preset, settings

_OURS = "ours: small enough for a laptop"

DEBUG_DENSE = Preset(
    name="debug_dense",
    description="tiny dense model on CPU: 4 decoder layers, 3 encoder blocks, C-Abstractor with 4 tokens a tile",
    settings=settings(
        _OURS,
        language={
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "ffn_hidden_size": 192,
            "vocab_size": 256,
            "share_embeddings_and_output_weights": False,
        },
        vision={
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "ffn_hidden_size": 64,
            "patch_size": 14,
            "image_size": 56,
        },
        connector={"num_tokens": 4, "hidden_size": 16, "depth": 1, "mlp_depth": 2},
        data={"seq_length": 128, "max_images": 8, "max_tiles": 16},
        parallel={"device": "cpu"},
        train={"steps": 20, "global_batch_size": 8, "micro_batch_size": 2},
        optimizer={"lr": 1e-3, "connector_lr": None},
        schedule={"warmup_steps": 2},
        checkpoint={"save_interval": 10},
    ),
)

DEBUG_MOE = replace(
    DEBUG_DENSE,
    name="debug_moe",
    description="debug_dense with 4 experts in every second layer",
    settings=DEBUG_DENSE.settings
    + settings(_OURS, moe={"num_moe_experts": 4, "moe_layer_period": 2, "moe_capacity_group_size": 32}),
)

DEBUG_VISION = replace(
    DEBUG_DENSE,
    name="debug_vision",
    description="debug_dense with a deeper encoder, average pooling and dynamic image splitting (1,4)",
    settings=DEBUG_DENSE.settings
    + settings(
        _OURS,
        vision={"num_layers": 6},
        connector={"kind": "average_pool"},
        tiling={"mode": "dynamic", "min_tiles": 1, "max_tiles": 4},
    ),
)

PRESETS = (DEBUG_DENSE, DEBUG_MOE, DEBUG_VISION)
