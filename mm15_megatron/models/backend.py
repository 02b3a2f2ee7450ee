"""The seam to Transformer Engine and apex: which classes compute a layer.

``kernels.transformer_impl`` names the implementation. It is never chosen silently: a library that was asked for and
cannot be imported is an error that carries the import error.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP

from mm15_megatron.errors import BackendError, ConfigError
from mm15_megatron.models.attention import LocalCoreAttention
from mm15_megatron.models.norm import LocalNorm


@dataclass(frozen=True)
class Backend:
    """The classes a transformer layer is made of.

    Attributes:
        name: value of ``kernels.transformer_impl``.
        norm: normalisation module.
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
    column_linear: type
    row_linear: type
    norm_column_linear: type | None
    core_attention: type
    experts: type
    expert_column_linear: type
    expert_row_linear: type


def resolve_backend(name: str) -> Backend:
    """Return the layer classes of ``kernels.transformer_impl``.

    Raises:
        BackendError: if the library is not usable here; the message holds its import error.
        ConfigError: if the name is not a known implementation.
    """
    if name == "local":
        return Backend(
            name="local",
            norm=LocalNorm,
            column_linear=ColumnParallelLinear,
            row_linear=RowParallelLinear,
            norm_column_linear=None,
            core_attention=LocalCoreAttention,
            experts=SequentialMLP,
            expert_column_linear=ColumnParallelLinear,
            expert_row_linear=RowParallelLinear,
        )
    if name == "transformer_engine":
        return _transformer_engine()
    raise ConfigError(
        f"kernels.transformer_impl = {name!r} is not an implementation", fix="use local or transformer_engine"
    )


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used here, or None if it can.

    Its import raises RuntimeError or OSError, not ImportError, beside a torch without CUDA.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _transformer_engine() -> Backend:
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

    return Backend(
        name="transformer_engine",
        norm=TENorm,
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        norm_column_linear=TELayerNormColumnParallelLinear,
        core_attention=TEDotProductAttention,
        experts=TEGroupedMLP,
        expert_column_linear=TEColumnParallelGroupedLinear,
        expert_row_linear=TERowParallelGroupedLinear,
    )
