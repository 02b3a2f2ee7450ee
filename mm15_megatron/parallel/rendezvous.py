"""Who am I among how many: torchrun, mpiexec, srun or a single process.

The launcher is recognised by the variables it sets, and a mixture that cannot be right (srun starting several tasks
without the run knowing its address, torchrun's variables half set, an MPI library that was not started by this mpiexec)
is an error instead of a one-rank run that looks healthy.

MPI serves only to meet: it tells rank, world size and neighbours and carries the address of torch's store. It stays
alive to the end all the same: that is how mpiexec learns of a rank that fails, and ends the others.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from urllib.parse import urlsplit

import torch

from mm15_megatron.errors import BackendError, ConfigError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Set by mpiexec itself, Open MPI's and Hydra's (MPICH, Intel MPI), never by srun --mpi=pmix|pmi2.
_MPIEXEC = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
_MPI_RANKS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("PMIX_RANK", None))
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Rendezvous:
    """Where a process stands in a job.

    Attributes:
        launcher: torchrun, mpi, srun or single.
        rank: global rank.
        world_size: processes of the job.
        local_rank: rank on this machine, the index of its GPU.
        local_world_size: processes of the job on this machine.
        init_method: URL that torch.distributed meets at; under MPI, port 0 is a free one that rank 0 tells the others.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    init_method: str


_ALONE = Rendezvous("single", 0, 1, 0, 1, "")


def discover(environ: Mapping[str, str] | None = None) -> Rendezvous:
    """Read the launcher's variables.

    torchrun wins over srun (torchrun is often started by srun, one a node), and so does mpiexec, whose own daemons are
    srun's tasks inside an allocation; srun --mpi=pmix|pmi2 is srun. Under srun the first host of the job's node list is
    the meeting point unless MASTER_ADDR names another; the port follows from the job id unless MASTER_PORT is set.

    Raises:
        ConfigError: if a launcher's variables are incomplete.
        BackendError: if mpiexec started several ranks, and mpi4py cannot be imported or finds itself in another job.
    """
    env = os.environ if environ is None else environ
    if any(env.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_torchrun(env)
    if any(env.get(name) for name in _MPIEXEC):
        return _from_mpi(env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and env.get("SLURM_STEP_ID") not in ("", "extern"):
        return _from_srun(env)
    if any(env.get(name) for pair in _MPI_RANKS for name in pair if name):
        return _from_mpi(env)
    return _ALONE


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


def _from_mpi(env: Mapping[str, str]) -> Rendezvous:
    rank_name, size_name = next(pair for pair in _MPI_RANKS if any(env.get(name) for name in pair if name))
    promised = _whole(env, size_name) if size_name else None
    if promised == 1:
        return _ALONE
    mpi = _mpi()
    world = mpi.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    if rank != _whole(env, rank_name) or promised not in (None, size):
        library = mpi.Get_library_version().split("\n")[0].strip(" \0")
        raise BackendError(
            f"the launcher started rank {env[rank_name]} of {promised or 'several'} ({rank_name}, {size_name}), but "
            f"mpi4py's library finds itself to be rank {rank} of {size}: {library}",
            fix="start the run with the mpiexec of that library, or name the launcher's libmpi.so in MPI4PY_LIBMPI",
        )
    neighbours = world.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, local_size = neighbours.Get_rank(), neighbours.Get_size()
    neighbours.Free()
    host = "127.0.0.1" if local_size == size else socket.gethostname()
    url = f"tcp://{_bracketed(env.get('MASTER_ADDR') or host)}:{_whole(env, 'MASTER_PORT', '0')}"
    return Rendezvous("mpi", rank, size, local_rank, local_size, world.bcast(url))


def _mpi() -> ModuleType:
    """Import mpi4py's MPI, which initialises it; ``leave_together`` ends it."""
    try:
        import mpi4py

        # Ended at exit it would wait for ranks that wait for this one, after an exception for ever.
        mpi4py.rc.finalize = False
        mpi4py.rc.thread_level = "funneled"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"an MPI launcher started this process, but mpi4py cannot be imported: {error}",
            fix="install mpi4py and the launcher's MPI library, or start the run with torchrun or srun",
        ) from error
    return MPI


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


def record_collectives() -> None:
    """Have torch remember the newest collectives, for the report of a job that hangs; before any group exists."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def join(place: Rendezvous, *, device: str, timeout_minutes: int) -> None:
    """Initialise torch.distributed: NCCL with a gloo companion on CUDA, gloo on the CPU.

    A single process meets itself in memory, so that the same collectives run everywhere.

    Args:
        place: from :func:`discover`.
        device: cuda or cpu.
        timeout_minutes: a collective that waits longer raises.
    """
    record_collectives()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if place.world_size == 1:
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    if place.launcher == "mpi":
        store = _store_over_mpi(place, timeout)
        torch.distributed.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
        )
        return
    if restarted := _attempt(os.environ):
        store, _, _ = next(torch.distributed.rendezvous(place.init_method, timeout=timeout))
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore(f"attempt_{restarted}", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
        return
    torch.distributed.init_process_group(
        backend, init_method=place.init_method, rank=place.rank, world_size=place.world_size, timeout=timeout
    )


def _attempt(env: Mapping[str, str]) -> int:
    """How often torchrun has started these ranks before on its one machine.

    There it hands every attempt the store of the first (its default rendezvous), in which the addresses of dead ranks
    still stand: new ranks would wait for them. On several machines its c10d rendezvous makes a new store.
    """
    alone = env.get("GROUP_WORLD_SIZE") == "1" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _whole(env, "TORCHELASTIC_RESTART_COUNT", "0") if alone else 0


def _store_over_mpi(place: Rendezvous, timeout: timedelta) -> torch.distributed.Store:
    """Rank 0 binds the store's port before it tells the others, so that nobody else can take it in between."""
    world, url = _mpi().COMM_WORLD, urlsplit(place.init_method)
    host, port, size = str(url.hostname), url.port or 0, place.world_size
    if place.rank == 0:
        store = torch.distributed.TCPStore(host, port, size, is_master=True, wait_for_workers=False, timeout=timeout)
        world.bcast(store.port)
        return store
    return torch.distributed.TCPStore(host, world.bcast(None), size, is_master=False, timeout=timeout)


@contextmanager
def leave_together(place: Rendezvous) -> Iterator[None]:
    """End MPI when the block has ended on every rank; other launchers need nothing.

    mpiexec may end all ranks as soon as one has ended with another code than 0. Those that reach the end of the block
    therefore wait a minute for the others. After an exception, or when the others do not come, MPI is left as it is:
    mpiexec takes that for a failure and ends what still runs.
    """
    yield
    if place.launcher != "mpi":
        return
    mpi = _mpi()
    everyone = mpi.COMM_WORLD.Ibarrier()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not everyone.Test():
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    mpi.Finalize()
