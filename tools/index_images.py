"""Index downloaded images by their URL, for documents that hold URLs alone (OBELICS, MMC4).

    python tools/index_images.py INDEX [--tars PATH ...] [--folders PATH ...] [--workers N]

Reads what img2dataset writes: tars (output_format=webdataset) or folders of files with their .json beside them. Of
several images of one URL the first counts. Exit codes: 0 written; 2 something in the input is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mm15_megatron.data.formats.url_sources import build_url_index
from mm15_megatron.errors import MM15Error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="file to write, beside or above the images")
    parser.add_argument("--tars", type=Path, nargs="+", default=[], help="tars, or folders of them")
    parser.add_argument("--folders", type=Path, nargs="+", default=[], help="folders of files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes [the cores]")
    given = parser.parse_args(argv)
    try:
        found = build_url_index(
            given.index, tars=tuple(given.tars), folders=tuple(given.folders), workers=given.workers
        )
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{given.index}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
