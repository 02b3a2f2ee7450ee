"""The seam to Transformer Engine and apex: which classes compute a layer.

``kernels`` names the implementations. None is ever chosen silently: a library that was asked for and cannot be used is
an error that carries the reason.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import nn

from mm15_megatron.config.schema import KernelConfig, PrecisionConfig, RunConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.models.attention import LocalCoreAttention
from mm15_megatron.models.norm import LocalNorm

APEX_WGRAD = "fused_weight_gradient_mlp_cuda"
"""apex's extension that adds weight gradients to a buffer inside their matrix product."""


@dataclass(frozen=True)
class Backend:
    """The classes a transformer layer is made of.

    Attributes:
        name: value of ``kernels.transformer_impl``.
        norm: normalisation module.
        linear: linear layer that is whole on every rank (the connector's), called like ``torch.nn.Linear``.
        column_linear: linear layer split along its output.
        row_linear: linear layer split along its input.
        norm_column_linear: one module for a norm followed by ``column_linear``; None = two modules.
        core_attention: softmax attention on projected heads.
        experts: the experts of one rank: one after the other, or as one grouped matrix product.
        expert_column_linear: their first linear layer.
        expert_row_linear: their second linear layer.
    """

    name: str
    norm: type
    linear: type
    column_linear: type
    row_linear: type
    norm_column_linear: type | None
    core_attention: type
    experts: type
    expert_column_linear: type
    expert_row_linear: type


def resolve_backend(kernels: KernelConfig) -> Backend:
    """Return the layer classes that ``kernels`` names.

    Raises:
        BackendError: if a library is not usable here; the message holds the reason.
    """
    if kernels.transformer_impl == "transformer_engine":
        return _transformer_engine(accumulates=kernels.gradient_accumulation_fusion)
    local = Backend(
        name="local",
        norm=LocalNorm,
        linear=nn.Linear,
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        norm_column_linear=None,
        core_attention=LocalCoreAttention,
        experts=SequentialMLP,
        expert_column_linear=ColumnParallelLinear,
        expert_row_linear=RowParallelLinear,
    )
    if kernels.gradient_accumulation_fusion and (problem := apex_problem(APEX_WGRAD)) is not None:
        raise BackendError(
            f"kernels.gradient_accumulation_fusion with local layers takes apex's kernel, not usable here: {problem}",
            fix="build apex with APEX_CUDA_EXT=1 (requirements-gpu.txt), use Transformer Engine layers, or set "
            "kernels.gradient_accumulation_fusion=false",
        )
    return replace(local, norm=_apex_norm()) if kernels.norm_impl == "apex" else local


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used here, or None if it can.

    Its import raises RuntimeError or OSError, not ImportError, beside a torch without CUDA.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def apex_problem(module: str) -> str | None:
    """Why a module of NVIDIA's apex (``apex.optimizers``, or a compiled extension) cannot be used, or None if it can.

    The package called apex on the Python package index is an unrelated one; it fails here too.
    """
    try:
        import_module("apex.normalization")
        import_module(module)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def fp8_problem(precision: PrecisionConfig) -> str | None:
    """Why this device cannot compute in the recipe of ``precision``, or None if it can (or nothing is in FP8)."""
    if precision.fp8 is None:
        return None
    problem = transformer_engine_problem()
    if problem is not None:
        return problem
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    from transformer_engine.pytorch import quantization

    supported, reason = {
        "tensorwise": quantization.check_fp8_support,
        "delayed": quantization.check_fp8_support,
        "blockwise": quantization.check_fp8_block_scaling_support,
        "mxfp8": quantization.check_mxfp8_support,
    }[precision.fp8_recipe]()
    return None if supported else reason


def check_fp8(precision: PrecisionConfig) -> None:
    """Refuse a recipe that this device does not have, before a model is built.

    Raises:
        BackendError: with Transformer Engine's reason.
    """
    problem = fp8_problem(precision)
    if problem is not None:
        raise BackendError(
            f"precision.fp8_recipe = {precision.fp8_recipe} is not usable here: {problem}",
            fix="choose another precision.fp8_recipe (mxfp8 needs Blackwell, the others Hopper or newer), or "
            "precision.fp8=null",
        )


@dataclass(frozen=True)
class TensorParallelBuffers:
    """What Transformer Engine's buffers of ``parallel.tp_comm_overlap`` look like.

    Attributes:
        shape: tokens of a micro-batch on the ranks of one tensor-parallel group together, and width of the decoder.
        ranks: size of the group.
        kinds: fp8 for layers that compute in FP8, none for those that do not.
    """

    shape: tuple[int, int]
    ranks: int
    kinds: tuple[str, ...]


def tensor_parallel_buffers(cfg: RunConfig) -> TensorParallelBuffers:
    """Describe the buffers of a run; every layer of the decoder takes turns with the same ones."""
    tokens = cfg.data.seq_length * cfg.train.micro_batch_size // cfg.parallel.context_parallel_size
    kinds: tuple[str, ...] = ("none",)
    if cfg.precision.fp8 is not None:
        kinds = ("fp8", "none") if cfg.precision.first_last_layers_bf16 else ("fp8",)
    return TensorParallelBuffers(
        (tokens, cfg.language.hidden_size), cfg.parallel.tensor_model_parallel_size, kinds=kinds
    )


def open_tensor_parallel_buffers(cfg: RunConfig) -> Callable[[], None]:
    """Open the buffers of ``parallel.tp_comm_overlap``, after the process groups and before any layer exist.

    Every rank must call, once. Transformer Engine takes consecutive ranks for a tensor-parallel group, as
    ``parallel/topology.py`` does.

    Returns:
        What closes the buffers; to be called before the process groups are left.

    Raises:
        BackendError: Transformer Engine or the device cannot have them.
    """
    problem = transformer_engine_problem()
    if problem is None and not torch.cuda.is_available():
        problem = f"torch {torch.__version__} finds no CUDA device"
    if problem is not None:
        raise BackendError(
            f"parallel.tp_comm_overlap takes Transformer Engine's buffers, which cannot be opened here: {problem}",
            fix="set parallel.tp_comm_overlap=false, or install requirements-gpu.txt on a CUDA machine",
        )
    import transformer_engine_torch
    from transformer_engine.pytorch import destroy_ub, initialize_ub
    from transformer_engine.pytorch.module import UserBufferQuantizationMode

    if not transformer_engine_torch.device_supports_multicast() and os.environ.get("UB_SKIPMC", "0") != "1":
        raise BackendError(
            "parallel.tp_comm_overlap: device, driver or toolkit do not support CUDA multicast, which Transformer "
            "Engine's buffers use",
            fix="set UB_SKIPMC=1 in the environment to use CUDA IPC instead, or parallel.tp_comm_overlap=false",
        )
    buffers = tensor_parallel_buffers(cfg)
    initialize_ub(
        shape=list(buffers.shape),
        tp_size=buffers.ranks,
        quantization_modes=[UserBufferQuantizationMode(kind) for kind in buffers.kinds],
        dtype=torch.bfloat16,
        bootstrap_backend="nccl",
    )
    closing: Callable[[], None] = destroy_ub
    return closing


def _apex_norm() -> type[LocalNorm]:
    problem = apex_problem("fused_layer_norm_cuda")
    if problem is not None:
        raise BackendError(
            f"kernels.norm_impl = apex, but apex's fused norms are not usable here: {problem}",
            fix="build apex with APEX_CUDA_EXT=1 (requirements-gpu.txt), or set kernels.norm_impl=backend",
        )
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    class ApexNorm(LocalNorm):
        """LocalNorm in one kernel."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Normalise ``x`` [..., hidden_size]; the result has the dtype of ``x``."""
            if self.is_rms:
                return fused_rms_norm_affine(x, self.weight, self.shape, self.eps)
            return fused_layer_norm_affine(x, self.weight, self.bias, self.shape, self.eps)

    return ApexNorm


def _accumulating(layer: type) -> type:
    """The same layer, adding its weight gradient to the gradient buffer inside the matrix product.

    Not a setting of the whole model: the output layer is megatron-core's own, whose kernel for this is apex's.
    """

    class Accumulating(layer):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(*args, config=config, **kwargs)

    return Accumulating


def _whole_linear(*, accumulates: bool) -> type:
    """Transformer Engine's linear layer outside its FP8 regions, in the dtype of its parameters."""
    from transformer_engine.pytorch import Linear

    class WholeLinear(Linear):  # type: ignore[misc]
        def __init__(
            self,
            in_features: int,
            out_features: int,
            *,
            bias: bool = True,
            dtype: torch.dtype,
            device: torch.device | int,
        ) -> None:
            super().__init__(
                in_features,
                out_features,
                bias=bias,
                params_dtype=dtype,
                device=device,
                fuse_wgrad_accumulation=accumulates,
            )

    return WholeLinear


def _as_it_is(layer: type) -> type:
    return layer


def _transformer_engine(*, accumulates: bool) -> Backend:
    problem = transformer_engine_problem()
    if problem is not None:
        raise BackendError(
            f"kernels.transformer_impl = transformer_engine, but Transformer Engine does not import here ({problem})",
            fix="install requirements-gpu.txt on a CUDA machine, or set kernels.transformer_impl=local",
        )
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelGroupedLinear,
        TERowParallelLinear,
    )
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    linear = _accumulating if accumulates else _as_it_is
    return Backend(
        name="transformer_engine",
        norm=TENorm,
        linear=_whole_linear(accumulates=accumulates),
        column_linear=linear(TEColumnParallelLinear),
        row_linear=linear(TERowParallelLinear),
        norm_column_linear=linear(TELayerNormColumnParallelLinear),
        core_attention=TEDotProductAttention,
        experts=TEGroupedMLP,
        expert_column_linear=linear(TEColumnParallelGroupedLinear),
        expert_row_linear=linear(TERowParallelGroupedLinear),
    )
