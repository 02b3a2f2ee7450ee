"""From measured times of a model's linear layers to advice about FP8: pure, so that recorded numbers give it anywhere.

``plan`` says what a sweep measures, ``fp8_record`` holds what it found, ``advise`` decides, ``fp8_text`` explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from mm15_megatron.accounting.matrix_products import DECODER, EXPERTS, NEVER, VISION, MatrixProduct, matrix_products
from mm15_megatron.bench.fp8_record import ATTENTION, BF16, RECIPES, Failed, Measured, Sweep, Timing, usual_format
from mm15_megatron.config.rules_precision import PRECISION_RULES, fp8_alignment
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError

WORTHWHILE = 1.05
"""A gain below 5 % does not pay: clocks and batches vary by as much, and the rounding is certain."""
AS_FAST = 0.98
"""Recipes within 2 % of the fastest count as equally fast; the one that rounds least is taken."""
OUTPUT_ERROR, GRADIENT_ERROR = 0.1, 0.2
"""Two operands of three mantissa bits (E4M3) put a product some 4 % off, a gradient of two bits (E5M2) some 6 %, as
norms of the difference over norms of the result. More than these limits says that a scale does not fit."""
LAUNCH_BOUND = 0.9
"""A product is bound by its launches if the host needs this share of its time for them."""
OTHER_SHARE = 0.1
"""Assumed share of a bf16 step that is neither linear layers nor attention."""


@dataclass(frozen=True)
class Plan:
    """What a sweep measures: products, the recipes of each, and why the others are left out."""

    products: tuple[MatrixProduct, ...]
    recipes: tuple[str, ...]
    refused: dict[str, str]
    refused_vision: dict[str, str]

    def recipes_of(self, product: MatrixProduct) -> tuple[str, ...]:
        """Return the recipes that ``product`` is measured in, besides bf16."""
        if product.fp8 == NEVER:
            return ()
        return tuple(r for r in self.recipes if product.fp8 != VISION or r not in self.refused_vision)


@dataclass(frozen=True)
class Verdict:
    """What a recipe gives.

    Attributes:
        recipe: its name.
        vision: whether the encoder is in FP8 too.
        ratios: bf16 time over FP8 time of each part measured in it: decoder, experts, vision.
        linear_speedup: of all products of the micro-batch, those that stay in bf16 included.
        step_speedup: of the step, with the assumed share of what is neither linear layers nor attention.
        step_bound: of the step if there were nothing else: an upper bound.
        output_error: largest of the products that are in FP8.
        gradient_error: the same for gradients.
    """

    recipe: str
    vision: bool
    ratios: dict[str, float]
    linear_speedup: float
    step_speedup: float
    step_bound: float
    output_error: float
    gradient_error: float

    @property
    def rounds_too_much(self) -> bool:
        """Whether an error is beyond its limit."""
        return self.output_error > OUTPUT_ERROR or self.gradient_error > GRADIENT_ERROR

    @property
    def pays(self) -> bool:
        """Whether the recipe is worth its rounding."""
        return not self.rounds_too_much and self.step_speedup >= WORTHWHILE


@dataclass(frozen=True)
class Advice:
    """What a user should do.

    Attributes:
        verdicts: on every recipe that computed all products of the decoder and of the experts.
        chosen: the one to take; None: bf16.
        remarks: what else a user should know.
        options: to copy into the configuration; empty without advice.
        failed: recipes that failed at a product of the decoder or of the experts, which no verdict is given on.
        missing: why there is no advice at all; empty if there is.
    """

    verdicts: tuple[Verdict, ...]
    chosen: Verdict | None
    remarks: tuple[str, ...]
    options: tuple[str, ...]
    failed: tuple[str, ...] = ()
    missing: str = ""


def as_trained(cfg: RunConfig, recipe: str | None, *, vision: bool = False) -> RunConfig:
    """Return ``cfg`` as FP8 needs it: Transformer Engine's layers in bf16 on a GPU, in ``recipe`` or (None) in bf16."""
    precision = replace(cfg.precision, fp8=None, fp8_vision=False, fp8_param_gather=False)
    if recipe is not None:
        chosen = cfg.precision.fp8 or usual_format(recipe)
        precision = replace(precision, fp8=chosen, fp8_recipe=recipe, fp8_vision=vision)
    return replace(
        cfg,
        precision=precision,
        parallel=replace(cfg.parallel, device="cuda"),
        kernels=replace(cfg.kernels, transformer_impl="transformer_engine", params_dtype="bf16", norm_impl="backend"),
    )


def layout_problem(cfg: RunConfig, recipe: str, *, vision: bool) -> str | None:
    """Say what in the configuration ``recipe`` does not accept (the rules of training), or None."""
    wanted = as_trained(cfg, recipe, vision=vision)
    world = cfg.parallel.tensor_model_parallel_size * cfg.parallel.pipeline_model_parallel_size
    for rule in PRECISION_RULES:
        try:
            rule(wanted, world * cfg.parallel.context_parallel_size)
        except ConfigError as error:
            return f"{error.problem}; {error.fix}"
    return None


def plan(cfg: RunConfig, *, unusable: Mapping[str, str], stage: int = 0) -> Plan:
    """Return what a sweep of ``cfg`` measures.

    Args:
        cfg: the run; its layout decides the shapes of one rank.
        unusable: why this device cannot compute in a recipe, by recipe.
        stage: pipeline stage of the rank.

    Raises:
        ConfigError: there is no such stage, or the layers cannot be split as configured.
    """
    products = matrix_products(cfg, stage=stage)
    refused, refused_vision = dict(unusable), {}
    for recipe in RECIPES:
        problem = refused.get(recipe) or layout_problem(cfg, recipe, vision=False)
        if problem is not None:
            refused[recipe] = problem
        elif (problem := layout_problem(cfg, recipe, vision=True)) is not None:
            refused_vision[recipe] = problem
    return Plan(products, tuple(r for r in RECIPES if r not in refused), refused, refused_vision)


def rows_of_experts(product: MatrixProduct) -> tuple[int, ...]:
    """Return the rows of each expert: equal shares, but for three rows that pairs of experts give each other.

    Real routing never meets a multiple of 16, so the padding that FP8 needs is done and timed.
    """
    share, rest = divmod(product.rows, product.groups)
    rows = [share + (i < rest) for i in range(product.groups)]
    for i in range(0, product.groups - 1, 2):
        moved = min(3, rows[i + 1])
        rows[i], rows[i + 1] = rows[i] + moved, rows[i + 1] - moved
    return tuple(rows)


def check_same_products(sweep: Sweep, cfg: RunConfig, *, stage: int) -> None:
    """Check that recorded numbers are of this configuration, as far as they go: a sweep may have ended early.

    Raises:
        ConfigError: the shapes differ, with the first product that does.
    """
    wanted = {p.name: p for p in matrix_products(cfg, stage=stage)}
    found = {m.product.name: m.product for m in sweep.measured}
    for name in [*wanted, *found]:
        if name in wanted and name in sweep.unmeasured:
            continue
        if name not in wanted or name not in found:
            where = "not measured there" if name in wanted else "no product of it"
            raise ConfigError(
                f"the recorded numbers are of another configuration: {name} is {where}",
                fix="measure this configuration, or give --recorded alone",
            )
        if wanted[name] != found[name]:
            raise ConfigError(
                f"the recorded numbers are of another configuration: {_difference(found[name], wanted[name])}",
                fix="measure this configuration, or give --recorded alone",
            )


def _difference(there: MatrixProduct, here: MatrixProduct) -> str:
    ours, theirs = asdict(here), asdict(there)
    differing = [f"{key} {theirs[key]} there and {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    return f"{here.name} has {', '.join(differing)}"


def advise(sweep: Sweep, *, other_share: float = OTHER_SHARE) -> Advice:
    """Decide whether FP8 pays, with which recipe, and for the encoder too.

    Args:
        sweep: what was measured.
        other_share: share of a bf16 step that is neither linear layers nor attention, 0 <= other_share < 1.

    Raises:
        ConfigError: ``other_share`` is no such share.
    """
    if not 0.0 <= other_share < 1.0:
        raise ConfigError(f"a share of {other_share} of the step", fix="give a number from 0 to below 1")
    failed = tuple(r for r in RECIPES if _failures(sweep, r, parts=(DECODER, EXPERTS)))
    missing = _missing(sweep)
    if missing:
        return Advice((), None, tuple(_about_failures(sweep)), (), failed=failed, missing=missing)
    recipes = [r for r in RECIPES if r not in failed and any(r in m.times for m in sweep.measured)]
    verdicts = tuple(_verdict(sweep, recipe, other_share=other_share) for recipe in recipes)
    paying = [v for v in verdicts if v.pays]
    fastest = max((v.step_speedup for v in paying), default=0.0)
    equally_fast = [v for v in paying if v.step_speedup >= AS_FAST * fastest]
    chosen = min(equally_fast, key=lambda v: v.output_error, default=None)
    remarks = (*_about_failures(sweep), *_remarks(sweep, verdicts, chosen))
    return Advice(verdicts, chosen, remarks, tuple(_options(sweep, chosen)), failed=failed)


def _missing(sweep: Sweep) -> str:
    """Why nothing can be said about a step; empty if all of it was measured in bf16."""
    absent = [*sweep.unmeasured, *([ATTENTION] if sweep.attention_ms is None else [])]
    if not absent:
        return ""
    why = sweep.stopped or ("see what failed" if sweep.failed else "the sweep was ended from outside")
    return f"{', '.join(absent)} {'has' if len(absent) == 1 else 'have'} no time in bf16: {why}"


def _failures(sweep: Sweep, recipe: str, *, parts: Sequence[str]) -> list[Failed]:
    """Where a recipe failed, of the products that bf16 could compute."""
    part_of = {item.product.name: item.product.fp8 for item in sweep.measured}
    return [f for f in sweep.failed if f.recipe == recipe and part_of.get(f.product) in parts]


def _about_failures(sweep: Sweep) -> Iterator[str]:
    by_problem: dict[tuple[str, str], list[str]] = {}
    for failure in sweep.failed:
        by_problem.setdefault((failure.recipe, failure.problem), []).append(failure.product)
    for (recipe, problem), products in by_problem.items():
        yield f"{recipe} failed at {', '.join(products)}: {problem}"


def _verdict(sweep: Sweep, recipe: str, *, other_share: float) -> Verdict:
    parts_measured = (DECODER, EXPERTS, *(() if _failures(sweep, recipe, parts=(VISION,)) else (VISION,)))
    ratios = {part: _ratio(sweep, recipe, part) for part in parts_measured}
    known = {part: ratio for part, ratio in ratios.items() if ratio is not None}
    errors_of_vision = _errors(sweep, recipe, parts=(VISION,))
    vision = (
        known.get(VISION, 0.0) >= WORTHWHILE
        and errors_of_vision[0] <= OUTPUT_ERROR
        and errors_of_vision[1] <= GRADIENT_ERROR
    )
    parts = (DECODER, EXPERTS, VISION) if vision else (DECODER, EXPERTS)
    before, after = linear_ms(sweep, None, parts=()), linear_ms(sweep, recipe, parts=parts)
    rest = sweep.attention_ms or 0.0
    other = (before + rest) * other_share / (1.0 - other_share)
    output_error, gradient_error = _errors(sweep, recipe, parts=parts)
    return Verdict(
        recipe=recipe,
        vision=vision,
        ratios=known,
        linear_speedup=before / after,
        step_speedup=(before + rest + other) / (after + rest + other),
        step_bound=(before + rest) / (after + rest),
        output_error=output_error,
        gradient_error=gradient_error,
    )


def linear_ms(sweep: Sweep, recipe: str | None, *, parts: Sequence[str]) -> float:
    """Return the time of all products in one micro-batch, milliseconds.

    Args:
        sweep: what was measured.
        recipe: of the products that are in FP8; None = all in bf16.
        parts: which products are (``decoder``, ``experts``, ``vision``), but for those kept in bf16 at the edges.
    """
    total = 0.0
    for item in sweep.measured:
        product = item.product
        in_bf16 = item.times[BF16].step_ms(product)
        if recipe is None or product.fp8 not in parts or recipe not in item.times:
            total += product.count * in_bf16
            continue
        kept = product.edge_count if sweep.keeps_edges else 0
        total += kept * in_bf16 + (product.count - kept) * item.times[recipe].step_ms(product)
    return total


def _of(sweep: Sweep, recipe: str, parts: Sequence[str]) -> Iterator[tuple[MatrixProduct, Timing, Timing]]:
    for item in sweep.measured:
        if item.product.fp8 in parts and recipe in item.times:
            yield item.product, item.times[BF16], item.times[recipe]


def _ratio(sweep: Sweep, recipe: str, part: str) -> float | None:
    """Time in bf16 over time in FP8 of the products of a part; None if none was measured."""
    found = [(p.count * b.step_ms(p), p.count * t.step_ms(p)) for p, b, t in _of(sweep, recipe, (part,))]
    return sum(b for b, _ in found) / sum(t for _, t in found) if found else None


def _errors(sweep: Sweep, recipe: str, *, parts: Sequence[str]) -> tuple[float, float]:
    found = [(t.output_error, t.gradient_error) for _, _, t in _of(sweep, recipe, parts)]
    return max((e for e, _ in found), default=0.0), max((e for _, e in found), default=0.0)


def _remarks(sweep: Sweep, verdicts: Sequence[Verdict], chosen: Verdict | None) -> Iterator[str]:
    if not verdicts:
        yield "no FP8 recipe was measured throughout: bf16 is what this machine trains in"
        return
    for verdict in verdicts:
        if verdict.rounds_too_much:
            yield (
                f"{verdict.recipe} is refused for its rounding: outputs differ from bf16 by {verdict.output_error:.1%} "
                f"(limit {OUTPUT_ERROR:.0%}), gradients by {verdict.gradient_error:.1%} (limit {GRADIENT_ERROR:.0%})"
            )
    best = chosen or max(verdicts, key=lambda v: (not v.rounds_too_much, v.step_speedup))
    for item in sweep.measured:
        if best.recipe in item.times and (best.vision or item.product.fp8 != VISION):
            yield from _slow_product(item, best.recipe)
    if best.ratios.get(EXPERTS, WORTHWHILE) < 1.0:
        yield (
            f"experts lose with {best.recipe} ({best.ratios[EXPERTS]:.2f}x) where the dense layers of the decoder have "
            f"{best.ratios.get(DECODER, 1.0):.2f}x; no option keeps experts alone in bf16, so the sum decides"
        )
    yield from _about_vision(sweep, best)
    yield from _about_rows(sweep, best)


def _slow_product(item: Measured, recipe: str) -> Iterator[str]:
    product, timing = item.product, item.times[recipe]
    if item.times[BF16].step_ms(product) >= timing.step_ms(product):
        return
    ratio = item.times[BF16].step_ms(product) / timing.step_ms(product)
    per_expert = f", {product.rows_per_group:.0f} rows an expert" if product.fp8 == EXPERTS else ""
    bound = timing.host_ms >= LAUNCH_BOUND * (timing.forward_ms + timing.backward_ms)
    why = (
        f"the host needs {timing.host_ms:.2f} ms to launch {timing.forward_ms + timing.backward_ms:.2f} ms of work"
        if bound
        else f"rounding its operands and the FP8 product together take longer than bf16{per_expert}"
    )
    yield f"{product.name} is slower in {recipe} ({ratio:.2f}x): {why}"


def _about_vision(sweep: Sweep, verdict: Verdict) -> Iterator[str]:
    if VISION in verdict.ratios and not verdict.vision:
        why = "not worth its rounding" if verdict.ratios[VISION] < WORTHWHILE else "its rounding is beyond the limit"
        yield f"the encoder stays in bf16: its products have {verdict.ratios[VISION]:.2f}x in {verdict.recipe}, {why}"
    elif verdict.recipe in sweep.refused_vision:
        yield f"the encoder cannot be in {verdict.recipe}: {sweep.refused_vision[verdict.recipe]}"
    elif failures := _failures(sweep, verdict.recipe, parts=(VISION,)):
        yield f"the encoder stays in bf16: {verdict.recipe} failed at {', '.join(f.product for f in failures)}"


def _about_rows(sweep: Sweep, verdict: Verdict) -> Iterator[str]:
    multiple = fp8_alignment(verdict.recipe)
    for product in (item.product for item in sweep.measured if verdict.recipe in item.times):
        if product.fp8 == VISION and not verdict.vision:
            continue
        padded = product.padded_rows(multiple)
        if padded != product.rows and product.name.endswith("fc1"):
            what = f"{product.groups} experts' rows" if product.fp8 == EXPERTS else "rows"
            yield (
                f"{product.name}: {product.rows} {what} are no multiples of {multiple} and are padded to {padded} "
                f"(+{padded / product.rows - 1:.1%}), which is part of the measured time"
            )


def _options(sweep: Sweep, chosen: Verdict | None) -> Iterator[str]:
    if chosen is None:
        yield "precision.fp8=null"
        return
    yield f"precision.fp8={sweep.fp8_format or usual_format(chosen.recipe)}"
    yield f"precision.fp8_recipe={chosen.recipe}"
    if any(item.product.fp8 == VISION for item in sweep.measured):
        yield f"precision.fp8_vision={str(chosen.vision).lower()}"
    if sweep.keeps_edges:
        yield "precision.first_last_layers_bf16=true"
    yield "kernels.transformer_impl=transformer_engine"
    yield "kernels.params_dtype=bf16"
