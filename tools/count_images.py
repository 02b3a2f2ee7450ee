"""Find the images that occur too often in interleaved documents (MM1 leaves out those that occur more than 10 times).

    python tools/count_images.py FORMAT INPUT... --output FREQUENT.npy [--more-than 10] [--workers N]

preprocess_interleaved.py then takes the file as --filters-frequent-path. FORMAT --help tells the options of a format.
Exit codes: 0 written; 2 something in the input is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mm15_megatron.data.formats.image_counts import MORE_THAN, count_images
from mm15_megatron.data.formats.mmc4 import Mmc4
from mm15_megatron.data.formats.obelics import Obelics
from mm15_megatron.data.formats.positioned import Positioned
from mm15_megatron.data.preprocess.cli import EXIT_BAD_INPUT, build, parser_of
from mm15_megatron.errors import MM15Error

READERS = {"obelics": Obelics, "mmc4": Mmc4, "positioned": Positioned}


def shared(parser: argparse.ArgumentParser) -> None:
    """Add what every format has."""
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--more-than", type=int, default=MORE_THAN, help=f"occurrences that are fine [{MORE_THAN}]")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes [the cores]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = parser_of(__doc__, READERS, shared=shared).parse_args(argv)
    try:
        reader = build(READERS[given.format], vars(given))
        found = count_images(reader, given.output, more_than=given.more_than, workers=given.workers)
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{given.output}: {found.images} images, {found.different} different ones, {found.frequent} too frequent")
    return 0


if __name__ == "__main__":
    sys.exit(main())
