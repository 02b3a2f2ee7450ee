"""Captured feed-forward blocks compute what they computed before they were captured."""

from __future__ import annotations

import pytest

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parallel.topology import Topology
from tests.helpers.layouts import change

from .marks import BF16_AND_EACH_RECIPE, NEEDS_TE, in_recipe
from .models import engine_config, losses, parts_of
from .tolerances import BF16_SCALAR, BF16_STEPS, assert_repeats

STEPS, WARM = 10, 3
CAPTURED = {"debug_dense": 4, "debug_moe": 2}
"""Dense layers of the decoder."""


def graphed(cfg: RunConfig) -> RunConfig:
    """The same with graphs after three steps."""
    return change(cfg, kernels={"cuda_graph_scope": ("mlp",), "cuda_graph_warmup_steps": WARM})


def compare(topology: Topology, cfg: RunConfig, *, layers: int) -> None:
    """Ten steps, four micro-batches each, seven of them replayed, against the same without graphs."""
    reference, repeated = (losses(parts_of(topology, cfg), STEPS) for _ in range(2))
    parts = parts_of(topology, graphed(cfg))
    found = losses(parts, WARM)
    assert parts.graphs is not None
    assert not parts.graphs.helper.graphs_created()
    found += losses(parts, STEPS - WARM)
    assert parts.graphs.helper.graphs_created()
    captured = parts.graphs.helper.flattened_callables
    assert len(captured) == layers
    assert all(len(layer.cuda_graphs) == 1 for layer in captured)
    if cfg.parallel.overlap_param_gather:
        assert all(layer.cuda_graph_manual_hooks for layer in captured)
    parts.graphs.close()
    assert_repeats(found, reference, repeated, floor=BF16_STEPS)
    assert_repeats(found[:WARM], reference[:WARM], repeated[:WARM], floor=BF16_SCALAR)


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
@pytest.mark.parametrize("recipe", BF16_AND_EACH_RECIPE)
def test_replayed_layers_train_alike(cuda_rank: Topology, recipe: str | None, preset: str) -> None:
    compare(cuda_rank, engine_config(recipe, preset), layers=CAPTURED[preset])


@pytest.mark.parametrize("recipe", [pytest.param(None, marks=NEEDS_TE, id="bf16"), in_recipe("tensorwise")])
def test_gradients_are_accumulated_inside_a_graph(cuda_rank: Topology, recipe: str | None) -> None:
    """A replayed product adds to the gradient's buffer at the address it was captured with."""
    cfg = change(engine_config(recipe), kernels={"gradient_accumulation_fusion": True})
    compare(cuda_rank, cfg, layers=CAPTURED["debug_dense"])


@NEEDS_TE
def test_gathered_parameters_are_awaited(cuda_rank: Topology) -> None:
    """The distributed optimizer's gathering is hooked to layers that no longer run as modules."""
    overlap = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    compare(cuda_rank, change(engine_config(None), parallel=overlap), layers=CAPTURED["debug_dense"])
