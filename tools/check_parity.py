"""Prove that a configuration computes the same thing in every layout.

    python tools/check_parity.py --preset debug_dense --layouts tp2,tp2sp,pp2,dp2

Exit codes: 0 every layout equals one rank; 1 one differs, the table names the first module that does; 2 something in
the input is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from mm15_megatron.config.parse import parse_run
from mm15_megatron.errors import MM15Error
from mm15_megatron.parity.layouts import TOKENS, default_layouts, parse_layouts
from mm15_megatron.parity.shrink import RULE
from mm15_megatron.presets import REGISTRY

EXIT_DIFFERENT, EXIT_BAD_INPUT = 1, 2


def arguments() -> argparse.ArgumentParser:
    """Return the parser of what is not an option of the configuration."""
    tokens = "\n".join(f"  {name:<20} {meaning}" for name, meaning in TOKENS.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s --preset NAME [--config FILE] [section.field=value ...] [--layouts A,B,...] [--steps N] "
        "[--device {cpu,cuda}] [--dtype {fp32,bf16}] [--keep-size]",
        description="Run a configuration from one state on one stream in every layout and compare losses, router "
        "losses, gradient norms, every gradient and every updated parameter with one rank.",
        epilog=f"tokens of a layout's name, to be combined (resume:A>B saves in A and loads in B):\n{tokens}\n\n{RULE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--layouts", help="names separated by commas; default: a full set for the model")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps [5]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the ranks compute [cpu]")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 has wider tolerances [fp32]")
    parser.add_argument("--keep-size", action="store_true", help="refuse to shrink the configuration")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    mine, rest = arguments().parse_known_args(argv)
    try:
        parsed = parse_run(rest, presets=REGISTRY)
        if parsed.output is not None:
            print(parsed.output, end="")
            return 0
        layouts = parse_layouts(default_layouts(parsed.config) if mine.layouts is None else mine.layouts)
        # megatron-core warns at import about every optional library that is absent, here and in the ranks.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        from mm15_megatron.parity.check import check_parity

        outcomes = check_parity(
            parsed.config,
            layouts,
            write=lambda line: print(line, flush=True),
            steps=mine.steps,
            device=mine.device,
            dtype=mine.dtype,
            keep_size=mine.keep_size,
        )
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0 if all(outcome.passes for outcome in outcomes) else EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
