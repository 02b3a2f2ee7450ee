"""Which part of a model fits one device."""

from __future__ import annotations

import pytest

from mm15_megatron.accounting import memory_estimate, sparse_layers
from mm15_megatron.bench.slices import Slice, choose_slice, experts_of_a_rank
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.tree import flatten
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import resolve

H200 = 139 * 2**30


def slice_of(preset: str, *, memory: float = H200, **changes) -> Slice:
    given = {"device": "cuda", "memory": memory, "margin": 0.12, "micro_batches": 4, "fp8": True} | changes
    return choose_slice(resolve(preset), **given)


@pytest.mark.parametrize("preset", ["mm1_30b", "mm1_3b_moe", "mm1_7b_moe"])
def test_a_slice_is_the_largest_that_fits(preset):
    found = slice_of(preset)
    period = resolve(preset).moe.moe_layer_period if resolve(preset).moe.num_moe_experts else 1
    layers = found.config.language.num_layers
    assert layers % period == 0
    assert found.needed <= found.allowed == H200 * 0.88
    assert found.estimate == memory_estimate(found.config, world_size=1)
    options = ["precision.fp8=hybrid", "precision.fp8_vision=true"]
    assert found.needed == memory_estimate(apply_overrides(found.config, options), world_size=1).total
    more = apply_overrides(found.config, [f"language.num_layers={layers + period}", *options])
    assert memory_estimate(more, world_size=1).total > found.allowed


def test_more_memory_never_means_fewer_layers():
    layers = [slice_of("mm1_30b", memory=gib * 2**30).config.language.num_layers for gib in (79, 94, 139, 190)]
    assert layers == sorted(layers)
    assert layers[0] >= 1


def test_sizes_rows_and_optimizer_are_the_whole_models():
    whole, cut = flatten(resolve("mm1_3b_moe")), flatten(slice_of("mm1_3b_moe").config)
    changed = {path for path in whole if whole[path] != cut[path] and not path.startswith("parallel.")}
    assert changed == {
        "language.num_layers",
        "moe.num_moe_experts",
        "kernels.transformer_impl",
        "kernels.recompute_vision",
        "data.max_tiles",
        "train.global_batch_size",
    }


def test_one_rank_runs_without_any_parallelism():
    parallel = slice_of("mm1_30b").config.parallel
    assert parallel.device == "cuda"
    assert (parallel.tensor_model_parallel_size, parallel.sequence_parallel) == (1, False)
    assert not parallel.use_distributed_optimizer
    assert not parallel.overlap_grad_reduce


@pytest.mark.parametrize(
    ("experts", "topk", "held"), [(64, 2, 8), (32, 2, 4), (4, 2, 4), (8, 2, 4), (6, 1, 2), (7, 2, 7)]
)
def test_experts_of_one_rank_leave_the_router_a_choice(experts, topk, held):
    assert experts_of_a_rank(experts, topk=topk) == held


def test_an_expert_sees_as_many_tokens_as_under_eight_ranks():
    cfg = slice_of("mm1_3b_moe").config
    assert cfg.data.seq_length * cfg.moe.moe_router_topk / cfg.moe.num_moe_experts == 8 * 4096 * 2 / 64
    assert any(sparse_layers(cfg))


def test_a_slice_says_what_it_is_and_what_it_leaves_out():
    dense, sparse = slice_of("mm1_30b"), slice_of("mm1_3b_moe")
    assert f"{dense.config.language.num_layers} of 48 decoder layers" in dense.describe()
    assert any("tensor parallelism 8" in line for line in dense.leaves_out())
    assert dense.vision_share > dense.whole_vision_share == pytest.approx(0.06, abs=0.01)
    assert "8 of 64 experts, 1024 tokens each" in sparse.describe()
    assert any("all-to-all" in line for line in sparse.leaves_out())


def test_room_for_fp8_is_kept_only_where_fp8_runs():
    with_fp8, without = slice_of("mm1_30b", memory=H200), slice_of("mm1_30b", memory=H200, fp8=False)
    assert without.config.language.num_layers >= with_fp8.config.language.num_layers
    assert with_fp8.needed > with_fp8.estimate.total
    assert without.fp8_estimate is None
    assert without.needed == without.estimate.total


def test_options_have_the_last_word_and_layers_can_be_capped():
    assert slice_of("mm1_30b", at_most=3).config.language.num_layers == 3
    assert slice_of("mm1_30b", options=["language.num_layers=2"]).config.language.num_layers == 2
    thrifty = slice_of("mm1_30b", options=["kernels.recompute_vision=true"])
    assert thrifty.estimate.activations < slice_of("mm1_30b").estimate.activations


def test_a_device_that_is_too_small_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"needs \d+\.\d GiB, and 14\.1 GiB are allowed") as refused:
        slice_of("mm1_30b", memory=16 * 2**30)
    assert "smaller preset" in refused.value.fix
