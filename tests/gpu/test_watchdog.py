"""A device that hangs: the rank that waits for it leaves, and says in which collective."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mm15_megatron.training.watchdog import EXIT_HANG

ROOT = Path(__file__).parents[2]
_HANGING = """
import sys
from pathlib import Path
import torch
from mm15_megatron.parallel.rendezvous import Rendezvous, join
from mm15_megatron.training.watchdog import Watchdog
torch.cuda.set_device(0)
join(Rendezvous("single", 0, 1, 0, 1, ""), device="cuda", timeout_minutes=5)
values = torch.ones(8, device="cuda")
torch.distributed.all_reduce(values)
torch.cuda.synchronize()
with Watchdog(Path(sys.argv[1]), rank=0, places=["here"], seconds=4.0) as watchdog:
    watchdog.step(1, batch=lambda: "row 5")
    watchdog.enter("backward")
    torch.cuda._sleep(10**13)
    if sys.argv[2] == "collective":
        torch.distributed.all_reduce(values)
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("behind", ["collective", "nothing"])
def test_a_kernel_that_does_not_end(behind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HANGING, str(tmp_path / "hangs"), behind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_HANG, done.stderr
    text = (tmp_path / "hangs" / "report.txt").read_text()
    assert "step 1, backward, for " in text
    assert "batch of rank 0: row 5" in text
    assert "in synchronize" in text, "the stack"
    waits = re.search(r"waiting in all_reduce number \d+ of 8 of 0 default_pg \(nccl\)", text)
    assert (waits is not None) == (behind == "collective"), text
