"""Put the phases and the evaluation into ``report.json``, and show them as one table.

python -m examples.quickstart.summarise --run-dir runs/quickstart
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm15_megatron.evaluation.report import library_versions, machine_facts, write_report

NAMES = {
    "single": "one digit",
    "pair": "two digits, all right",
    "three": "three digits, all right",
    "four": "four digits, all right",
    "count": "how many digits",
    "cell": "the digit of a cell",
}
STAGES = ("pretrain", "sft")


def phase_lines(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a phase."""
    lines = [f"{'phase':<26}{'seconds':>9}{'exit code':>11}{'peak MiB':>10}"]
    for phase in phases:
        name = phase["name"] + (" (SIGTERM)" if phase["terminated"] else "")
        lines.append(f"{name:<26}{phase['seconds']:>9.1f}{phase['exit_code']:>11}{phase['peak_memory_mib']:>10}")
    total = sum(phase["seconds"] for phase in phases)
    return [*lines, f"{'all':<26}{total:>9.1f}{'':>11}{max(phase['peak_memory_mib'] for phase in phases):>10}"]


def accuracy_lines(figures: Mapping[str, Any]) -> list[str]:
    """One line a kind of question: the model, its 95 % interval, and the baselines."""
    nearest, blind = figures["baselines"]["3_nearest_neighbours"], figures["baselines"]["shuffled_pictures"]
    chance = figures["baselines"]["chance"]
    lines = [
        f"{'held-out questions':<26}{'n':>5}{'right':>8}{'95 % interval':>17}{'3-NN':>8}{'shuffled':>10}{'chance':>8}"
    ]
    for kind, score in figures["accuracy"].items():
        low, high = score["interval95"]
        neighbours = f"{nearest[kind]['accuracy']:.3f}" if kind in nearest else "-"
        lines.append(
            f"{NAMES[kind]:<26}{score['n']:>5}{score['accuracy']:>8.3f}{f'{low:.3f} - {high:.3f}':>17}{neighbours:>8}"
            f"{blind[kind]['accuracy']:>10.3f}{chance[kind]:>8.3f}"
        )
    return lines


def steps_of(run_dir: Path) -> int:
    """Steps that a run has taken."""
    last = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return int(json.loads(last)["step"])


def main() -> None:
    """Read the command line, write the report, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"), help="the quickstart's folder")
    folder = parser.parse_args().run_dir
    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    phases = [json.loads(line) for line in (folder / "phases.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {stage: steps_of(folder / stage) for stage in STAGES}
    report = {
        **figures,
        "steps": steps,
        "phases": phases,
        "seconds": round(sum(phase["seconds"] for phase in phases), 1),
        "peak_memory_mib": max(phase["peak_memory_mib"] for phase in phases),
        "machine": machine_facts(),
        "versions": library_versions(),
    }
    write_report(folder / "report.json", report)
    single = figures["accuracy"]["single"]
    print("\n".join([*phase_lines(phases), "", *accuracy_lines(figures), ""]))
    print(f"{figures['parameters']:,} parameters, {' + '.join(f'{count} steps of {s}' for s, count in steps.items())}")
    print(f"report: {folder / 'report.json'}, pictures: {folder / 'answers.png'}")
    print(f"held-out accuracy: {single['accuracy']:.3f} (n={single['n']})")


if __name__ == "__main__":
    main()
