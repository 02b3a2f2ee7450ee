"""The report of a benchmark: everything as JSON, and the tables that a reader wants as markdown."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mm15_megatron.bench.cases import Device
from mm15_megatron.bench.kernels import CLASSES
from mm15_megatron.bench.outcome import CaseOutcome
from mm15_megatron.bench.slices import Slice
from mm15_megatron.bench.targets import Target
from mm15_megatron.evaluation.report import commit, library_versions, machine_facts, write_report

LEFT_OUT = (
    "One GPU leaves out the communication of tensor, pipeline, expert and data parallelism, and the input pipeline: "
    "rows lie on the device before the step begins."
)
ROWS = (
    "Every row is full: one sample over its whole length (as model FLOPs count attention), tiles spread evenly, random "
    "text between them with a target behind every token. All steps take the same rows."
)
LIBRARIES = ("torch", "megatron-core", "transformer-engine", "apex", "triton", "nvidia-cudnn-cu13", "nvidia-cublas")


@dataclass
class Report:
    """What is known so far.

    Attributes:
        command: the command line.
        environment: environment variables that matter, as they are set.
        budget_seconds: how long it may take.
        date: when it began, UTC.
        spent_seconds: how long it took.
        complete: every case was dealt with.
        device: the device; None = not yet looked at.
        peak: the measured products, as plain values.
        peak_tflops: the fastest of them.
        slices: by family; a family without a slice has a text that says why.
        presets: by family.
        outcomes: the cases that were dealt with.
        targets: judged by them.
    """

    command: str
    environment: Mapping[str, str]
    budget_seconds: float
    date: str = field(default_factory=lambda: datetime.now(tz=UTC).date().isoformat())
    spent_seconds: float = 0.0
    complete: bool = False
    device: Device | None = None
    peak: list[dict[str, Any]] = field(default_factory=list)
    peak_tflops: float | None = None
    slices: dict[str, Slice | str] = field(default_factory=dict)
    presets: dict[str, str] = field(default_factory=dict)
    outcomes: list[CaseOutcome] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def write(self, output: Path) -> None:
        """Write OUTPUT.json and OUTPUT.md; a reader sees the former files or the whole new ones."""
        write_report(output.with_name(f"{output.name}.json"), content(self))
        target = output.with_name(f"{output.name}.md")
        temporary = target.with_name(f".{target.name}")
        temporary.write_text(markdown(self), encoding="utf-8")
        os.replace(temporary, target)


def plain(value: Any) -> Any:
    """Return ``value`` as JSON knows it: tuples as lists, and numbers that are not finite as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def content(report: Report) -> dict[str, Any]:
    """Return everything as plain values."""
    found: dict[str, Any] = plain(
        {
            "command": report.command,
            "date": report.date,
            "commit": commit(),
            "complete": report.complete,
            "environment": dict(report.environment),
            "budget_seconds": report.budget_seconds,
            "spent_seconds": report.spent_seconds,
            "device": None if report.device is None else asdict(report.device),
            "machine": machine_facts(),
            "versions": library_versions(LIBRARIES),
            "matrix_products": report.peak,
            "measured_peak_tflops": report.peak_tflops,
            "slices": {family: _slice_content(part) for family, part in report.slices.items()},
            "presets": report.presets,
            "cases": [outcome.content() for outcome in report.outcomes],
            "targets": [asdict(target) | {"verdict": target.verdict} for target in report.targets],
            "leaves_out": LEFT_OUT,
        }
    )
    return found


def _slice_content(part: Slice | str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"not_run": part}
    return {
        "slice": part.describe(),
        "leaves_out": part.leaves_out(),
        "vision_share_of_flops": part.vision_share,
        "vision_share_of_flops_whole_model": part.whole_vision_share,
        "estimated_bytes": asdict(part.estimate) | {"total": part.estimate.total},
        "estimated_bytes_fp8": None if part.fp8_estimate is None else asdict(part.fp8_estimate),
        "most_demanding_case_bytes": part.needed,
        "allowed_bytes": part.allowed,
    }


def markdown(report: Report) -> str:
    """Return the tables."""
    lines = ["# One device: slices of the large models against its own matrix peak", "", *_head(report)]
    lines += ["", "## Targets", "", *_target_lines(report.targets)]
    lines += ["", "## Slices", "", *_slice_lines(report)]
    for title, table in (
        ("Cases", _case_table(report)),
        ("Memory, GiB measured (over the estimate of `accounting`)", _memory_table(report.outcomes)),
        ("Beside a bare megatron-core loop", _bare_table(report.outcomes)),
        ("Kernel time of a step, ms (share of all kernel time)", _breakdown_table(report.outcomes)),
        ("Stillness and host waits, for one step", _wait_table(report.outcomes)),
        ("Not measured", _missing_lines(report.outcomes)),
        ("Settings", _setting_lines(report.outcomes)),
        ("Matrix products, bf16, random data", _product_table(report)),
    ):
        if table:
            lines += ["", f"## {title}", "", *table]
    return "\n".join(lines) + "\n"


def _head(report: Report) -> list[str]:
    device = report.device
    versions = ", ".join(f"{name} {number}" for name, number in library_versions(LIBRARIES).items())
    found = "the device was not reached" if device is None else f"{device.name}, {device.memory / 2**30:.1f} GiB free"
    if device is not None and device.kind == "cuda":
        found += f", driver {device.driver or 'unknown'}, CUDA {device.cuda}"
    state = "complete" if report.complete else "INTERRUPTED OR STILL RUNNING"
    lines = [
        f"{report.date}, commit {commit() or 'unknown'}.",
        f"`{report.command}`: {state}, {report.spent_seconds / 60:.1f} of {report.budget_seconds / 60:.1f} minutes.",
        "",
        f"{found}; {versions}; "
        + (", ".join(f"{k}={v}" for k, v in report.environment.items()) or "no environment variables set"),
    ]
    if device is not None and device.compile_problem is not None:
        lines += ["", f"kernels.compile_fusions is off in every case: {device.compile_problem}"]
    return lines


def _target_lines(targets: Sequence[Target]) -> list[str]:
    return [f"- **{target.verdict}**: {target.name}; {target.text}" for target in targets] or ["- nothing was judged"]


def _slice_lines(report: Report) -> list[str]:
    lines = [LEFT_OUT, "", ROWS, ""]
    for family, part in report.slices.items():
        name = f"- **{family}** ({report.presets[family]}): "
        if isinstance(part, str):
            lines.append(f"{name}not run: {part}")
            continue
        needed, allowed = part.needed / 2**30, part.allowed / 2**30
        lines.append(f"{name}{part.describe()}; {needed:.1f} GiB expected at most, {allowed:.1f} GiB allowed")
        lines += [f"  - leaves out {line}" for line in part.leaves_out()]
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(*heads), _row(*["---"] * len(heads)), *(_row(*row) for row in rows)] if rows else []


def _measured(outcomes: Sequence[CaseOutcome]) -> list[CaseOutcome]:
    return [outcome for outcome in outcomes if outcome.figures]


def _case_table(report: Report) -> list[str]:
    heads = ("case", "layers", "s a step", "tokens/s", "tiles/s", "model TFLOP/s", "of the peak", "loss", "result")
    rows = []
    for outcome in _measured(report.outcomes):
        figures, losses = outcome.figures, outcome.figures["losses"]
        share = f"{outcome.tflops / report.peak_tflops:.1%}" if report.peak_tflops else ""
        rows.append(
            (
                outcome.case.name,
                str(outcome.layers),
                f"{figures['median_step_seconds']:.4g}",
                f"{outcome.tokens_per_second:.0f}",
                f"{figures['tiles_per_second']:.1f}",
                f"{outcome.tflops:.4g}",
                share,
                f"{losses[0]:.3f} to {losses[-1]:.3f}",
                outcome.status,
            )
        )
    return _table(heads, rows)


def _memory_table(outcomes: Sequence[CaseOutcome]) -> list[str]:
    parts = ("parameters", "gradients", "optimizer", "activations", "total")
    rows = []
    for outcome in _measured(outcomes):
        memory = outcome.figures["memory"]
        if memory["measured_bytes"]:
            cells = [
                f"{memory['measured_bytes'][part] / 2**30:.1f} ({memory['measured_over_estimated'].get(part, 0):.2f})"
                for part in parts
            ]
            rows.append((outcome.case.name, *cells, f"{memory['max_reserved_bytes'] / 2**30:.1f}"))
    return _table(("case", *parts, "reserved"), rows)


def _bare_table(outcomes: Sequence[CaseOutcome]) -> list[str]:
    rows = []
    for outcome in _measured(outcomes):
        bare = outcome.figures["beside_bare"]
        if bare and bare["problem"] is None:
            low, high = bare["quartiles"]
            medians = [f"{statistics.median(bare['seconds'][loop]):.4g}" for loop in ("bare", "ours")]
            rows.append((outcome.case.name, *medians, f"{bare['ratio']:.3f}", f"{low:.3f} to {high:.3f}"))
        elif bare:
            rows.append((outcome.case.name, "", "", bare["problem"], ""))
    return _table(("case", "s a step, bare", "s a step, ours", "ours / bare, median of pairs", "quartiles"), rows)


def _breakdown_table(outcomes: Sequence[CaseOutcome]) -> list[str]:
    rows = []
    for outcome in _measured(outcomes):
        profile = outcome.figures["profile"]
        if profile["problem"] is not None:
            rows.append((outcome.case.name, profile["problem"], *[""] * (len(CLASSES) - 1)))
            continue
        cells = [f"{profile['milliseconds'][name]:.1f} ({profile['shares'][name]:.0%})" for name in CLASSES]
        rows.append((outcome.case.name, *cells))
    return _table(("case", *CLASSES), rows)


def _wait_table(outcomes: Sequence[CaseOutcome]) -> list[str]:
    rows = []
    for outcome in _measured(outcomes):
        profile = outcome.figures["profile"]
        if profile["problem"] is not None:
            continue
        longest = profile["longest_gaps"]
        waits = ", ".join(f"{name} {wait['calls']:g}" for name, wait in profile["host_waits"].items())
        rows.append(
            (
                outcome.case.name,
                f"{profile['window_milliseconds']:.1f}",
                f"{profile['idle_share']:.1%}",
                f"{profile['gaps_over_10_us']:g}",
                f"{longest[0]['microseconds']:.0f} us" if longest else "none",
                waits or "none seen",
            )
        )
    heads = ("case", "ms between first and last kernel", "idle", "pauses over 10 us", "longest pause", "host waits")
    table = _table(heads, rows)
    return [*table, "", "One cudaDeviceSynchronize or two of the profile are its own."] if table else []


def _missing_lines(outcomes: Sequence[CaseOutcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        if outcome.status != "ran":
            lines.append(
                f"- {outcome.case.name}: {'FAILED' if outcome.status == 'failed' else 'not run'}: {outcome.reason}"
            )
    return lines


def _setting_lines(outcomes: Sequence[CaseOutcome]) -> list[str]:
    return [
        f"- {outcome.case.name}: " + (", ".join(f"{path}={value}" for path, value in outcome.settings.items()))
        for outcome in outcomes
        if outcome.settings
    ]


def _product_table(report: Report) -> list[str]:
    rows = [
        (product["name"], f"{product['m']} x {product['k']} x {product['n']}", f"{product['tflops']:.4g}")
        for product in report.peak
    ]
    table = _table(("product", "rows x inner x columns", "TFLOP/s"), rows)
    if table and report.peak_tflops:
        table += ["", f"The fastest one, **{report.peak_tflops:.4g} TFLOP/s**, is the measured peak."]
    return table
