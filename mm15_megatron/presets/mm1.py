"""MM1 (arXiv 2403.09611): the dense and sparse models, their instruction tuning, and the models of its ablations."""

from __future__ import annotations

from mm15_megatron.presets.preset import Preset, settings
from mm15_megatron.presets.recipe import (
    C_ABSTRACTOR_144,
    FINE_TUNING,
    MM1_MIXTURE,
    PRETRAINING,
    VIT_H_378,
    VIT_L_336,
    at_672_pixels,
    decoder,
    experts,
    peak_rate,
    tensor_parallel,
)

DECODER_1B = decoder(24, hidden=2048, heads=32, head_dim=64, ffn=5632)
DECODER_3B = decoder(26, hidden=3072, heads=24, head_dim=128, ffn=8064)
DECODER_7B = decoder(32, hidden=4096, heads=32, head_dim=128, ffn=11008)
DECODER_30B = decoder(48, hidden=7168, heads=56, head_dim=128, ffn=19200)
DECODER_7B_FOR_EXPERTS = decoder(
    32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=12800,
    source="derived: a 6.4B decoder that comes to 46.3B with 32 experts in every fourth layer (MM1: 47B)",
)

LR_1B = peak_rate(8.6e-5, "published: MM1 appendix (recollected), the law's value at 1.2B")
LR_3B = peak_rate(6e-5, "published: MM1 section 4")
LR_7B = peak_rate(4e-5, "published: MM1 section 4")
LR_30B = peak_rate(2e-5, "published: MM1 section 4")
Z_LOSS_30B = settings("published: MM1 appendix (recollected), 30B alone", language={"z_loss_coeff": 1e-4})

FINAL = (*VIT_H_378, *C_ABSTRACTOR_144, *PRETRAINING)
ABLATION = (*VIT_L_336, *C_ABSTRACTOR_144, *PRETRAINING)

MM1_3B = Preset("mm1_3b", f"MM1-3B pre-training, {MM1_MIXTURE}", (*FINAL, *DECODER_3B, *LR_3B))
MM1_7B = Preset("mm1_7b", f"MM1-7B pre-training, {MM1_MIXTURE}", (*FINAL, *DECODER_7B, *LR_7B, *tensor_parallel(2)))
MM1_30B = Preset(
    "mm1_30b",
    f"MM1-30B pre-training, {MM1_MIXTURE}",
    (*FINAL, *DECODER_30B, *LR_30B, *Z_LOSS_30B, *tensor_parallel(8)),
)
MM1_3B_MOE = Preset(
    "mm1_3b_moe",
    f"MM1-3B-MoE pre-training, 64 experts in every second layer, 64.6B parameters, {MM1_MIXTURE}",
    (*FINAL, *DECODER_3B, *LR_3B, *experts(64, period=2)),
)
MM1_7B_MOE = Preset(
    "mm1_7b_moe",
    f"MM1-7B-MoE pre-training, 32 experts in every fourth layer, 46.3B parameters (MM1: 47B), {MM1_MIXTURE}",
    (*FINAL, *DECODER_7B_FOR_EXPERTS, *LR_7B, *experts(32, period=4), *tensor_parallel(2)),
)

SFT = (
    *FINE_TUNING,
    *at_672_pixels("MM1 section 5"),
    *settings(
        "published: MM1 section 5",
        optimizer={"name": "adafactor", "lr": 1e-5},
        schedule={"decay": "cosine", "min_lr_ratio": 0.0},
        train={"steps": 10_000, "global_batch_size": 256},
        data={"seq_length": 2048, "mixture_unit": "sample"},
        tiling={"mode": "static", "overview": "before"},
    ),
    *settings("ours: MM1 only says that images are resized", tiling={"resize": "stretch"}),
    *settings("ours: unpublished; a row holds two split images", tiling={"max_split_images": 2}),
)

MODELS = (MM1_3B, MM1_7B, MM1_30B, MM1_3B_MOE, MM1_7B_MOE)
STAGES = tuple(
    model.derive("sft", f"{model.description.split(' ')[0]}-Chat: instruction tuning at 672 px, 4+1 tiles", SFT)
    for model in MODELS
)

ABLATION_BASE = Preset(
    "mm1_ablation_base",
    "MM1's ablation model: 1.2B decoder, ViT-L/14 at 336 px; captions : interleaved : text 5:5:1",
    (*ABLATION, *DECODER_1B, *LR_1B),
)

_LR_SEARCH = (
    *peak_rate(None, "derived: MM1's law, whose points these models gave"),
    *settings("published: MM1 appendix (recollected), runs of the learning-rate grid", train={"steps": 50_000}),
)
LR_SEARCH = tuple(
    Preset(f"mm1_lr_{size}", f"MM1's learning-rate search, {size.upper()} decoder", (*ABLATION, *shape, *_LR_SEARCH))
    for size, shape in (
        ("9m", decoder(12, hidden=256, heads=4, head_dim=64, ffn=768)),
        ("85m", decoder(12, hidden=768, heads=12, head_dim=64, ffn=2048)),
        ("302m", decoder(24, hidden=1024, heads=16, head_dim=64, ffn=2816)),
    )
)

PRESETS = (*MODELS, *STAGES, ABLATION_BASE, *LR_SEARCH)
