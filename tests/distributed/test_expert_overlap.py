"""The experts' all-to-all beside another micro-batch's computation: the same numbers as one micro-batch after another.

The overlapped schedule runs the same arithmetic in the same order for every parameter, so a layout with it is compared
bitwise to the layout without it. Tied embeddings are the exception: see their test.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerLayerSchedulePlan

from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models import schedule_plan
from mm15_megatron.models.sparse_layer import SparseFeedForward
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.compare import BF16_SCALAR, BITWISE, Difference, compare, distance
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.trace import Plan, Prepare, Trace, build_parts, micro_batches, run_step, trace
from mm15_megatron.training.optimizer import learning_rates
from mm15_megatron.training.step import evaluate_step

from ..helpers.layouts import debug_config

# The last of bf16's 8 bits: what one rounding may change, relative to the largest entry.
BF16_ROUNDING = 2.0**-8
EMBEDDING = "language_model.embedding.word_embeddings.weight"
TIED = "language.share_embeddings_and_output_weights=true"


def configured(*options: str) -> RunConfig:
    return apply_overrides(debug_config("debug_moe", kernels={"params_dtype": "bf16"}), list(options))


def in_layout(cfg: RunConfig, name: str, *, steps: int = 5, prepare: Prepare | None = None) -> Trace:
    layout = parse_layout(name)
    plan = Plan(steps, fingerprints=False)
    return trace(layout.apply(cfg), world_size=layout.world_size, plan=plan, prepare=prepare)


def beside_plain(cfg: RunConfig, name: str, *, steps: int = 5, prepare: Prepare | None = None) -> Difference:
    """Compare a layout that overlaps (and what ``prepare`` plants in it) with the same layout that does not."""
    plain = in_layout(cfg, name, steps=steps)
    overlapped = in_layout(cfg, f"{name}-epoverlap", steps=steps, prepare=prepare)
    return compare(plain, overlapped, rates=learning_rates(cfg), tolerances=BITWISE)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("ep2", []),  # two micro-batches a step
        ("ep2-mbs1-overlap-buckets20000", ["moe.moe_expert_capacity_factor=0.8"]),  # four, with all other overlaps
        ("vpp2-ep2-mbs1", []),
        ("vpp2-ep2-mbs1-overlap-buckets20000", ["moe.moe_layer_period=4"]),  # three dense chunks, a sparse one
        ("ep4-mbs1", []),  # one expert a rank
        ("tp2-ep2-mbs1", []),  # sparse layers cut their tokens
        ("tp2sp-ep2-etp1-mbs1", []),
        pytest.param("cp2-ep2-mbs1", [], marks=pytest.mark.soak),
        ("ep2", ["moe.moe_layer_period=3"]),  # the last layer is dense
        ("ep2-recompute-selective", ["kernels.recompute_modules=[core_attn, mlp]", "kernels.recompute_vision=true"]),
        ("ep2", ["freeze.language=true"]),
        ("ep2", ["freeze.vision=true", "freeze.connector=true"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(option.partition(".")[2] for option in value),
)
def test_overlap_changes_nothing(layout: str, options: list[str]) -> None:
    """Losses, router figures, norms, gathered gradients and parameters of five steps are bitwise the same."""
    found = beside_plain(configured(*options), layout)
    assert found.passes, found


def test_tied_embeddings_differ_by_one_rounding() -> None:
    """Input and output embedding send their gradients one after the other, each rounded to bf16 by itself."""
    cfg = configured(TIED)
    plain, overlapped = (in_layout(cfg, name) for name in ("ep2-overlap", "ep2-overlap-epoverlap"))
    assert plain.losses[0] == overlapped.losses[0]
    apart = {
        name: distance(overlapped.first_gradients[name], gradient) / gradient.abs().max().item()
        for name, gradient in plain.first_gradients.items()
        if not torch.equal(overlapped.first_gradients[name], gradient)
    }
    assert list(apart) == [EMBEDDING]
    assert apart[EMBEDDING] <= BF16_ROUNDING
    assert overlapped.losses == pytest.approx(plain.losses, abs=BF16_SCALAR)


@dataclass(frozen=True)
class Seen:
    """What a rank did in a step and in an evaluation pass: layers forward, layers backward, both at once; its loss."""

    forward: int
    backward: int
    both: int
    held_out: float


def count_layers(cfg: RunConfig) -> Seen:
    """Run one step and one evaluation pass, noting what the schedule pairs."""
    run, pairs = TransformerLayerSchedulePlan.run, []

    def noted(f_layer, b_layer, **kwargs):  # type: ignore[no-untyped-def]
        pairs.append((f_layer is not None, b_layer is not None))
        return run(f_layer, b_layer, **kwargs)

    TransformerLayerSchedulePlan.run = staticmethod(noted)
    parts = build_parts(cfg)
    run_step(parts, step=0)
    trained = len(pairs)
    batches = list(micro_batches(cfg, parts.topology, step=1))
    held_out = evaluate_step(parts, iter(batches), num_microbatches=len(batches)).loss
    assert len(pairs) == trained, "an evaluation pass needs no plan"
    close_topology()
    return Seen(sum(f for f, _ in pairs), sum(b for _, b in pairs), sum(f and b for f, b in pairs), held_out)


def test_layers_run_beside_each_other() -> None:
    """Four micro-batches of four layers: all but the first forward and the last backward pass are paired."""
    cfg = parse_layout("ep2-mbs1").apply(configured())
    plain, overlapped = (
        run_on_ranks(count_layers, 2, cfg=one) for one in (cfg, parse_layout("ep2-mbs1-epoverlap").apply(configured()))
    )
    assert [(seen.forward, seen.backward, seen.both) for seen in plain] == [(0, 0, 0)] * 2
    assert [(seen.forward, seen.backward, seen.both) for seen in overlapped] == [(16, 16, 12)] * 2
    assert [seen.held_out for seen in overlapped] == [seen.held_out for seen in plain]


def forget_padding() -> None:
    """Padding is routed, as megatron-core's own nodes do."""
    attend = schedule_plan._attend_and_route

    def without_mask(layer, node, hidden_states):  # type: ignore[no-untyped-def]
        node.chunk_state.padding_mask = torch.zeros_like(node.chunk_state.padding_mask)
        return attend(layer, node, hidden_states)

    schedule_plan._attend_and_route = without_mask


def forget_last_norm() -> None:
    """The norm behind a dense last layer is left out, as megatron-core's own nodes do."""
    schedule_plan._dense_and_norm = lambda layer, node, hidden_states: layer._forward_mlp(hidden_states)


def free_received_tokens() -> None:
    """What a single expert multiplies is freed before its backward pass, as megatron-core's own nodes do."""
    SparseFeedForward.copies_received_tokens = property(lambda self: True)


@pytest.mark.parametrize(("fault", "options"), [(forget_padding, []), (forget_last_norm, ["moe.moe_layer_period=3"])])
def test_what_the_plan_puts_back_is_needed(fault: Prepare, options: list[str]) -> None:
    assert not beside_plain(configured(*options), "ep2", steps=1, prepare=fault).passes


def test_tokens_of_a_single_expert_are_needed_again() -> None:
    """One expert a rank: freed as those of several are, its input is gone when the backward pass reads it."""
    with pytest.raises(RankFailure, match="its data is not allocated yet"):
        in_layout(configured(), "ep4-mbs1-epoverlap", steps=1, prepare=free_received_tokens)
