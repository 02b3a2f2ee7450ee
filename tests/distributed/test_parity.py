"""Every layout computes the same thing: loss, gradient norm, every gradient and the parameters of five steps."""

from __future__ import annotations

import functools

import pytest

from mm15_megatron.models import mm_model
from mm15_megatron.models.build import build_model, check_replicas
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology
from mm15_megatron.parity.compare import BF16_SCALAR
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, rank_place, run_on_ranks
from mm15_megatron.parity.shrink import ADAFACTOR_EPS

from ..helpers.layouts import LAYOUTS, Layout, change, debug_config
from ..helpers.parity import FP32_SCALAR, Difference, Trace, compare, trace

TITLE = "parity with one rank (debug_dense and debug_moe, mixed batches, five steps)"
HEADER = (
    f"{'layout':44} {'ranks':>5} {'loss':>9} {'router':>9} {'grad norm':>9} {'gradient':>9} {'parameter':>9}  "
    "worst gradient"
)

EXPERTS = {"num_moe_experts": 4, "moe_layer_period": 2}
VARIANTS = {
    "dense": {},
    "tied-qknorm": {
        "language": {"share_embeddings_and_output_weights": True, "qk_layernorm": True, "z_loss_coeff": 1e-2}
    },
    "encoder-frozen": {"freeze": {"vision": True}},
    "connector-frozen": {"freeze": {"connector": True}},
    "language-frozen": {"freeze": {"language": True}},
    "four-kv-heads": {"language": {"num_query_groups": 4}},
    "average-pool": {"connector": {"kind": "average_pool"}, "vision": {"post_layernorm": True, "class_token": False}},
    "sample-weights": {"train": {"loss_normalisation": "sample"}},
    "moe": {"moe": EXPERTS},
    "moe-capacity": {"moe": EXPERTS | {"moe_expert_capacity_factor": 0.8, "moe_capacity_group_size": 32}},
}
ADAFACTOR = {
    "name": "adafactor",
    "weight_decay": 1e-3,
    "adafactor_clip_threshold": 0.5,  # so that most updates are clipped
    "adafactor_eps": ADAFACTOR_EPS,
}
VARIANTS |= {
    "adafactor": {"optimizer": ADAFACTOR},
    "adafactor-tied": VARIANTS["tied-qknorm"] | {"optimizer": ADAFACTOR},
    "adafactor-moe": {"moe": EXPERTS, "optimizer": ADAFACTOR | {"adafactor_beta1": None}},
}
COMBINATIONS = [("dense", layout) for layout in LAYOUTS if layout != "tp4sp"] + [
    (variant, layout)
    for variant in ("tied-qknorm", "encoder-frozen", "language-frozen", "average-pool")
    for layout in ("tp2sp", "tp2pp2", "dp2-overlap-many-buckets")
]
COMBINATIONS += [
    ("connector-frozen", "dp2-overlap-many-buckets"),
    ("four-kv-heads", "tp4sp"),
    ("tied-qknorm", "pp2dp2-dist-opt-grad-overlap"),
    ("tied-qknorm", "vpp2"),
    ("dense", "tp2sp-vpp2"),
    ("sample-weights", "dp2"),
    ("moe", "tp2"),
    ("moe", "tp2sp-etp1"),
    ("moe", "tp2sp-ep2-etp1"),
    ("moe", "tp2pp2ep2"),
    ("moe", "vpp2-ep2"),
    ("moe", "ep2-overlap-buckets20000"),
    ("moe", "ep2-recompute"),
    ("dense", "recompute-mlp-tp2sp"),
    ("moe", "ep2-recompute-moe"),
    ("moe-capacity", "tp2sp"),
    ("moe-capacity", "ep2-mbs1"),
    *(("adafactor", layout) for layout in ("tp2", "tp2sp", "pp2", "dp2", "dp4", "cp2", "tp2-encoder-tp", "vpp2")),
    ("adafactor", "tp2dp2-gradoverlap-buckets20000"),
    ("adafactor-tied", "tp2pp2"),
    ("adafactor-moe", "tp2sp-etp1"),
    ("adafactor-moe", "tp2"),
    ("adafactor-moe", "tp2sp-ep2-etp1"),
    ("adafactor-moe", "ep2dp4"),
]


def layout_of(name: str) -> Layout:
    return LAYOUTS[name] if name in LAYOUTS else parse_layout(name)


def line(name: str, ranks: int, found: Difference) -> str:
    return (
        f"{name:44} {ranks:5} {found.loss:9.1e} {found.router:9.1e} {found.grad_norm:9.1e} {found.gradient:9.1e} "
        f"{found.parameter:9.1e}  {found.worst}"
    )


@functools.cache
def reference(variant: str) -> Trace:
    """The one-rank trace of a variant, computed once."""
    return trace(debug_config(**VARIANTS[variant]), world_size=1)


@pytest.mark.parametrize(("variant", "layout"), COMBINATIONS, ids=[f"{v}-{n}" for v, n in COMBINATIONS])
def test_layout_equals_one_rank(variant: str, layout: str, table: dict[str, list[str]]) -> None:
    """Losses, norms, gathered gradients and parameters agree within the named tolerances."""
    cfg = debug_config(**VARIANTS[variant])
    chosen = layout_of(layout)
    other = trace(chosen.apply(cfg), world_size=chosen.world_size)
    found = compare(reference(variant), other, learning_rate=cfg.optimizer.lr or 0)
    table.setdefault(TITLE, [HEADER]).append(line(f"{variant} {layout}", chosen.world_size, found))
    assert found.passes, found


def test_reference_learns_something() -> None:
    """The compared quantities are not trivial: gradients exist for every parameter and the loss moves."""
    whole = reference("dense")
    assert all(gradient.abs().max() > 0 for gradient in whole.gradients.values())
    assert max(whole.losses) - min(whole.losses) > 100 * FP32_SCALAR


@pytest.mark.parametrize("layout", ["tp2sp", "tp2pp2", "dp2-dist-opt"])
def test_bf16_layouts_agree(layout: str, table: dict[str, list[str]]) -> None:
    """bf16 parameters and activations, fp32 gradients and master weights: equal up to bf16 rounding of the sums."""
    cfg = debug_config(kernels={"params_dtype": "bf16"})
    chosen = LAYOUTS[layout]
    one = bf16_reference()
    found = compare(one, trace(chosen.apply(cfg), world_size=chosen.world_size), learning_rate=cfg.optimizer.lr or 0)
    table.setdefault(TITLE, [HEADER]).append(line(f"bf16 {layout}", chosen.world_size, found))
    assert found.loss <= BF16_SCALAR
    assert found.grad_norm <= BF16_SCALAR
    assert one.losses == pytest.approx(reference("dense").losses, abs=BF16_SCALAR)


@functools.cache
def bf16_reference() -> Trace:
    """The one-rank trace in bf16."""
    return trace(debug_config(kernels={"params_dtype": "bf16"}), world_size=1)


def _count_encoder_twice() -> None:
    mm_model.clear_tensor_parallel_marks = lambda module: None


def _perturb_a_replica(cfg):  # type: ignore[no-untyped-def]
    topology = build_topology(cfg.parallel, place=rank_place())
    seed_everything(cfg.train.seed, topology=topology)
    model = build_model(cfg, stage=topology.stages[0])
    if topology.tensor_rank == 1:
        model.connector.position_embedding.data[0, 0] += 1e-6
    check_replicas([model], group=topology.groups.tp)


def test_replicas_that_differ_are_named() -> None:
    """A replicated parameter that differs in one bit on one tensor-parallel rank ends the run before it starts."""
    cfg = change(debug_config(), parallel={"tensor_model_parallel_size": 2})
    with pytest.raises(RankFailure, match=r"1 replicated parameters differ.*connector\.position_embedding"):
        run_on_ranks(_perturb_a_replica, 2, cfg=cfg)


def test_counting_the_encoder_twice_is_found() -> None:
    """Replicas that look split fail (more faults: tests/parity)."""
    cfg = change(debug_config(), parallel={"tensor_model_parallel_size": 2})
    found = trace(cfg, world_size=2, prepare=_count_encoder_twice)
    broken = compare(reference("dense"), found, learning_rate=cfg.optimizer.lr or 0)
    assert not broken.passes
    assert broken.grad_norm > 1e-4, broken
