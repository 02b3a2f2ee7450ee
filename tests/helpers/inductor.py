"""torch.compile in tests: why it cannot be used here, and a cache that goes away with the test."""

from __future__ import annotations

import os
import shutil


def why_not() -> str | None:
    """Reason why inductor cannot compile for the CPU here, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"inductor needs a C++ compiler: {compiler} is not installed"


def use_cache(folder: str) -> None:
    """Compile in this process, into ``folder``; call it on a rank before anything is compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    from torch._inductor import config

    config.compile_threads = 1  # no pool of workers, each of which would import torch
