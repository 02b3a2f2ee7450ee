"""Say whether FP8 pays for a configuration on this GPU, and with which recipe.

    python tools/advise_fp8.py --preset mm1_30b [--config FILE] [section.field=value ...] [--record numbers.json]
    python tools/advise_fp8.py --recorded numbers.json

The first form measures (about a minute) every linear layer of one rank, forward and backward, in bf16 and in each FP8
recipe; it needs a GPU and Transformer Engine. The second one advises from numbers that were measured elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mm15_megatron.bench.fp8_advice import OTHER_SHARE, advice_text, advise, check_same_products
from mm15_megatron.bench.fp8_record import Sweep, read_sweep, sweep_to_json
from mm15_megatron.config.parse import parse_run
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import BackendError, MM15Error
from mm15_megatron.presets import REGISTRY

EXIT_BAD_INPUT = 2


def arguments() -> argparse.ArgumentParser:
    """Return the parser of what is not an option of the configuration."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --preset NAME [--config FILE] [section.field=value ...] [--record FILE] | --recorded FILE",
        description=__doc__,
        epilog="Exit codes: 0 advice was given, whatever it is; 2 something in the input or on this machine is wrong.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the measured numbers to FILE (JSON)")
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="advise from the numbers in FILE, without a GPU")
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


def measured_here(cfg: RunConfig, *, wanted: argparse.Namespace, command: str) -> Sweep:
    """Run the sweep on this machine's GPU.

    Raises:
        BackendError: there is no GPU, or a library does not work.
    """
    # megatron-core warns at import about every optional library that is absent.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        from mm15_megatron.bench.fp8_sweep import Effort, measure
        from mm15_megatron.evaluation.report import LIBRARIES, library_versions
    except (ImportError, RuntimeError, OSError) as error:
        # Transformer Engine beside a torch without CUDA breaks the import of megatron-core itself.
        raise BackendError(
            f"the sweep cannot be imported here: {type(error).__name__}: {error}",
            fix="repair the installation (tools/gpu_environment.py names what is broken), or give --recorded FILE "
            "(that works anywhere)",
        ) from error
    return measure(
        cfg,
        source=command,
        versions=library_versions((*LIBRARIES, "transformer-engine")),
        stage=wanted.stage,
        effort=Effort(micro_batches=wanted.micro_batches, repeats=wanted.repeats),
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
    try:
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
            sweep = measured_here(parsed.config, wanted=wanted, command=command)
        if wanted.record is not None:
            from mm15_megatron.evaluation.report import write_report

            write_report(wanted.record, sweep_to_json(sweep))
        print(advice_text(sweep, advise(sweep, other_share=wanted.other_share), other_share=wanted.other_share), end="")
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
