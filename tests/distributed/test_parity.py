"""Every layout computes the same thing: loss, gradient norm, every gradient and the parameters of five steps."""

from __future__ import annotations

import functools

import pytest

from mm15_megatron.models import mm_model
from mm15_megatron.models.build import build_model, check_replicas
from mm15_megatron.models.rope import rotary_table
from mm15_megatron.parallel import reduce
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology

from ..helpers.layouts import LAYOUTS, change, debug_config
from ..helpers.parity import FP32_SCALAR, Trace, compare, trace, trace_on_rank
from ..helpers.ranks import RankFailure, rank_place, run_on_ranks

# Losses and norms of a bf16 model: 8 bits of mantissa, averaged over a thousand tokens.
BF16_SCALAR = 2e-3

TITLE = "parity with one rank (debug_dense, mixed batches, five steps)"
HEADER = f"{'layout':34} {'ranks':>5} {'loss':>9} {'grad norm':>9} {'gradient':>9} {'parameter':>9}  worst gradient"

VARIANTS = {
    "dense": {},
    "tied-qknorm": {
        "language": {"share_embeddings_and_output_weights": True, "qk_layernorm": True, "z_loss_coeff": 1e-2}
    },
    "encoder-frozen": {"freeze": {"vision": True}},
    "language-frozen": {"freeze": {"language": True}},
    "four-kv-heads": {"language": {"num_query_groups": 4}},
    "average-pool": {"connector": {"kind": "average_pool"}, "vision": {"post_layernorm": True, "class_token": False}},
}
COMBINATIONS = [("dense", layout) for layout in LAYOUTS if layout != "tp4sp"] + [
    (variant, layout)
    for variant in VARIANTS
    if variant not in ("dense", "four-kv-heads")
    for layout in ("tp2sp", "tp2pp2", "dp2-overlap-many-buckets")
]
COMBINATIONS += [("four-kv-heads", "tp4sp"), ("tied-qknorm", "pp2dp2-dist-opt-grad-overlap")]


@functools.cache
def reference(variant: str) -> Trace:
    """The one-rank trace of a variant, computed once."""
    return trace(debug_config(**VARIANTS[variant]), world_size=1)


@pytest.mark.parametrize(("variant", "layout"), COMBINATIONS, ids=[f"{v}-{n}" for v, n in COMBINATIONS])
def test_layout_equals_one_rank(variant: str, layout: str, table: dict[str, list[str]]) -> None:
    """Losses, norms, gathered gradients and parameters agree within the named tolerances."""
    cfg = debug_config(**VARIANTS[variant])
    chosen = LAYOUTS[layout]
    found = compare(
        reference(variant), trace(chosen.apply(cfg), world_size=chosen.world_size), learning_rate=cfg.optimizer.lr or 0
    )
    lines = table.setdefault(TITLE, [HEADER])
    lines.append(
        f"{variant + ' ' + layout:34} {chosen.world_size:5} {found.loss:9.1e} {found.grad_norm:9.1e} "
        f"{found.gradient:9.1e} {found.parameter:9.1e}  {found.first}"
    )
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
    table.setdefault(TITLE, [HEADER]).append(
        f"{'bf16 ' + layout:34} {chosen.world_size:5} {found.loss:9.1e} {found.grad_norm:9.1e} "
        f"{found.gradient:9.1e} {found.parameter:9.1e}  {found.first}"
    )
    assert found.loss <= BF16_SCALAR
    assert found.grad_norm <= BF16_SCALAR
    assert one.losses == pytest.approx(reference("dense").losses, abs=BF16_SCALAR)


@functools.cache
def bf16_reference() -> Trace:
    """The one-rank trace in bf16."""
    return trace(debug_config(kernels={"params_dtype": "bf16"}), world_size=1)


def _skip_encoder_sum(cfg, steps):  # type: ignore[no-untyped-def]
    reduce._sum_encoder_gradients = lambda chunk, topology: None
    return trace_on_rank(cfg, steps)


def _wrong_positions(cfg, steps):  # type: ignore[no-untyped-def]
    mm_model.rotary_table = lambda ids, **kwargs: rotary_table(ids // 3, **kwargs)
    return trace_on_rank(cfg, steps)


def _count_encoder_twice(cfg, steps):  # type: ignore[no-untyped-def]
    mm_model.clear_tensor_parallel_marks = lambda module: None
    return trace_on_rank(cfg, steps)


def _perturb_a_replica(cfg):  # type: ignore[no-untyped-def]
    topology = build_topology(cfg.parallel, place=rank_place())
    seed_everything(cfg.train.seed, topology=topology)
    model = build_model(cfg, stage=topology)
    if topology.tensor_rank == 1:
        model.connector.position_embedding.data[0, 0] += 1e-6
    check_replicas(model, group=topology.groups.tp)


def test_replicas_that_differ_are_named() -> None:
    """A replicated parameter that differs in one bit on one tensor-parallel rank ends the run before it starts."""
    cfg = change(debug_config(), parallel={"tensor_model_parallel_size": 2})
    with pytest.raises(RankFailure, match=r"1 replicated parameters differ.*connector\.position_embedding"):
        run_on_ranks(_perturb_a_replica, 2, cfg=cfg)


@pytest.mark.parametrize(
    ("fault", "measure"),
    [(_skip_encoder_sum, "gradient"), (_wrong_positions, "gradient"), (_count_encoder_twice, "grad_norm")],
)
def test_planted_fault_is_found(fault, measure: str) -> None:  # type: ignore[no-untyped-def]
    """The harness fails when a rule it guards is broken on purpose."""
    cfg = change(debug_config(), parallel={"tensor_model_parallel_size": 2})
    results = run_on_ranks(fault, 2, cfg=cfg, steps=5)
    broken = compare(reference("dense"), results[0], learning_rate=cfg.optimizer.lr or 0)
    assert not broken.passes
    assert getattr(broken, measure) > 1e-4, broken
