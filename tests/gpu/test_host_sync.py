"""No host synchronisation between the first forward pass and the reduced gradients, by torch's own detector."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mm15_megatron.accounting import sparse_layers
from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.parallel.reduce import squared_gradient_norm
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.step import StepParts, accumulate_on_device, train_step
from tests.helpers.layouts import change
from tests.helpers.sources import with_sources

from .models import build, gpu_config, mixed_batch

# Both masked_select of megatron-core's permutation; the wait for the token counts is an event, which torch's detector
# does not see (tests/training/test_host_sync.py counts it).
DETECTED_IN_A_SPARSE_PASS = 2
TWO_SOURCES = (SourceConfig(prefix="a"), SourceConfig(prefix="b"))


@contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """Let torch raise or warn at every operation that waits for the device."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parts_of(topology: Topology, cfg: RunConfig) -> StepParts:
    """A model and an optimizer that have taken one step, so that libraries are loaded and buffers allocated."""
    chunks = wrap_chunks(cfg, [build(topology, cfg)])
    parts = StepParts(cfg=cfg, topology=topology, chunks=chunks, optimizer=build_optimizer(cfg, chunks))
    assert train_step(parts, iter([with_sources(mixed_batch(cfg))] * 2), num_microbatches=2).applied
    return parts


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dense_step_does_not_wait_for_the_host(cuda_rank: Topology, dtype: str, compiled: bool) -> None:
    """Two micro-batches with images forward and backward, the reduction, the norm: then one read."""
    cfg = change(gpu_config("local", dtype), kernels={"compile_fusions": compiled}, data={"sources": TWO_SOURCES})
    parts = parts_of(cuda_rank, cfg)
    batches = [with_sources(mixed_batch(cfg)).to(cuda_rank.device)] * 2
    assert parts.optimizer is not None
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    torch.cuda.synchronize()
    with sync_debug("error"):
        figures = accumulate_on_device(parts, iter(batches), num_microbatches=2)
        parts.optimizer.prepare_grads()
        square = squared_gradient_norm(parts.optimizer, device=cuda_rank.device)
    assert torch.isfinite(figures).all()
    assert square.item() > 0


def test_sparse_layers_wait_as_often_as_counted(cuda_rank: Topology) -> None:
    """The detector warns as often as the count on the CPU says."""
    cfg = gpu_config("local", "bf16", "debug_moe")
    parts = parts_of(cuda_rank, cfg)
    batches = [mixed_batch(cfg)] * 2
    with warnings.catch_warnings(record=True) as caught, sync_debug("warn"):
        warnings.simplefilter("always")
        accumulate_on_device(parts, iter(batches), num_microbatches=2)
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    expected = DETECTED_IN_A_SPARSE_PASS * sum(sparse_layers(cfg)) * len(batches)
    assert len(waits) == expected, [f"{w.filename}:{w.lineno}" for w in waits]
