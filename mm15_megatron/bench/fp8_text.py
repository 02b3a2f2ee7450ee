"""FP8 advice in words: the measured products, the verdict on every recipe, what to do."""

from __future__ import annotations

from collections.abc import Sequence

from mm15_megatron.accounting.matrix_products import EXPERTS, MatrixProduct
from mm15_megatron.bench.fp8_advice import OTHER_SHARE, WORTHWHILE, Advice, linear_ms
from mm15_megatron.bench.fp8_record import BF16, RECIPES, Sweep


def _shape(product: MatrixProduct) -> str:
    experts = f" for {product.groups} experts" if product.fp8 == EXPERTS else ""
    passes = f", {product.forward_passes} forward" if product.forward_passes > 1 else ""
    sizes = f"{product.rows} x {product.in_features} -> {product.out_features}"
    return f"{sizes}{experts}, {product.count} times{passes}"


def advice_text(sweep: Sweep, advice: Advice, *, other_share: float = OTHER_SHARE) -> str:
    """Lay the numbers and the advice out for a reader."""
    versions = ", ".join(f"{name} {version}" for name, version in sweep.versions.items())
    return "\n".join(
        [
            f"FP8 advice for {sweep.preset or 'a configuration without preset'} on {sweep.device}",
            f"numbers: {sweep.source}",
            f"measured {sweep.date} with {versions or 'unknown versions'}",
            "",
            *_product_table(sweep),
            "",
            *([] if advice.missing else _verdict_table(sweep, advice, other_share=other_share)),
            *(f"not tried: {recipe}: {reason}" for recipe, reason in sweep.refused.items()),
            "",
            headline(advice),
            *(f"- {remark}" for remark in advice.remarks),
            "",
            *(["options to copy:", *(f"  {option}" for option in advice.options), ""] if advice.options else []),
        ]
    )


def headline(advice: Advice) -> str:
    """Return the verdict in one sentence."""
    if advice.missing:
        return f"no advice: {advice.missing}"
    failed = f"; no verdict on {', '.join(advice.failed)}: failed" if advice.failed else ""
    if advice.chosen is not None:
        chosen = advice.chosen
        return (
            f"FP8 pays: {chosen.recipe}, {chosen.linear_speedup:.2f}x of the linear layers, about "
            f"{chosen.step_speedup:.2f}x of the step (at most {chosen.step_bound:.2f}x){failed}"
        )
    usable = [v for v in advice.verdicts if not v.rounds_too_much]
    if not usable:
        return f"FP8 cannot be used here: keep bf16{failed}"
    best = max(usable, key=lambda v: v.step_speedup)
    return (
        f"FP8 does not pay here: the best recipe, {best.recipe}, has {best.linear_speedup:.2f}x of the linear layers "
        f"and about {best.step_speedup:.2f}x of the step, below {WORTHWHILE:.2f}x: keep bf16{failed}"
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _product_table(sweep: Sweep) -> list[str]:
    tried = {*(r for item in sweep.measured for r in item.times), *(failure.recipe for failure in sweep.failed)}
    recipes = [r for r in RECIPES if r in tried]
    rows = [["product", "rows x in -> out of one rank, times a micro-batch", "bf16 ms", "TFLOP/s", *recipes]]
    for item in sweep.measured:
        product, base = item.product, item.times[BF16]
        spent = base.step_ms(product)
        passes = product.forward_passes + product.weight_gradient + product.input_gradient
        failed = {failure.recipe for failure in sweep.failed if failure.product == product.name}
        cells = [
            f"{item.times[r].step_ms(product):.3f} ({spent / item.times[r].step_ms(product):.2f}x)"
            if r in item.times
            else ("failed" if r in failed else "bf16")
            for r in recipes
        ]
        rows.append(
            [product.name, _shape(product), f"{spent:.3f}", f"{passes * product.flops / spent / 1e9:.0f}", *cells]
        )
    return _table(rows)


def _verdict_table(sweep: Sweep, advice: Advice, *, other_share: float) -> list[str]:
    before, attention = linear_ms(sweep, None, parts=()), sweep.attention_ms or 0.0
    lines = [
        f"one micro-batch in bf16: linear layers {before:.2f} ms, attention {attention:.2f} ms (measured); "
        f"assumed: {other_share:.0%} of the step is neither.",
        "One rank without communication; connector, norms, activations, loss and optimizer belong to what is assumed. "
        "Errors are of Gaussian",
        "data, which has no outliers: a run's losses are the last word.",
    ]
    if any(verdict.recipe == "delayed" for verdict in advice.verdicts):
        lines += [
            "delayed: each layer was timed alone and updates its amax history by itself, where a run updates those of",
            "all layers in one go: its times are pessimistic.",
        ]
    if not advice.verdicts:
        return lines
    rows = [
        ["recipe", "linear layers", "step, about", "bound of the step", "error of outputs", "of gradients", "parts"]
    ]
    for v in advice.verdicts:
        parts = ", ".join(f"{part} {ratio:.2f}x" for part, ratio in v.ratios.items())
        speedups = (f"{x:.2f}x" for x in (v.linear_speedup, v.step_speedup, v.step_bound))
        rows.append([v.recipe, *speedups, f"{v.output_error:.1%}", f"{v.gradient_error:.1%}", parts])
    return [*lines, "", *_table(rows)]
