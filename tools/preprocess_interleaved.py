"""Make a dataset of documents with images between their paragraphs.

    python tools/preprocess_interleaved.py FORMAT INPUT... --output PREFIX --tokenizer PATH [--workers N]

FORMAT --help tells what a format reads and its options. Under mpiexec, or srun with MPI, the ranks share the work; the
bytes are the same for any number of processes. A job that was killed goes on where it was when it is started again.
Exit codes: 0 written; 2 something in the input is wrong.
"""

from __future__ import annotations

import sys

from mm15_megatron.data.formats.mmc4 import Mmc4
from mm15_megatron.data.formats.obelics import Obelics
from mm15_megatron.data.formats.positioned import Positioned
from mm15_megatron.data.preprocess.cli import run_tool

READERS = {"obelics": Obelics, "mmc4": Mmc4, "positioned": Positioned}

if __name__ == "__main__":
    sys.exit(run_tool(__doc__, READERS))
