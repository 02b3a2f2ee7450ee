"""The local and the Transformer Engine backend on a GPU compute the same model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mm15_megatron.batch import MMBatch
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.backend import transformer_engine_problem
from mm15_megatron.models.build import build_model
from mm15_megatron.models.global_parameters import global_parameters
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.parity.stream import Row, rank_batches, row_of
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.step import StepParts, train_step
from tests.helpers.layouts import change, debug_config

# bf16 has 8 bits of mantissa; four layers and a sum over a row.
BF16 = 4e-2


def gpu_config(transformer_impl: str, dtype: str, preset: str = "debug_dense") -> RunConfig:
    """A debug model on a GPU, widened so that every kernel accepts its head dimension."""
    return change(
        debug_config(preset),
        language={"hidden_size": 256, "kv_channels": 64, "ffn_hidden_size": 512, "init_method_std": 0.05},
        vision={"hidden_size": 128, "ffn_hidden_size": 256},
        kernels={"transformer_impl": transformer_impl, "params_dtype": dtype},
        parallel={"device": "cuda"},
    )


def build(topology: Topology, cfg: RunConfig) -> MM15Model:
    """One rank's whole model."""
    return build_model(cfg, stage=topology.stages[0])


def mixed_batch(cfg: RunConfig) -> MMBatch:
    """A row with images and one with text: a whole step."""
    rows = [Row(row_of(kind, cfg, seed=number), number) for number, kind in enumerate(("several", "text"))]
    (batch,) = rank_batches(rows, change(cfg, train={"micro_batch_size": 2}), data_rank=0, data_size=1)
    return batch.to("cuda")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_bf16_packed_kernel_equals_fp32_mask(cuda_rank: Topology) -> None:
    """The varlen kernel (bf16) and the explicit mask (fp32) give the same logits."""
    logits = [build(cuda_rank, cfg)(mixed_batch(cfg)) for cfg in (gpu_config("local", d) for d in ("bf16", "fp32"))]
    assert relative(logits[0], logits[1]) < BF16


@pytest.mark.skipif(
    transformer_engine_problem() is not None, reason=f"Transformer Engine: {transformer_engine_problem()}"
)
@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
def test_transformer_engine_equals_local(cuda_rank: Topology, preset: str) -> None:
    """Same global names, same initial weights, same logits in bf16, same gradients of the dense model."""
    models = [build(cuda_rank, gpu_config(name, "bf16", preset)) for name in ("local", "transformer_engine")]
    weights = [{item.name: item.parameter for item in global_parameters([model])} for model in models]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    outputs = [model(mixed_batch(gpu_config("local", "bf16"))) for model in models]
    assert relative(outputs[1], outputs[0]) < BF16
    if preset == "debug_moe":
        return  # rounding moves a few tokens to another expert, and their gradients with them
    for output in outputs:
        output.float().square().mean().backward()
    for name, parameter in weights[0].items():
        assert relative(weights[1][name].grad, parameter.grad) < 3 * BF16, name


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_training_lowers_the_loss(cuda_rank: Topology, implementation: str, preset: str) -> None:
    """Twenty steps on one batch through DDP, NCCL and the fused optimizer."""
    if implementation == "transformer_engine" and transformer_engine_problem() is not None:
        pytest.skip(f"Transformer Engine: {transformer_engine_problem()}")
    cfg = gpu_config(implementation, "bf16", preset)
    cfg = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, lr=3e-3))
    chunks = wrap_chunks(cfg, [build(cuda_rank, cfg)])
    optimizer = build_optimizer(cfg, chunks)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"]
    parts = StepParts(cfg=cfg, topology=cuda_rank, chunks=chunks, optimizer=optimizer)
    steps = [train_step(parts, iter([mixed_batch(cfg)]), num_microbatches=1) for _ in range(20)]
    assert all(step.applied for step in steps)
    assert steps[-1].loss < 0.7 * steps[0].loss
