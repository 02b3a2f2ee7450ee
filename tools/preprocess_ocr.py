"""Make a dataset of pages and their text.

    python tools/preprocess_ocr.py FORMAT INPUT... --output PREFIX --tokenizer PATH [--workers N]

FORMAT --help tells what a format reads and its options. Under mpiexec, or srun with MPI, the ranks share the work; the
bytes are the same for any number of processes. A job that was killed goes on where it was when it is started again.
Exit codes: 0 written; 2 something in the input is wrong.
"""

from __future__ import annotations

import sys

from mm15_megatron.data.formats.docstruct import DocStruct
from mm15_megatron.data.formats.idl import Idl
from mm15_megatron.data.formats.pdfa import Pdfa
from mm15_megatron.data.formats.rendered_text import RenderedText
from mm15_megatron.data.preprocess.cli import run_tool

READERS = {"pdfa": Pdfa, "idl": Idl, "rendered-text": RenderedText, "docstruct": DocStruct}

if __name__ == "__main__":
    sys.exit(run_tool(__doc__, READERS))
