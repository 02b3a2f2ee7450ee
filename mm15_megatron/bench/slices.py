"""Which part of a model one device trains, chosen by its memory. Torch-free.

A slice keeps every size of the model and cuts down how often it repeats: fewer decoder layers, and of a sparse layer
the experts that one of several expert-parallel ranks would hold. Encoder, connector, embedding, rows and optimizer are
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm15_megatron.accounting import (
    MemoryEstimate,
    memory_estimate,
    model_parameters,
    planned_tiles_per_row,
    sparse_layers,
    step_flops,
)
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS, with_values
from mm15_megatron.errors import ConfigError

EXPERT_RANKS = 8
"""Expert-parallel ranks whose share of the experts a slice holds: one machine of eight GPUs."""
_KEPT_PARALLEL = ("device", "grad_reduce_in_fp32", "distributed_timeout_minutes")
# The case that takes most memory: every linear layer in FP8, its copies of the weights beside them.
_MOST_DEMANDING = {"precision.fp8": "hybrid", "precision.fp8_vision": True}


@dataclass(frozen=True)
class Slice:
    """The part of a model that is benchmarked.

    Attributes:
        config: one rank's configuration in bf16, with local layers and nothing recomputed.
        whole: the configuration it was cut from.
        estimate: bytes it is expected to take in bf16.
        fp8_estimate: bytes it is expected to take with everything in FP8 that can be; None = no case is in FP8.
        allowed: bytes it may take: the device's memory less the margin.
    """

    config: RunConfig
    whole: RunConfig
    estimate: MemoryEstimate
    fp8_estimate: MemoryEstimate | None
    allowed: float

    @property
    def needed(self) -> float:
        """Bytes of the most demanding case."""
        return max(part.total for part in (self.estimate, self.fp8_estimate) if part is not None)

    @property
    def vision_share(self) -> float:
        """Share of the encoder and the connector in the slice's model FLOPs."""
        return _vision_share(self.config)

    @property
    def whole_vision_share(self) -> float:
        """The same share in the whole model, on the same rows."""
        rows = {"data.max_images": self.config.data.max_images, "data.max_tiles": self.config.data.max_tiles}
        return _vision_share(with_values(self.whole, rows | _tiling_defaults()))

    def describe(self) -> str:
        """Return the slice in one sentence."""
        cfg, whole = self.config, self.whole
        text = f"{cfg.language.num_layers} of {whole.language.num_layers} decoder layers"
        if cfg.moe.num_moe_experts:
            tokens = cfg.data.seq_length * cfg.train.micro_batch_size * cfg.moe.moe_router_topk
            text += (
                f" ({sum(sparse_layers(cfg))} of them sparse with {cfg.moe.num_moe_experts} of "
                f"{whole.moe.num_moe_experts} experts, {tokens // cfg.moe.num_moe_experts} tokens each on average"
            )
            ranks = whole.moe.num_moe_experts // cfg.moe.num_moe_experts
            text += f": what one of {ranks} expert-parallel ranks computes)" if ranks > 1 else ")"
        rows = cfg.train.global_batch_size
        return (
            f"{text}, whole encoder, connector, embedding and optimizer: {model_parameters(cfg).total / 1e9:.2f}B of "
            f"{model_parameters(whole).total / 1e9:.2f}B parameters; {rows} rows a step in "
            f"{rows // cfg.train.micro_batch_size} micro-batches of {cfg.train.micro_batch_size}, "
            f"{cfg.data.seq_length} tokens and {planned_tiles_per_row(cfg)} tiles a row"
        )

    def leaves_out(self) -> list[str]:
        """Return what the whole model in its own layout does and the slice does not."""
        cfg, whole = self.config, self.whole
        p = whole.parallel
        lines = [
            f"a step of {whole.train.global_batch_size} rows over all ranks: here the optimizer's pass, and the FP8 "
            f"copies of the weights, are shared by {cfg.train.global_batch_size} rows of one GPU"
        ]
        if cfg.language.num_layers < whole.language.num_layers:
            lines.append(
                f"{whole.language.num_layers - cfg.language.num_layers} decoder layers, so encoder and connector "
                f"are {self.vision_share:.0%} of the model FLOPs instead of {self.whole_vision_share:.0%}"
            )
        if cfg.moe.num_moe_experts < whole.moe.num_moe_experts:
            lines.append(
                f"the all-to-all of expert parallelism, and a router over {whole.moe.num_moe_experts} experts (here "
                f"{cfg.moe.num_moe_experts})"
            )
        if p.tensor_model_parallel_size > 1:
            lines.append(
                f"tensor parallelism {p.tensor_model_parallel_size}: its communication, and matrix products that are "
                f"{p.tensor_model_parallel_size} times smaller than here"
            )
        if p.use_distributed_optimizer:
            lines.append(
                "sharing the optimizer over data-parallel ranks: here one GPU updates every parameter it holds"
            )
        return lines


def _tiling_defaults() -> dict[str, Any]:
    return {path: option.default for path, option in OPTIONS.items() if path.startswith("tiling.")}


def _vision_share(cfg: RunConfig) -> float:
    flops = step_flops(cfg, rows=1, tiles=planned_tiles_per_row(cfg))
    return (flops.vision + flops.connector) / flops.total


def experts_of_a_rank(experts: int, *, topk: int, ranks: int = EXPERT_RANKS) -> int:
    """Return the experts that one of at most ``ranks`` ranks holds, at least twice ``topk``.

    With fewer, the router would have no choice left. Tokens of an expert stay as many as in the whole model, where
    ``ranks`` ranks send theirs: 4096 x 2 / 64 x 8 ranks = 4096 x 2 / 8.
    """
    shares = [experts // r for r in range(1, ranks + 1) if experts % r == 0 and experts // r >= 2 * topk]
    return min(shares, default=experts)


def one_device(cfg: RunConfig, *, device: str, micro_batches: int) -> RunConfig:
    """Return ``cfg`` on one device: no parallelism, nothing recomputed, one tile an image, bf16."""
    values: dict[str, Any] = {
        path: option.default
        for path, option in OPTIONS.items()
        if path.startswith("parallel.") and path.partition(".")[2] not in _KEPT_PARALLEL
    }
    values |= _tiling_defaults()
    values |= {
        "parallel.device": device,
        "kernels.params_dtype": "bf16",
        "kernels.transformer_impl": "local",
        "kernels.recompute_granularity": None,
        "kernels.recompute_vision": False,
        "data.max_tiles": min(cfg.data.max_tiles, cfg.data.max_images),
        "data.batch_unit": "rows",
        "train.rampup_batch_size": None,
        "train.global_batch_size": micro_batches * cfg.train.micro_batch_size,
    }
    if cfg.moe.num_moe_experts:
        values["moe.num_moe_experts"] = experts_of_a_rank(cfg.moe.num_moe_experts, topk=cfg.moe.moe_router_topk)
    return with_values(cfg, values)


def _with_layers(whole: RunConfig, cfg: RunConfig, layers: int, *, fp8: bool, allowed: float) -> Slice:
    cut = with_values(cfg, {"language.num_layers": layers})
    in_fp8 = memory_estimate(with_values(cut, _MOST_DEMANDING), world_size=1) if fp8 else None
    return Slice(cut, whole, memory_estimate(cut, world_size=1), in_fp8, allowed)


def choose_slice(
    whole: RunConfig,
    *,
    device: str,
    memory: float,
    margin: float,
    micro_batches: int,
    fp8: bool,
    at_most: int | None = None,
    options: Sequence[str] = (),
) -> Slice:
    """Return the largest slice that fits: as many decoder layers as possible, in whole sparse periods.

    Args:
        whole: the model's configuration.
        device: cpu or cuda.
        memory: bytes of the device.
        margin: share of them kept free for workspaces, communication buffers and fragmentation.
        micro_batches: micro-batches of a step.
        fp8: leave room for what FP8 adds, so that every case runs the same slice.
        at_most: decoder layers at most; None = the model's.
        options: ``section.field=value`` texts that have the last word.

    Raises:
        ConfigError: an option is wrong, or not even one period of layers fits.
    """
    cfg = apply_overrides(one_device(whole, device=device, micro_batches=micro_batches), options)
    period = cfg.moe.moe_layer_period if cfg.moe.num_moe_experts else 1
    allowed = memory * (1 - margin)
    most = min(cfg.language.num_layers, at_most or cfg.language.num_layers)
    found = None
    for layers in range(period, most + 1, period):
        candidate = _with_layers(whole, cfg, layers, fp8=fp8, allowed=allowed)
        if candidate.needed > allowed:
            break
        found = candidate
    if found is None:
        least = _with_layers(whole, cfg, period, fp8=fp8, allowed=allowed)
        raise ConfigError(
            f"{whole.preset or 'the model'} with {period} decoder layers needs {least.needed / 2**30:.1f} GiB, "
            f"and {allowed / 2**30:.1f} GiB are allowed (the memory less a margin of {margin:.0%})",
            fix="choose a smaller preset or data.max_images, set kernels.recompute_vision=true, or lower --margin",
        )
    return found
