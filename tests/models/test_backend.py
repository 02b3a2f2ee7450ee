"""The seam to Transformer Engine and apex: what was asked for is built, or refused with the reason."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from mm15_megatron.config.schema import KernelConfig, PrecisionConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.models.backend import (
    APEX_WGRAD,
    apex_problem,
    check_fp8,
    fp8_problem,
    resolve_backend,
    transformer_engine_problem,
)
from mm15_megatron.models.norm import LocalNorm

NO_TE, NO_APEX = transformer_engine_problem(), apex_problem("apex.optimizers")


def test_local_layers_hold_torch_norms() -> None:
    backend = resolve_backend(KernelConfig())
    assert backend.name == "local"
    assert backend.norm is LocalNorm
    assert backend.norm_column_linear is None


def test_transformer_engine_is_never_replaced_silently() -> None:
    kernels = KernelConfig(transformer_impl="transformer_engine")
    if NO_TE is None:
        assert resolve_backend(kernels).norm_column_linear is not None
    else:
        with pytest.raises(BackendError, match=r"transformer_engine.*does not import.*Error"):
            resolve_backend(kernels)


@pytest.mark.skipif(NO_APEX is None, reason="apex is installed")
@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (KernelConfig(norm_impl="apex"), "fused norms are not usable here: ModuleNotFoundError"),
        (KernelConfig(gradient_accumulation_fusion=True), "takes apex's kernel, not usable here: ModuleNotFound"),
    ],
)
def test_apex_is_never_replaced_silently(kernels: KernelConfig, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        resolve_backend(kernels)


def test_the_reason_names_what_is_missing() -> None:
    if find_spec("apex") is None:
        assert apex_problem(APEX_WGRAD) == "ModuleNotFoundError: No module named 'apex'"


def test_bf16_needs_nothing() -> None:
    assert fp8_problem(PrecisionConfig(fp8=None, fp8_recipe="mxfp8")) is None
    check_fp8(PrecisionConfig())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_a_recipe_without_its_device_is_refused(recipe: str) -> None:
    with pytest.raises(BackendError, match=f"fp8_recipe = {recipe} is not usable here: .+"):
        check_fp8(PrecisionConfig(fp8="hybrid", fp8_recipe=recipe))
