"""Measure how long data-parallel ranks wait for each other: rows dealt in turn against rows dealt by their tiles.

    python tools/bench_balance.py [--steps 200] [--output benchmarks/results/balance-cpu]

Steps are drawn from ``benchmarks/data/tile_histograms.json``; the sources come in the order of the project's mixture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mm15_megatron.accounting.row_cost import row_cost
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.data.dealing import deal_evenly, deal_in_order
from mm15_megatron.data.mixture import Mixture, Weights
from mm15_megatron.evaluation.report import library_versions, machine_facts, write_report
from mm15_megatron.presets import resolve

Int64 = npt.NDArray[np.int64]

HISTOGRAMS = Path(__file__).parents[1] / "benchmarks" / "data" / "tile_histograms.json"
LAYOUTS = ((32, 16, 1), (32, 16, 2), (512, 16, 1))  # data-parallel ranks, rows of a rank, rows of a micro-batch


@dataclass(frozen=True)
class Figures:
    """What waiting costs, as a multiple of the mean cost of a rank; mean and worst over the steps.

    Attributes:
        total_mean: cost of the rank with the largest total (all that a dense model waits for), mean.
        total_worst: the same, worst step.
        in_step_mean: sum over k of the costliest k-th micro-batch (experts spread over all ranks), mean.
        in_step_worst: the same, worst step.
        milliseconds: time of one dealing, mean.
    """

    total_mean: float
    total_worst: float
    in_step_mean: float
    in_step_worst: float
    milliseconds: float


def draw_tiles(content: Mapping[str, Any], profile: Mapping[str, Any], *, rows: int, steps: int, seed: int) -> Int64:
    """Draw the tiles of every row of ``steps`` steps of ``rows`` rows, int64 [steps, rows]."""
    kinds = list(profile["rows"])
    chosen = Mixture([Weights(0, tuple(profile["rows"][kind] for kind in kinds))], seed=seed).choose(0, steps * rows)
    uniform = np.random.default_rng(seed).random(steps * rows)
    tiles = np.zeros(steps * rows, np.int64)
    for index, kind in enumerate(kinds):
        shares = content["tiles_of_rows"][kind]
        ends = np.cumsum(list(shares.values()))
        mine = chosen == index
        tiles[mine] = np.array([int(n) for n in shares])[np.searchsorted(ends[:-1], uniform[mine], side="right")]
    return tiles.reshape(steps, rows)


def measure(
    steps_of_tiles: Int64, *, ranks: int, micro_batch: int, constant: float, price: float
) -> dict[str, Figures]:
    """Deal every step both ways; a row costs ``constant`` plus ``price`` for each tile."""
    found: dict[str, list[tuple[float, float, float]]] = {"round_robin": [], "balanced": []}
    shape = {"data_size": ranks, "micro_batch_size": micro_batch}
    for tiles in steps_of_tiles:
        for name, figures in found.items():
            start = time.perf_counter()
            dealt = deal_evenly(tiles, **shape) if name == "balanced" else deal_in_order(len(tiles), **shape)
            seconds = time.perf_counter() - start
            cost_DK = (constant + price * tiles[dealt]).sum(axis=2)
            total_D = cost_DK.sum(axis=1)
            figures.append((total_D.max() / total_D.mean(), cost_DK.max(axis=0).sum() / total_D.mean(), seconds))
    results = {}
    for name, figures in found.items():
        total, in_step, seconds = np.array(figures).T
        results[name] = Figures(
            *(round(float(x), 4) for x in (total.mean(), total.max(), in_step.mean(), in_step.max())),
            milliseconds=round(float(seconds.mean()) * 1e3, 2),
        )
    return results


def run(*, steps: int, seed: int) -> list[dict[str, Any]]:
    """Measure every profile of the file in every layout."""
    content = json.loads(HISTOGRAMS.read_text(encoding="utf-8"))
    results = []
    for name, profile in content["profiles"].items():
        cfg = apply_overrides(resolve(profile["preset"]), profile["options"])
        constant = row_cost(cfg, 0)
        price = row_cost(cfg, 1) - constant
        for ranks, rows, micro_batch in LAYOUTS:
            tiles = draw_tiles(content, profile, rows=ranks * rows, steps=steps, seed=seed)
            figures = measure(tiles, ranks=ranks, micro_batch=micro_batch, constant=constant, price=price)
            facts = {
                "profile": name,
                "tiles": round(float(tiles.mean()), 2),
                "tile_over_row": round(price / constant, 4),
                "ranks": ranks,
                "rows": rows,
                "micro_batch": micro_batch,
            }
            results.append(facts | {dealing: asdict(found) for dealing, found in figures.items()})
    return results


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Lay the results out as one markdown table."""
    lines = [
        "| rows | tiles a row | a tile costs | ranks x rows x micro-batch | dealing | worst rank / mean | worst step "
        "| sum of worst / mean | worst step | ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        layout = f"{result['ranks']} x {result['rows']} x {result['micro_batch']}"
        for dealing in ("round_robin", "balanced"):
            f = Figures(**result[dealing])
            lines.append(
                f"| {result['profile']} | {result['tiles']} | {result['tile_over_row']:.1%} | {layout} | {dealing} "
                f"| {f.total_mean:.3f} | {f.total_worst:.3f} | {f.in_step_mean:.3f} | {f.in_step_worst:.3f} "
                f"| {f.milliseconds:.2f} |"
            )
    return "\n".join(lines)


def page(report: Mapping[str, Any]) -> str:
    """Return the report as a page that explains its columns."""
    command = f"python tools/bench_balance.py --steps {report['steps']} --seed {report['seed']}"
    machine = report["machine"]
    return f"""# Balance of data-parallel ranks

`{command}` on {machine["processor"]}, {machine["cores"]} cores.

Tiles of rows are drawn from `benchmarks/data/tile_histograms.json`, which says what in them is published and what is
modelled. Costs are computed, not timed: model FLOPs of pipeline stage 0 for a row without images, and the share of that
which one tile adds ("a tile costs"). Only the last column is a measured time, that of one dealing.

- *worst rank / mean*: what the gradient synchronisation at the end of a step waits for, over the mean rank.
- *sum of worst / mean*: sum over k of the costliest k-th micro-batch, what experts spread over all ranks wait for.
- Each is the mean over {report["steps"]} steps, and the worst of them.
- With one row a rank (MM1's 512 rows on 512 ranks) nothing can be dealt better: 512 x 16 is a step of 8192 rows.

{table(report["results"])}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, print the table, and write it and its figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps drawn for each line [200]")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw [1]")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    wanted = parser.parse_args(argv)
    if wanted.steps < 1:
        parser.error(f"--steps {wanted.steps}: at least one step is needed")
    results = run(steps=wanted.steps, seed=wanted.seed)
    print(table(results))
    if wanted.output is not None:
        report = {
            "steps": wanted.steps,
            "seed": wanted.seed,
            "results": results,
            "machine": machine_facts(),
            "versions": library_versions(),
        }
        write_report(wanted.output.with_suffix(".json"), report)
        wanted.output.with_suffix(".md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
