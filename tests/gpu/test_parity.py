"""The parity harness on GPUs and NCCL: what the GPUs present can vary computes what one rank computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mm15_megatron.parity.layouts import parse_layouts
from mm15_megatron.parity.shrink import ranks_of

ROOT = Path(__file__).parents[2]
SECONDS = 280
"""Both presets together fit into a command of ten minutes."""
LAYOUTS = {
    "debug_dense": "accum1,recompute,recompute-selective,recompute-mlp,packed,resume,tp2sp,pp2,dp2-overlap",
    "debug_moe": "mbs1,recompute-moe,packed,resume,ep2,tp2sp-etp1",
}
"""Micro-batches, recomputation, packed rows and a resume on one GPU; more where there are more GPUs."""


def layouts_here(preset: str) -> str:
    """Those layouts of a preset that have no more ranks than this machine has GPUs."""
    fitting = [layout for layout in parse_layouts(LAYOUTS[preset]) if ranks_of(layout) <= torch.cuda.device_count()]
    return ",".join(layout.name for layout in fitting)


@pytest.mark.parametrize("preset", sorted(LAYOUTS))
def test_layouts_agree(preset: str) -> None:
    """In fp32 on the devices, in processes of their own."""
    layouts = layouts_here(preset)
    command = [sys.executable, "tools/check_parity.py", "--device", "cuda", "--preset", preset, "--layouts", layouts]
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    said = done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0, said
    assert f"all {layouts.count(',') + 1} layouts compute what one rank computes" in done.stdout, said
