"""The MPI of this machine, for tests: where mpiexec is, and why it cannot be used where it cannot."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {
    # Open MPI refuses root and more ranks than cores unless it is told twice; Hydra does not read these.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def mpiexec() -> str | None:
    """The mpiexec beside this Python, else the one on the path."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


@functools.cache
def why_no_library() -> str | None:
    """Reason why mpi4py cannot be used here, or None."""
    loads = [sys.executable, "-c", "from mpi4py import MPI"]
    tried = subprocess.run(loads, capture_output=True, text=True, check=False)
    return f"mpi4py finds no MPI library: {tried.stderr.strip().splitlines()[-1]}" if tried.returncode else None


def why_not() -> str | None:
    """Reason why ranks cannot be started with mpiexec here, or None."""
    return "mpiexec is not installed (pip install mpich)" if mpiexec() is None else why_no_library()
