"""Put datasets that were built alike together as one.

    python tools/merge_datasets.py OUTPUT INPUT [INPUT ...] [--overwrite]

Inputs and output are path prefixes. Exit codes: 0 written; 2 something in the input is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mm15_megatron.data.indexed.merge import merge_datasets
from mm15_megatron.errors import MM15Error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="prefix of the new dataset")
    parser.add_argument("inputs", type=Path, nargs="+", help="prefixes, in this order")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of that prefix")
    given = parser.parse_args(argv)
    try:
        found = merge_datasets(given.inputs, given.output, overwrite=given.overwrite)
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{given.output}: {found.documents} documents, {found.tokens} tokens, {found.images} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
