"""The small model that tests run, and the layouts a change of the trainer is proven in."""

from __future__ import annotations

from dataclasses import replace

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parity.layouts import Layout, parse_layout
from mm15_megatron.parity.shrink import ADAM_EPS
from mm15_megatron.presets import resolve

__all__ = ["LAYOUTS", "Layout", "change", "debug_config"]


def debug_config(preset: str = "debug_dense", **sections: dict[str, object]) -> RunConfig:
    """Return a debug preset with section overrides such as ``parallel={"tensor_model_parallel_size": 2}``."""
    cfg = resolve(preset)
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, adam_eps=ADAM_EPS))
    return change(cfg, **sections)


def change(cfg: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """Return ``cfg`` with the given fields of the given sections replaced."""
    return replace(cfg, **{name: replace(getattr(cfg, name), **fields) for name, fields in sections.items()})


LAYOUTS: dict[str, Layout] = {
    ours: parse_layout(name)
    for ours, name in {
        "tp2": "tp2",
        "tp2sp": "tp2sp",
        "pp2": "pp2",
        "dp2": "dp2",
        "dp2-dist-opt": "dp2-distopt",
        "dp2-dist-opt-overlap": "dp2-overlap",
        "dp2-overlap-many-buckets": "dp2-overlap-buckets20000",
        "tp2sp-dp2-overlap-many-buckets": "tp2sp-dp2-overlap-buckets20000",
        "pp2dp2-dist-opt-grad-overlap": "pp2dp2-distopt-gradoverlap-buckets20000",
        "pp3-uneven": "pp3-first2",
        "pp4": "pp4",
        "tp4sp": "tp4sp",
        "tp2pp2": "tp2pp2",
        "tp2sp-pp2": "tp2sp-pp2",
        "tp2dp2-dist-opt": "tp2dp2-distopt",
        "tp2-encoder-tp": "tp2-enctp",
        "tp2sp-encoder-tp": "tp2sp-enctp",
        # The reference accumulates four micro-batches of two rows.
        "accumulation-1": "accum1",
        "accumulation-8": "accum8",
        "recompute-full": "recompute",
        "recompute-selective": "recompute-selective",
    }.items()
}
