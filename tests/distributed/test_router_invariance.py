"""What may not change a routed model: more padding, other micro-batches, another share of targets, another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.build import build_chunks
from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology, close_topology
from mm15_megatron.parity.ranks import rank_place, run_on_ranks
from mm15_megatron.parity.stream import Row, global_batch, rank_batches
from mm15_megatron.parity.trace import gathered_gradients
from mm15_megatron.training.optimizer import wrap_chunks
from mm15_megatron.training.router_figures import RouterFigures
from mm15_megatron.training.step import StepParts, accumulate_gradients
from tests.helpers.layouts import change, debug_config

# Sums in another order; figures relative to the largest entry of a gradient.
FP32_REDUCTION = 5e-5
FP32_FIGURE = 1e-6

DROPLESS: dict[str, object] = {}
CAPACITY: dict[str, object] = {"moe_expert_capacity_factor": 1.0}
TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

Result = tuple[dict[str, torch.Tensor], tuple[RouterFigures, ...]]


def routed(moe: dict[str, object], **sections: dict[str, object]) -> RunConfig:
    """debug_moe with overrides."""
    return debug_config("debug_moe", moe=moe, **sections)


def step_on_rank(cfg: RunConfig, rows: Sequence[Row]) -> Result:
    """Gathered gradients and router figures of one step over the given rows."""
    torch.set_num_threads(1)
    topology = build_topology(cfg.parallel, place=rank_place())
    seed_everything(cfg.train.seed, topology=topology)
    parts = StepParts(cfg, topology, wrap_chunks(cfg, build_chunks(cfg, stages=topology.stages)), None)
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    batches = [
        local_batch(batch, topology=topology, image_size=cfg.vision.image_size)
        for batch in rank_batches(rows, cfg, data_rank=topology.data_rank, data_size=topology.data_size)
    ]
    sums = accumulate_gradients(parts, iter(batches), num_microbatches=len(batches))
    gradients = gathered_gradients(parts)
    close_topology()
    return gradients, sums.router


def step(cfg: RunConfig, rows: Sequence[Row], *, world_size: int = 1) -> Result:
    """The same on that many ranks, merged."""
    results = run_on_ranks(step_on_rank, world_size, cfg=cfg, rows=rows)
    return {name: value for gradients, _ in results for name, value in gradients.items()}, results[0][1]


def assert_equal(one: Result, other: Result) -> None:
    """Every gradient and every router figure."""
    assert one[0].keys() == other[0].keys()
    for name, gradient in one[0].items():
        largest = max(gradient.abs().max().item(), 1e-6)
        assert (gradient - other[0][name]).abs().max().item() <= FP32_REDUCTION * largest, name
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine.balance == pytest.approx(theirs.balance, abs=FP32_FIGURE * 10)
        assert mine.z == pytest.approx(theirs.z, abs=FP32_FIGURE * 10)
        assert mine.load == pytest.approx(theirs.load, abs=FP32_FIGURE)
        assert mine.dropped == pytest.approx(theirs.dropped, abs=FP32_FIGURE)


@pytest.mark.parametrize("moe", [DROPLESS, CAPACITY], ids=["dropless", "capacity"])
@pytest.mark.parametrize(("world", "layout"), [(1, {}), (2, TP2SP)], ids=["one", "tp2sp"])
def test_amount_of_padding_changes_nothing(moe: dict[str, object], world: int, layout: dict[str, object]) -> None:
    """The same samples in rows of 128 and of 192 tokens: equal gradients, hence equal outputs of every real token."""
    cfg = routed(moe, parallel=layout)
    rows = global_batch(cfg, step=0)
    longer = change(cfg, data={"seq_length": 192})
    assert_equal(step(cfg, rows, world_size=world), step(longer, rows, world_size=world))


@pytest.mark.parametrize("moe", [DROPLESS, CAPACITY], ids=["dropless", "capacity"])
@pytest.mark.parametrize(("world", "layout"), [(1, {}), (2, {"expert_model_parallel_size": 2})], ids=["one", "ep2"])
def test_dealing_of_rows_changes_nothing(moe: dict[str, object], world: int, layout: dict[str, object]) -> None:
    """Rows in another order meet in other micro-batches on other ranks."""
    cfg = routed(moe, parallel=layout)
    rows = global_batch(cfg, step=0)
    dealt = [rows[index] for index in (5, 0, 7, 2, 1, 6, 3, 4)]
    assert_equal(step(cfg, rows, world_size=world), step(cfg, dealt, world_size=world))


def router_part(cfg: RunConfig, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Gradient of the router losses alone: with their coefficients minus without."""
    on = change(cfg, moe={"moe_aux_loss_coeff": 1.0, "moe_z_loss_coeff": 0.1})
    off = change(cfg, moe={"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0})
    gradients, none = step(on, rows)[0], step(off, rows)[0]
    return {name: gradients[name] - none[name] for name in gradients}


def test_share_of_targets_changes_no_router_gradient() -> None:
    """Router losses weigh the same whether every token is a target or answers alone are."""
    cfg = routed(DROPLESS)
    rows = global_batch(cfg, step=0)
    everything, answers = (
        [replace(row, segments=[replace(s, answer_only=only) for s in row.segments]) for row in rows]
        for only in (False, True)
    )
    one, other = router_part(cfg, everything), router_part(cfg, answers)
    routers = [name for name in one if name.endswith("mlp.router.weight")]
    assert len(routers) == 2
    for name in routers:
        assert one[name].abs().max() > 1e-3, "the losses do something"
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


def test_top1_counts_differ_from_topk_counts() -> None:
    """The two balance losses share their scale at balance, and have different gradients."""
    cfg = routed(DROPLESS)
    rows = global_batch(cfg, step=0)
    top1 = change(cfg, moe={"moe_router_load_balancing_type": "gshard_top1"})
    (_, both), (_, first) = step(cfg, rows), step(top1, rows)
    assert [figures.load for figures in both] == [figures.load for figures in first]
    for mine, theirs in zip(both, first, strict=True):
        assert 1.0 < mine.balance < 1.1
        assert 1.0 < theirs.balance < 1.2
        assert mine.balance != theirs.balance


def test_capacity_drops_and_keeps_padding_out() -> None:
    """A tight capacity refuses a counted share; a generous one refuses nobody."""
    cfg = routed({"moe_expert_capacity_factor": 0.5})
    rows = global_batch(cfg, step=0)
    assert all(0.3 < figures.dropped < 0.7 for figures in step(cfg, rows)[1])
    generous = routed({"moe_expert_capacity_factor": 4.0})
    assert all(figures.dropped == 0.0 for figures in step(generous, rows)[1])
