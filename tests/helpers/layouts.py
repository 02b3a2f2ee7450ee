"""The layouts a change of the trainer is proven in, and the small model they run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.presets import resolve

# AdamW turns rounding noise in tiny gradients into visible updates; an epsilon well above that noise keeps the
# comparison about the gradients.
ADAM_EPS = 1e-5


def debug_config(preset: str = "debug_dense", **sections: dict[str, object]) -> RunConfig:
    """Return a debug preset with section overrides such as ``parallel={"tensor_model_parallel_size": 2}``."""
    cfg = resolve(preset)
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, adam_eps=ADAM_EPS))
    return change(cfg, **sections)


def change(cfg: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """Return ``cfg`` with the given fields of the given sections replaced."""
    return replace(cfg, **{name: replace(getattr(cfg, name), **fields) for name, fields in sections.items()})


@dataclass(frozen=True)
class Layout:
    """A way to run the same job.

    Attributes:
        world_size: ranks.
        sections: overrides of the configuration.
    """

    world_size: int
    sections: dict[str, dict[str, object]]

    def apply(self, cfg: RunConfig) -> RunConfig:
        """The configuration in this layout."""
        return change(cfg, **self.sections)


def _parallel(world_size: int, **fields: object) -> Layout:
    return Layout(world_size, {"parallel": fields})


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}

LAYOUTS: dict[str, Layout] = {
    "tp2": _parallel(2, **TP2),
    "tp2sp": _parallel(2, **TP2, sequence_parallel=True),
    "pp2": _parallel(2, **PP2),
    "dp2": _parallel(2),
    "dp2-dist-opt": _parallel(2, use_distributed_optimizer=True),
    "dp2-dist-opt-overlap": _parallel(
        2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    ),
    "dp2-overlap-many-buckets": _parallel(
        2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=20_000
    ),
    "tp2sp-dp2-overlap-many-buckets": _parallel(
        4,
        **TP2,
        sequence_parallel=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        ddp_bucket_size=20_000,
    ),
    "pp2dp2-dist-opt-grad-overlap": _parallel(
        4, **PP2, use_distributed_optimizer=True, overlap_grad_reduce=True, ddp_bucket_size=20_000
    ),
    "pp3-uneven": _parallel(3, pipeline_model_parallel_size=3, num_layers_in_first_pipeline_stage=2),
    "pp4": _parallel(4, pipeline_model_parallel_size=4),
    "tp4sp": Layout(
        4,
        {
            "parallel": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
            "language": {"num_query_groups": 4},
        },
    ),
    "tp2pp2": _parallel(4, **TP2, **PP2),
    "tp2sp-pp2": _parallel(4, **TP2, **PP2, sequence_parallel=True),
    "tp2dp2-dist-opt": _parallel(4, **TP2, use_distributed_optimizer=True),
    "tp2-encoder-tp": _parallel(2, **TP2, encoder_parallel="tensor"),
    "tp2sp-encoder-tp": _parallel(2, **TP2, sequence_parallel=True, encoder_parallel="tensor"),
    # The reference accumulates four micro-batches of two rows.
    "accumulation-1": Layout(1, {"train": {"micro_batch_size": 8}}),
    "accumulation-8": Layout(1, {"train": {"micro_batch_size": 1}}),
    "recompute-full": Layout(1, {"kernels": {"recompute_granularity": "full", "recompute_vision": True}}),
    "recompute-selective": Layout(1, {"kernels": {"recompute_granularity": "selective"}}),
}
