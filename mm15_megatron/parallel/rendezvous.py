"""Who am I among how many: torchrun, srun or a single process.

The launcher is recognised by the variables it sets, and a mixture that cannot be right (srun starting several tasks
without the run knowing its address, torchrun's variables half set) is an error instead of a one-rank run that looks
healthy.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

from mm15_megatron.errors import ConfigError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rendezvous:
    """Where a process stands in a job.

    Attributes:
        launcher: torchrun, srun or single.
        rank: global rank.
        world_size: processes of the job.
        local_rank: rank on this machine, the index of its GPU.
        local_world_size: processes of the job on this machine.
        init_method: URL that torch.distributed meets at.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    init_method: str


def discover(environ: Mapping[str, str] | None = None) -> Rendezvous:
    """Read the launcher's variables.

    torchrun wins over srun (torchrun is often started by srun, one a node). Under srun the first host of the job's node
    list is the meeting point unless MASTER_ADDR names another; the port follows from the job id unless MASTER_PORT is
    set.

    Raises:
        ConfigError: if a launcher's variables are incomplete.
    """
    env = os.environ if environ is None else environ
    if any(env.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_torchrun(env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and env.get("SLURM_STEP_ID") not in ("", "extern"):
        return _from_srun(env)
    _refuse_mpi(env)
    return Rendezvous("single", 0, 1, 0, 1, "")


def _refuse_mpi(env: Mapping[str, str]) -> None:
    """Ranks started by mpiexec would each train alone, into one run directory."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if _whole(env, name, "1") > 1:
            raise ConfigError(
                f"{env[name]} processes were started by an MPI launcher ({name}), which is not read here",
                fix="start the run with torchrun or srun",
            )


def _whole(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    """Read a variable that must be a whole number."""
    text = env.get(name) or default or ""
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name} = {text!r} is not a whole number", fix="let the launcher set it") from error


def _from_torchrun(env: Mapping[str, str]) -> Rendezvous:
    missing = [name for name in _TORCHRUN if not env.get(name)]
    if missing:
        raise ConfigError(
            f"the launcher set some of torchrun's variables but not {', '.join(missing)}",
            fix="start the run with torchrun, or with srun, or set all of " + ", ".join(_TORCHRUN),
        )
    return Rendezvous(
        "torchrun",
        _whole(env, "RANK"),
        _whole(env, "WORLD_SIZE"),
        _whole(env, "LOCAL_RANK"),
        _whole(env, "LOCAL_WORLD_SIZE", "1"),
        f"tcp://{_bracketed(env['MASTER_ADDR'])}:{env['MASTER_PORT']}"
        if "TORCHELASTIC_RUN_ID" not in env
        else "env://",
    )


def _from_srun(env: Mapping[str, str]) -> Rendezvous:
    world = _whole(env, "SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS") or "1")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    address = env.get("MASTER_ADDR") or (_first_host(nodes) if world > 1 else "127.0.0.1")
    job = env.get("SLURM_JOB_ID", "")
    port = env.get("MASTER_PORT") or (str(20000 + int(job) % 20000) if job.isdigit() else "")
    if world > 1 and not (address and port):
        raise ConfigError(
            f"srun started {world} tasks, but the meeting point is unknown "
            f"(MASTER_ADDR={address!r}, MASTER_PORT={port!r}, SLURM_JOB_NODELIST={nodes!r})",
            fix="export MASTER_ADDR and MASTER_PORT in the sbatch script",
        )
    per_node = (env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1").split("(")[0]
    return Rendezvous(
        "srun",
        _whole(env, "SLURM_PROCID"),
        world,
        _whole(env, "SLURM_LOCALID", "0"),
        int(per_node.split(",")[0]),
        f"tcp://{_bracketed(address)}:{port}" if world > 1 else "",
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _first_host(nodes: str) -> str:
    """Expand the first host of a Slurm node list, with scontrol where the list is compressed."""
    if not nodes:
        return ""
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"cannot expand the Slurm node list {nodes!r}: {error}", fix="export MASTER_ADDR in the sbatch script"
        ) from error
    return answer.stdout.split()[0]


def join(place: Rendezvous, *, device: str, timeout_minutes: int) -> None:
    """Initialise torch.distributed: NCCL with a gloo companion on CUDA, gloo on the CPU.

    A single process meets itself in memory, so that the same collectives run everywhere.

    Args:
        place: from :func:`discover`.
        device: cuda or cpu.
        timeout_minutes: a collective that waits longer raises.
    """
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if place.world_size == 1:
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    torch.distributed.init_process_group(
        backend, init_method=place.init_method, rank=place.rank, world_size=place.world_size, timeout=timeout
    )
