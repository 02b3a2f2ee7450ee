"""Say whether FP8 pays for a configuration on this GPU, and with which recipe.

    python tools/advise_fp8.py --preset mm1_30b [--config FILE] [section.field=value ...] [--record numbers.json]
    python tools/advise_fp8.py --recorded numbers.json

The first form measures every linear layer of one rank, forward and backward, in bf16 and in each FP8 recipe, a few
dozen micro-batches each; it needs a GPU and Transformer Engine. A recipe that fails at a layer is named with its error
and the others are measured; the record is written after every layer. The second form advises from numbers that were
measured elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mm15_megatron.bench.fp8_advice import OTHER_SHARE, advise, check_same_products
from mm15_megatron.bench.fp8_record import RECIPES, Sweep, read_sweep, sweep_to_json
from mm15_megatron.bench.fp8_text import advice_text
from mm15_megatron.config.parse import parse_run
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import BackendError, ConfigError, MM15Error, did_you_mean
from mm15_megatron.presets import REGISTRY

EXIT_NO_ADVICE, EXIT_BAD_INPUT = 1, 2
MORE_LIBRARIES = ("transformer-engine", "mm15_megatron")


def arguments() -> argparse.ArgumentParser:
    """Return the parser of what is not an option of the configuration."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --preset NAME [--config FILE] [section.field=value ...] [--record FILE] | --recorded FILE",
        description=__doc__,
        epilog="Exit codes: 0 advice was given, whatever it is; 1 too much failed, or the numbers are not all there; 2 "
        "something in the input or on this machine is wrong.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the numbers to FILE (JSON) as they come")
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="advise from the numbers in FILE, without a GPU")
    parser.add_argument("--recipes", metavar="A,B,...", help=f"which recipes to measure [{','.join(RECIPES)}]")
    parser.add_argument("--stage", type=int, default=0, help="pipeline stage of the rank; the first one encodes [0]")
    parser.add_argument(
        "--other-share",
        type=float,
        default=OTHER_SHARE,
        help=f"assumed share of a bf16 step that is neither linear layers nor attention [{OTHER_SHARE}]",
    )
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step; weights are quantised once in it [8]")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each product, the median counts [7]")
    return parser


def recipes_named(text: str | None) -> tuple[str, ...]:
    """Return the recipes of ``--recipes``.

    Raises:
        ConfigError: one of them is none.
    """
    if text is None:
        return RECIPES
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in RECIPES:
            raise ConfigError(f"--recipes names {name!r}, no FP8 recipe", fix=did_you_mean(name, RECIPES))
    return names


def measured_here(cfg: RunConfig, *, wanted: argparse.Namespace, recipes: tuple[str, ...], command: str) -> Sweep:
    """Run the sweep on this machine's GPU.

    Raises:
        BackendError: there is no GPU, or a library does not work.
    """
    # megatron-core warns at import about every optional library that is absent.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        from mm15_megatron.bench.fp8_sweep import Effort, measure
        from mm15_megatron.bench.peak import driver_version
        from mm15_megatron.evaluation.report import LIBRARIES, commit, library_versions, write_report
    except (ImportError, RuntimeError, OSError) as error:
        # Transformer Engine beside a torch without CUDA breaks the import of megatron-core itself.
        raise BackendError(
            f"the sweep cannot be imported here: {type(error).__name__}: {error}",
            fix="repair the installation (tools/gpu_environment.py names what is broken), or give --recorded FILE "
            "(that works anywhere)",
        ) from error

    versions = library_versions((*LIBRARIES, *MORE_LIBRARIES))
    versions |= {"driver": driver_version() or "unknown", "commit": commit() or "unknown"}

    def keep(sweep: Sweep) -> None:
        if wanted.record is not None:
            write_report(wanted.record, sweep_to_json(sweep))

    return measure(
        cfg,
        source=command,
        versions=versions,
        stage=wanted.stage,
        effort=Effort(micro_batches=wanted.micro_batches, repeats=wanted.repeats),
        recipes=recipes,
        keep=keep,
        write=lambda line: print(line, file=sys.stderr, flush=True),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = arguments()
    wanted, rest = parser.parse_known_args(given)
    if wanted.record is not None and wanted.recorded is not None:
        parser.error("--record writes what is measured, --recorded measures nothing: give one of them")
    if wanted.micro_batches < 1 or wanted.repeats < 1:
        parser.error(f"--micro-batches {wanted.micro_batches} and --repeats {wanted.repeats} must be at least 1")
    if not 0.0 <= wanted.other_share < 1.0:
        parser.error(f"--other-share {wanted.other_share} is no share from 0 to below 1")
    if wanted.recipes is not None and wanted.recorded is not None:
        parser.error("--recipes says what to measure, --recorded measures nothing: give one of them")
    try:
        recipes = recipes_named(wanted.recipes)
        parsed = parse_run(rest, presets=REGISTRY)
        if parsed.output is not None:
            print(parsed.output, end="")
            return 0
        if wanted.recorded is not None:
            sweep = read_sweep(wanted.recorded)
            if rest:
                check_same_products(sweep, parsed.config, stage=wanted.stage)
        else:
            command = " ".join(["python", "tools/advise_fp8.py", *given])
            sweep = measured_here(parsed.config, wanted=wanted, recipes=recipes, command=command)
        advice = advise(sweep, other_share=wanted.other_share)
        print(advice_text(sweep, advice, other_share=wanted.other_share), end="", flush=True)
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_NO_ADVICE if advice.missing else 0


if __name__ == "__main__":
    sys.exit(main())
