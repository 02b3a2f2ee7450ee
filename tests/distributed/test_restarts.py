"""Ranks killed or hanging under a launcher that starts the job again: it ends as the run that nobody disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mm15_megatron.checkpoint.publish import checkpoints_folder, tracked
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
from tests.helpers.tables import FaultMatrix

SAVING = ["checkpoint.save_interval=7", "checkpoint.async_save=true"]
SEVERAL = 13  # steps that are written down when a rank is stopped: at least five after a checkpoint


@pytest.fixture
def saving(arguments: list[str]) -> list[str]:
    """What every run here is told: it saves."""
    return [*(one for one in arguments if not one.startswith("checkpoint.")), *SAVING]


def _after_several_steps(run_dir: Path, log: Path) -> list[float]:
    """Wait until a run has a checkpoint and some steps behind it; the losses it wrote."""
    metrics = run_dir / "metrics.jsonl"
    wait_for(
        lambda: metrics.exists() and metrics.read_text().count("\n") >= SEVERAL and _saved(run_dir),
        seconds=120,
        what=f"step {SEVERAL}",
        log=log,
    )
    shutil.copytree(run_dir, run_dir.with_name("seen"), ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    torn = run_dir.with_name("seen") / "metrics.jsonl"
    torn.write_text("".join(line for line in torn.read_text().splitlines(keepends=True) if line.endswith("\n")))
    return losses(torn.parent)


def _saved(run_dir: Path) -> bool:
    return tracked(checkpoints_folder(run_dir)) is not None


def _rank(process: psutil.Process, number: int) -> psutil.Process:
    """The process of a rank of torchrun's."""
    return next(child for child in process.children() if child.environ().get("RANK") == str(number))


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        (signal.SIGKILL, []),
        pytest.param(
            signal.SIGSTOP,
            ["parallel.pipeline_model_parallel_size=2", "faults.hang_timeout_minutes=0.1"],
            marks=pytest.mark.soak,
        ),
    ],
    ids=["killed", "stopped"],
)
def test_torchrun_starts_the_job_again(
    fault: signal.Signals,
    layout: list[str],
    saving: list[str],
    straight: list[float],
    tmp_path: Path,
    fault_matrix: FaultMatrix,
) -> None:
    """A rank is killed, or stands still, in a step: every loss behind the checkpoint is bitwise what it was before."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = torchrun(saving, run_dir, *layout, agent=("--max-restarts=1",))
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=stream, stderr=stream)
    seen = _after_several_steps(run_dir, log)
    rank = _rank(psutil.Process(process.pid), 1)
    helpers = rank.children(recursive=True)
    # resources, the writer of checkpoints, and where the rank reads rows of its own a data worker and its server
    assert len(helpers) >= (2 if layout else 4)
    os.kill(rank.pid, fault)
    assert process.wait(timeout=240) == 0, log.read_text()[-4000:]
    text, found = log.read_text(), losses(run_dir)
    assert "go on from step_0000" in text
    assert found[: len(seen)] == seen
    assert found == pytest.approx(straight, abs=FP32_DRIFT)
    assert psutil.wait_procs(helpers, timeout=30)[1] == [], "nobody stays behind"
    outcome = f"started again, {len(seen)} losses bitwise as before, {STEPS} as undisturbed"
    fault_matrix(f"{fault.name} of rank 1 (torchrun)", f"behind step {len(seen)}", outcome)
    if fault == signal.SIGSTOP:
        assert f", process {rank.pid}) says nothing: it is stopped or dead" in text
        assert len(list((run_dir / "hangs").glob("*/report.txt"))) == 1


@pytest.mark.soak
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_slurm_starts_the_job_again(
    saving: list[str], straight: list[float], tmp_path: Path, fault_matrix: FaultMatrix
) -> None:
    """A rank of train.sbatch is killed: the script requeues its job, which ends as one process does."""
    run_dir, log = tmp_path / "run", tmp_path / "job.out"
    with cluster(tmp_path / "slurm") as slurm:
        env = {**environment(), **slurm, "PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1"}
        submit = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", "slurm/train.sbatch"]
        run([*submit, *saving, f"train.run_dir={run_dir}"], env)
        seen = _after_several_steps(run_dir, log)
        running = {one: one.info["cmdline"] or [] for one in psutil.process_iter(["cmdline"])}  # a zombie has none
        ranks = [one for one, line in running.items() if f"train.run_dir={run_dir}" in line and line[1:3] == TRAIN]
        killed = next(one for one in ranks if one.environ().get("SLURM_PROCID") == "1")
        killed.kill()
        wait_for(lambda: "requeueing job" in log.read_text(), seconds=180, what="the requeue", log=log)
        metrics = run_dir / "metrics.jsonl"
        wait_for(lambda: "start 1 nodes" in log.read_text(), seconds=240, what="the second start", log=log)
        wait_for(lambda: len(metrics.read_text().splitlines()) == STEPS, seconds=180, what="the last step", log=log)
    assert "a rank hung or was killed (code 137); requeueing" in log.read_text()
    assert losses(run_dir)[: len(seen)] == seen
    fault_matrix("kill -9 of rank 1 (Slurm)", f"behind step {len(seen)}", "requeued, losses bitwise as before")
    assert losses(run_dir) == pytest.approx(straight, abs=FP32_DRIFT)


_FINISH = """
scontrol() { echo "scontrol $*"; }
source "$1/slurm/common.sh"
SLURM_JOB_ID=7 finish "$2"
"""


def _finish(code: int, folder: Path, **more: str) -> tuple[int, str]:
    command = ["bash", "-euo", "pipefail", "-c", _FINISH, "bash", str(ROOT), str(code)]
    done = subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_what_the_batch_script_makes_of_a_code(tmp_path: Path) -> None:
    """Interruptions are requeued always, hangs and kills a few times, anything else never."""
    for _ in range(5):
        code, said = _finish(75, tmp_path)
        assert (code, "scontrol requeue 7" in said) == (0, True)
    for number, fault in enumerate((4, 137, 134), start=1):
        code, said = _finish(fault, tmp_path)
        assert (code, "scontrol requeue 7" in said) == (0, True)
        assert f"(code {fault}); requeueing job 7, restart {number} of 3" in said
    code, said = _finish(4, tmp_path)
    assert (code, "requeue" in said) == (4, False)
    assert "3 of 3 restarts (MM15_MAX_RESTARTS) are used up" in said
    assert list(tmp_path.iterdir()) == [], "the count goes with the job"
    for code in (0, 1, 2, 3):
        assert _finish(code, tmp_path) == (code, "")
    assert _finish(4, tmp_path, MM15_MAX_RESTARTS="0")[0] == 4
