"""MM1.5 (arXiv 2409.20566): the dense models in their three stages."""

from __future__ import annotations

from mm15_megatron.presets.mm1 import (
    DECODER_1B,
    DECODER_3B,
    DECODER_7B,
    DECODER_30B,
    FINAL,
    LR_3B,
    LR_7B,
    LR_30B,
    Z_LOSS_30B,
)
from mm15_megatron.presets.preset import Preset, settings
from mm15_megatron.presets.recipe import FINE_TUNING, MM15_MIXTURE, at_672_pixels, peak_rate, tensor_parallel

LR_1B = peak_rate(8.6e-5, "derived: MM1's law at 1.2B parameters")

MM15_1B = Preset("mm15_1b", f"MM1.5-1B pre-training, {MM15_MIXTURE}", (*FINAL, *DECODER_1B, *LR_1B))
MM15_3B = Preset("mm15_3b", f"MM1.5-3B pre-training, {MM15_MIXTURE}", (*FINAL, *DECODER_3B, *LR_3B))
MM15_7B = Preset(
    "mm15_7b", f"MM1.5-7B pre-training, {MM15_MIXTURE}", (*FINAL, *DECODER_7B, *LR_7B, *tensor_parallel(2))
)
MM15_30B = Preset(
    "mm15_30b",
    f"MM1.5-30B pre-training, {MM15_MIXTURE}",
    (*FINAL, *DECODER_30B, *LR_30B, *Z_LOSS_30B, *tensor_parallel(8)),
)

_AT_HIGH_RESOLUTION = (
    *FINE_TUNING,
    *at_672_pixels("MM1.5 section 4"),
    *settings(
        "published: MM1.5 section 4",
        optimizer={"name": "adafactor"},
        schedule={"decay": "cosine", "min_lr_ratio": 0.0},
        train={"global_batch_size": 256},
        data={"mixture_unit": "sample"},
        tiling={
            "mode": "dynamic",
            "min_tiles": 4,
            "max_tiles": 9,
            "overview": "after",
            "max_split_images": 2,
            "indicator": "index",
        },
    ),
    *settings("ours: unpublished; the smallest power of two that holds two split images", data={"seq_length": 4096}),
)
CONTINUAL = (
    *_AT_HIGH_RESOLUTION,
    *settings("published: MM1.5 section 4", optimizer={"lr": 1e-5}, train={"steps": 30_000}),
)
SFT = (
    *_AT_HIGH_RESOLUTION,
    *settings("published: MM1.5 section 4", optimizer={"lr": 2e-5}, train={"steps": 23_000}),
)


def stages_of(model: Preset) -> tuple[Preset, Preset]:
    """Return the stages that follow: continual pre-training on text-rich images, and instruction tuning."""
    name = model.description.split(" ")[0]
    return (
        model.derive(
            "continual",
            f"{name} continual pre-training, 672 px tiles, PDFA : IDL : RenderedText : DocStruct-4M 25:25:25:25",
            CONTINUAL,
        ),
        model.derive(
            "sft", f"{name} instruction tuning, 672 px tiles, single-image : multi-image : text 80:10:10", SFT
        ),
    )


MODELS = (MM15_1B, MM15_3B, MM15_7B, MM15_30B)
PRESETS = (*MODELS, *(stage for model in MODELS for stage in stages_of(model)))
