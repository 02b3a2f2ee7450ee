"""The start-up screen: what follows from the configuration, before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mm15_megatron.accounting import (
    MemoryEstimate,
    device_peak_tflops,
    memory_estimate,
    model_parameters,
    pipeline_layer_split,
    planned_tiles_per_row,
    step_flops,
)
from mm15_megatron.config.effect import without_effect
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.blend import Share
from mm15_megatron.data.loader import StepShape
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.training.optimizer import learning_rates
from mm15_megatron.training.precision import adam_implementation

_LR_OPTIONS = {"language": "optimizer.lr", "connector": "optimizer.connector_lr", "vision": "optimizer.vision_lr"}


def peak_tflops(cfg: RunConfig, *, device: torch.device) -> float | None:
    """Return the dense peak of one device in TFLOP/s: configured, or known for its name; None = not known."""
    if cfg.logging.peak_tflops is not None:
        return cfg.logging.peak_tflops
    return device_peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def startup_screen(
    cfg: RunConfig,
    *,
    topology: Topology,
    shape: StepShape,
    mixture: Sequence[Share],
    origins: Mapping[str, str],
    digest: str,
) -> str:
    """Return every derived number of the run as lines of text."""
    lines = ["run"]
    facts = [
        *_model_facts(cfg),
        *_layout_facts(cfg, topology),
        *_batch_facts(cfg, shape),
        *_rate_facts(cfg, origins),
        ("memory per rank", _memory_text(cfg, world_size=topology.place.world_size)),
        ("data order", f"digest {digest[:12]}, seed {cfg.train.seed}"),
        *(("source", str(share)) for share in mixture),
        *(
            ("without effect", f"{idle.path} = {idle.value}: {idle.reason}")
            for idle in without_effect(cfg, world_size=topology.place.world_size)
        ),
    ]
    return "\n".join(lines + [f"  {name:18} {text}" for name, text in facts])


def _model_facts(cfg: RunConfig) -> list[tuple[str, str]]:
    counted = model_parameters(cfg)
    language = counted.language
    frozen = [name for name in ("vision", "connector", "language") if getattr(cfg.freeze, name)]
    return [
        ("preset", cfg.preset or "none"),
        (
            "parameters",
            f"{counted.total:,}: decoder {language.total:,} ({language.non_embedding:,} without embeddings), encoder "
            f"{counted.vision:,}, connector {counted.connector:,}",
        ),
        ("frozen", ", ".join(frozen) or "nothing"),
    ]


def _layout_facts(cfg: RunConfig, topology: Topology) -> list[tuple[str, str]]:
    parallel, place = cfg.parallel, topology.place
    extras = [
        name
        for name, on in (
            ("sequence parallel", parallel.sequence_parallel),
            ("distributed optimizer", parallel.use_distributed_optimizer),
            ("overlapped gradient reduction", parallel.overlap_grad_reduce),
            ("overlapped parameter gather", parallel.overlap_param_gather),
        )
        if on
    ]
    sizes = f"tensor {topology.tensor_size} x pipeline {topology.pipeline_size} x data {topology.data_size}"
    if topology.groups.cp.size() > 1:
        sizes += f" x context {topology.groups.cp.size()}"
    if cfg.moe.num_moe_experts:
        groups = topology.groups
        sizes += f", experts {groups.ep.size()} x tensor {groups.expt_tp.size()} x data {groups.expt_dp.size()}"
    if topology.model_chunks > 1:
        sizes += f", {topology.model_chunks} interleaved chunks a stage"
    device = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu"
    return [
        ("layout", ", ".join([f"{place.world_size} ranks ({place.launcher}): {sizes}", *extras])),
        (
            "decoder layers",
            " + ".join(map(str, pipeline_layer_split(cfg)))
            + f", encoder on stage 0, {parallel.encoder_parallel}-parallel",
        ),
        (
            "device",
            f"{device}, {torch.distributed.get_backend()}, {cfg.kernels.params_dtype}, "
            f"{cfg.kernels.transformer_impl} layers, {torch.get_num_threads()} threads per rank, "
            f"torch {torch.__version__}",
        ),
        ("kernels", _kernels_text(cfg)),
        ("precision", _precision_text(cfg)),
    ]


def _kernels_text(cfg: RunConfig) -> str:
    """Say whose code computes what."""
    kernels = cfg.kernels
    names = [f"{adam_implementation(kernels)} AdamW"]
    if kernels.norm_impl != "backend":
        names.append(f"{kernels.norm_impl} norms")
    names += [
        text
        for text, on in (
            ("weight gradients accumulated in their products", kernels.gradient_accumulation_fusion),
            ("fused permutation", kernels.moe_permute_fusion),
            ("compiled fusions", kernels.compile_fusions),
        )
        if on
    ]
    if kernels.recompute_granularity is not None:
        what = "layers" if kernels.recompute_granularity == "full" else ", ".join(kernels.recompute_modules)
        names.append(f"recomputed: {what}")
    if kernels.cuda_graph_scope:
        names.append(f"CUDA graphs of {', '.join(kernels.cuda_graph_scope)}")
    return ", ".join(names)


def _precision_text(cfg: RunConfig) -> str:
    precision = cfg.precision
    if precision.fp8 is None:
        return cfg.kernels.params_dtype
    parts = [f"FP8 {precision.fp8} ({precision.fp8_recipe}) in the decoder's linear layers"]
    if precision.first_last_layers_bf16:
        first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
        parts.append(f"the first {first} and the last {last} in bf16")
    parts.append(f"the encoder in {'FP8' if precision.fp8_vision else 'bf16'}")
    parts.append("weights gathered in FP8" if precision.fp8_param_gather else "weights in bf16")
    return ", ".join(parts) + "; router, norms, connector, embedding and output layer in higher precision"


def _batch_facts(cfg: RunConfig, shape: StepShape) -> list[tuple[str, str]]:
    train, rows = cfg.train, shape.rows
    ramp = f", ramping to {train.global_batch_size}" if shape.units != train.global_batch_size else ""
    packed = f"{shape.units} samples{ramp} in " if cfg.data.batch_unit == "samples" else ""
    ramp = "" if packed else ramp
    tiles = rows * planned_tiles_per_row(cfg)
    flops = step_flops(cfg, rows=rows, tiles=tiles)
    decoder, encoder, connector = (f"{part / 1e12:.4g}" for part in (flops.language, flops.vision, flops.connector))
    return [
        (
            "step",
            f"{packed}{rows} rows{ramp} x {cfg.data.seq_length} tokens = {rows * cfg.data.seq_length:,} tokens in "
            f"{shape.micro_batches} micro-batches of {train.micro_batch_size} rows per rank",
        ),
        ("length", f"{train.steps} steps, {cfg.schedule.warmup_steps} of warm-up, {cfg.schedule.decay} decay"),
        (
            "model FLOPs",
            f"at most {flops.total / 1e12:.4g} TFLOP a step with {tiles} tiles: decoder {decoder}, encoder {encoder}, "
            f"connector {connector}",
        ),
    ]


def _rate_facts(cfg: RunConfig, origins: Mapping[str, str]) -> list[tuple[str, str]]:
    facts = []
    for module, rate in learning_rates(cfg).items():
        path = _LR_OPTIONS[module]
        section, _, name = path.partition(".")
        own = getattr(getattr(cfg, section), name)
        if own is not None:
            source = f"{path}, {origins.get(path, 'unknown')}"
        else:
            source = "MM1's law exp(-0.4214 ln N - 0.5535)" if cfg.optimizer.lr is None else "as the decoder"
        facts.append((f"peak lr {module}", f"{rate:.3e} ({source})"))
    return facts


def _memory_text(cfg: RunConfig, *, world_size: int) -> str:
    stages = range(cfg.parallel.pipeline_model_parallel_size)
    estimates = [memory_estimate(cfg, world_size=world_size, stage=stage) for stage in stages]
    worst: MemoryEstimate = max(estimates, key=lambda estimate: estimate.total)
    parts = ", ".join(
        f"{name} {getattr(worst, name) / 2**30:.3g}" for name in ("parameters", "gradients", "optimizer", "activations")
    )
    modelled = ", FP8 modelled" if cfg.precision.fp8 is not None else ""
    return f"about {worst.total / 2**30:.3g} GiB on the fullest stage ({parts}), estimated without workspaces{modelled}"
