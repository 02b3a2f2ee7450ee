"""The real command under the real launchers: alone, torchrun, mpiexec and Slurm agree, and a signal loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers import mpi
from tests.helpers.launched import (
    FP32_DRIFT,
    ROOT,
    STEPS,
    TRAIN,
    environment,
    losses,
    run,
    torchrun,
    wait_for,
)
from tests.helpers.slurm import cluster, why_not


def test_torchrun_tensor_parallel(arguments: list[str], straight: list[float], tmp_path: Path) -> None:
    """Two ranks under torchrun, sequence-parallel, give one process's losses."""
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    run(torchrun(arguments, tmp_path, *layout), environment())
    assert losses(tmp_path) == pytest.approx(straight, abs=FP32_DRIFT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_every_process_of_a_run(number: signal.Signals, arguments: list[str], tmp_path: Path) -> None:
    """Launchers signal the whole group: data workers and their server leave it to the training process, which saves."""
    command = [sys.executable, *TRAIN, *arguments, f"train.run_dir={tmp_path}", "data.num_workers=2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and "\n" in metrics.read_text(), seconds=120, what="step 1", log=tmp_path / "log")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4, "two workers, the server that forks them, Python's resource tracker"
    for child in children:
        assert _leaves_alone(child.pid, number), f"{child.cmdline()} would be ended by {number.name}"
    os.killpg(process.pid, number)
    assert process.wait(timeout=120) == 75, (tmp_path / "log").read_text()[-4000:]
    assert (tmp_path / "checkpoints" / "latest").exists()


def mpiexec(arguments: list[str], run_dir: Path, *options: str) -> list[str]:
    """The mpiexec command of a two-rank run."""
    return [str(mpi.mpiexec()), "-n", "2", sys.executable, *TRAIN, *arguments, f"train.run_dir={run_dir}", *options]


def started(command: list[str], run_dir: Path) -> subprocess.Popen[bytes]:
    """Start a run and return once it has taken a step; what it prints is in ``run_dir``/log."""
    run_dir.mkdir(exist_ok=True)
    with (run_dir / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(**mpi.ENVIRONMENT), cwd=ROOT, stdout=log, stderr=log)
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and "\n" in metrics.read_text(), seconds=120, what="step 1", log=run_dir / "log")
    return process


@pytest.mark.skipif(mpi.why_not() is not None, reason=str(mpi.why_not()))
def test_mpiexec_signal_and_resume(arguments: list[str], straight: list[float], tmp_path: Path) -> None:
    """Two stages under mpiexec: SIGUSR1 ends every rank with 75, the same command resumes, the losses are the same."""
    run_dir = tmp_path / "run"
    command = mpiexec(arguments, run_dir, "parallel.pipeline_model_parallel_size=2", "data.num_workers=2")
    process = started(command, run_dir)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=120) == 75, (run_dir / "log").read_text()[-4000:]
    assert (run_dir / "checkpoints" / "latest").exists()
    assert len(losses(run_dir)) < STEPS
    output = run(command, environment(**mpi.ENVIRONMENT))
    assert "2 ranks (mpi)" in output
    assert losses(run_dir) == pytest.approx(straight, abs=FP32_DRIFT)


@pytest.mark.skipif(mpi.why_not() is not None, reason=str(mpi.why_not()))
def test_mpiexec_ends_the_ranks_that_a_dead_one_leaves(arguments: list[str], tmp_path: Path) -> None:
    """MPI stays alive to the end, so that mpiexec sees a rank that dies; nobody waits for it."""
    process = started(mpiexec(arguments, tmp_path, "parallel.pipeline_model_parallel_size=2"), tmp_path)
    below = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in below if child.cmdline()[1:3] == TRAIN]
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait(timeout=60) not in (0, 75)
    assert psutil.wait_procs(ranks, timeout=60)[1] == []


def _leaves_alone(pid: int, number: int) -> bool:
    """Whether a process blocks or ignores a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return bool((int(status["SigBlk"], 16) | int(status["SigIgn"], 16)) >> (number - 1) & 1)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_sbatch_requeue_resumes(arguments: list[str], straight: list[float], tmp_path: Path) -> None:
    """train.sbatch on two nodes, interrupted by SIGUSR1, requeues itself and ends as one process does."""
    run_dir, log = tmp_path / "run", tmp_path / "job.out"
    with cluster(tmp_path / "slurm") as slurm:
        env = {**environment(), **slurm, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env["MASTER_ADDR"] = "127.0.0.1"  # the nodes are virtual: their names resolve nowhere
        submit = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", "slurm/train.sbatch"]
        job = run([*submit, *arguments, f"train.run_dir={run_dir}"], env).split()[-1]
        metrics = run_dir / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, seconds=120, what="step 2", log=log)
        run(["scancel", "--signal=USR1", f"{job}.0"], env)
        wait_for(lambda: "requeueing" in log.read_text(), seconds=60, what="the requeue", log=log)
        wait_for(lambda: "start 1 nodes" in log.read_text(), seconds=240, what="the second start", log=log)
        wait_for(lambda: len(metrics.read_text().splitlines()) == STEPS, seconds=180, what="the last step", log=log)
        wait_for(lambda: not _is_queued(job, env), seconds=60, what="the end of the job", log=log)
    text = log.read_text()
    assert losses(run_dir) == pytest.approx(straight, abs=FP32_DRIFT), text[-4000:]


def _is_queued(job: str, env: dict[str, str]) -> bool:
    answer = subprocess.run(["squeue", "-h", "-o", "%i"], env=env, capture_output=True, text=True, check=True)
    return job in answer.stdout.split()
