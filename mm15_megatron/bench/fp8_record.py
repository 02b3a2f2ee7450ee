"""Measured times of a model's linear layers, as a sweep leaves them: plain values in a JSON file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mm15_megatron.accounting.matrix_products import MatrixProduct
from mm15_megatron.bench.cases import BLOCKS
from mm15_megatron.errors import DataError

BF16 = "bf16"
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
ATTENTION = "attention"
"""Stands in :class:`Failed` for core attention, which is measured in bf16 alone."""
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Timing:
    """What one of a product costs in one micro-batch, and how far it is from bf16.

    Attributes:
        forward_ms: GPU time of the forward pass, milliseconds; quantising the weight is spread over the step.
        backward_ms: GPU time of the backward pass.
        host_ms: time in which the host launches both.
        output_error: norm of the difference from the bf16 output over its norm; 0 for bf16 itself.
        gradient_error: the same of the gradient of the input or of the weight, whichever is further off.
    """

    forward_ms: float
    backward_ms: float
    host_ms: float
    output_error: float = 0.0
    gradient_error: float = 0.0

    def step_ms(self, product: MatrixProduct) -> float:
        """Return the time of one of ``product`` in a step, with a recomputed forward pass."""
        return product.forward_passes * self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class Measured:
    """One product and its times: ``bf16`` always, and each recipe that was measured."""

    product: MatrixProduct
    times: dict[str, Timing]


@dataclass(frozen=True)
class Failed:
    """A measurement that was tried and gave no number.

    Attributes:
        product: name of the product, or ``attention``.
        recipe: ``bf16`` or the recipe.
        problem: the error in one line.
    """

    product: str
    recipe: str
    problem: str


@dataclass(frozen=True)
class Sweep:
    """What was measured, on what, and what could not be.

    Attributes:
        source: the command that measured it, or where else the numbers are from.
        date: when it began, ISO 8601 in UTC.
        device: name of the GPU.
        versions: versions of the libraries and of the driver, and the commit of this package.
        preset: name of the preset the configuration started from; may be empty.
        fp8_format: ``hybrid`` or ``e4m3``; empty: each recipe was measured in its usual one.
        keeps_edges: ``precision.first_last_layers_bf16``.
        micro_batches: micro-batches of a step, over which a quantised weight is used again.
        attention_ms: core attention of the decoder and of the encoder in bf16, forward and backward, one micro-batch;
            None if it was not measured.
        refused: why a recipe was not tried, by recipe.
        refused_vision: why it was not tried for the encoder although it was for the decoder, by recipe.
        failed: what was tried in vain.
        measured: the products that were measured in bf16 at least.
        unmeasured: names of the other products that belong to the rank.
        stopped: why the sweep ended before its end; empty if it did not.
        version: of this format.
    """

    source: str
    date: str
    device: str
    versions: dict[str, str]
    preset: str
    fp8_format: str
    keeps_edges: bool
    micro_batches: int
    attention_ms: float | None
    refused: dict[str, str]
    refused_vision: dict[str, str]
    failed: tuple[Failed, ...] = ()
    measured: tuple[Measured, ...] = ()
    unmeasured: tuple[str, ...] = ()
    stopped: str = ""
    version: int = FORMAT_VERSION


def usual_format(recipe: str) -> str:
    """Return the FP8 format that a recipe is usually trained in: blocks keep the range of gradients in E4M3."""
    return "e4m3" if recipe in BLOCKS else "hybrid"


def sweep_to_json(sweep: Sweep) -> dict[str, Any]:
    """Return the sweep as plain values."""
    return asdict(sweep)


def read_sweep(path: Path) -> Sweep:
    """Read recorded numbers.

    Raises:
        DataError: the file is absent, is no JSON, or does not hold a sweep of this format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read recorded numbers from {path}: {error}", fix="give a file of --record") from error
    if isinstance(content, dict) and content.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has version {content.get('version')!r} of recorded numbers, not {FORMAT_VERSION}",
            fix="measure again with --record",
        )
    sweep: Sweep = _parse(content, Sweep, where=str(path))
    _check(sweep, path)
    return sweep


def _parse(value: Any, kind: Any, *, where: str) -> Any:
    """Turn plain values into ``kind``: a frozen dataclass, tuple[X, ...], dict[str, X], X | None or a scalar."""
    if isinstance(kind, UnionType):
        inner, _ = get_args(kind)
        return None if value is None else _parse(value, inner, where=where)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        names = {f.name for f in fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{where} holds {found}, not {sorted(names)}", fix="give a file of --record, unchanged")
        return kind(**{name: _parse(value[name], hints[name], where=f"{where}: {name}") for name in names})  # type: ignore[operator]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_parse(v, get_args(kind)[0], where=f"{where}[{i}]") for i, v in enumerate(value))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {str(k): _parse(v, get_args(kind)[1], where=f"{where}: {k}") for k, v in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value) and value >= 0:
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise DataError(f"{where} is {value!r}, not {kind}", fix="give a file of --record, unchanged")


def _check(sweep: Sweep, path: Path) -> None:
    """Refuse numbers that no measurement gives."""
    if not sweep.measured and not sweep.failed:
        raise DataError(f"{path} holds no measured product", fix="measure again with --record")
    for failure in sweep.failed:
        if failure.recipe not in (BF16, *RECIPES):
            raise DataError(
                f"{path}: {failure.product} failed in {failure.recipe!r}, which is none of {[BF16, *RECIPES]}",
                fix="measure again with --record",
            )
    for item in sweep.measured:
        unknown = set(item.times) - {BF16, *RECIPES}
        spent = {recipe: timing.forward_ms for recipe, timing in item.times.items()}
        sizes = (item.product.rows, item.product.in_features, item.product.out_features, item.product.groups)
        if BF16 not in item.times or unknown or min(spent.values()) <= 0.0 or min(sizes) < 1:
            raise DataError(
                f"{path}: {item.product.name} has forward times {spent} and sizes {sizes}; bf16 must be among them "
                f"and the others in {list(RECIPES)}, all above 0",
                fix="measure again with --record",
            )
