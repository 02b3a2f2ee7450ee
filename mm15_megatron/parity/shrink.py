"""What a configuration becomes before its layouts are compared: one rank's, and small enough. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm15_megatron.accounting import memory_estimate, model_parameters, step_flops
from mm15_megatron.config.dump import Difference, diff
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS, with_values
from mm15_megatron.config.validate import LEFT_TO_THE_USER, RULES
from mm15_megatron.errors import ConfigError
from mm15_megatron.parity.layouts import Layout

RULE = """\
The reference is one rank: the configuration with every parallel option at its default and nothing recomputed, in fp32
(--dtype), with constant learning rates and an AdamW epsilon of at least 1e-5, so that rounding noise in small gradients
does not become updates. The stream is synthetic: data.*, tiling.* and the batch ramp play no part.

If the comparison would not fit into the free memory or take more than about ten minutes, sizes are cut down and every
choice of structure is kept: the ratio of query to key/value heads, activations, norms on queries and keys, tying,
padded or exact vocabulary, sparse period, top-k, capacity factor, losses and their coefficients, the connector's kind,
class token, feature layer, interpolated positions, freezing. No size grows.
  decoder      width 64, heads of 16, key/value heads: 2 or the largest tensor-parallel size; inner width 192;
               4 layers, or as many as the layouts have model chunks, in whole sparse periods (two at least)
  experts      8, or as many as the layouts spread them over; capacity groups of 32 tokens
  vocabulary   256 ids (250 if the original is padded)
  encoder      3 blocks that are built, width 32, 2 heads or the tensor-parallel size, inner width 64, 4 x 4 patches
  connector    4 tokens a tile, 16 channels, depth 2, 2 heads
  rows         128 tokens, 2 rows a micro-batch, 8 rows a step or what the layouts' batches divide
--keep-size refuses instead."""

# Sustained fp32 rates of the small products that are left, and how long a check may take.
CPU_CORE_FLOPS, CUDA_FLOPS, SECONDS = 5e9, 2e13, 600.0
# Beside the ranks: gradients of two steps and parameters, of the reference and of the layout, fp32.
_COLLECTED_BYTES = 6 * 4
# Where a gradient is noise, an update without these is its sign.
ADAM_EPS, ADAFACTOR_EPS = 1e-5, 1e-10
_KEPT_PARALLEL = ("device", "grad_reduce_in_fp32", "distributed_timeout_minutes")


@dataclass(frozen=True)
class Machine:
    """What the check may use.

    Attributes:
        device: cpu or cuda.
        memory: free bytes, of the host or of one GPU.
        cores: CPU cores.
        devices: GPUs; 0 on the CPU, which runs any number of ranks.
    """

    device: str
    memory: float
    cores: int
    devices: int = 0


@dataclass(frozen=True)
class Prepared:
    """The reference configuration and how it came about.

    Attributes:
        config: what one rank runs.
        replaced: options that the comparison itself sets.
        shrunk: sizes that were cut down.
    """

    config: RunConfig
    replaced: tuple[Difference, ...]
    shrunk: tuple[Difference, ...]


def prepare_config(
    cfg: RunConfig, layouts: Sequence[Layout], *, machine: Machine, steps: int, dtype: str, keep_size: bool
) -> Prepared:
    """Return the configuration of the reference run, shrunk if it does not fit (``RULE``).

    Raises:
        ConfigError: it does not fit and ``keep_size`` is set, a layout cannot train the result, or has more ranks than
            the machine has GPUs.
    """
    if machine.device == "cuda":
        _check_devices(layouts, devices=machine.devices)
    one_rank = reference_config(cfg, device=machine.device, dtype=dtype)
    reason = why_it_does_not_fit(one_rank, layouts, machine=machine, steps=steps)
    config = one_rank
    if reason:
        if keep_size:
            raise ConfigError(f"the configuration does not fit: {reason}", fix="leave out --keep-size to shrink it")
        config = shrink(one_rank, layouts)
    for layout in layouts:
        check_layout(config, layout)
    return Prepared(config, tuple(diff(cfg, one_rank)), tuple(diff(one_rank, config)))


def ranks_of(layout: Layout) -> int:
    """Return how many ranks a layout takes, those it is saved in included."""
    return max(one.world_size for one in (layout.saved_in, layout) if one is not None)


def _check_devices(layouts: Sequence[Layout], *, devices: int) -> None:
    too_large = [layout.name for layout in layouts if ranks_of(layout) > devices]
    if too_large:
        fitting = [layout.name for layout in layouts if ranks_of(layout) <= devices]
        raise ConfigError(
            f"{len(too_large)} layouts have more ranks than this machine's {devices} GPU(s): {', '.join(too_large)}",
            fix=f"use --layouts {','.join(fitting)}" if fitting else "use layouts of fewer ranks, or --device cpu",
        )


def reference_config(cfg: RunConfig, *, device: str, dtype: str) -> RunConfig:
    """Return ``cfg`` on one rank: no parallelism, no recomputation, nothing that the stream replaces."""
    values: dict[str, Any] = {
        path: option.default
        for path, option in OPTIONS.items()
        if path.startswith("parallel.") and path.partition(".")[2] not in _KEPT_PARALLEL
    }
    values |= {path: option.default for path, option in OPTIONS.items() if path.startswith("tiling.")}
    values |= {
        "parallel.device": device,
        "kernels.params_dtype": dtype,
        "kernels.transformer_impl": "local" if device == "cpu" else cfg.kernels.transformer_impl,
        "kernels.recompute_granularity": None,
        "kernels.recompute_vision": False,
        "kernels.cuda_graph_scope": (),
        "kernels.compile_fusions": False,
        "data.batch_unit": "rows",
        "train.rampup_batch_size": None,
    }
    if cfg.optimizer.name == "adafactor":
        values["optimizer.adafactor_eps"] = max(cfg.optimizer.adafactor_eps, ADAFACTOR_EPS)
    else:
        values["optimizer.adam_eps"] = max(cfg.optimizer.adam_eps, ADAM_EPS)
    return with_values(cfg, values)


def why_it_does_not_fit(cfg: RunConfig, layouts: Sequence[Layout], *, machine: Machine, steps: int) -> str:
    """Return the reason in one clause; empty if the comparison fits."""
    ranks = max(layout.world_size for layout in layouts)
    replicas = max(layout.data_size for layout in layouts)
    on_host = machine.device == "cpu"
    needed = memory_estimate(cfg, world_size=1).total * (replicas if on_host else 1)
    needed += _COLLECTED_BYTES * model_parameters(cfg).total if on_host else 0
    if needed > machine.memory:
        return f"{needed / 2**30:.1f} GiB for {ranks} ranks, {machine.memory / 2**30:.1f} GiB are free"
    rate = CPU_CORE_FLOPS * machine.cores if on_host else CUDA_FLOPS
    rows = cfg.train.global_batch_size
    seconds = (len(layouts) + 1) * steps * step_flops(cfg, rows=rows, tiles=2 * rows).total / rate
    return f"about {seconds / 60:.0f} minutes of arithmetic" if seconds > SECONDS else ""


def shrink(cfg: RunConfig, layouts: Sequence[Layout]) -> RunConfig:
    """Return ``cfg`` with its sizes cut down by ``RULE``."""
    values = _decoder_sizes(cfg, layouts) | _encoder_sizes(cfg, layouts) | _batch_sizes(cfg, layouts)
    return with_values(cfg, values)


def _decoder_sizes(cfg: RunConfig, layouts: Sequence[Layout]) -> dict[str, Any]:
    language, moe = cfg.language, cfg.moe
    tensor = max(layout.size("tensor_model_parallel") for layout in layouts)
    period = moe.moe_layer_period if moe.num_moe_experts else 1
    chunks = max(layout.chunks for layout in layouts)
    layers = max(4, chunks, 2 * period if moe.num_moe_experts else 1)
    groups = min(language.num_query_groups, max(2, tensor))
    padded = bool(language.vocab_size % language.make_vocab_size_divisible_by)
    values = {
        "language.num_layers": min(language.num_layers, -(-layers // period) * period),
        "language.hidden_size": min(language.hidden_size, 64),
        "language.num_query_groups": groups,
        "language.num_attention_heads": groups * (language.num_attention_heads // language.num_query_groups),
        "language.kv_channels": min(language.kv_channels, 16),
        "language.ffn_hidden_size": min(language.ffn_hidden_size, -(-192 // tensor) * tensor),
        "language.vocab_size": min(language.vocab_size, 250 if padded else 256),
    }
    if moe.num_moe_experts:
        spread = max(layout.size("expert_model_parallel") for layout in layouts)
        values["moe.num_moe_experts"] = min(moe.num_moe_experts, max(8, spread, moe.moe_router_topk))
        values["moe.moe_capacity_group_size"] = min(moe.moe_capacity_group_size, 32)
    return values


def _encoder_sizes(cfg: RunConfig, layouts: Sequence[Layout]) -> dict[str, Any]:
    vision, connector = cfg.vision, cfg.connector
    split = [x.size("tensor_model_parallel") for x in layouts if "parallel.encoder_parallel" in x.settings]
    heads = min(vision.num_attention_heads, max(2, *split) if split else 2)
    grid = min(vision.grid_size, 4)
    interpolated = vision.stored_grid_size != vision.grid_size
    return {
        # blocks behind the feature layer are not built
        "vision.num_layers": min(vision.num_layers, 3 - (vision.feature_layer + 1)),
        "vision.num_attention_heads": heads,
        "vision.hidden_size": min(vision.hidden_size // vision.num_attention_heads, 16) * heads,
        "vision.ffn_hidden_size": min(vision.ffn_hidden_size, 32 * heads),
        "vision.image_size": grid * vision.patch_size,
        "vision.position_grid_size": grid - 1 if interpolated else min(vision.position_grid_size, grid),
        "connector.num_tokens": min(connector.num_tokens, 4),
        "connector.hidden_size": min(connector.hidden_size, 16),
        "connector.depth": min(connector.depth, 2),
        "connector.num_attention_heads": min(connector.num_attention_heads, 2),
    }


def _batch_sizes(cfg: RunConfig, layouts: Sequence[Layout]) -> dict[str, Any]:
    rows = min(cfg.train.micro_batch_size, 2)
    parts = [int(x.settings.get("train.micro_batch_size", rows)) * x.data_size * (x.accumulation or 1) for x in layouts]
    step = math.lcm(rows, *parts)
    return {
        "data.seq_length": min(cfg.data.seq_length, 128),
        "train.micro_batch_size": rows,
        "train.global_batch_size": min(cfg.train.global_batch_size, -(-8 // step) * step),
    }


def check_layout(cfg: RunConfig, layout: Layout) -> None:
    """Check that a layout can train ``cfg``, by the rules that every run is checked by.

    Raises:
        ConfigError: the first rule that fails, with the layout's name.
    """
    for one in (layout.saved_in, layout):
        if one is None:
            continue
        changed = one.apply(cfg)
        for rule in RULES:
            if rule in LEFT_TO_THE_USER:
                continue
            try:
                rule(changed, one.world_size)
            except ConfigError as error:
                raise ConfigError(f"layout {layout.name}: {error.problem}", fix=error.fix) from error
