"""mpiexec and srun on the two nodes of a real Slurm cluster: which launcher it was, and who is whose neighbour."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import mpi
from tests.helpers.slurm import cluster
from tests.helpers.slurm import why_not as why_no_slurm

ROOT = Path(__file__).resolve().parents[2]
MISSING = mpi.why_not() or why_no_slurm()

WHO = """
import dataclasses, json, os, sys, torch
from pathlib import Path
from mm15_megatron.parallel.rendezvous import discover, join, leave_together
place = discover()
with leave_together(place):
    join(place, device="cpu", timeout_minutes=1)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    found = dataclasses.asdict(place) | {"sum": total.item(), "node": os.environ["SLURM_NODEID"]}
    Path(sys.argv[1], f"{place.launcher}{place.rank}").write_text(json.dumps(found))
"""


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_two_nodes(tmp_path: Path) -> None:
    """Four ranks: mpiexec's, although srun started its daemons, and those of srun with an MPI plugin."""
    (tmp_path / "found").mkdir()
    who = [sys.executable, "-c", WHO, str(tmp_path / "found")]
    with cluster(tmp_path / "slurm") as slurm:
        env = {**os.environ, **slurm, **mpi.ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env["MASTER_ADDR"] = "127.0.0.1"  # the nodes are virtual: their names resolve nowhere
        for command in (
            ["salloc", "--nodes=2", "--ntasks-per-node=2", str(mpi.mpiexec()), "-n", "4", *who],
            ["srun", "--nodes=2", "--ntasks-per-node=2", "--mpi=pmi2", *who],
        ):
            done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    for launcher in ("mpi", "srun"):
        ranks = [json.loads((tmp_path / "found" / f"{launcher}{rank}").read_text()) for rank in range(4)]
        assert [place["sum"] for place in ranks] == [4.0] * 4
        assert [(place["rank"], place["world_size"], place["local_world_size"]) for place in ranks] == [
            (rank, 4, 2) for rank in range(4)
        ]
        for node in "01":
            assert sorted(place["local_rank"] for place in ranks if place["node"] == node) == [0, 1]
