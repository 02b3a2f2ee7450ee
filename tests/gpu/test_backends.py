"""The local and the Transformer Engine backend on a GPU compute the same model."""

from __future__ import annotations

import pytest
import torch

from mm15_megatron.models.global_parameters import global_parameters
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.training.step import train_step
from tests.helpers.layouts import change

from .marks import IMPLEMENTATIONS, NEEDS_TE
from .models import build, gpu_config, mixed_batch, parts_of, relative
from .tolerances import BF16, BF16_GRADIENT, LEARNED


def weights_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by global name."""
    return {item.name: item.parameter for item in global_parameters([model])}


def test_bf16_packed_kernel_equals_fp32_mask(cuda_rank: Topology) -> None:
    """The varlen kernel (bf16) and the explicit mask (fp32) give the same logits."""
    logits = [build(cuda_rank, cfg)(mixed_batch(cfg)) for cfg in (gpu_config("local", d) for d in ("bf16", "fp32"))]
    assert relative(logits[0], logits[1]) < BF16


@NEEDS_TE
@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
def test_transformer_engine_equals_local(cuda_rank: Topology, preset: str) -> None:
    """Same global names, same initial weights, same logits in bf16, same gradients of the dense model."""
    models = [build(cuda_rank, gpu_config(name, "bf16", preset)) for name in ("local", "transformer_engine")]
    local, engine = (weights_of(model) for model in models)
    assert local.keys() == engine.keys()
    assert all(torch.equal(local[name], engine[name]) for name in local)
    outputs = [model(mixed_batch(gpu_config("local", "bf16"))) for model in models]
    assert relative(outputs[1], outputs[0]) < BF16
    if preset == "debug_moe":
        return  # rounding moves a few tokens to another expert, and their gradients with them
    for output in outputs:
        output.float().square().mean().backward()
    for name, parameter in local.items():
        assert relative(engine[name].grad, parameter.grad) < BF16_GRADIENT, name


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_lowers_the_loss(cuda_rank: Topology, implementation: str, preset: str) -> None:
    """Twenty steps on one batch through DDP, NCCL and the fused optimizer."""
    cfg = change(gpu_config(implementation, "bf16", preset), optimizer={"lr": 3e-3})
    parts = parts_of(cuda_rank, cfg)
    steps = [train_step(parts, iter([mixed_batch(cfg)]), num_microbatches=1) for _ in range(20)]
    assert all(step.applied for step in steps)
    assert steps[-1].loss < LEARNED * steps[0].loss
