"""Measure the data path beside named peers, on the same work, in one run.

    python tools/bench_data.py [--cases images,loader] [--record benchmarks/results/data-cpu]

| case | ours | peers | target |
| --- | --- | --- | --- |
| images | decode, resize to 378, normalise | Pillow; OpenCV by areas | 1.6 times Pillow, above OpenCV |
| tiles | overview and 2 x 2 tiles of 672 | Pillow; OpenCV | 1.15 times Pillow |
| preprocess | tools/preprocess_text.py on JSON lines | Megatron-LM's own tool, of a checkout | as fast |
| open | a text dataset of 100 million documents | megatron-core's reader, which checks nothing | 0.5 s |
| packing | documents cut and packed, by kind | the caps' bound; next fit; first fit decreasing | 0.98; 1 M/s |
| plan | an epoch of 100 million documents | the limits of the targets | 120 s, 4 GiB; resumed in 2 s |
| loader | build_loader: packed rows out | WebDataset and megatron-energon with Pillow | 1.3 times |

Contenders take turns; medians and quartiles of pairs are printed with what each did, the machine, the versions and what
other programs took of it. A peer that is not installed is left out with its reason: `pip install
opencv-python-headless webdataset megatron-energon scikit-image` (the last for more photographs) has them all, and
--megatron-lm names a checkout. --record keeps the cases of earlier runs. Exit codes: 0 measured, 2 something is wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from mm15_megatron.bench.data.cases import CASES, check_names, check_request, run_case
from mm15_megatron.bench.data.outcome import Request
from mm15_megatron.bench.data.record import section, write
from mm15_megatron.errors import MM15Error


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, measure case by case, print and record each."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {','.join(CASES)} [all]")
    parser.add_argument("--record", type=Path, help="write RECORD.json and RECORD.md after each case")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each contender [9]")
    parser.add_argument("--patience", type=float, default=0.0, help="minutes to wait for a quiet machine [0]")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for datasets [the system's]")
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM, for preprocess")
    parser.add_argument("--pictures", type=int, default=6, help="photographs, and screenshots, of each size [6]")
    parser.add_argument("--workers", type=int, default=2, help="processes of preprocess and loader [2]")
    parser.add_argument("--text-mib", type=float, default=64.0, help="text of preprocess, MiB [64]")
    parser.add_argument("--documents", type=int, default=100_000_000, help="documents of open [100000000]")
    parser.add_argument("--chunk-documents", type=int, default=1 << 20, help="documents of packing [1048576]")
    parser.add_argument("--plan-documents", type=int, default=100_000_000, help="documents of plan [100000000]")
    parser.add_argument("--samples", type=int, default=1024, help="pairs of loader [1024]")
    parser.add_argument("--batches", type=int, default=60, help="batches of a turn of loader [60]")
    given = parser.parse_args(argv)
    names = [name for name in given.cases.split(",") if name]
    request = Request(**{name: value for name, value in vars(given).items() if name in Request.__dataclass_fields__})
    words = [_without_place(word) for word in (sys.argv[1:] if argv is None else argv)]
    command = " ".join(["python", "tools/bench_data.py", *words])
    try:
        check_names(names)
        check_request(request)
        for name in names:
            content = run_case(name, request, command=command, patience=60 * given.patience).content()
            print(section(name, content))
            if given.record is not None:
                write(given.record, {name: content})
    except MM15Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _without_place(word: str) -> str:
    """Say no folder of this machine in the record."""
    return Path(word).name if word.startswith("/") else word


if __name__ == "__main__":
    sys.exit(main())
