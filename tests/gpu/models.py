"""The small models of the GPU tests, their rows and their steps."""

from __future__ import annotations

import torch

from mm15_megatron.batch import MMBatch
from mm15_megatron.bench.fp8_record import usual_format
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.build import build_model
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.parity.stream import Row, rank_batches, row_of
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.step import StepParts, train_step
from tests.helpers.layouts import change, debug_config

STEPS = 50
Runs = tuple[list[float], list[float]]
"""Losses of a run of that many steps, and of the same once more."""


def gpu_config(transformer_impl: str, dtype: str, preset: str = "debug_dense") -> RunConfig:
    """A debug model on a GPU, widened so that every kernel and every recipe accepts its widths."""
    return change(
        debug_config(preset),
        language={"hidden_size": 256, "kv_channels": 64, "ffn_hidden_size": 512, "init_method_std": 0.05},
        vision={"hidden_size": 128, "ffn_hidden_size": 256},
        kernels={"transformer_impl": transformer_impl, "params_dtype": dtype},
        parallel={"device": "cuda"},
    )


def engine_config(recipe: str | None, preset: str = "debug_dense", **precision: object) -> RunConfig:
    """The same with Transformer Engine's layers in an FP8 recipe and its usual format; None is bf16."""
    fp8 = {"fp8": None} if recipe is None else {"fp8": usual_format(recipe), "fp8_recipe": recipe}
    return change(
        gpu_config("transformer_engine", "bf16", preset),
        parallel={"use_distributed_optimizer": bool(precision.get("fp8_param_gather"))},
        precision={**fp8, **precision},
        optimizer={"lr": 1e-3, "connector_lr": None},
    )


def build(topology: Topology, cfg: RunConfig) -> MM15Model:
    """One rank's whole model."""
    return build_model(cfg, stage=topology.stages[0])


def parts_of(topology: Topology, cfg: RunConfig) -> StepParts:
    """Model and optimizer at a constant learning rate."""
    chunks = wrap_chunks(cfg, [build(topology, cfg)])
    optimizer = build_optimizer(cfg, chunks)
    constant_rate(optimizer)
    return StepParts(cfg=cfg, topology=topology, chunks=chunks, optimizer=optimizer)


def constant_rate(optimizer: torch.optim.Optimizer) -> None:
    """Train at the peak of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"]


def model_of(parts: StepParts) -> MM15Model:
    """The model inside of what a step trains."""
    (chunk,) = parts.chunks
    return chunk.module


def mixed_batch(cfg: RunConfig) -> MMBatch:
    """A row with images and one with text: a whole step."""
    rows = [Row(row_of(kind, cfg, seed=number), number) for number, kind in enumerate(("several", "text"))]
    (batch,) = rank_batches(rows, change(cfg, train={"micro_batch_size": 2}), data_rank=0, data_size=1)
    return batch.to("cuda")


def losses(parts: StepParts, steps: int) -> list[float]:
    """Losses of ``steps`` steps on one step's rows: images, text and padding."""
    kinds = ("several", "text", "one", "padded")
    rows = [Row(row_of(kind, parts.cfg, seed=number), number) for number, kind in enumerate(kinds)]
    batches = [batch.to("cuda") for batch in rank_batches(rows, parts.cfg, data_rank=0, data_size=1)]
    outputs = [train_step(parts, iter(batches), num_microbatches=len(batches)) for _ in range(steps)]
    assert all(output.applied for output in outputs)
    return [output.loss for output in outputs]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in fp64 on the host."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()
