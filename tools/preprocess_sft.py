"""Make a dataset of conversations, with the loss on answers alone.

    python tools/preprocess_sft.py FORMAT INPUT... --output PREFIX --tokenizer PATH [--workers N]

FORMAT --help tells what a format reads and its options. Under mpiexec, or srun with MPI, the ranks share the work; the
bytes are the same for any number of processes. A job that was killed goes on where it was when it is started again.
Exit codes: 0 written; 2 something in the input is wrong.
"""

from __future__ import annotations

import sys

from mm15_megatron.data.formats.grit import Grit
from mm15_megatron.data.formats.llava import Llava
from mm15_megatron.data.formats.openai_chat import OpenAIChat
from mm15_megatron.data.formats.sharegpt import ShareGPT
from mm15_megatron.data.preprocess.cli import run_tool

READERS = {"llava": Llava, "sharegpt": ShareGPT, "openai": OpenAIChat, "grit": Grit}

if __name__ == "__main__":
    sys.exit(run_tool(__doc__, READERS))
