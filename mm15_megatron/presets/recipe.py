"""Pieces that presets share: decoder shapes, image encoders, the connector and the recipe of each stage."""

from __future__ import annotations

from mm15_megatron.presets.preset import Setting, settings

DECODER_SHAPES = "derived: MM1 publishes parameter counts alone; shapes of AXLearn's public configs that meet them"
FITS_80_GB = "ours: a layout that fits 80 GB devices"

MM1_MIXTURE = "captions : interleaved : text 45:45:10"
MM15_MIXTURE = "captions : interleaved : text 50:10:40"
"""Mixtures of pre-training, drawn for each row (published: MM1 section 4, MM1.5 section 4)."""

_BLOCK = (
    *settings(
        "ours: unpublished; as in AXLearn's public configs",
        language={
            "vocab_size": 49152,
            "activation": "swiglu",
            "norm_epsilon": 1e-5,
            "rotary_base": 10_000.0,
            "share_embeddings_and_output_weights": True,
        },
    ),
    *settings("ours: unpublished; AXLearn's configs have it", language={"qk_layernorm": False}),
)


def decoder(
    layers: int,
    *,
    hidden: int,
    heads: int,
    head_dim: int,
    ffn: int,
    kv_heads: int | None = None,
    source: str = DECODER_SHAPES,
) -> tuple[Setting, ...]:
    """Return the settings of a decoder's shape; ``kv_heads`` None is multi-head attention."""
    shape = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": kv_heads or heads,
        "kv_channels": head_dim,
        "ffn_hidden_size": ffn,
    }
    return (*settings(source, language=shape), *_BLOCK)


def experts(count: int, *, period: int) -> tuple[Setting, ...]:
    """Return the settings of sparse layers: ``count`` experts in the last layer of every ``period``."""
    published = {"num_moe_experts": count, "moe_layer_period": period, "moe_router_topk": 2}
    losses = {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001}
    return (
        *settings("published: MM1 section 4, MM1.5 section 4", moe=published | losses),
        *settings("ours: dropless", moe={"moe_expert_capacity_factor": None}),
        *settings(FITS_80_GB, parallel={"expert_model_parallel_size": 16}, kernels={"recompute_vision": True}),
    )


def tensor_parallel(size: int) -> tuple[Setting, ...]:
    """Return the settings of a tensor-parallel layout with sequence parallelism."""
    layout = {"tensor_model_parallel_size": size, "sequence_parallel": True}
    return settings(FITS_80_GB, parallel=layout)


def _encoder(layers: int, *, hidden: int, heads: int, source: str) -> tuple[Setting, ...]:
    dimensions = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_hidden_size": 4 * hidden,
    }
    return settings(source, vision=dimensions)


def _clip(*, image: int, published: str, shape: str, activation: str) -> tuple[Setting, ...]:
    return (
        *settings(shape, vision={"class_token": True}),
        *settings(activation, vision={"activation": "quick_gelu"}),
        *settings(published, vision={"patch_size": 14, "image_size": image}),
        *settings("ours: unpublished", vision={"feature_layer": -1, "post_layernorm": False}),
    )


def vit_h(image: int, *, section: str) -> tuple[Setting, ...]:
    """Return the settings of CLIP ViT-H/14 on tiles of ``image`` pixels; ``section`` is the paper's place."""
    source = "derived: open_clip ViT-H-14-378-quickgelu, the public DFN-5B weights"
    published = f"published: {section}, CLIP ViT-H/14 at {image} px"
    return (
        *_encoder(32, hidden=1280, heads=16, source=source),
        *_clip(image=image, published=published, shape=source, activation=source),
    )


def vit_l(image: int, *, section: str) -> tuple[Setting, ...]:
    """Return the settings of CLIP ViT-L/14 on tiles of ``image`` pixels; ``section`` is the paper's place."""
    source = "derived: open_clip ViT-L-14" + ("" if image == 224 else f"-{image}")
    published = f"published: {section}, CLIP ViT-L/14 at {image} px"
    return (
        *_encoder(24, hidden=1024, heads=16, source=source),
        *_clip(image=image, published=published, shape=source, activation="ours: unpublished; as the ViT-H encoder"),
    )


def aim(hidden: int, *, section: str) -> tuple[Setting, ...]:
    """Return the settings of the AIM encoder that is ``hidden`` wide (1536, 2048 or 3072) on tiles of 224 pixels."""
    source = "derived: the public v1 models of apple/ml-aim"
    architecture = {
        "patch_size": 14,
        "position_embedding": "sincos",
        "pre_layernorm": "patches",
        "patch_bias": True,
        "add_bias_linear": False,
        "activation": "gelu",
        "class_token": False,
        "norm_epsilon": 1e-6,
        "post_layernorm": True,
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
    }
    return (
        *_encoder(24, hidden=hidden, heads=hidden // 128, source=source),
        *settings(source, vision=architecture),
        *settings(f"published: {section}, AIM at 224 px", vision={"image_size": 224}),
        *settings("ours: unpublished", vision={"feature_layer": -1}),
    )


VIT_H_378 = vit_h(378, section="MM1 section 4")
VIT_L_336 = vit_l(336, section="MM1 section 3.1")

CONNECTOR_SIZES = {
    "average_pool": (),
    "attention_pool": settings(
        "ours: unpublished; one layer as wide as Honeybee's resampler, with its heads",
        connector={"hidden_size": 1024, "num_attention_heads": 16, "position_embedding": True},
    ),
    "c_abstractor": settings(
        "derived: Honeybee's released configuration, which MM1 follows",
        connector={"hidden_size": 1024, "depth": 3, "mlp_depth": 2, "position_embedding": True},
    ),
}
"""What each kind of connector has sizes of; average pooling has none."""


def connector(kind: str, tokens: int, *, source: str) -> tuple[Setting, ...]:
    """Return the settings of a connector; ``source`` says where its kind and its number of tokens come from."""
    return (*settings(source, connector={"kind": kind, "num_tokens": tokens}), *CONNECTOR_SIZES[kind])


C_ABSTRACTOR_144 = connector("c_abstractor", 144, source="published: MM1 section 4, C-Abstractor with 144 tokens")

PRECISION_AND_OVERLAP = settings(
    "ours: bf16 compute, fp32 master weights and sharded optimizer state",
    kernels={"params_dtype": "bf16", "transformer_impl": "transformer_engine"},
    parallel={"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
)

PRETRAINING = (
    *PRECISION_AND_OVERLAP,
    *settings(
        "published: MM1 section 4",
        data={"seq_length": 4096, "max_images": 16},
        train={"steps": 200_000, "global_batch_size": 512},
        optimizer={"weight_decay": 0.1},
        schedule={"warmup_steps": 2000, "decay": "cosine", "min_lr_ratio": 0.1},
    ),
    *settings(
        "published: MM1 appendix (recollected)",
        optimizer={"name": "adamw", "clip_grad": 1.0, "connector_lr": 8e-5},
        data={"mixture_unit": "row"},
    ),
    *settings(
        "ours: unpublished; AXLearn's defaults", optimizer={"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8}
    ),
)


def peak_rate(value: float | None, source: str) -> tuple[Setting, ...]:
    """Return the setting of the peak learning rate."""
    return settings(source, optimizer={"lr": value})


FINE_TUNING = (
    *settings(
        "derived: 23k steps of 256 samples are the one epoch of MM1.5's instruction tuning; 256 rows hold far more",
        data={"batch_unit": "samples"},
    ),
    *settings("ours: MM1 gives it for the pre-training of the 30B model alone", language={"z_loss_coeff": 0.0}),
    *settings("ours: unpublished for these stages", optimizer={"clip_grad": 1.0}, data={"max_images": 16}),
    *settings(
        "ours: unpublished; AXLearn's public AdaFactor configuration",
        optimizer={
            "adafactor_beta1": 0.9,
            "adafactor_clip_threshold": 5.0,
            "adafactor_decay_rate": 0.8,
            "weight_decay": 1e-3,
        },
    ),
    *settings("ours: one rate for the whole model", optimizer={"connector_lr": None, "vision_lr": None}),
    *settings("ours: unpublished, a small warm-up", schedule={"warmup_steps": 300}),
    *settings(
        "ours: AdaFactor spreads whole parameters over data-parallel ranks by itself",
        parallel={"use_distributed_optimizer": False, "overlap_param_gather": False},
    ),
)


def at_672_pixels(published: str) -> tuple[Setting, ...]:
    """Return the settings of tiles of 672 px from an encoder of 378 px; ``published`` names the paper's section."""
    return (
        *settings(f"published: {published}, position embeddings interpolated to 672 px", vision={"image_size": 672}),
        *settings("derived: the table of the 378 px encoder is kept", vision={"position_grid_size": 27}),
        *settings(FITS_80_GB, kernels={"recompute_vision": True}),
    )
