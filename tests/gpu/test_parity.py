"""The parity harness on one GPU and NCCL: what one rank can vary computes what the reference computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
def test_layouts_of_one_rank_agree(preset: str) -> None:
    """Micro-batches, recomputation, packed rows and a resume, in fp32 on the device."""
    layouts = "mbs1,accum1,recompute,recompute-selective,recompute-mlp,packed,resume"
    command = [sys.executable, "tools/check_parity.py", "--device", "cuda", "--preset", preset, "--layouts", layouts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
