"""Report the images of a dataset that are also in benchmarks on disk, by their bytes or by their looks.

    python tools/find_duplicates.py PREFIX --against PATH [PATH ...] [--max-distance 4] [--output REPORT.jsonl]

A line of the report is {"document", "image", "file", "distance"}; distance null means equal bytes.
Exit codes: 0 nothing was found; 1 something was; 2 something in the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mm15_megatron.data.duplicates import find_duplicates
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.errors import MM15Error
from mm15_megatron.utils.progress import Progress

EXIT_FOUND, EXIT_BAD_INPUT = 1, 2
_SHOWN = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path, help="of the dataset")
    parser.add_argument("--against", type=Path, nargs="+", required=True, help="images, or folders of them")
    parser.add_argument("--max-distance", type=int, default=4, help="bits of 64 that may differ [4]")
    parser.add_argument("--output", type=Path, help="write every match as a JSON line")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes [the cores]")
    given = parser.parse_args(argv)
    try:
        progress = Progress(IndexedSource(given.prefix).manifest.images, noun="image", stream=sys.stderr)
        matches = list(
            find_duplicates(
                given.prefix,
                tuple(given.against),
                max_distance=given.max_distance,
                workers=given.workers,
                tell=lambda done, total: progress.update(done, "compared"),
            )
        )
        progress.close()
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if given.output is not None:
        temporary = given.output.with_name(f".{given.output.name}")
        temporary.write_text("".join(json.dumps(asdict(match)) + "\n" for match in matches), encoding="utf-8")
        os.replace(temporary, given.output)
    equal = sum(match.distance is None for match in matches)
    print(f"{len(matches)} images are in the benchmarks: {equal} byte for byte, {len(matches) - equal} by their looks")
    for match in matches[:_SHOWN]:
        how = "equal bytes" if match.distance is None else f"{match.distance} bits apart"
        print(f"  document {match.document}, image {match.image}: {match.file} ({how})")
    return EXIT_FOUND if matches else 0


if __name__ == "__main__":
    sys.exit(main())
