"""The configuration of one run: frozen dataclasses, importable without torch.

A run is described by :class:`RunConfig`, one frozen section for each concern. Sections hold plain values (int, float,
str, bool, None, tuples and nested frozen dataclasses), never derived ones: what follows from other values is a property
or a function of ``accounting``. Names are megatron-core's for what is megatron-core's and the papers' for what is
theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mm15_megatron.config.fields import option


@dataclass(frozen=True)
class LanguageConfig:
    """The decoder LLM: pre-norm, no biases, RoPE (MM1: unpublished; dimensions as argued from AXLearn's configs)."""

    num_layers: int = option(24, "decoder layers")
    hidden_size: int = option(2048, "width of the residual stream")
    num_attention_heads: int = option(32, "query heads")
    num_query_groups: int = option(32, "key/value heads; equal to num_attention_heads = multi-head attention")
    kv_channels: int = option(64, "dimension of a head")
    ffn_hidden_size: int = option(5632, "inner width of the feed-forward block (one branch of SwiGLU)")
    vocab_size: int = option(49152, "token ids the model knows, before padding")
    make_vocab_size_divisible_by: int = option(
        128, "the embedding is padded to a multiple of this, whatever the layout"
    )
    activation: str = option("swiglu", "feed-forward activation", choices=("swiglu", "gelu"))
    norm_epsilon: float = option(1e-5, "RMSNorm epsilon")
    rotary_base: float = option(10000.0, "RoPE theta")
    qk_layernorm: bool = option(False, "RMSNorm on queries and keys, per head")
    share_embeddings_and_output_weights: bool = option(True, "tie the input embedding and the output layer")
    z_loss_coeff: float = option(0.0, "LM-head z-loss weight (MM1: 1e-4 for the 30B model alone)")
    init_method_std: float = option(0.02, "standard deviation of the initial weights (unpublished: our default)")


@dataclass(frozen=True)
class MoEConfig:
    """Sparse decoder layers (MM1 section 4); num_moe_experts = 0 is a dense model."""

    num_moe_experts: int = option(0, "experts of a sparse layer; 0 = dense model", flag="num-experts")
    moe_layer_period: int = option(2, "one sparse layer in this many; the LAST layer of each group is sparse")
    moe_router_topk: int = option(2, "experts a token visits (MM1: top-2)")
    moe_aux_loss_coeff: float = option(0.01, "load-balance loss weight (MM1: 0.01)")
    moe_z_loss_coeff: float = option(0.001, "router z-loss weight (MM1: 0.001)")
    moe_router_load_balancing_type: str = option(
        "seq_aux_loss",
        "what the balance loss of a row counts: seq_aux_loss = all choices of a token, gshard_top1 = its first one",
        choices=("seq_aux_loss", "gshard_top1"),
    )
    moe_expert_capacity_factor: float | None = option(
        None,
        "capacity factor in training, in megatron-core's convention (AXLearn's 2.0 is 1.0 here); None = dropless, as "
        "evaluation always is",
    )
    moe_capacity_group_size: int = option(
        256, "tokens that share the experts' capacity (a GShard group); divides the tokens of every rank"
    )
    moe_token_drop_policy: str = option(
        "position",
        "who stays when an expert is full: position = first choices before second ones, in token order (GShard); "
        "probs = the largest gates",
        choices=("position", "probs"),
    )


@dataclass(frozen=True)
class VisionConfig:
    """The ViT image encoder (CLIP ViT-L/14 and ViT-H/14; AIM with the options of its release)."""

    num_layers: int = option(32, "encoder blocks")
    hidden_size: int = option(1280, "width of the encoder")
    num_attention_heads: int = option(16, "heads; the head dimension is hidden_size / heads")
    ffn_hidden_size: int = option(5120, "inner width of the MLP")
    patch_size: int = option(14, "side of a patch, pixels")
    image_size: int = option(378, "side of a tile, pixels; a multiple of patch_size")
    position_embedding: str = option(
        "learned",
        "positions of patches: learned = a stored table (CLIP); sincos = fixed 2-D sines and cosines (AIM)",
        choices=("learned", "sincos"),
    )
    position_grid_size: int = option(
        0,
        "grid side of the stored position embedding; 0 = image_size / patch_size; another value is interpolated",
    )
    pre_layernorm: str = option(
        "tokens",
        "the LayerNorm before the blocks: tokens = after class token and positions (CLIP); patches = before them (AIM)",
        choices=("tokens", "patches"),
    )
    patch_bias: bool = option(False, "a bias on the patch embedding (CLIP: no; AIM: yes)")
    add_bias_linear: bool = option(True, "biases in the linear layers of the blocks (CLIP: yes; AIM: no)")
    activation: str = option("quick_gelu", "MLP activation", choices=("gelu", "quick_gelu"))
    class_token: bool = option(True, "a learned class token at index 0, dropped from the features")
    norm_epsilon: float = option(1e-5, "LayerNorm epsilon")
    feature_layer: int = option(
        -1,
        "block whose output is the feature: -1 = last, -2 = the one before; later ones are not built (unpublished)",
    )
    post_layernorm: bool = option(False, "apply ln_post to the features (Honeybee: no; MM1: unpublished)")
    image_mean: tuple[float, float, float] = option(
        (0.48145466, 0.4578275, 0.40821073), "per-channel mean, 0..1 (CLIP)"
    )
    image_std: tuple[float, float, float] = option((0.26862954, 0.26130258, 0.27577711), "per-channel deviation (CLIP)")

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def stored_grid_size(self) -> int:
        """Grid side of the position-embedding table."""
        return self.position_grid_size or self.grid_size


@dataclass(frozen=True)
class ConnectorConfig:
    """What turns patch features into language tokens (MM1 section 3.2; sizes are Honeybee's released ones)."""

    kind: str = option("c_abstractor", "connector", choices=("c_abstractor", "average_pool", "attention_pool"))
    num_tokens: int = option(
        144, "language tokens a tile becomes; a perfect square (64, 81 or 144) unless attention pools"
    )
    hidden_size: int = option(1024, "width of the C-Abstractor's convolutions, or of attention pooling")
    depth: int = option(3, "residual blocks before and after the pooling")
    mlp_depth: int = option(2, "linear layers of the output MLP")
    num_attention_heads: int = option(16, "heads of attention pooling; they divide hidden_size (unpublished)")
    position_embedding: bool = option(True, "learned position embedding on the input grid")
    norm_epsilon: float = option(1e-5, "LayerNorm epsilon")

    @property
    def pools_grid(self) -> bool:
        """Whether the tokens are a square grid: all kinds but attention pooling, whose queries have no order."""
        return self.kind != "attention_pool"

    @property
    def output_grid_size(self) -> int:
        """Side of the pooled grid."""
        return round(math.sqrt(self.num_tokens))


@dataclass(frozen=True)
class FreezeConfig:
    """Modules that are not trained (MM1 and MM1.5 train everything in every stage)."""

    vision: bool = option(False, "freeze the image encoder")
    connector: bool = option(False, "freeze the connector")
    language: bool = option(False, "freeze the decoder, embeddings and output layer")


@dataclass(frozen=True)
class WeightChange:
    """A weight that holds from one row (or sample, as ``mixture_unit`` counts) of the run on."""

    first: int = option(0, "number of the first row or sample of the run that it holds for")
    weight: float = option(1.0, "the weight; 0 = the source rests")


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of the mixture."""

    prefix: str = option("", "path prefix of the indexed dataset: <prefix>.json, <prefix>_tokens.bin, ...")
    weight: float | None = option(
        None, "share of what epochs leave, normalised over the sources with a weight; None = 1, unless epochs are given"
    )
    changes: tuple[WeightChange, ...] = option((), "later weights, a list of {first, weight}")
    epochs: float | None = option(
        None,
        "how often the run sees each document, within a few rows, instead of a weight; a shorter run shares them",
    )
    name: str = option("", "name in logs and in the ledger; empty = the last part of the prefix")


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes rows."""

    sources: tuple[SourceConfig, ...] = option(
        (),
        "the training mixture, a list of {prefix, weight or epochs, name}; --list-presets shows the papers' weights",
        flag="",
    )
    validation_sources: tuple[SourceConfig, ...] = option((), "held-out mixture; empty = no validation", flag="")
    tokenizer: str = option("", "path of a tokenizer.json (tokenizers) or a .model (SentencePiece)")
    seq_length: int = option(4096, "tokens of a row (MM1: 4096)")
    max_images: int = option(16, "images of a row at most (MM1: 16)")
    max_tiles: int = option(160, "tiles of a row at most, a memory cap")
    mixture_unit: str = option(
        "row",
        "what weights count: row = rows, each of one source (MM1); token = tokens, in rows of one source; sample = "
        "samples, which mix inside a row",
        choices=("row", "sample", "token"),
    )
    batch_unit: str = option(
        "rows",
        "what global_batch_size counts: rows (pre-training), or samples, packed into as many rows as they need",
        choices=("rows", "samples"),
    )
    shuffle: str = option(
        "full",
        "order of an epoch's documents: full = keyed pseudo-random over all of them; blocks = of blocks of neighbours, "
        "mixed inside windows, for file systems that hate small reads; none = as stored",
        choices=("full", "blocks", "none"),
    )
    shuffle_block: int = option(1024, "documents of a block (shuffle: blocks)")
    shuffle_window: int = option(64, "blocks of a window, which are also packed together (shuffle: blocks)")
    plan_dir: str = option("", "folder of the tables that say which rows a dataset becomes; empty = <run_dir>/plan")
    row_dealing: str = option(
        "balanced",
        "which data-parallel rank takes which row of a step: balanced = so that tiles even out, round_robin = in turn",
        choices=("balanced", "round_robin"),
    )
    num_workers: int = option(
        1, "processes that decode images for each rank that reads them; 0 = in the training process"
    )
    prefetch_factor: int = option(2, "micro-batches each worker prepares ahead")
    decoder: str = option(
        "dali",
        "image decoder: dali = on the CPU; dali_gpu = decoded and resized on the rank's GPU (not measured); pil = the "
        "reference",
        choices=("dali", "dali_gpu", "pil"),
        flag="image-decoder",
    )
    max_image_pixels: int = option(64_000_000, "larger images are refused before they are decoded")
    on_bad_image: str = option(
        "substitute",
        "an image that does not decode: substitute (mean colour, counted, named) or raise",
        choices=("substitute", "raise"),
    )


@dataclass(frozen=True)
class TilingConfig:
    """How an image becomes tiles (MM1.5 section 4)."""

    mode: str = option(
        "none",
        "none = one tile; static = 2x2 tiles and an overview; dynamic = best grid and an overview",
        choices=("none", "static", "dynamic"),
        flag="tiling",
    )
    min_tiles: int = option(4, "n_min of dynamic image splitting (MM1.5: 4)")
    max_tiles: int = option(9, "n_max of dynamic image splitting (MM1.5: 9)", flag="tiling-max-tiles")
    overview: str = option("after", "where the overview stands (MM1.5: after)", choices=("before", "after"))
    resize: str = option(
        "stretch",
        "how an image meets one tile: stretch to the square, or fit and pad bottom/right; dynamic always fits",
        choices=("stretch", "fit"),
    )
    max_split_images: int = option(2, "samples with more images than this are never split (MM1.5: 2)")
    mixed_resolution_images: int = option(
        0, "but the last so many images of a sample are always split (MM1's few-shot prompts: 3, recollected)"
    )
    indicator: str = option(
        "none",
        "how a tile says where it stands: none, index = its position as text, seps = separators (MM1.5: index)",
        choices=("none", "index", "seps"),
    )


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
    format: str = option("torch_dist", "checkpoint format", choices=("torch_dist",), flag="ckpt-format")


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
    logging: LoggingConfig = LoggingConfig()
