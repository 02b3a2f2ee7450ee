"""The comparison: every figure counts, and the place is where a fault shows first."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from mm15_megatron.parity.compare import BITWISE, FP32, compare, nearest_to_loss, not_finite
from mm15_megatron.parity.fingerprints import PADDING, SAMPLE
from mm15_megatron.parity.trace import Trace

RATES = dict.fromkeys(("language", "connector", "vision"), 1e-3)
LAYER = "language_model.decoder.layers.{}"
NAMES = (
    "vision_encoder.class_token",
    "connector.mlp.0.weight",
    "language_model.embedding.word_embeddings.weight",
    # registration order is not forward order
    LAYER.format(0) + ".self_attention.linear_proj.weight",
    LAYER.format(0) + ".self_attention.linear_qkv.weight",
    LAYER.format(1) + ".mlp.router.weight",
    LAYER.format(1) + ".mlp.experts.0.linear_fc1.weight",
    "language_model.decoder.final_layernorm.weight",
    "language_model.output_layer.weight",
)
MODULES = ("connector", "merged_input", "decoder.layers.0.self_attention", "decoder.layers.0", "decoder.layers.10")


def traced() -> Trace:
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(4, 3, generator=g) for name in NAMES}
    owners = [(SAMPLE, 2), (SAMPLE, 3), (PADDING, 1)]
    return Trace(
        losses=[5.0, 4.0],
        router=[{"decoder.layers.1.mlp.router": (1.0, 2.0, 0.0, 0.5, 0.5)}] * 2,
        grad_norms=[1.5, 1.0],
        applied=[True, True],
        first_gradients=tensors,
        gradients={name: tensor * 2 for name, tensor in tensors.items()},
        parameters={name: tensor * 3 for name, tensor in tensors.items()},
        fingerprints={
            module: {key: torch.randn(5, 2, generator=g, dtype=torch.float64) for key in owners} for module in MODULES
        },
    )


def changed(**parts: object) -> Trace:
    """A trace in which one value of each named part is off: ``part=name`` or ``part=(name, key)`` or ``part=step``."""
    found = deepcopy(traced())
    for part, where in parts.items():
        value = getattr(found, part)
        for one in where if isinstance(where, list) else [where]:
            if isinstance(one, tuple):
                value[one[0]][one[1]][1, 1] += 0.1
            elif isinstance(one, str):
                value[one][1, 1] += 0.1
            else:
                value[one] += 0.1
    return found


def test_equal_traces_pass() -> None:
    found = compare(traced(), traced(), rates=RATES, tolerances=BITWISE)
    assert found.passes
    assert found.place == ""


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        (
            {"fingerprints": [("decoder.layers.10", (SAMPLE, 2)), ("decoder.layers.0", (SAMPLE, 3))], "losses": 0},
            "decoder.layers.0 (1 of 3 samples and paddings, first sample 1 of row 1)",
        ),
        ({"losses": 0, "first_gradients": NAMES[0]}, "loss of step 1: output layer or loss"),
        ({"first_gradients": [*NAMES[:2], NAMES[3], NAMES[4]]}, f"gradient of {NAMES[3]}"),
        ({"first_gradients": [NAMES[5], NAMES[4]], "grad_norms": 0}, f"gradient of {NAMES[5]}"),
        ({"grad_norms": 0, "parameters": NAMES[1]}, "gradient norm of step 1"),
        ({"parameters": NAMES[1], "gradients": NAMES[2], "losses": 1}, f"update of {NAMES[1]}"),
        ({"gradients": NAMES[2], "losses": 1}, f"gradient of {NAMES[2]} in the last step"),
        ({"losses": 1}, "step 2"),
    ],
)
def test_the_first_difference_is_the_place(parts: dict[str, object], place: str) -> None:
    found = compare(traced(), changed(**parts), rates=RATES)
    assert not found.passes
    assert found.place.startswith(place), found.place


def test_padding_does_not_fail_but_names_the_place() -> None:
    padding = ("decoder.layers.0", (PADDING, 1))
    assert compare(traced(), changed(fingerprints=padding), rates=RATES).passes
    both = changed(fingerprints=padding, losses=0)
    assert "first the padding of row 1" in compare(traced(), both, rates=RATES).place
    assert compare(traced(), both, rates=RATES, padding=False).place.startswith("loss of step 1")


@pytest.mark.parametrize(
    ("figures", "place"),
    [
        ((1.1, 2.0, 0.0, 0.5, 0.5), "router (balance loss)"),
        ((1.0, 2.1, 0.1, 0.5, 0.5), "router (z loss, dropped share)"),
        ((1.0, 2.0, 0.0, 0.4, 0.6), "router (load)"),
        ((), "router (load)"),
    ],
)
def test_router_figures(figures: tuple[float, ...], place: str) -> None:
    other = traced()
    other.router = [{"decoder.layers.1.mlp.router": figures}, other.router[1]]
    found = compare(traced(), other, rates=RATES)
    assert not found.passes
    assert found.place == f"decoder.layers.1.mlp.{place}"


@pytest.mark.parametrize("part", ["losses", "grad_norms", "first_gradients", "gradients", "parameters", "fingerprints"])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_no_number_never_passes(part: str, both: bool) -> None:
    """Neither in the layout alone nor in both."""
    broken = traced()
    value = getattr(broken, part)
    if part == "fingerprints":
        value["merged_input"][SAMPLE, 2][0, 0] = math.nan
    elif isinstance(value, dict):
        value[NAMES[2]][0, 0] = math.nan
    else:
        value[0] = math.nan
    found = compare(broken if both else traced(), broken, rates=RATES)
    assert not found.passes
    if part == "fingerprints":
        assert found.place.startswith("merged_input")
        assert found.place.endswith("not finite)")
        assert not_finite(broken) == "merged_input"


@pytest.mark.parametrize("part", ["first_gradients", "gradients", "parameters"])
def test_what_a_side_lacks_never_passes(part: str) -> None:
    lacking = traced()
    del getattr(lacking, part)[NAMES[4]]
    assert not compare(traced(), lacking, rates=RATES).passes
    assert not compare(lacking, traced(), rates=RATES).passes


def test_missing_tokens_never_pass() -> None:
    lacking = traced()
    del lacking.fingerprints["decoder.layers.0"]
    found = compare(traced(), lacking, rates=RATES)
    assert not found.passes
    assert found.place.startswith("decoder.layers.0 (3 of 3")
    assert "3 missing" in found.place


def resumed(**parts: object) -> Trace:
    found = changed(**parts)
    return Trace(
        first_step=1,
        losses=found.losses[1:],
        router=found.router[1:],
        grad_norms=found.grad_norms[1:],
        applied=found.applied[1:],
        first_gradients=found.gradients,
        gradients=found.gradients,
        parameters=found.parameters,
    )


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ({}, ""),
        ({"losses": 1}, "loss of step 2: the weights that were loaded"),
        ({"parameters": NAMES[2]}, f"update of {NAMES[2]} (optimizer state that was loaded)"),
    ],
)
def test_a_resumed_run_is_compared_from_its_first_step(parts: dict[str, object], place: str) -> None:
    assert compare(traced(), resumed(**parts), rates=RATES, tolerances=BITWISE).place == place


def test_updates_are_measured_by_the_rate_of_their_part() -> None:
    other = traced()
    other.parameters[NAMES[1]] += 1e-3
    rates = RATES | {"connector": 1.0}
    assert compare(traced(), other, rates=rates, tolerances=FP32).parameter == pytest.approx(5e-4, rel=1e-3)
    assert compare(traced(), other, rates=RATES).parameter == pytest.approx(0.5, rel=1e-3)


def test_backward_order() -> None:
    distances = dict.fromkeys(NAMES, 1.0)
    assert nearest_to_loss(distances, 0.5) == NAMES[-1]
    assert nearest_to_loss(distances, 1.5) == ""
    for expected in (-2, 6, 5, 3, 4, 2, 1, 0):
        distances = {name: d for name, d in distances.items() if name != nearest_to_loss(distances, 0.5)}
        assert nearest_to_loss(distances, 0.5) == NAMES[expected]
