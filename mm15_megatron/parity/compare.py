"""Compare what two layouts showed, and name the place where they part.

A fault shows first where it is: the forward pass is searched from the input, the gradients from the loss backwards,
then the norm, then the update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from mm15_megatron.models.global_parameters import module_of
from mm15_megatron.parity.fingerprints import PADDING, Key, forward_position
from mm15_megatron.parity.stream import ROW_SAMPLES
from mm15_megatron.parity.trace import Gradients, Trace

# fp32 sums taken in another order, five steps deep. Seen: 1e-5 of the largest entry of a gradient, 1e-6 of a loss.
FP32_REDUCTION = 5e-5
FP32_SCALAR = 5e-6
# AdamW divides by sqrt(v), which enlarges the noise of small gradients; seen: 5e-5 of what a parameter may move.
UPDATE_SHARE = 1e-3
# bf16 keeps 8 bits of mantissa: losses and norms average over a thousand tokens, single entries do not, and the sign of
# an update near zero may turn. Seen: 6e-5 of a loss, 4e-4 of a norm, 1e-2 of a token, 1.3e-1 of a gradient, 8e-1 of
# what a parameter may move.
BF16_SCALAR = 2e-3
BF16_TOKEN = 5e-2
BF16_ENTRY = 5e-1
BF16_UPDATE = 2.0
# Gradients below this are noise around zero, not compared relative to themselves.
SMALLEST_GRADIENT = 1e-6


@dataclass(frozen=True)
class Tolerances:
    """What two layouts may differ by.

    Attributes:
        loss: absolute, a step's loss; router figures too, relative to those above 1.
        grad_norm: relative.
        token: of a fingerprint, relative to the largest of its module.
        gradient: of an entry, relative to the largest of its tensor.
        parameter: of a parameter, in units of the learning rate times the steps taken.
    """

    loss: float
    grad_norm: float
    token: float
    gradient: float
    parameter: float


BITWISE = Tolerances(0.0, 0.0, 0.0, 0.0, 0.0)
FP32 = Tolerances(FP32_SCALAR, FP32_SCALAR, FP32_REDUCTION, FP32_REDUCTION, UPDATE_SHARE)
BF16 = Tolerances(BF16_SCALAR, BF16_SCALAR, BF16_TOKEN, BF16_ENTRY, BF16_UPDATE)


@dataclass(frozen=True)
class Difference:
    """How far a layout is from the reference; infinite where something is missing or not a number.

    Attributes:
        forward: largest difference of a real token's fingerprint, relative to the largest of its module.
        loss: largest absolute difference of a step's loss.
        router: largest difference of a router figure, relative to those above 1.
        grad_norm: largest relative difference of a gradient norm.
        gradient: largest difference of a gradient (first and last step), relative to the largest entry of its tensor.
        parameter: largest difference of a parameter, in units of the learning rate times the steps taken.
        worst: the gradient that differs most.
        place: where the two part; empty if they do not.
        tolerances: what was allowed.
    """

    forward: float
    loss: float
    router: float
    grad_norm: float
    gradient: float
    parameter: float
    worst: str
    place: str
    tolerances: Tolerances

    @property
    def passes(self) -> bool:
        """Whether every figure is within its tolerance."""
        allowed = self.tolerances
        return (
            self.forward <= allowed.token
            and self.loss <= allowed.loss
            and self.router <= allowed.loss
            and self.grad_norm <= allowed.grad_norm
            and self.gradient <= allowed.gradient
            and self.parameter <= allowed.parameter
        )


def compare(
    reference: Trace, other: Trace, *, rates: Mapping[str, float], tolerances: Tolerances = FP32, padding: bool = True
) -> Difference:
    """Compare what a layout showed with the reference.

    A trace that was resumed is compared from its first step on; its first gradients and fingerprints are those of
    another step and are left out.

    Args:
        reference: one rank, from the first step.
        other: the layout.
        rates: learning rate of each part of the model (``training.optimizer.learning_rates``).
        tolerances: what they may differ by.
        padding: the rows of both have the same padding, which can be compared.
    """
    found = _Comparison(reference, other, rates, padding=padding)
    gradients = found.first_gradients | {f"{n} ": d for n, d in found.gradients.items()}
    figures = Difference(
        forward=_largest(d for d in found.real_tokens.values()),
        loss=_largest(found.losses),
        router=_largest(found.router.values()),
        grad_norm=_largest(found.grad_norms),
        gradient=_largest(gradients.values()),
        parameter=_largest(found.parameters.values()),
        worst=max(gradients, key=gradients.__getitem__, default="").strip(),
        place="",
        tolerances=tolerances,
    )
    if figures.passes:
        return figures
    return Difference(**{**vars(figures), "place": _place(found, tolerances)})


def not_finite(reference: Trace) -> str:
    """Return where the reference itself is not a number; empty if it is one everywhere."""
    for module in sorted(reference.fingerprints, key=forward_position):
        if any(not values.isfinite().all() for values in reference.fingerprints[module].values()):
            return module
    for name, gradient in reversed(list(reference.first_gradients.items())):
        if not gradient.isfinite().all():
            return f"gradient of {name}"
    return "" if all(math.isfinite(loss) for loss in reference.losses) else "loss"


def distance(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference; infinite if the shapes differ or a value is not a number."""
    if tensor.shape != reference.shape or not (tensor.isfinite().all() and reference.isfinite().all()):
        return math.inf
    return (tensor - reference).abs().max().item() if tensor.numel() else 0.0


def _share(tensor: torch.Tensor, reference: torch.Tensor, scale: float) -> float:
    """Distance in units of ``scale``, which may itself be no number."""
    found = distance(tensor, reference)
    return found / scale if math.isfinite(found) else math.inf


class _Comparison:
    """Every single distance between two traces."""

    def __init__(self, reference: Trace, other: Trace, rates: Mapping[str, float], *, padding: bool) -> None:
        begun = other.first_step - reference.first_step
        self.first_step, self.resumed = other.first_step, begun > 0
        self.reference, self.other = reference, other
        self.losses = [_apart(a, b) for a, b in zip(reference.losses[begun:], other.losses, strict=True)]
        self.grad_norms = [
            _apart(a, b, scale=abs(a) or 1.0)
            for a, b in zip(reference.grad_norms[begun:], other.grad_norms, strict=True)
        ]
        self.router = _router_distances(reference.router[begun:], other.router)
        self.gradients = _gradient_distances(reference.gradients, other.gradients)
        self.first_gradients: dict[str, float] = {}
        self.tokens: dict[str, dict[Key, float]] = {}
        if not self.resumed:
            self.first_gradients = _gradient_distances(reference.first_gradients, other.first_gradients)
            self.tokens = _token_distances(reference, other, padding=padding)
        steps = len(reference.losses)
        self.parameters = _by_name(
            reference.parameters,
            other.parameters,
            lambda name, whole, found: _share(found, whole, rates[module_of(name)] * steps),
        )

    @property
    def real_tokens(self) -> dict[str, float]:
        """Largest distance of each module, padding left out."""
        return {
            module: _largest(d for (kind, _), d in owned.items() if kind != PADDING)
            for module, owned in self.tokens.items()
        }


def _place(found: _Comparison, allowed: Tolerances) -> str:
    for module in sorted(found.tokens, key=forward_position):
        apart = [key for key, d in found.tokens[module].items() if d > allowed.token]
        if apart:
            return f"{module} ({_owners(apart, found, module)})"
    if name := _first_router(found, allowed):
        return name
    first = found.first_step + 1
    if found.losses[0] > allowed.loss:
        return f"loss of step {first}: " + ("the weights that were loaded" if found.resumed else "output layer or loss")
    if name := nearest_to_loss(found.first_gradients, allowed.gradient):
        return f"gradient of {name} ({_modules(found.first_gradients, allowed.gradient)})"
    if found.grad_norms[0] > allowed.grad_norm:
        return f"gradient norm of step {first}: how shards are counted"
    if found.other.applied != found.reference.applied[found.first_step - found.reference.first_step :]:
        return "which steps updated the parameters"
    updates = {name: d for name, d in found.parameters.items() if d > allowed.parameter}
    if updates:
        state = " (optimizer state that was loaded)" if found.resumed else ""
        return f"update of {max(updates, key=updates.__getitem__)}{state}"
    if name := nearest_to_loss(found.gradients, allowed.gradient):
        return f"gradient of {name} in the last step"
    return f"step {first + next((k for k, d in enumerate(found.losses) if d > allowed.loss), len(found.losses) - 1)}"


def _owners(apart: list[Key], found: _Comparison, module: str) -> str:
    """Whose tokens differ, and whether they are numbers at all."""
    values = [owned[key] for owned in (found.other.fingerprints.get(module, {}),) for key in apart if key in owned]
    missing = len(apart) - len(values)
    kind, number = apart[0]
    row = number // ROW_SAMPLES if kind != PADDING else number
    text = f"{len(apart)} of {len(found.tokens[module])} samples and paddings, first "
    text += f"the padding of row {row}" if kind == PADDING else f"sample {number % ROW_SAMPLES} of row {row}"
    text += f"; {missing} missing" if missing else ""
    return text + ("; not finite" if any(not v.isfinite().all() for v in values) else "")


def _first_router(found: _Comparison, allowed: Tolerances) -> str:
    """The first router of the first step whose figures differ."""
    layers = [name for (step, name), d in found.router.items() if step == 0 and d > allowed.loss]
    if not layers:
        return ""
    name = min(layers, key=_layer_number)
    begun = found.first_step - found.reference.first_step
    ours, theirs = (t.get(name, ()) for t in (found.reference.router[begun], found.other.router[0]))
    labels = ("balance loss", "z loss", "dropped share")
    apart = [label for label, a, b in zip(labels, ours, theirs, strict=False) if _relative(a, b) > allowed.loss]
    return f"{name} ({', '.join(apart) or 'load'})"


def _modules(distances: Mapping[str, float], allowed: float) -> str:
    """How many gradients differ, by part of the model."""
    parts: dict[str, list[bool]] = {}
    for name, d in distances.items():
        parts.setdefault(name.split(".")[0], []).append(d > allowed)
    return "differing: " + ", ".join(
        f"{sum(seen)} of {len(seen)} of {part}" for part, seen in parts.items() if any(seen)
    )


_PARTS = ("vision_encoder", "connector", "language_model.embedding", "language_model.decoder", "language_model.output")
_INSIDE_LAYER = (
    "input_layernorm",
    "linear_qkv",
    "q_layernorm",
    "k_layernorm",
    "linear_proj",
    "pre_mlp_layernorm",
    "router",
    "linear_fc1",
    "linear_fc2",
)


def backward_position(name: str) -> tuple[int, float, int]:
    """Where a parameter stands in the forward pass; the largest is nearest to the loss."""
    part = next((i for i, prefix in enumerate(_PARTS) if name.startswith(prefix)), -1)
    inside = next((i for i, word in enumerate(_INSIDE_LAYER) if f".{word}." in name), -1)
    last = any(f".{norm}." in name for norm in ("final_layernorm", "decoder.layernorm", "blocks.layernorm"))
    return (part, math.inf if last else _layer_number(name), inside)


def _layer_number(name: str) -> int:
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def nearest_to_loss(distances: Mapping[str, float], allowed: float) -> str:
    """Return the parameter whose gradient the backward pass computes first among those that differ; empty if none."""
    apart = [name for name, d in distances.items() if d > allowed]
    order = {name: k for k, name in enumerate(distances)}
    return max(apart, key=lambda name: (*backward_position(name), order[name]), default="")


def _largest(values: Iterable[float]) -> float:
    return max(values, default=0.0)


def _apart(a: float, b: float, *, scale: float = 1.0) -> float:
    return abs(a - b) / scale if math.isfinite(a) and math.isfinite(b) else math.inf


def _relative(a: float, b: float) -> float:
    return _apart(a, b, scale=max(1.0, abs(a)))


def _by_name(
    reference: Gradients, other: Gradients, measure: Callable[[str, torch.Tensor, torch.Tensor], float]
) -> dict[str, float]:
    """Measure every tensor; one that a side lacks is infinitely far."""
    names = [*reference, *(name for name in other if name not in reference)]
    both = reference.keys() & other.keys()
    return {name: measure(name, reference[name], other[name]) if name in both else math.inf for name in names}


def _gradient_distances(reference: Gradients, other: Gradients) -> dict[str, float]:
    return _by_name(
        reference,
        other,
        lambda _, whole, found: _share(found, whole, max(whole.abs().max().item(), SMALLEST_GRADIENT)),
    )


def _token_distances(reference: Trace, other: Trace, *, padding: bool) -> dict[str, dict[Key, float]]:
    if not (reference.fingerprints and other.fingerprints):
        return {}
    distances = {}
    for module, owned in reference.fingerprints.items():
        found = other.fingerprints.get(module, {})
        scale = _largest(values.abs().max().item() for values in owned.values() if values.numel()) or 1.0
        distances[module] = {
            key: _share(found[key], owned[key], scale) if key in owned and key in found else math.inf
            for key in sorted(owned.keys() | found.keys())
            if padding or key[0] != PADDING
        }
    return distances


def _router_distances(
    reference: list[dict[str, tuple[float, ...]]], other: list[dict[str, tuple[float, ...]]]
) -> dict[tuple[int, str], float]:
    """Largest distance of each layer's figures, by (step, layer)."""
    distances = {}
    for step, (left, right) in enumerate(zip(reference, other, strict=True)):
        for name in left.keys() | right.keys():
            a, b = left.get(name, ()), right.get(name, ())
            pairs = zip(a, b, strict=False)
            distances[step, name] = _largest(_relative(x, y) for x, y in pairs) if len(a) == len(b) else math.inf
    return distances
