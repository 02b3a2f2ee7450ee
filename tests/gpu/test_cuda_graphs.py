"""Captured feed-forward blocks compute what they computed before they were captured."""

from __future__ import annotations

import pytest

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parallel.topology import Topology

from .test_backends import change
from .test_fp8 import config, losses, needs, parts_of

WARM = 3


def graphed(cfg: RunConfig) -> RunConfig:
    """The same with graphs after three steps."""
    return change(cfg, kernels={"cuda_graph_scope": ("mlp",), "cuda_graph_warmup_steps": WARM})


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_fusion": True}])
@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
@pytest.mark.parametrize("recipe", [None, "tensorwise", "delayed", "blockwise"])
def test_replayed_layers_train_alike(
    cuda_rank: Topology, recipe: str | None, preset: str, options: dict[str, object]
) -> None:
    """Ten steps, four micro-batches each, seven of them replayed; a validation step in between runs without graphs."""
    if recipe is not None:
        needs(recipe)
    cfg = change(config(recipe, preset), kernels=options)
    reference = losses(parts_of(cuda_rank, cfg), 10)
    parts = parts_of(cuda_rank, graphed(cfg))
    found = losses(parts, WARM)
    assert parts.graphs is not None
    assert not parts.graphs.helper.graphs_created()
    found += losses(parts, 10 - WARM)
    assert parts.graphs.helper.graphs_created()
    layers = parts.graphs.helper.flattened_callables
    assert len(layers) == (4 if preset == "debug_dense" else 2)
    assert all(len(layer.cuda_graphs) == 1 for layer in layers)
    parts.graphs.close()
    assert found == pytest.approx(reference, rel=1e-2)
    assert found[:WARM] == pytest.approx(reference[:WARM], rel=1e-5)


def test_gathered_parameters_are_awaited(cuda_rank: Topology) -> None:
    """The distributed optimizer's gathering is hooked to layers that no longer run as modules."""
    overlap = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    cfg = change(config(None), parallel=overlap)
    reference = losses(parts_of(cuda_rank, cfg), 8)
    parts = parts_of(cuda_rank, graphed(cfg))
    found = losses(parts, 8)
    assert parts.graphs is not None
    assert all(layer.cuda_graph_manual_hooks for layer in parts.graphs.helper.flattened_callables)
    parts.graphs.close()
    assert found == pytest.approx(reference, rel=1e-2)
