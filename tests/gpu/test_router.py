"""The router computes in fp32 on a GPU, forward and backward, whichever library multiplies."""

from __future__ import annotations

import pytest
import torch

from mm15_megatron.models.router import RowRouter
from mm15_megatron.parallel.topology import Topology

from .marks import IMPLEMENTATIONS
from .models import build, gpu_config, relative
from .tolerances import FP32_REDUCTION

TOKENS = 512


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_and_gradients_are_those_of_fp64(cuda_rank: Topology, implementation: str) -> None:
    """megatron-core multiplies with Transformer Engine's kernel where it finds it, and that rounds fp32 to TF32.

    TF32 keeps 10 bits of the logits' gradients, an error of 2e-4 and more. Inputs and weights are values of bf16, as in
    training, but held in fp32: so nothing is rounded on the way out and the products alone are seen.
    """
    router = next(
        m for m in build(cuda_rank, gpu_config(implementation, "bf16", "debug_moe")).modules() if is_router(m)
    )
    generator = torch.Generator("cuda").manual_seed(1)
    shape = {"device": "cuda", "generator": generator}
    router.weight = torch.nn.Parameter(router.weight.detach().float())
    x_T1H = torch.randn(TOKENS, 1, router.weight.shape[1], dtype=torch.bfloat16, **shape).float().requires_grad_()
    gradient_T1E = torch.randn(TOKENS, 1, router.weight.shape[0], dtype=torch.float32, **shape)
    logits_T1E = router.gating(x_T1H)
    logits_T1E.backward(gradient_T1E)
    assert logits_T1E.dtype == torch.float32

    x_TH, w_EH, g_TE = (t.detach().double().cpu().squeeze(1) for t in (x_T1H, router.weight, gradient_T1E))
    assert x_T1H.grad is not None
    assert router.weight.grad is not None
    assert relative(logits_T1E[:, 0], x_TH @ w_EH.T) < FP32_REDUCTION
    assert relative(x_T1H.grad[:, 0], g_TE @ w_EH) < FP32_REDUCTION
    assert relative(router.weight.grad, g_TE.T @ x_TH) < FP32_REDUCTION


def is_router(module: torch.nn.Module) -> bool:
    """Whether a module is the router of a sparse layer."""
    return isinstance(module, RowRouter)
