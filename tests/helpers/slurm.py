"""A real Slurm cluster on this machine, for tests: two virtual nodes on loopback, everything under one folder.

It needs root and Debian's packages slurmctld, slurmd, slurm-client and munge; ``why_not`` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
NODES = 2
# Slurm holds a requeued job back for as long as its first credential lives (120 s by default). A second start before
# that, forced with scontrol, may be refused as revoked: credentials tell times in whole seconds.
CREDENTIAL_SECONDS = 20


def why_not() -> str | None:
    """Reason why no cluster can be started here, or None."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing)"
    if os.geteuid() != 0:
        return "a Slurm cluster of one's own needs root"
    return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _configuration(folder: Path, host: str) -> str:
    controller, *daemons = _free_ports(1 + NODES)
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.sock,cred_expire={CREDENTIAL_SECONDS}",
        "CryptoType=crypto/munge",
        "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",  # loopback only
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool.%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd.%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "SchedulerType=sched/backfill",
        # a requeued job is looked at when its credential has expired, not up to a minute later
        "SchedulerParameters=bf_interval=2,sched_interval=2",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "ReturnToService=2",
        "KillWait=5",
        "MailProg=/bin/true",
        "SlurmdParameters=config_overrides",
        *(
            f"NodeName=n{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=2000 State=UNKNOWN"
            for index, port in enumerate(daemons)
        ),
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the cluster and yield the environment that reaches it; everything is ended on leaving.

    Raises:
        RuntimeError: if the nodes do not become idle; the message holds the logs.
    """
    host = socket.gethostname().split(".")[0]
    for name in ("state", *(f"spool.n{index}" for index in range(NODES))):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    folder.chmod(0o755)
    (folder / "slurm.conf").write_text(_configuration(folder, host))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin",
    }
    munge = [
        f"--{name}={folder}/munge.{suffix}"
        for name, suffix in (
            ("key-file", "key"),
            ("socket", "sock"),
            ("pid-file", "pid"),
            ("log-file", "log"),
            ("seed-file", "seed"),
        )
    ]
    commands = [
        ["munged", "--force", "--foreground", *munge],
        ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
        *(["slurmd", "-D", "-N", f"n{index}", "-f", f"{folder}/slurm.conf"] for index in range(NODES)),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            if command[0] == "munged":
                _wait_for(lambda: (folder / "munge.sock").exists(), 10, folder)
        _wait_for(lambda: _idle_nodes(environment) == NODES, 30, folder)
        yield environment
    finally:
        _end_jobs(environment)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=3)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle_nodes(environment: dict[str, str]) -> int:
    answer = subprocess.run(
        ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environment, capture_output=True, text=True, check=False
    )
    return int(answer.stdout.strip() or 0)


def _end_jobs(environment: dict[str, str], *, seconds: float = 20) -> None:
    """Cancel what still runs, so that no job outlives the daemons that watch it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        queue = subprocess.run(
            ["squeue", "-h", "-o", "%i"], env=environment, capture_output=True, text=True, check=False
        ).stdout.split()
        if not queue:
            return
        subprocess.run(["scancel", *queue], env=environment, capture_output=True, check=False)
        time.sleep(0.5)


def _wait_for(ready, seconds: float, folder: Path) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
            raise RuntimeError(f"the Slurm cluster did not come up in {seconds} s\n{logs}")
        time.sleep(0.1)
