"""MM1.5's sparse models: 64 experts in every second layer of the 1B and 3B decoders."""

from __future__ import annotations

from dataclasses import replace

from mm15_megatron.presets.mm15 import MM15_1B, MM15_3B, stages_of
from mm15_megatron.presets.preset import Preset
from mm15_megatron.presets.recipe import experts


def _sparse(dense: Preset) -> Preset:
    return replace(
        dense,
        name=f"{dense.name}_moe",
        description=dense.description.replace(" pre-training", "-MoE pre-training, 64 experts in every second layer"),
        settings=dense.settings + experts(64, period=2),
    )


MODELS = (_sparse(MM15_1B), _sparse(MM15_3B))
PRESETS = (*MODELS, *(stage for model in MODELS for stage in stages_of(model)))
