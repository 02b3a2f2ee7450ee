"""The products with weights that one rank computes in a micro-batch (symbols and convention: see the package)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mm15_megatron.accounting.flops import planned_tiles_per_row
from mm15_megatron.accounting.parameters import built_vision_layers, padded_vocab_size, sparse_layers
from mm15_megatron.accounting.pipeline import stage_layers
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.validate import expert_tensor_size
from mm15_megatron.errors import ConfigError

DECODER, EXPERTS, VISION, NEVER = "decoder", "experts", "vision", "never"
"""Which option puts a product in FP8: ``precision.fp8`` (decoder, experts), ``precision.fp8_vision`` too, or none."""


@dataclass(frozen=True)
class MatrixProduct:
    """One kind of linear layer on one rank: [rows, in_features] x [in_features, out_features].

    Attributes:
        name: part and layer, such as ``decoder.fc1``; several entries never share it.
        fp8: ``decoder``, ``experts``, ``vision`` or ``never``, see above.
        rows: rows of the input in one micro-batch, without padding; of all groups together, routed evenly.
        in_features: width of the input on this rank.
        out_features: width of the output on this rank; both branches of a gated layer.
        groups: weights multiplied in one call: experts of this rank, else 1.
        count: how often the product stands in the layers of this rank.
        edge_count: how many of those stand in the decoder layers that ``precision.first_last_layers_bf16`` would keep
            in bf16.
        split: ``column``, ``row`` or ``whole``: which side tensor parallelism cuts.
        normed: a norm stands before it and is fused with it by Transformer Engine.
        bias: it adds a bias.
        weight_gradient: the backward pass computes the gradient of the weight.
        input_gradient: ... and that of the input.
        forward_passes: 2 if its layer is recomputed, else 1.
    """

    name: str
    fp8: str
    rows: int
    in_features: int
    out_features: int
    groups: int = 1
    count: int = 1
    edge_count: int = 0
    split: str = "whole"
    normed: bool = False
    bias: bool = False
    weight_gradient: bool = True
    input_gradient: bool = True
    forward_passes: int = 1

    @property
    def part(self) -> str:
        """What stands before the dot of the name."""
        return self.name.partition(".")[0]

    @property
    def rows_per_group(self) -> float:
        """Rows that meet one weight."""
        return self.rows / self.groups

    @property
    def flops(self) -> float:
        """FLOPs of one pass over one of the ``count``."""
        return 2.0 * self.rows * self.in_features * self.out_features

    @property
    def trained_flops(self) -> float:
        """Model FLOPs of all ``count``, forward and backward; recomputation does not count."""
        return self.count * self.flops * (1 + self.weight_gradient + self.input_gradient)

    def padded_rows(self, multiple: int) -> int:
        """Return the rows when every group is filled up to a multiple of ``multiple``."""
        per_group = -(-self.rows // self.groups)
        return self.groups * (-(-per_group // multiple) * multiple)


def matrix_products(cfg: RunConfig, *, stage: int = 0) -> tuple[MatrixProduct, ...]:
    """Return the products of one rank of pipeline stage ``stage``, in the order of the forward pass.

    Rows carry ``planned_tiles_per_row`` tiles, the class token is a row, and experts get equal shares. The connector is
    left out: it is never in FP8, and most of it are convolutions. The patch embedding is counted with an input gradient
    like the rest of the encoder (the convention of ``step_flops``), though pixels need none.

    Raises:
        ConfigError: there is no such stage, or the layers cannot be split as configured.
    """
    stages = cfg.parallel.pipeline_model_parallel_size
    if not 0 <= stage < stages:
        raise ConfigError(f"stage {stage} of {stages} pipeline stages", fix=f"give a stage from 0 to {stages - 1}")
    products = list(_vision(cfg)) if stage == 0 else []
    products += _decoder(cfg, stage_layers(cfg, stage))
    if stage == stages - 1:
        tp = cfg.parallel.tensor_model_parallel_size
        vocabulary = padded_vocab_size(cfg) // tp
        output = MatrixProduct(
            "output.logits", NEVER, _tokens(cfg), cfg.language.hidden_size, vocabulary, split="column"
        )
        products.append(_of_language(cfg, output))
    return tuple(product for product in products if product.count)


def _tokens(cfg: RunConfig) -> int:
    """Tokens of a micro-batch on one context-parallel rank: what a decoder layer's products see."""
    return cfg.data.seq_length * cfg.train.micro_batch_size // cfg.parallel.context_parallel_size


def _of_language(cfg: RunConfig, product: MatrixProduct) -> MatrixProduct:
    freeze = cfg.freeze
    flows = not (freeze.language and freeze.connector and freeze.vision)
    return replace(product, weight_gradient=not freeze.language, input_gradient=flows)


def _forward_passes(cfg: RunConfig, module: str) -> int:
    """Forward passes of a decoder module in one step."""
    kernels = cfg.kernels
    again = kernels.recompute_granularity == "full" or (
        kernels.recompute_granularity == "selective" and module in kernels.recompute_modules
    )
    return 1 + again


def _decoder(cfg: RunConfig, layers: Sequence[int]) -> list[MatrixProduct]:
    language, precision, tp = cfg.language, cfg.precision, cfg.parallel.tensor_model_parallel_size
    tokens, h, f = _tokens(cfg), language.hidden_size, language.ffn_hidden_size
    q = language.num_attention_heads * language.kv_channels // tp
    kv = language.num_query_groups * language.kv_channels // tp
    branches = 2 if language.activation == "swiglu" else 1
    ends = (precision.num_layers_at_start_in_bf16, language.num_layers - precision.num_layers_at_end_in_bf16)
    sparse = sparse_layers(cfg)
    with_experts = [layer for layer in layers if sparse[layer]]
    without = [layer for layer in layers if not sparse[layer]]

    def standing(product: MatrixProduct, *, among: Sequence[int], module: str) -> MatrixProduct:
        edges = sum(not ends[0] <= layer < ends[1] for layer in among)
        passes = _forward_passes(cfg, module)
        return _of_language(cfg, replace(product, count=len(among), edge_count=edges, forward_passes=passes))

    column = MatrixProduct("decoder.qkv", DECODER, tokens, h, q + 2 * kv, split="column", normed=True)
    row = MatrixProduct("decoder.proj", DECODER, tokens, q, h, split="row")
    found = [
        standing(column, among=layers, module="attention"),
        standing(row, among=layers, module="attention"),
        standing(replace(column, name="decoder.fc1", out_features=branches * f // tp), among=without, module="mlp"),
        standing(replace(row, name="decoder.fc2", in_features=f // tp), among=without, module="mlp"),
    ]
    if with_experts:
        found += [standing(product, among=with_experts, module="moe") for product in _sparse(cfg, tokens=tokens)]
    return found


def _sparse(cfg: RunConfig, *, tokens: int) -> list[MatrixProduct]:
    """The products of a sparse layer: tensor-parallel ranks cut its tokens, and send each to ``topk`` experts."""
    moe, parallel, language = cfg.moe, cfg.parallel, cfg.language
    split, local = expert_tensor_size(cfg), moe.num_moe_experts // parallel.expert_model_parallel_size
    own = tokens // parallel.tensor_model_parallel_size
    rows = split * own * moe.moe_router_topk
    h, f = language.hidden_size, language.ffn_hidden_size // split
    branches = 2 if language.activation == "swiglu" else 1
    return [
        MatrixProduct("router.logits", NEVER, own, h, moe.num_moe_experts),
        MatrixProduct("experts.fc1", EXPERTS, rows, h, branches * f, groups=local, split="column"),
        MatrixProduct("experts.fc2", EXPERTS, rows, f, h, groups=local, split="row"),
    ]


def _vision(cfg: RunConfig) -> list[MatrixProduct]:
    vision, parallel = cfg.vision, cfg.parallel
    shares_tiles = parallel.encoder_parallel == "data"
    tp = parallel.tensor_model_parallel_size
    ranks, split = (tp * parallel.context_parallel_size, 1) if shares_tiles else (1, tp)
    tiles = max(1, -(-planned_tiles_per_row(cfg) * cfg.train.micro_batch_size // ranks))
    patches, d, f = vision.grid_size**2, vision.hidden_size, vision.ffn_hidden_size
    rows = tiles * (patches + vision.class_token)
    trains = not cfg.freeze.vision
    blocks, passes = built_vision_layers(vision), 2 if cfg.kernels.recompute_vision and trains else 1
    column = MatrixProduct("vision.qkv", VISION, rows, d, 3 * d // split, split="column", normed=True)
    row = MatrixProduct("vision.proj", VISION, rows, d // split, d, split="row")
    of_blocks = [
        column,
        row,
        replace(column, name="vision.fc1", out_features=f // split),
        replace(row, name="vision.fc2", in_features=f // split),
    ]
    patch = 3 * vision.patch_size**2
    products = [
        MatrixProduct("patches.embedding", NEVER, tiles * patches, patch, d, bias=vision.patch_bias),
        *(replace(p, count=blocks, forward_passes=passes, bias=vision.add_bias_linear) for p in of_blocks),
    ]
    return [replace(product, weight_gradient=trains, input_gradient=trains) for product in products]
