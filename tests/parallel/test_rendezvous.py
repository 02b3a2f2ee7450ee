"""Launchers are recognised by their variables; half-set ones are refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mm15_megatron.config.schema import ParallelConfig
from mm15_megatron.errors import BackendError, ConfigError
from mm15_megatron.parallel.rendezvous import Rendezvous, discover
from mm15_megatron.parallel.topology import prepare_device
from tests.helpers import mpi

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "41007", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "alpha,beta",
}  # fmt: skip


def test_torchrun() -> None:
    """Ranks and the agent's own store."""
    assert discover(TORCHRUN) == Rendezvous("torchrun", 5, 8, 1, 4, "env://")


def test_srun() -> None:
    """The first host and a port that follows from the job id; MASTER_ADDR and MASTER_PORT win."""
    assert discover(SRUN) == Rendezvous("srun", 3, 4, 1, 2, "tcp://alpha:21007")
    chosen = discover({**SRUN, "MASTER_ADDR": "fd00::1", "MASTER_PORT": "777"})
    assert chosen.init_method == "tcp://[fd00::1]:777"


def test_torchrun_under_srun_wins() -> None:
    """One torchrun a node, started by srun."""
    assert discover({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_a_shell_inside_an_allocation_is_a_single_process() -> None:
    """salloc and sbatch set job variables without starting tasks."""
    assert discover({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}).world_size == 1
    assert discover({}).launcher == "single"


def test_incomplete_variables_are_refused() -> None:
    """The missing names are in the message."""
    with pytest.raises(ConfigError, match=r"MASTER_ADDR, MASTER_PORT"):
        discover({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    lost = {key: value for key, value in SRUN.items() if key not in ("SLURM_STEP_NODELIST", "SLURM_JOB_ID")}
    with pytest.raises(ConfigError, match="4 tasks"):
        discover(lost)


@pytest.mark.parametrize("half", [{"WORLD_SIZE": "8", "MASTER_ADDR": "x"}, {"RANK": "3"}, {"LOCAL_RANK": "0"}])
def test_a_half_set_launcher_is_not_a_single_process(half: dict[str, str]) -> None:
    """One variable of torchrun's is enough to expect the others."""
    with pytest.raises(ConfigError, match="but not"):
        discover(half)


def test_values_that_are_not_numbers_are_refused() -> None:
    """The variable and its value are in the message."""
    with pytest.raises(ConfigError, match="RANK = 'a'"):
        discover({**TORCHRUN, "RANK": "a"})
    with pytest.raises(ConfigError, match="SLURM_LOCALID = '-'"):
        discover({**SRUN, "SLURM_LOCALID": "-"})


HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}


def test_one_rank_of_mpiexec_needs_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nobody to meet."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name in ("PMI", "OMPI_COMM_WORLD"):
        assert discover({f"{name}_SIZE": "1", f"{name}_RANK": "0"}).launcher == "single"


@pytest.mark.parametrize(
    "env",
    [
        HYDRA,
        OPEN_MPI,
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
        {"PMIX_RANK": "0"},
        {**SRUN, **HYDRA},  # mpiexec in an allocation: srun started its daemons
        {**SRUN, **OPEN_MPI},
    ],
    ids=["hydra", "open-mpi", "pmi", "pmix", "hydra-in-slurm", "open-mpi-in-slurm"],
)
def test_mpiexec_without_mpi4py_is_refused(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks would all be rank 0 of a job of their own."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(BackendError, match="mpi4py cannot be imported: import of mpi4py halted"):
        discover(env)


def test_srun_with_an_mpi_plugin_is_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --mpi=pmi2 and --mpi=pmix add variables of theirs; Slurm's own are enough."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert discover({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}) == discover(SRUN)
    assert discover({**SRUN, "PMIX_RANK": "3"}) == discover(SRUN)


def test_torchrun_under_mpiexec_wins() -> None:
    """One torchrun a node, started by mpiexec."""
    assert discover({**OPEN_MPI, **TORCHRUN}).launcher == "torchrun"


def test_incomplete_mpi_variables_are_refused() -> None:
    """A size without a rank is no launcher's work."""
    with pytest.raises(ConfigError, match="PMI_SIZE = 'many'"):
        discover({**HYDRA, "PMI_SIZE": "many"})
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_RANK = ''"):
        discover({"OMPI_COMM_WORLD_SIZE": "4"})


def refusal(env: dict[str, str], **more: str) -> str:
    """What ``discover`` refuses in a process of its own, so that MPI is not initialised in this one."""
    code = f"""
from mm15_megatron.errors import BackendError
from mm15_megatron.parallel.rendezvous import discover
try:
    print(discover({env!r}))
except BackendError as error:
    print("refused:", error)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI", "OMPI_"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=kept | more, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(mpi.why_no_library() is not None, reason=str(mpi.why_no_library()))
def test_a_library_of_another_mpi_is_refused() -> None:
    """It takes every process for a job of one rank; both numbers are in the message."""
    text = refusal(HYDRA)
    assert text.startswith("refused: the launcher started rank 1 of 4 (PMI_RANK, PMI_SIZE), but mpi4py's library finds")
    assert "rank 0 of 1" in text
    assert "MPI4PY_LIBMPI" in text


def test_a_missing_library_is_refused() -> None:
    """mpi4py without libmpi.so imports up to the point where it loads it."""
    assert "refused: an MPI launcher started this process, but mpi4py cannot be imported" in refusal(
        HYDRA, MPI4PY_LIBMPI="/nowhere/libmpi.so"
    )


def test_compressed_node_list_without_scontrol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """scontrol expands alpha[01-04]; where it is absent the fix is named."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        discover({**SRUN, "SLURM_STEP_NODELIST": "alpha[01-04]"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_cuda_is_refused_where_absent() -> None:
    """The message names the fix."""
    with pytest.raises(BackendError, match=r"parallel\.device"):
        prepare_device(ParallelConfig().device, local_rank=0)
