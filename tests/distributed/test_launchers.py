"""The real command under the real launchers: alone, torchrun, mpiexec and Slurm agree, and a signal loses nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.tokenizer import train_character_tokenizer
from tests.data.images import photo
from tests.helpers import mpi
from tests.helpers.slurm import cluster, why_not

ROOT = Path(__file__).resolve().parents[2]
# Long enough for a signal to arrive in the middle of a run on a fast machine.
STEPS = 60
# fp32 sums in another order, fed back through sixty updates.
FP32_DRIFT = 2e-4
TRAIN = ["-m", "mm15_megatron.train"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A debug_dense run on forty captioned images, decoded by DALI in a worker process."""
    folder = tmp_path_factory.mktemp("dataset")
    tokenizer = train_character_tokenizer([*map(chr, range(32, 127)), "\n"], folder / "tokenizer.json")
    pairs = [(photo(30 + i, 40, seed=i), f"caption number {i} " * (1 + i % 4)) for i in range(40)]
    build_captions(folder / "train", pairs, tokenizer)
    return [
        "--preset=debug_dense",
        f"data.tokenizer={folder / 'tokenizer.json'}",
        f"data.sources=[{{prefix: {folder / 'train'}}}]",
        f"train.steps={STEPS}",
        "train.threads_per_rank=1",
        "checkpoint.save_interval=0",
        "optimizer.adam_eps=1e-5",
    ]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher sets."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MM15_PARITY_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(command: list[str], env: dict[str, str], *, timeout: float = 240) -> str:
    """Run a command to its end and return what it printed; its output is in the failure."""
    done = subprocess.run(
        command,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def losses(run_dir: Path) -> list[float]:
    """Loss of every step, as the run wrote them."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["train/loss"] for record in records]


@pytest.fixture(scope="module")
def straight(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run in one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    run([sys.executable, *TRAIN, *arguments, f"train.run_dir={run_dir}"], environment())
    return losses(run_dir)


def torchrun(arguments: list[str], run_dir: Path, *layout: str) -> list[str]:
    """The torchrun command of a two-rank run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [sys.executable, *agent, *TRAIN, *arguments, f"train.run_dir={run_dir}", *layout]


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


def wait_for(ready: Callable[[], bool], *, seconds: float, what: str, log: Path) -> None:
    """Poll until something has happened."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen in {seconds} s\n{log.read_text()[-4000:] if log.exists() else ''}")
        time.sleep(0.2)


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
