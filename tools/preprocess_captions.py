"""Make a dataset of image-caption pairs.

    python tools/preprocess_captions.py FORMAT INPUT... --output PREFIX --tokenizer PATH [--workers N]

FORMAT --help tells what a format reads and its options. Under mpiexec, or srun with MPI, the ranks share the work; the
bytes are the same for any number of processes. A job that was killed goes on where it was when it is started again.
Exit codes: 0 written; 2 something in the input is wrong.
"""

from __future__ import annotations

import sys

from mm15_megatron.data.formats.caption_files import JsonlCaptions, ParquetCaptions
from mm15_megatron.data.formats.img2dataset import Img2Dataset
from mm15_megatron.data.formats.webdataset import WebDatasetCaptions
from mm15_megatron.data.preprocess.cli import run_tool

READERS = {
    "img2dataset": Img2Dataset,
    "webdataset": WebDatasetCaptions,
    "jsonl": JsonlCaptions,
    "parquet": ParquetCaptions,
}

if __name__ == "__main__":
    sys.exit(run_tool(__doc__, READERS))
