"""The configuration of one run: frozen dataclasses, importable without torch.

A run is described by :class:`RunConfig`, one frozen section for each concern. Sections hold plain values (int, float,
str, bool, None, tuples and nested frozen dataclasses), never derived ones: what follows from other values is a property
or a function of ``accounting``. Names are megatron-core's for what is megatron-core's and the papers' for what is
theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm15_megatron.config.fields import option
from mm15_megatron.config.schema_data import DataConfig, SourceConfig, TilingConfig, WeightChange
from mm15_megatron.config.schema_model import ConnectorConfig, FreezeConfig, LanguageConfig, MoEConfig, VisionConfig

__all__ = [
    "CheckpointConfig",
    "ConnectorConfig",
    "DataConfig",
    "FaultConfig",
    "FreezeConfig",
    "KernelConfig",
    "LanguageConfig",
    "LoggingConfig",
    "MoEConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TilingConfig",
    "TrainConfig",
    "VisionConfig",
    "WeightChange",
]


@dataclass(frozen=True)
class ParallelConfig:
    """Devices and process groups. Data-parallel size follows from the world size."""

    device: str = option("cuda", "cuda = NCCL; cpu = the same layers on gloo processes", choices=("cuda", "cpu"))
    tensor_model_parallel_size: int = option(1, "ranks a layer is split over")
    pipeline_model_parallel_size: int = option(1, "pipeline stages")
    virtual_pipeline_model_parallel_size: int | None = option(
        None, "model chunks a stage holds; None = no interleaving"
    )
    context_parallel_size: int = option(
        1, "ranks the tokens of a row are split over; attention exchanges them for heads (Ulysses)"
    )
    expert_model_parallel_size: int = option(1, "ranks the experts are spread over")
    expert_tensor_parallel_size: int | None = option(
        None, "ranks an expert is split over; None = tensor_model_parallel_size"
    )
    sequence_parallel: bool = option(False, "shard activations between tensor-parallel regions along the sequence")
    encoder_parallel: str = option(
        "data",
        "encoder in a tensor-parallel group: data = each rank encodes a share of the tiles; tensor = split layers",
        choices=("data", "tensor"),
    )
    num_layers_in_first_pipeline_stage: int | None = option(
        None, "decoder layers of the first (virtual) stage, beside the encoder; None = from the cost model"
    )
    use_distributed_optimizer: bool = option(False, "shard optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = option(False, "reduce gradients while the backward pass runs")
    ddp_bucket_size: int | None = option(
        None, "parameters of one gradient bucket when reduction overlaps; None = megatron-core's 40M or 1M per rank"
    )
    overlap_param_gather: bool = option(False, "gather parameters while the forward pass runs (distributed optimizer)")
    grad_reduce_in_fp32: bool = option(True, "accumulate and reduce gradients in fp32")
    tp_comm_overlap: bool = option(
        False, "overlap tensor-parallel collectives with matrix products (Transformer Engine; not measured)"
    )
    overlap_moe_expert_parallel_comm: bool = option(
        False, "overlap the experts' all-to-all of one micro-batch with another's computation (not measured)"
    )
    distributed_timeout_minutes: int = option(10, "a collective that waits longer ends the run")


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation computes a layer, and what is recomputed."""

    transformer_impl: str = option(
        "local", "layer implementation, never chosen silently", choices=("local", "transformer_engine")
    )
    params_dtype: str = option(
        "fp32", "dtype of parameters and activations; master weights are fp32", choices=("fp32", "bf16")
    )
    norm_impl: str = option(
        "backend",
        "norms of local layers: backend = torch's; apex = its fused RMSNorm and LayerNorm",
        choices=("backend", "apex"),
    )
    optimizer_impl: str | None = option(
        None,
        "AdamW kernel: torch, transformer_engine or apex; None = transformer_engine's with its layers, else torch's",
        choices=(None, "torch", "transformer_engine", "apex"),
    )
    gradient_accumulation_fusion: bool = option(
        False,
        "add weight gradients to the gradient buffer inside their matrix product (Transformer Engine layers, or local "
        "layers with apex)",
    )
    moe_permute_fusion: bool = option(False, "sort tokens by expert in one kernel (Transformer Engine)")
    recompute_granularity: str | None = option(
        None,
        "activation recomputation in the decoder: None, selective (kernels.recompute_modules) or full",
        choices=(None, "selective", "full"),
    )
    recompute_modules: tuple[str, ...] = option(
        ("core_attn",),
        "what selective recomputes: core_attn, mlp, moe (a sparse block); with Transformer Engine also layernorm "
        "(before a sparse block; the others are part of a linear layer), moe_act (activation of grouped experts)",
    )
    recompute_num_layers: int = option(1, "layers of one recomputed chunk (full)")
    recompute_vision: bool = option(False, "recompute every encoder block")
    cuda_graph_scope: tuple[str, ...] = option(
        (),
        "what is replayed as CUDA graphs, with Transformer Engine: mlp (feed-forward blocks of dense decoder layers, "
        "all that keeps its shapes)",
    )
    cuda_graph_warmup_steps: int = option(3, "steps after a start or a resume before graphs are captured")
    compile_fusions: bool = option(
        False, "torch.compile megatron-core's fused functions, RoPE and the loss (not bitwise equal to eager)"
    )


@dataclass(frozen=True)
class PrecisionConfig:
    """FP8 training through Transformer Engine; router, norms, connector, embeddings and output layer stay in bf16."""

    fp8: str | None = option(
        None,
        "FP8 format of linear layers: None = bf16; hybrid = E4M3 forward, E5M2 gradients; e4m3 = E4M3 throughout",
        choices=(None, "hybrid", "e4m3"),
        flag="fp8-format",
    )
    fp8_recipe: str = option(
        "tensorwise",
        "scaling: tensorwise = current amax of a tensor; delayed = amax history; blockwise = 128 x 128 and 1 x 128 "
        "blocks; mxfp8 = blocks of 32 (Blackwell only)",
        choices=("tensorwise", "delayed", "blockwise", "mxfp8"),
    )
    fp8_margin: int = option(0, "delayed scaling: powers of two between the largest value and the format's maximum")
    fp8_amax_history_len: int = option(
        1024,
        "delayed scaling: amax of how many passes are remembered; a micro-batch is one, and one more for the "
        "encoder in FP8 and for each recomputed block",
    )
    fp8_amax_compute_algo: str = option("max", "delayed scaling: amax of a history", choices=("max", "most_recent"))
    fp8_param_gather: bool = option(
        False, "keep weights of linear layers in FP8 and gather them so (distributed optimizer)"
    )
    fp8_vision: bool = option(False, "the encoder's linear layers in FP8 too; false = bf16")
    first_last_layers_bf16: bool = option(False, "keep the first and the last decoder layers in bf16")
    num_layers_at_start_in_bf16: int = option(1, "how many of the first (first_last_layers_bf16)")
    num_layers_at_end_in_bf16: int = option(1, "how many of the last (first_last_layers_bf16)")
    moe_router_padding_for_quantization: bool = option(
        False, "send extra tokens with gate 0 to experts so that FP8 blocks are full; false = pad with zeros there"
    )


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and reproducibility of a run."""

    steps: int = option(200_000, "optimizer steps (MM1: 200k)", flag="train-iters")
    global_batch_size: int = option(512, "rows of a step, or samples (data.batch_unit) (MM1: 512)")
    micro_batch_size: int = option(1, "rows of one forward pass on one data-parallel rank")
    rampup_batch_size: tuple[int, int, int] | None = option(
        None, "batch-size ramp: (start, increment, rows or samples over which it ramps); None = no ramp"
    )
    seed: int = option(1234, "seeds the initial weights and the data order")
    run_dir: str = option("runs/default", "checkpoints, logs and reports of the run")
    validation_interval: int = option(0, "steps between validations; 0 = never")
    validation_steps: int = option(10, "global batches of one validation")
    threads_per_rank: int = option(0, "CPU threads of one rank; 0 = cores of the machine divided by its ranks")
    loss_normalisation: str = option(
        "token",
        "weight of a target: token = 1, sample = 1 / targets of its sample, sqrt = 1 / sqrt(targets); the loss is the "
        "weighted sum over the global batch divided by the sum of weights",
        choices=("token", "sample", "sqrt"),
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (MM1), or AdaFactor (MM1 SFT, MM1.5 stages 2 and 3)."""

    name: str = option("adamw", "optimizer", choices=("adamw", "adafactor"), flag="optimizer")
    lr: float | None = option(None, "peak learning rate; None = MM1's law exp(-0.4214 ln N - 0.5535)")
    connector_lr: float | None = option(8e-5, "peak learning rate of the connector (MM1: 8e-5); None = lr")
    vision_lr: float | None = option(None, "peak learning rate of the encoder; None = lr")
    weight_decay: float = option(0.1, "decoupled: w <- w - lr_t * weight_decay * w (MM1: 0.1)")
    decay_norms_and_biases: bool = option(False, "decay one-dimensional parameters too (AXLearn: yes; Megatron: no)")
    adam_beta1: float = option(0.9, "AdamW beta 1")
    adam_beta2: float = option(0.95, "AdamW beta 2")
    adam_eps: float = option(1e-8, "AdamW epsilon")
    clip_grad: float = option(1.0, "global gradient-norm clip; 0 = no clipping (MM1: 1.0)")
    adafactor_beta1: float | None = option(0.9, "AdaFactor momentum; None = none")
    adafactor_clip_threshold: float = option(5.0, "AdaFactor update-RMS clip (AXLearn: 5)")
    adafactor_decay_rate: float = option(0.8, "AdaFactor: beta2 = 1 - t ** -decay_rate")
    adafactor_eps: float = option(1e-30, "AdaFactor: added to squared gradients")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule, in optimizer steps."""

    warmup_steps: int = option(2000, "linear warm-up from 0 (MM1: 2000)", flag="lr-warmup-iters")
    decay: str = option("cosine", "shape after the warm-up", choices=("cosine", "constant"), flag="lr-decay-style")
    decay_steps: int | None = option(
        None, "step at which the floor is reached; None = train.steps", flag="lr-decay-iters"
    )
    min_lr_ratio: float = option(0.1, "floor as a share of the peak (MM1: 0.1; MM1.5 stages 2 and 3: 0)")


@dataclass(frozen=True)
class CheckpointConfig:
    """When and what is saved."""

    save_interval: int = option(1000, "steps between checkpoints; 0 = only at the end and on a signal")
    keep: int = option(3, "newest checkpoints that are kept; 0 = all", flag="keep-checkpoints")
    resume: str = option(
        "auto",
        "auto = resume if the run directory holds a checkpoint, else start; never = refuse to start "
        "beside one; required = refuse to start without one",
        choices=("auto", "never", "required"),
    )
    init_from: str = option(
        "",
        "a fresh start takes the weights alone of this checkpoint: a folder .../checkpoints/step_00001234, or a run "
        "directory, whose latest one is taken; empty = random weights",
    )
    async_save: bool = option(
        False,
        "checkpoints are written by processes of their own while the training goes on; takes host memory for a copy of "
        "what a rank holds, and with the distributed optimizer for the state that it gathers and writes",
    )
    format: str = option(
        "torch_dist",
        "how tensors are stored: torch_dist = megatron-core's; zarr = one array a tensor, for any zarr reader",
        choices=("torch_dist", "zarr"),
        flag="ckpt-format",
    )


@dataclass(frozen=True)
class FaultConfig:
    """What a run does when something goes wrong."""

    max_skips_in_a_row: int = option(
        20, "steps in a row refused for their loss or gradients before the run saves and stops; 0 = no limit"
    )
    loss_spike: str = option(
        "report",
        "a loss that jumps: off = nothing, report = a line in the log, skip = the step updates nothing, stop = the run "
        "ends too, saved",
        choices=("off", "report", "skip", "stop"),
    )
    loss_spike_window: int = option(100, "steps whose losses say what is normal")
    loss_spike_threshold: float = option(
        10.0, "deviations above their median that are a jump (1.48 median absolute deviations each)"
    )
    hang_timeout_minutes: float | None = option(
        None,
        "a rank that stays longer in one phase of a step hangs: all ranks report, and leave with code 4; "
        "None = 80 % of parallel.distributed_timeout_minutes, 0 = nobody watches",
    )


@dataclass(frozen=True)
class LoggingConfig:
    """What is written where."""

    log_interval: int = option(1, "steps between log lines")
    tensorboard: bool = option(True, "write TensorBoard events under <run_dir>/tensorboard")
    peak_tflops: float | None = option(
        None,
        "dense peak of one device in TFLOP/s, the denominator of utilisation; None = known devices only",
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    preset: str = option("", "name of the preset the run started from", flag="")
    language: LanguageConfig = LanguageConfig()
    moe: MoEConfig = MoEConfig()
    vision: VisionConfig = VisionConfig()
    connector: ConnectorConfig = ConnectorConfig()
    freeze: FreezeConfig = FreezeConfig()
    data: DataConfig = DataConfig()
    tiling: TilingConfig = TilingConfig()
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelConfig = KernelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()
    logging: LoggingConfig = LoggingConfig()
