"""Names of layouts: what they set, how many ranks they take, and what is refused."""

from __future__ import annotations

import pytest

from mm15_megatron.errors import ConfigError
from mm15_megatron.parity.layouts import TOKENS, default_layouts, parse_layout, parse_layouts
from mm15_megatron.presets import resolve

from ..helpers.layouts import debug_config

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VPP, EP = "parallel.virtual_pipeline_model_parallel_size", "parallel.expert_model_parallel_size"
SP, ETP = "parallel.sequence_parallel", "parallel.expert_tensor_parallel_size"
DISTRIBUTED = {"parallel.use_distributed_optimizer": True}
OVERLAP = DISTRIBUTED | {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}


@pytest.mark.parametrize(
    ("name", "ranks", "settings"),
    [
        ("tp2", 2, {TP: 2}),
        ("tp2sp", 2, {TP: 2, SP: True}),
        ("tp2-sp", 2, {TP: 2, SP: True}),
        ("vpp2", 2, {PP: 2, VPP: 2}),
        ("pp4vpp3", 4, {PP: 4, VPP: 3}),
        ("dp4", 4, {}),
        ("ep2", 2, {EP: 2}),
        ("ep2dp4", 4, {EP: 2}),
        ("tp2sp-etp1", 2, {TP: 2, SP: True, ETP: 1}),
        ("tp2pp2ep2", 8, {TP: 2, PP: 2, EP: 2}),
        ("tp2pp2ep2dp1-etp1", 4, {TP: 2, PP: 2, EP: 2, ETP: 1}),
        ("dp2-dist-opt", 2, DISTRIBUTED),
        ("dp2distopt", 2, DISTRIBUTED),
        ("dp2-grad-overlap", 2, {"parallel.overlap_grad_reduce": True}),
        ("dp2overlapbuckets500", 2, OVERLAP | {"parallel.ddp_bucket_size": 500}),
        ("pp3first2", 3, {PP: 3, "parallel.num_layers_in_first_pipeline_stage": 2}),
        ("vpp2ep2-epoverlap", 4, {PP: 2, VPP: 2, EP: 2, "parallel.overlap_moe_expert_parallel_comm": True}),
        ("tp2-enctp", 2, {TP: 2, "parallel.encoder_parallel": "tensor"}),
        ("recompute", 1, {"kernels.recompute_granularity": "full", "kernels.recompute_vision": True}),
        (
            "recompute-mlp",
            1,
            {"kernels.recompute_granularity": "selective", "kernels.recompute_modules": ("mlp",)},
        ),
        (
            "recompute-moe",
            1,
            {"kernels.recompute_granularity": "selective", "kernels.recompute_modules": ("core_attn", "moe")},
        ),
        ("recompute-selective-tp2", 2, {"kernels.recompute_granularity": "selective", TP: 2}),
        ("mbs4", 1, {"train.micro_batch_size": 4}),
        ("cp2", 2, {"parallel.context_parallel_size": 2}),
    ],
)
def test_tokens(name: str, ranks: int, settings: dict[str, object]) -> None:
    found = parse_layout(name)
    assert (found.name, found.world_size, found.settings) == (name, ranks, settings)
    assert (found.alone, found.resumes) == (False, False)


def test_accumulation_follows_the_batch() -> None:
    cfg = debug_config()
    assert parse_layout("dp2-accum2").apply(cfg).train.micro_batch_size == 2
    assert parse_layout("accum8").apply(cfg).train.micro_batch_size == 1
    with pytest.raises(ConfigError, match="global_batch_size = 8 is not 3 micro-batches"):
        parse_layout("accum3").apply(cfg)


def test_ways_to_run() -> None:
    packed, resumed, moved = parse_layouts("tp2-packed, dp2-resume, resume:tp2>one")
    assert packed.alone
    assert packed.world_size == 2
    assert resumed.resumes
    assert resumed.saved_in is None
    assert moved.resumes
    assert moved.world_size == 1
    assert moved.saved_in is not None
    assert moved.saved_in.world_size == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpp2", "'tpp2' is no token\n  fix: did you mean 'tpN'"),
        ("tp2-dstopt", "'dstopt' is no token\n  fix: did you mean 'distopt'"),
        ("tp2tp4", "says tpN twice"),
        ("tp0", "'tp0' is no size"),
        ("-", "has no token"),
        ("dp2-buckets10", "no effect without an overlap"),
        ("packed-mbs1", "packed chooses its own rows"),
        ("accum2mbs2", "both set the micro-batch"),
        ("resume:tp2", "does not say two layouts"),
        ("resume:tp2>packed", "resumes twice, or packed"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_layout(name)
    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["", ",", "tp2,tp2"])
def test_bad_lists_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no layout, or one twice"):
        parse_layouts(text)


def test_default_set_follows_the_model() -> None:
    dense, sparse = (default_layouts(resolve(name)).split(",") for name in ("debug_dense", "debug_moe"))
    assert set(dense) < set(sparse)
    assert [name for name in dense if parse_layout(name).size("expert_model_parallel") > 1] == []
    assert {"ep2", "tp2sp-etp1", "tp2pp2ep2", "vpp2-ep2"} <= set(sparse)
    used = " ".join(sparse)
    assert [
        token for token in TOKENS if token.rstrip("N") not in used and token not in ("cpN", "firstN", "epoverlap")
    ] == []
