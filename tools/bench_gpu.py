"""Measure one GPU: slices of MM1-30B and MM1-3B-MoE in bf16 and FP8, beside its own matrix peak.

    python tools/bench_gpu.py [--cases A,B] [--option section.field=value ...] [--budget-minutes 7.5] [--output PATH]

Exit codes: 0 every case that could run did; 1 a case failed, or none ran; 2 something in the input is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mm15_megatron.bench.cases import CASES, DEFAULT_PRESETS, FAMILIES, Device, case_config, choose_cases, why_not_run
from mm15_megatron.bench.report import LEFT_OUT
from mm15_megatron.bench.run import DEVICE_PLACE, Request, check, exit_code, plan, run_bench
from mm15_megatron.config.dump import diff
from mm15_megatron.errors import MM15Error

EXIT_BAD_INPUT = 2
# Slices fill the memory, and cases differ in what they allocate when: fixed segments would fragment.
# NCCL may not register what such a segment holds when graphs are captured.
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"}
RESULTS = Path("benchmarks/results") / f"gpu-{DEVICE_PLACE}"
_SHOWN = (*ENVIRONMENT, "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def arguments() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="cases, in the order in which they run:\n"
        + "\n".join(f"  {case.name:<28} {case.family}, {case.precision}" for case in CASES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cases", help="names separated by commas [all]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the tool [cuda]")
    for family in FAMILIES:
        shown = ", ".join(f"{presets[family]} on {device}" for device, presets in DEFAULT_PRESETS.items())
        parser.add_argument(f"--{family}", metavar="PRESET", help=f"preset of the {family} slice [{shown}]")
    parser.add_argument(
        "--option", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="has the last word in every case"
    )
    parser.add_argument("--budget-minutes", type=float, default=7.5, help="for everything [7.5]")
    parser.add_argument("--margin", type=float, default=0.12, help="share of the memory that is kept free [0.12]")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of a step [4]")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a case [5]")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"write OUTPUT.json and OUTPUT.md, {DEVICE_PLACE} is the device's name [{RESULTS} on cuda, none on cpu]",
    )
    parser.add_argument("--plan", action="store_true", help="print cases and slices for --memory-gib, and stop")
    parser.add_argument("--memory-gib", type=float, default=139.0, help="free memory for --plan [139]")
    return parser


def request_of(given: argparse.Namespace, *, command: str) -> Request:
    """Return what the command line asks for.

    Raises:
        ConfigError: a case is unknown.
    """
    chosen = {"dense": given.dense, "moe": given.moe}
    return Request(
        command=command,
        device=given.device,
        presets={family: chosen[family] or DEFAULT_PRESETS[given.device][family] for family in FAMILIES},
        cases=choose_cases(given.cases),
        options=tuple(given.option),
        budget_seconds=given.budget_minutes * 60,
        margin=given.margin,
        micro_batches=given.micro_batches,
        steps=given.steps,
        environment={name: os.environ[name] for name in _SHOWN if name in os.environ},
        output=given.output or (RESULTS if given.device == "cuda" else None),
    )


def show_plan(request: Request, *, memory: float) -> None:
    """Print the slices that ``memory`` bytes allow and the settings of every case."""
    capable = Device(request.device, "planned", memory)
    slices = plan(request, memory=memory)
    for family, part in slices.items():
        print(f"{family} ({request.presets[family]}): " + (part if isinstance(part, str) else part.describe()))
        if not isinstance(part, str):
            print(f"  {part.needed / 2**30:.1f} GiB expected at most, {part.allowed / 2**30:.1f} GiB allowed")
            print(*(f"  leaves out {line}" for line in part.leaves_out()), sep="\n")
    for case in request.cases:
        part = slices[case.family]
        reason = part if isinstance(part, str) else why_not_run(case, capable)
        if isinstance(part, str) or reason is not None:
            print(f"{case.name}: not run: {reason}")
            continue
        changes = diff(part.config, case_config(case, part.config, device=capable, options=request.options))
        print(f"{case.name}: " + ", ".join(f"{change.path}={change.right}" for change in changes))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    given = arguments().parse_args(words)
    if given.device == "cuda":
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    try:
        request = request_of(given, command=" ".join(["python", "tools/bench_gpu.py", *words]))
        if given.plan:
            check(request)
            show_plan(request, memory=given.memory_gib * 2**30)
            return 0
        report = run_bench(request, write=lambda line: print(line, flush=True))
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print()
    for target in report.targets:
        print(f"{target.verdict}: {target.name}; {target.text}")
    print(LEFT_OUT)
    return exit_code(report.outcomes)


if __name__ == "__main__":
    sys.exit(main())
