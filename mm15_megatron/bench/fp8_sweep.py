"""Measure the linear layers of one rank in bf16 and in each FP8 recipe, on the production layers and one GPU.

R: rows of a product; I, O: its input and output width.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from mm15_megatron.accounting.matrix_products import EXPERTS, NEVER, VISION, MatrixProduct
from mm15_megatron.bench.fp8_advice import as_trained, plan, rows_of_experts
from mm15_megatron.bench.fp8_course import Instruments, run_course
from mm15_megatron.bench.fp8_record import BF16, RECIPES, Sweep, Timing
from mm15_megatron.config.rules_precision import fp8_alignment
from mm15_megatron.config.schema import ParallelConfig, RunConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.models.backend import Backend, fp8_problem, resolve_backend, transformer_engine_problem
from mm15_megatron.models.transformer_config import language_transformer_config, vision_transformer_config
from mm15_megatron.parallel.rendezvous import Rendezvous
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology, close_topology

FIX = "run it on a GPU machine with requirements-gpu.txt, or give --recorded FILE (that works anywhere)"


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        micro_batches: of a step: a weight is quantised in the first and used again in the others.
        warm_up: steps before the clock starts (kernels are chosen, amax histories filled).
        repeats: steps that are timed; the median counts.
    """

    micro_batches: int = 8
    warm_up: int = 3
    repeats: int = 7


def recipes_unusable_here(cfg: RunConfig) -> dict[str, str]:
    """Return why this device cannot compute in a recipe, by recipe; the others it can.

    Raises:
        BackendError: there is no GPU, or Transformer Engine does not import: nothing can be measured.
    """
    if not torch.cuda.is_available():
        raise BackendError(f"the sweep needs a GPU, and torch {torch.__version__} finds no CUDA device", fix=FIX)
    problem = transformer_engine_problem()
    if problem is not None:
        raise BackendError(f"the sweep measures Transformer Engine's layers, which do not import: {problem}", fix=FIX)
    problems = {recipe: fp8_problem(as_trained(cfg, recipe).precision) for recipe in RECIPES}
    return {recipe: problem for recipe, problem in problems.items() if problem is not None}


def measure(
    cfg: RunConfig,
    *,
    source: str,
    versions: dict[str, str],
    stage: int = 0,
    effort: Effort | None = None,
    recipes: Sequence[str] = RECIPES,
    keep: Callable[[Sweep], None],
    write: Callable[[str], None],
) -> Sweep:
    """Measure every product of one rank of ``cfg``; what fails is recorded and the others are measured.

    The rank's shapes are computed by one process without communication.

    Args:
        cfg: the run.
        source: how the numbers came about, for the record.
        versions: of the libraries and the driver, for the record.
        stage: pipeline stage of the rank.
        effort: how long.
        recipes: which of ``RECIPES`` to measure.
        keep: takes the record as it grows, after every product.
        write: takes progress, and the traceback of a failure.

    Raises:
        BackendError: the device or Transformer Engine is not usable: nothing can be measured.
        ConfigError: the layout cannot be split as configured.
    """
    effort = effort or Effort()
    unusable = {recipe: "left out by --recipes" for recipe in RECIPES if recipe not in recipes}
    chosen = plan(cfg, unusable=recipes_unusable_here(cfg) | unusable, stage=stage)
    with ExitStack() as stack:
        stack.callback(close_topology)
        topology = build_topology(ParallelConfig(device="cuda"), place=Rendezvous("single", 0, 1, 0, 1, ""))
        seed_everything(cfg.train.seed, topology=topology)
        shared = SharedParts(cfg, resolve_backend(as_trained(cfg, None).kernels), topology.groups, effort)
        begun = Sweep(
            source=source,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            device=torch.cuda.get_device_name(),
            versions=versions,
            preset=cfg.preset,
            fp8_format=cfg.precision.fp8 or "",
            keeps_edges=cfg.precision.first_last_layers_bf16,
            micro_batches=effort.micro_batches,
            attention_ms=None,
            refused=chosen.refused,
            refused_vision=chosen.refused_vision,
        )
        instruments = Instruments(
            attention=lambda: _attention_ms(shared, chosen.products),
            opened=lambda product: ProductTimer(shared, product).time,
            recover=recover,
        )
        sweep = run_course(begun, chosen, instruments=instruments, keep=keep, write=write)
        if sweep.stopped:
            stack.pop_all()  # the groups of a device that does not answer cannot be left, and would hide the record
    return sweep


def recover() -> str | None:
    """Free what a failed measurement left; return why the device does not work any more, or None if it does."""
    gc.collect()
    try:
        torch.cuda.empty_cache()
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing more can be measured
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


@dataclass(frozen=True)
class SharedParts:
    """What every measurement shares."""

    cfg: RunConfig
    backend: Backend
    groups: ProcessGroupCollection
    effort: Effort

    def config(self, product: MatrixProduct, recipe: str | None) -> TransformerConfig:
        """megatron-core's settings of the layer, on one rank: sizes are given to the layer itself."""
        vision = product.fp8 == VISION
        cfg = as_trained(self.cfg, recipe, vision=vision)
        precision = replace(cfg.precision, first_last_layers_bf16=False)
        kernels = replace(cfg.kernels, recompute_granularity=None, recompute_vision=False)
        alone = replace(cfg, parallel=ParallelConfig(device="cuda"), precision=precision, kernels=kernels)
        return vision_transformer_config(alone) if vision else language_transformer_config(alone)


def build_layer(
    product: MatrixProduct, *, config: TransformerConfig, backend: Backend, groups: ProcessGroupCollection
) -> torch.nn.Module:
    """Build the production layer of ``product`` with this rank's widths (a plain linear layer if never in FP8)."""
    sizes = (product.in_features, product.out_features)
    if product.fp8 == NEVER:
        placement = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        return torch.nn.Linear(*sizes, bias=product.bias, **placement)
    shared: dict[str, Any] = {
        "config": config,
        "init_method": config.init_method,
        "bias": product.bias,
        "skip_bias_add": False,
        "tp_comm_buffer_name": product.name.partition(".")[2],
    }
    if product.fp8 == EXPERTS:
        kind = backend.expert_column_linear if product.split == "column" else backend.expert_row_linear
        return kind(product.groups, *sizes, is_expert=True, pg_collection=groups, **shared)
    if product.split == "row":
        return backend.row_linear(*sizes, input_is_parallel=True, is_expert=False, tp_group=groups.tp, **shared)
    kind = backend.norm_column_linear if product.normed else backend.column_linear
    return kind(*sizes, gather_output=False, is_expert=False, tp_group=groups.tp, **shared)


class Trial:
    """One product in one precision, with its data: what a micro-batch computes.

    Weights, inputs and gradients are functions of the seed and of the shape, so that recipes compute the same thing.

    Args:
        product: the shapes.
        layer: from :func:`build_layer`.
        config: the layer's.
        padding: a pair of functions that pad and unpad the rows of experts; None in bf16.
        rows: rows of the input, those that fill up a block included.
        std: of the weights.
        seed: of everything random.
    """

    def __init__(
        self,
        product: MatrixProduct,
        *,
        layer: torch.nn.Module,
        config: TransformerConfig,
        padding: tuple[Any, Any] | None,
        rows: int,
        std: float,
        seed: int,
    ) -> None:
        self.product, self.layer, self.config, self.padding = product, layer, config, padding
        self.splits = list(rows_of_experts(product))
        self.device = next(layer.parameters()).device
        generator = torch.Generator(self.device).manual_seed(seed)
        for parameter in layer.parameters():
            parameter.requires_grad_(product.weight_gradient)
            if parameter.dim() > 1:
                parameter.data.normal_(std=std, generator=generator)
            # DDP adds gradients to a buffer in fp32 after every micro-batch, or the product itself does.
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False
        self.x_RI = self._data(rows, product.in_features, generator).requires_grad_(product.input_gradient)
        self.gradient_RO = self._data(rows, product.out_features, generator)

    def _data(self, rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """Gaussian rows, then zeros in those that only fill up a block."""
        real = torch.randn(self.product.rows, width, generator=generator, device=self.device, dtype=torch.bfloat16)
        return torch.nn.functional.pad(real, (0, 0, 0, rows - self.product.rows))

    def forward(self) -> torch.Tensor:
        """Run the layer on its rows: [R, O]."""
        if self.product.fp8 == NEVER:
            return self.layer(self.x_RI)
        with get_fp8_context(self.config):
            if self.product.fp8 != EXPERTS:
                return self.layer(self.x_RI[:, None])[0][:, 0]
            if self.padding is None:
                return self.layer(self.x_RI, self.splits)[0]
            pad, unpad = self.padding
            padded, splits = pad(self.x_RI, self.splits)
            return unpad(self.layer(padded, splits)[0], self.splits)

    def micro_batch(self, *, first: bool, backward: bool) -> torch.Tensor:
        """Run one micro-batch and return its output; ``first``: the weights have changed since the last one."""
        if self.product.fp8 != NEVER:
            self.layer.is_first_microbatch = first
        trains = self.product.weight_gradient or self.product.input_gradient
        with nullcontext() if trains else torch.no_grad():
            output_RO = self.forward()
        if backward and trains:
            output_RO.backward(self.gradient_RO)
            for parameter in self.layer.parameters():
                if parameter.grad is not None and not parameter.grad_added_to_main_grad:
                    parameter.main_grad.add_(parameter.grad)
                parameter.grad = None
        return output_RO.detach()

    def results(self) -> Results:
        """Run one micro-batch and return what it computed, real rows alone."""
        for parameter in self.layer.parameters():
            parameter.main_grad.zero_()
        self.x_RI.grad = None
        output_RO = self.micro_batch(first=True, backward=True)[: self.product.rows]
        gradient_RI = None if self.x_RI.grad is None else self.x_RI.grad[: self.product.rows].clone()
        weights = [p.main_grad for p in self.layer.parameters() if p.dim() > 1 and p.requires_grad]
        return Results([output_RO], [] if gradient_RI is None else [gradient_RI], weights)


@dataclass(frozen=True)
class Results:
    """The output, the gradient of the input and those of the weights; a list is empty where nothing is computed."""

    outputs: list[torch.Tensor]
    input_gradients: list[torch.Tensor]
    weight_gradients: list[torch.Tensor]

    def errors(self, reference: Results) -> tuple[float, float]:
        """Return how far the output and the gradients (the worse kind) are from ``reference``, relative norms."""
        gradients = (
            _relative(self.input_gradients, reference.input_gradients),
            _relative(self.weight_gradients, reference.weight_gradients),
        )
        return _relative(self.outputs, reference.outputs), max(gradients)


def _relative(values: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm of the references, over all tensors together; 0 without any."""
    difference = sum(float((v.float() - r.float()).square().sum()) for v, r in zip(values, references, strict=True))
    norm = sum(float(r.float().square().sum()) for r in references)
    return math.sqrt(difference / norm) if references else 0.0


def _trial(shared: SharedParts, product: MatrixProduct, recipe: str | None) -> Trial:
    config = shared.config(product, recipe)
    layer = build_layer(product, config=config, backend=shared.backend, groups=shared.groups)
    padding, rows = None, product.rows
    if recipe is not None and product.fp8 == EXPERTS:
        from megatron.core.extensions.transformer_engine import Fp8Padding, Fp8Unpadding

        padding = (Fp8Padding(product.groups), Fp8Unpadding(product.groups))
    elif recipe is not None:
        rows = product.padded_rows(fp8_alignment(recipe))
    return Trial(
        product,
        layer=layer,
        config=config,
        padding=padding,
        rows=rows,
        std=shared.cfg.language.init_method_std,
        seed=shared.cfg.train.seed,
    )


def check_rounded(product: MatrixProduct, recipe: str, *, output_error: float) -> None:
    """Refuse an output that equals bf16's: Gaussian data survive no rounding to FP8.

    Raises:
        BackendError: the layer did not compute in FP8.
    """
    if output_error == 0.0:
        raise BackendError(
            f"{product.name} in {recipe} gave bf16's output bit by bit: the layer did not compute in FP8",
            fix="check that megatron-core finds this Transformer Engine (tools/gpu_environment.py), and its version",
        )


class ProductTimer:
    """Times one product, bf16 first: its results are what the recipes are compared with."""

    def __init__(self, shared: SharedParts, product: MatrixProduct) -> None:
        self.shared, self.product = shared, product
        self.reference: Results | None = None

    def time(self, recipe: str | None) -> Timing:
        """Time the product in ``recipe`` (None: bf16) and say how far its results are from bf16's.

        Raises:
            BackendError: it does not fit into memory, or a recipe did not round; whatever the kernels raise.
        """
        product = self.product
        if recipe == "delayed":
            # It updates the amax histories of all modules that ever ran, and those of other products are not asked for.
            fp8_utils.FP8GlobalStateManager.reset()
        try:
            trial = _trial(self.shared, product, recipe)
            timing = _time(trial, self.shared.effort)
            found = trial.results()
        except torch.cuda.OutOfMemoryError as error:
            raise BackendError(
                f"{product.name} ({product.rows} x {product.in_features} -> {product.out_features}, {product.groups} "
                f"weights) in {recipe or BF16} does not fit into this GPU's memory: {error}",
                fix="spread it over more ranks (tensor or expert parallel), as the training of this model has to",
            ) from error
        del trial
        torch.cuda.empty_cache()
        if recipe is None:
            self.reference = found
            return timing
        assert self.reference is not None, "bf16 is timed first"
        output_error, gradient_error = found.errors(self.reference)
        check_rounded(product, recipe, output_error=output_error)
        return replace(timing, output_error=output_error, gradient_error=gradient_error)


def _time(trial: Trial, effort: Effort) -> Timing:
    for _ in range(effort.warm_up):
        _step(trial, effort, backward=True)
    whole = [_step(trial, effort, backward=True) for _ in range(effort.repeats)]
    forward = [_step(trial, effort, backward=False)[0] for _ in range(effort.repeats)]
    both_ms, host_ms = (statistics.median(values) for values in zip(*whole, strict=True))
    forward_ms = min(statistics.median(forward), both_ms)
    return Timing(forward_ms=forward_ms, backward_ms=both_ms - forward_ms, host_ms=host_ms)


def _step(trial: Trial, effort: Effort, *, backward: bool) -> tuple[float, float]:
    """Milliseconds of one micro-batch on the GPU and on the host, mean over the micro-batches of a step."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began = time.perf_counter()
    start.record()
    for index in range(effort.micro_batches):
        trial.micro_batch(first=index == 0, backward=backward)
        trial.x_RI.grad = None
    end.record()
    host_ms = 1e3 * (time.perf_counter() - began)
    end.synchronize()
    return start.elapsed_time(end) / effort.micro_batches, host_ms / effort.micro_batches


def _attention_ms(shared: SharedParts, products: Sequence[MatrixProduct]) -> float:
    """Milliseconds of core attention in one micro-batch of the rank: the decoder over whole rows, and the encoder."""
    cfg, total = shared.cfg, 0.0
    parallel, tokens = cfg.parallel, cfg.data.seq_length
    counts = {product.name: product.count for product in products}
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    by_name = {product.name: product for product in products}
    if "decoder.qkv" in by_name:
        language = cfg.language
        shape = (tokens, cfg.train.micro_batch_size, language.num_attention_heads // ranks, language.kv_channels)
        groups = language.num_query_groups // ranks
        total += counts["decoder.qkv"] * _time_attention(shared, by_name["decoder.qkv"], shape, groups=groups)
    if "vision.qkv" in by_name:
        vision = cfg.vision
        split = parallel.tensor_model_parallel_size if parallel.encoder_parallel == "tensor" else 1
        length = vision.grid_size**2 + vision.class_token
        heads, channels = vision.num_attention_heads // split, vision.hidden_size // vision.num_attention_heads
        shape = (length, by_name["vision.qkv"].rows // length, heads, channels)
        total += counts["vision.qkv"] * _time_attention(shared, by_name["vision.qkv"], shape, groups=heads)
    return total


def _time_attention(
    shared: SharedParts, product: MatrixProduct, shape: tuple[int, int, int, int], *, groups: int
) -> float:
    """Milliseconds of one core attention, forward and backward; ``shape`` is [tokens, rows, heads, channels]."""
    config = copy.copy(shared.config(product, None))
    config.num_attention_heads, config.num_query_groups = shape[2], groups
    mask = AttnMaskType.no_mask if product.fp8 == VISION else AttnMaskType.causal
    core = shared.backend.core_attention(
        config=config, layer_number=1, attn_mask_type=mask, attention_type="self", pg_collection=shared.groups
    )
    tokens, rows, heads, channels = shape
    like = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": product.input_gradient}
    query = torch.randn(tokens, rows, heads, channels, **like)
    key, value = (torch.randn(tokens, rows, groups, channels, **like) for _ in range(2))
    gradient = torch.randn(tokens, rows, heads * channels, device="cuda", dtype=torch.bfloat16)
    spent = []
    for _ in range(shared.effort.warm_up + shared.effort.repeats):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(shared.effort.micro_batches):
            output = core(query, key, value, None, mask)
            if product.input_gradient:
                torch.autograd.grad(output, (query, key, value), gradient)
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end) / shared.effort.micro_batches)
    return statistics.median(spent[shared.effort.warm_up :])
