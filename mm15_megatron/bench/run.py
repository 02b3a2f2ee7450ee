"""The benchmark of one device: survey it, choose slices, measure case by case, write what is known after each."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mm15_megatron.bench.cases import Budget, Case, Device, case_config, why_not_run
from mm15_megatron.bench.fresh import Failure, FreshProcesses
from mm15_megatron.bench.outcome import CaseOutcome
from mm15_megatron.bench.report import Report
from mm15_megatron.bench.slices import Slice, choose_slice
from mm15_megatron.bench.targets import judge
from mm15_megatron.config.dump import diff
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import BackendError, ConfigError
from mm15_megatron.presets import resolve

Write = Callable[[str], None]
# Named, not imported: torch and megatron-core are for the processes that measure.
SURVEY, MEASURE = "mm15_megatron.bench.peak:survey", "mm15_megatron.bench.measure:measure_case"
_PRELOAD = ("mm15_megatron.bench.measure", "mm15_megatron.bench.peak")
DEVICE_PLACE = "{device}"
# Whatever budget is left: what takes so long hangs. The survey waits for the first import of torch, megatron-core and
# Transformer Engine and for the first compilation.
LONGEST_CASE_SECONDS, SURVEY_SECONDS = 180.0, 240.0
_SMALLER_SLICES = 2
_OUT_OF_MEMORY = ("out of memory", "status_alloc_failed")  # torch's and the driver's words, and cuBLAS's


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        command: the command line, for the report.
        device: cpu or cuda.
        presets: the preset of each family.
        cases: in order.
        options: ``section.field=value`` texts that have the last word in every case.
        budget_seconds: how long everything may take.
        margin: share of the device's memory that a slice leaves free.
        micro_batches: micro-batches of a step.
        steps: timed steps of a case.
        environment: environment variables for the report.
        output: where OUTPUT.json and OUTPUT.md are written, ``{device}`` standing for the device's name; None =
            nowhere.
    """

    command: str
    device: str
    presets: dict[str, str]
    cases: tuple[Case, ...]
    options: tuple[str, ...]
    budget_seconds: float
    margin: float
    micro_batches: int
    steps: int
    environment: Mapping[str, str]
    output: Path | None


def check(request: Request) -> None:
    """Check what can be checked before a process is started.

    Raises:
        ConfigError: a number is impossible, a preset or an option unknown.
    """
    for name, value, least in (
        ("--budget-minutes", request.budget_seconds / 60, 0.1),
        ("--steps", request.steps, 1),
        ("--micro-batches", request.micro_batches, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} {value:g} is too little", fix=f"give at least {least:g}")
    if not 0 <= request.margin < 1:
        raise ConfigError(f"--margin {request.margin:g} is no share of the memory", fix="give 0 or more, less than 1")
    for family in dict.fromkeys(case.family for case in request.cases):
        name = request.presets[family]
        cfg = resolve(name)
        if bool(cfg.moe.num_moe_experts) != (family == "moe"):
            kind = "has experts" if cfg.moe.num_moe_experts else "is dense"
            raise ConfigError(f"--{family} {name}: that preset {kind}", fix=f"choose one for --{family}")
        _slice_of(request, family, memory=float("inf"))


def _slice_of(request: Request, family: str, *, memory: float, at_most: int | None = None) -> Slice:
    return choose_slice(
        resolve(request.presets[family]),
        device=request.device,
        memory=memory,
        margin=request.margin,
        micro_batches=request.micro_batches,
        fp8=any(case.recipe is not None for case in request.cases if case.family == family),
        at_most=at_most,
        options=request.options,
    )


def plan(request: Request, *, memory: float) -> dict[str, Slice | str]:
    """Return the slice of each family that a case asks for, or why none fits into ``memory`` bytes."""
    slices: dict[str, Slice | str] = {}
    for family in dict.fromkeys(case.family for case in request.cases):
        try:
            slices[family] = _slice_of(request, family, memory=memory)
        except ConfigError as error:
            slices[family] = error.problem
    return slices


class Processes(Protocol):
    """What calls a function in a process of its own (``FreshProcesses`` is one)."""

    def call(self, function: str, *, seconds: float, say: Write, **arguments: Any) -> Any: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


def run_bench(request: Request, *, write: Write, processes: Processes | None = None) -> Report:
    """Measure everything that was asked for and fits into the budget.

    Args:
        request: what.
        write: takes progress, line by line.
        processes: who measures; None = fresh processes.

    Raises:
        ConfigError: as :func:`check`.
        BackendError: the device is not usable.
    """
    check(request)
    bench = _Bench(request, write, processes or FreshProcesses(preload=_PRELOAD))
    try:
        bench.survey()
        for case in request.cases:
            bench.deal_with(case)
        bench.report.complete = True
        bench.save()
    finally:
        bench.processes.close()
    return bench.report


class _Bench:
    """The state of a running benchmark: what is known, what is left of the budget."""

    def __init__(self, request: Request, write: Write, processes: Processes) -> None:
        self.request, self.write, self.processes, self.started = request, write, processes, time.monotonic()
        self.budget = Budget(request.budget_seconds)
        self.report = Report(request.command, request.environment, request.budget_seconds, presets=request.presets)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    @property
    def device(self) -> Device:
        assert self.report.device is not None, "the device is surveyed first"
        return self.report.device

    def say(self, text: str) -> None:
        self.write(f"[{self.spent:5.0f} s] {text}")

    def save(self) -> None:
        """Judge and write what is known."""
        report = self.report
        report.spent_seconds = self.spent
        report.targets = judge(
            report.outcomes,
            peak_tflops=report.peak_tflops,
            device=self.request.device,
            presets=self.request.presets,
        )
        output = self.request.output
        if output is not None and report.device is not None:
            report.write(output.with_name(output.name.replace(DEVICE_PLACE, short_name(report.device.name))))

    def survey(self) -> None:
        """Look at the device, measure its peak, choose the slices."""
        answer = self.processes.call(
            SURVEY,
            seconds=min(SURVEY_SECONDS, self.request.budget_seconds),
            say=self.say,
            kind=self.request.device,
            cfg=resolve(self.request.presets["dense"]),
        )
        if isinstance(answer, Failure):
            if answer.bad_input is not None:
                raise answer.bad_input
            raise BackendError(
                f"the device cannot be surveyed: {answer.kind}: {answer.message}\n{answer.traceback}",
                fix="make torch work on it first",
            )
        self.report.device, self.report.peak = answer
        best = max(self.report.peak, key=lambda product: product["tflops"])
        self.report.peak_tflops = best["tflops"]
        self.say(f"measured peak {best['tflops']:.4g} TFLOP/s ({best['name']})")
        for problem in (self.device.transformer_engine_problem, self.device.compile_problem):
            if problem is not None:
                self.say(problem)
        self.report.slices = plan(self.request, memory=self.device.memory)
        for family, part in self.report.slices.items():
            self.say(f"{family}: " + (f"not run: {part}" if isinstance(part, str) else part.describe()))
        self.save()

    def deal_with(self, case: Case) -> None:
        """Measure ``case`` or say why not, and write what is known."""
        outcome = self.attempt(case)
        for _ in range(_SMALLER_SLICES):
            if outcome.status != "failed" or not self.may_shrink(case, outcome):
                break
            self.shrink(case)
            outcome = self.attempt(case)
        self.report.outcomes.append(outcome)
        figures = outcome.figures
        told = f"{outcome.tflops:.4g} TFLOP/s, {outcome.tokens_per_second:.0f} tokens/s" if figures else outcome.reason
        self.say(f"{case.name}: {outcome.status}" + (f": {told}" if told else ""))
        if figures and outcome.reason:
            self.say(f"{case.name}: {outcome.reason}")
        self.save()

    def attempt(self, case: Case) -> CaseOutcome:
        """Run ``case`` on its family's slice as it is now."""
        part = self.report.slices[case.family]
        reason = part if isinstance(part, str) else why_not_run(case, self.device)
        if isinstance(part, str) or reason is not None:
            return CaseOutcome(case, "not run", str(reason))
        try:
            cfg = case_config(case, part.config, device=self.device, options=self.request.options)
        except ConfigError as error:
            return CaseOutcome(case, "failed", f"ConfigError: {error.problem}", traceback=str(error))
        expected = self.budget.expected(
            case, cfg, steps=self.request.steps, peak_tflops=self.report.peak_tflops or float("inf")
        )
        refusal = self.budget.refusal(expected, spent=self.spent)
        if refusal is not None:
            return CaseOutcome(case, "not run", refusal)
        return self.measured(case, cfg, part)

    def measured(self, case: Case, cfg: RunConfig, part: Slice) -> CaseOutcome:
        """Run ``case`` in a fresh process."""
        begin, left = self.spent, self.budget.seconds - self.spent
        self.say(f"{case.name} ...")
        answer = self.processes.call(
            MEASURE,
            seconds=min(LONGEST_CASE_SECONDS, left),
            say=lambda text: self.say(f"  {text}"),
            cfg=cfg,
            steps=self.request.steps,
            beside_bare=case.beside_bare,
        )
        seconds = self.spent - begin
        settings = {change.path: change.right for change in diff(part.config, cfg)}
        common: dict[str, Any] = {"layers": cfg.language.num_layers, "settings": settings, "seconds": seconds}
        if isinstance(answer, Failure):
            if answer.too_late and left < LONGEST_CASE_SECONDS:
                return CaseOutcome(case, "not run", f"out of time: ended after {seconds:.0f} s", **common)
            reason = f"{answer.kind}: {answer.message}"
            return CaseOutcome(case, "failed", reason, traceback=answer.traceback or reason, **common)
        self.budget.note(case, seconds)
        problem = answer["problem"]
        return CaseOutcome(case, "failed" if problem else "ran", problem or "", figures=answer, **common)

    def may_shrink(self, case: Case, outcome: CaseOutcome) -> bool:
        """Whether the first case of a family ran out of memory: then all of them take a smaller slice."""
        earlier = [known for known in self.report.outcomes if known.case.family == case.family and known.figures]
        return not earlier and any(word in outcome.traceback.lower() for word in _OUT_OF_MEMORY)

    def shrink(self, case: Case) -> None:
        """Take a step fewer layers for the whole family, or give it up."""
        part = self.report.slices[case.family]
        assert isinstance(part, Slice), "only a slice that ran can run out of memory"
        self.say(f"{case.name} ran out of memory with {part.config.language.num_layers} layers: a smaller slice")
        try:
            self.report.slices[case.family] = _slice_of(
                self.request, case.family, memory=self.device.memory, at_most=part.config.language.num_layers - 1
            )
        except ConfigError as error:
            self.report.slices[case.family] = f"no slice fits: {error.problem}"


def short_name(device: str) -> str:
    """Return a device's name as a part of a file's: NVIDIA H200 is h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-") or "device"


def exit_code(outcomes: Sequence[CaseOutcome]) -> int:
    """Return 0 if something ran and nothing failed, else 1."""
    failed = any(outcome.status == "failed" for outcome in outcomes)
    return int(failed or not any(outcome.status == "ran" for outcome in outcomes))
