"""Each encoder of the ablations trains with each connector; AIM with attention pooling is the same in any layout."""

from __future__ import annotations

import functools
from itertools import product

import pytest

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.presets import resolve

from ..helpers.layouts import LAYOUTS, debug_config
from ..helpers.parity import Trace, compare, trace

# What makes the small encoder of debug_dense CLIP's or AIM's, as the presets do; only the sizes stay small.
ARCHITECTURE = (
    "position_embedding pre_layernorm patch_bias add_bias_linear activation class_token norm_epsilon post_layernorm"
).split()
ENCODERS = {
    name: {field: getattr(resolve(f"mm1_encoder_{name}").vision, field) for field in ARCHITECTURE}
    for name in ("vit_l_224", "aim_600m")
}
CONNECTORS = {
    "c_abstractor": (1, 4, 9),
    "average_pool": (1, 4, 16),
    "attention_pool": (1, 5, 16),  # any number of queries
}
COMBINATIONS = [
    (encoder, kind, tokens) for encoder, kind in product(ENCODERS, CONNECTORS) for tokens in CONNECTORS[kind]
]
STEPS = 3


def small(encoder: str, kind: str, tokens: int) -> RunConfig:
    connector = {"kind": kind, "num_tokens": tokens, "num_attention_heads": 2}
    return debug_config(vision=ENCODERS[encoder], connector=connector)


@functools.cache
def one_rank(encoder: str, kind: str, tokens: int) -> Trace:
    return trace(small(encoder, kind, tokens), world_size=1, steps=STEPS)


@pytest.mark.parametrize(("encoder", "kind", "tokens"), COMBINATIONS)
def test_every_combination_trains(encoder: str, kind: str, tokens: int) -> None:
    """Real steps; every parameter gets a gradient that is finite and not zero, and moves."""
    found = one_rank(encoder, kind, tokens)
    assert found.gradients.keys() == found.parameters.keys()
    assert [name for name, gradient in found.gradients.items() if not gradient.isfinite().all()] == []
    assert [name for name, gradient in found.gradients.items() if gradient.abs().max() == 0] == []
    assert len(set(found.losses)) == STEPS


@pytest.mark.parametrize(
    "layout", ["tp2sp", "tp2-encoder-tp", "tp2sp-encoder-tp", "dp2-overlap-many-buckets", "recompute-full"]
)
def test_aim_with_attention_pooling_equals_one_rank(layout: str) -> None:
    """Losses, norms, every gathered gradient and the parameters agree within the harness's named tolerances."""
    variant = ("aim_600m", "attention_pool", 5)
    cfg, chosen = small(*variant), LAYOUTS[layout]
    layout_trace = trace(chosen.apply(cfg), world_size=chosen.world_size, steps=STEPS)
    found = compare(one_rank(*variant), layout_trace, learning_rate=cfg.optimizer.lr or 0)
    assert found.passes, found
