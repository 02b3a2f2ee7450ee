"""The targets of one GPU, judged by what was measured beside its own matrix peak. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mm15_megatron.bench.outcome import CaseOutcome

DENSE_SHARE_OF_PEAK = 0.60
FP8_OVER_BF16, FP8_OVER_BF16_STRETCH = 1.25, 1.35
MOE_TFLOPS = 300.0
LOOP_OVERHEAD = 0.03
JUDGED_PRESETS = {"dense": "mm1_30b", "moe": "mm1_3b_moe"}


@dataclass(frozen=True)
class Target:
    """One target and what became of it.

    Attributes:
        name: what is measured.
        goal: the least value.
        value: what was found; None = not measured.
        text: the numbers in words, or why it is not judged.
    """

    name: str
    goal: float
    value: float | None
    text: str

    @property
    def verdict(self) -> str:
        """Met, not met or not judged."""
        return "not judged" if self.value is None else "met" if self.value >= self.goal else "NOT MET"


def judge(
    outcomes: Sequence[CaseOutcome], *, peak_tflops: float | None, device: str, presets: dict[str, str]
) -> list[Target]:
    """Judge every target.

    Args:
        outcomes: the cases, run or not.
        peak_tflops: the device's measured peak.
        device: cpu or cuda.
        presets: the preset of each family.
    """
    return [
        _dense_share(outcomes, peak_tflops, _objection("dense", device, presets)),
        _fp8_gain(outcomes, _objection("dense", device, presets)),
        _moe_rate(outcomes, _objection("moe", device, presets)),
        _loop(outcomes, "dense", _objection("dense", device, presets)),
    ]


def _objection(family: str, device: str, presets: dict[str, str]) -> str | None:
    """Why a family's target does not apply, or None if it does."""
    if device != "cuda":
        return "a target for GPUs"
    if presets.get(family) != JUDGED_PRESETS[family]:
        return f"a target of {JUDGED_PRESETS[family]}"
    return None


def _ran(outcomes: Sequence[CaseOutcome], family: str) -> list[CaseOutcome]:
    return [outcome for outcome in outcomes if outcome.status == "ran" and outcome.case.family == family]


def _dense_share(outcomes: Sequence[CaseOutcome], peak: float | None, objection: str | None) -> Target:
    name = f"30B slice, bf16: at least {DENSE_SHARE_OF_PEAK:.0%} of the measured matrix peak"
    bf16 = [outcome for outcome in _ran(outcomes, "dense") if outcome.case.recipe is None]
    if objection or not bf16 or not peak:
        return Target(name, DENSE_SHARE_OF_PEAK, None, objection or "no bf16 case of the slice ran")
    found = max(bf16, key=lambda outcome: outcome.tflops)
    share = found.tflops / peak
    text = f"{share:.1%}: {found.tflops:.0f} of {peak:.0f} TFLOP/s ({found.case.name})"
    return Target(name, DENSE_SHARE_OF_PEAK, share, text)


def _fp8_gain(outcomes: Sequence[CaseOutcome], objection: str | None) -> Target:
    name = f"30B slice: best FP8 at least {FP8_OVER_BF16:g}x bf16 (stretch {FP8_OVER_BF16_STRETCH:g}x)"
    ran = _ran(outcomes, "dense")
    bf16 = [outcome for outcome in ran if outcome.case.recipe is None]
    base = max(bf16, key=lambda outcome: outcome.tflops, default=None)
    fp8 = [o for o in ran if o.case.recipe is not None and base is not None and o.layers == base.layers]
    if objection or base is None or not fp8:
        return Target(name, FP8_OVER_BF16, None, objection or "bf16 and FP8 did not both run on the same slice")
    found = max(fp8, key=lambda outcome: outcome.tokens_per_second)
    ratio = found.tokens_per_second / base.tokens_per_second
    text = (
        f"{ratio:.3f}x: {found.tokens_per_second:.0f} tokens/s ({found.case.name}) over "
        f"{base.tokens_per_second:.0f} ({base.case.name})"
    )
    return Target(name, FP8_OVER_BF16, ratio, text)


def _moe_rate(outcomes: Sequence[CaseOutcome], objection: str | None) -> Target:
    name = f"3B-MoE slice with its encoder: at least {MOE_TFLOPS:.0f} model TFLOP/s"
    ran = _ran(outcomes, "moe")
    if objection or not ran:
        return Target(name, MOE_TFLOPS, None, objection or "no case of the slice ran")
    found = max(ran, key=lambda outcome: outcome.tflops)
    return Target(name, MOE_TFLOPS, found.tflops, f"{found.tflops:.0f} TFLOP/s ({found.case.name})")


def _loop(outcomes: Sequence[CaseOutcome], family: str, objection: str | None) -> Target:
    goal = 1 / (1 + LOOP_OVERHEAD)
    name = f"30B slice: our step at most {LOOP_OVERHEAD:.0%} slower than a bare megatron-core loop on the same layers"
    beside = [outcome.figures["beside_bare"] for outcome in _ran(outcomes, family) if outcome.case.beside_bare]
    found = next((figures for figures in beside if figures and figures["problem"] is None), None)
    if objection or found is None:
        problem = next((figures["problem"] for figures in beside if figures), "no case was timed beside it")
        return Target(name, goal, None, objection or str(problem))
    low, high = found["quartiles"]
    text = f"ours / bare {found['ratio']:.3f} (quartiles {low:.3f} and {high:.3f})"
    return Target(name, goal, 1 / found["ratio"], text)
