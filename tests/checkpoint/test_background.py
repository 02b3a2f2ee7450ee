"""Saving beside the training: the snapshot alone is saved, whatever dies and wherever."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from mm15_megatron.checkpoint import exchange, publish, save, torch_dist
from mm15_megatron.checkpoint.background import BackgroundWriter, GivenUp, Written, _meet, _Meeting
from mm15_megatron.checkpoint.publish import checkpoints_folder
from mm15_megatron.checkpoint.save import save_checkpoint, take_snapshot
from mm15_megatron.checkpoint.store import load_training, open_checkpoint, open_latest
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.trace import build_parts
from mm15_megatron.training.step import StepParts

from ..helpers.layouts import change, debug_config
from ..helpers.steps import train_steps
from ..helpers.tables import FaultMatrix

TP2DP2 = parse_layout("tp2dp2-distopt")
AFTER = 5
PATIENCE = 30.0


def _config(run_dir: Path, **checkpoint: object) -> RunConfig:
    return change(debug_config(), train={"run_dir": str(run_dir)}, checkpoint=checkpoint)


def _arguments(parts: StepParts, step: int) -> dict[str, object]:
    return {"topology": parts.topology, "step": step, "data_digest": "stream", "progress": {"step": step}}


def _writer(parts: StepParts, prepare: Callable[[], None] | None = None) -> BackgroundWriter:
    return BackgroundWriter(parts.topology.place, timeout_minutes=1, prepare=prepare)


# --- What is saved


def _save_while_training(cfg: RunConfig) -> tuple[list[tuple[float, float]], list[Written]]:
    """Two saves in the background, with steps behind each; what the uninterrupted run shows after the first."""
    parts = build_parts(cfg)
    writer = _writer(parts)
    train_steps(parts, 0, 2)
    written, figures = [], []
    for step in (2, 2 + AFTER):
        writer.submit(take_snapshot(cfg, parts.chunks, parts.optimizer, **_arguments(parts, step)))
        figures += train_steps(parts, step, AFTER)
        written.append(writer.result())
    writer.close()
    close_topology()
    return figures[:AFTER], written


def _resume(cfg: RunConfig, step: int) -> list[tuple[float, float]]:
    parts = build_parts(cfg)
    folder = checkpoints_folder(cfg.train.run_dir) / f"step_{step:08}"
    load_training(open_checkpoint(folder), cfg, parts.chunks, parts.optimizer)
    found = train_steps(parts, step, AFTER)
    close_topology()
    return found


@pytest.mark.parametrize("kind", ["torch_dist", "zarr"])
def test_the_run_goes_on_and_its_snapshot_is_saved(kind: str, tmp_path: Path) -> None:
    """The five losses after the checkpoint are bitwise those of the run that went on while it was written."""
    cfg = TP2DP2.apply(_config(tmp_path, format=kind))
    results = run_on_ranks(_save_while_training, 4, cfg=cfg)
    straight, written = results[0]
    assert [(one.step, one.error) for one in written] == [(2, None), (2 + AFTER, None)]
    assert written[1].folder == str(checkpoints_folder(tmp_path) / "step_00000007")
    assert all(found == (straight, [replace_seconds(one, other) for one, other in zip(written, found[1], strict=True)])
               for found in results)  # fmt: skip
    assert run_on_ranks(_resume, 4, cfg=cfg, step=2)[0] == straight


def replace_seconds(one: Written, other: Written) -> Written:
    """The same outcome at the other rank's time."""
    return Written(one.step, one.folder, other.seconds, one.error)


# --- Deaths


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(phase: str) -> None:
    """Have this process die in one phase of the second save."""
    step, begin = {"count": 0}, save._begin

    def counted(*arguments: object) -> Path:
        step["count"] += 1
        folder = begin(*arguments)
        if step["count"] == 2:
            _arm(phase)
        return folder

    save._begin = counted


def _arm(phase: str) -> None:
    def dying(*unused: object, **also: object) -> None:
        _die()

    if phase == "exchange":
        exchange._received = dying
    elif phase == "tensors":
        torch_dist.save = dying
    elif phase == "proof":
        save._write_proof = dying
    elif phase == "rename":
        publish._hide = publish.sync_to_disk = dying
    elif phase == "tracker":
        publish._move_tracker = dying
    elif phase == "retention":
        publish.shutil.rmtree = dying
    else:
        _die()


PHASES = {"begin": 1, "exchange": 1, "tensors": 1, "proof": 1, "rename": 1, "tracker": 1, "retention": 2}
"""By phase: the step that the tracker names after a death in it, while step 2 is being saved."""


def _train_with_dying_writer(cfg: RunConfig, phase: str) -> list[str]:
    """Two saves; in the second the writer of rank 0 dies. What each rank is told."""
    parts = build_parts(cfg)
    writer = _writer(parts, functools.partial(_die_at, phase) if parts.topology.place.rank == 0 else None)
    told = []
    for step in (1, 2):
        train_steps(parts, step - 1, 1)
        writer.submit(take_snapshot(cfg, parts.chunks, parts.optimizer, **_arguments(parts, step)))
        written = writer.result()
        told.append("" if written.error is None else str(written.error))
    writer.close()
    close_topology()
    return told


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param(one, marks=() if one in ("exchange", "tracker", "retention") else pytest.mark.soak)
        for one in PHASES
    ],
)
def test_a_writer_that_is_killed(phase: str, tmp_path: Path, fault_matrix: FaultMatrix) -> None:
    """The rank says so, and the run goes on from the last checkpoint that is whole."""
    cfg = _config(tmp_path, keep=1)
    first, second = run_on_ranks(_train_with_dying_writer, 2, cfg=parse_layout("dp2-distopt").apply(cfg), phase=phase)
    assert (first[0], second[0]) == ("", "")
    assert "the process that wrote the checkpoint of step 2 ended with -9" in first[1]
    assert "was given up" in second[1]
    found = open_latest(tmp_path)
    assert found is not None
    assert found.step == PHASES[phase]
    fault_matrix("kill -9 of rank 0's writer", f"asynchronous save of step 2: {phase}", f"step {found.step} is loaded")
    run_on_ranks(_resume, 1, cfg=cfg, step=found.step)
    run_on_ranks(_save_once, 1, cfg=cfg)
    names = sorted(path.name for path in checkpoints_folder(tmp_path).iterdir())
    assert names == ["latest", "step_00000003"], "the next save leaves nothing of it"


def _save_once(cfg: RunConfig) -> None:
    parts = build_parts(cfg)
    train_steps(parts, 0, 3)
    save_checkpoint(cfg, parts.chunks, parts.optimizer, **_arguments(parts, 3))
    close_topology()


def _kill_rank_while_writing(cfg: RunConfig, notes: str) -> None:
    parts = build_parts(cfg)
    writer = _writer(parts, functools.partial(_sleep_in_proof, notes))
    train_steps(parts, 0, 1)
    writer.submit(take_snapshot(cfg, parts.chunks, parts.optimizer, **_arguments(parts, 1)))
    while len(list(Path(notes).iterdir())) < parts.topology.place.world_size:
        time.sleep(0.05)
    if parts.topology.place.rank == 1:
        _die()
    writer.result()


def _sleep_in_proof(notes: str) -> None:
    def sleeping(*unused: object, **also: object) -> None:
        Path(notes, str(os.getpid())).touch()
        time.sleep(10 * PATIENCE)

    save._prove = sleeping


def test_a_rank_that_is_killed_takes_its_writer_with_it(tmp_path: Path, fault_matrix: FaultMatrix) -> None:
    """Nothing is published, and no process stays behind."""
    notes = tmp_path / "notes"
    notes.mkdir()
    cfg = parse_layout("dp2").apply(_config(tmp_path))
    with pytest.raises(RankFailure):
        run_on_ranks(_kill_rank_while_writing, 2, cfg=cfg, notes=str(notes))
    assert open_latest(tmp_path) is None
    writers = [int(note.name) for note in notes.iterdir()]
    assert len(writers) == 2
    deadline = time.monotonic() + PATIENCE
    while any(map(_lives, writers)):
        assert time.monotonic() < deadline, "a writer stays behind"
        time.sleep(0.1)
    fault_matrix("kill -9 of rank 1", "while its writer writes", f"nothing published, {len(writers)} writers gone")


def _submit_and_close(cfg: RunConfig) -> None:
    """A run that ends for another reason while a save is on its way."""
    parts = build_parts(cfg)
    writer = _writer(parts)
    train_steps(parts, 0, 1)
    writer.submit(take_snapshot(cfg, parts.chunks, parts.optimizer, **_arguments(parts, 1)))
    writer.close()
    close_topology()


def test_what_is_on_its_way_arrives_behind_a_run_that_ends(tmp_path: Path) -> None:
    run_on_ranks(_submit_and_close, 2, cfg=parse_layout("dp2").apply(_config(tmp_path)))
    found = open_latest(tmp_path)
    assert found is not None
    assert found.step == 1


def _note_devices(note: str) -> None:
    Path(note).write_text(os.environ["CUDA_VISIBLE_DEVICES"])


def _devices_of_both(cfg: RunConfig, note: str) -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = "3"
    parts = build_parts(cfg)
    writer = _writer(parts, functools.partial(_note_devices, note))
    writer.submit(take_snapshot(cfg, parts.chunks, parts.optimizer, **_arguments(parts, 0)))
    assert writer.result().error is None
    writer.close()
    close_topology()
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_the_writer_sees_no_device(tmp_path: Path) -> None:
    """From its first import on, which asks for devices; the rank keeps its own."""
    note = tmp_path / "note"
    assert run_on_ranks(_devices_of_both, 1, cfg=_config(tmp_path), note=str(note)) == ["3"]
    assert note.read_text() == ""


_STAGE = """
import torch
from mm15_megatron.checkpoint.staging import Staging
from mm15_megatron.errors import CheckpointError
try:
    Staging().hold({"a": torch.zeros(8 << 20, dtype=torch.uint8)})
except CheckpointError as error:
    print(error)
"""


def test_too_little_shared_memory() -> None:
    """As in a container with its default of 64 MB: said with both sizes and what to do."""
    small = f'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {sys.executable} -c "$SCRIPT"'
    environment = {**os.environ, "SCRIPT": _STAGE}
    done = subprocess.run(["unshare", "-m", "sh", "-c", small], env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small /dev/shm cannot be mounted: {done.stderr.strip()[-200:]}")
    assert "the snapshot needs 8.0 MiB of shared memory, and 2.0 MiB are free in /dev/shm: " in done.stdout
    assert (
        "fix: enlarge it (docker run --shm-size, or a larger tmpfs), or set checkpoint.async_save=false" in done.stdout
    )


def test_writers_that_cannot_meet() -> None:
    """The address of rank 0's writer answers nobody."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        meeting = _Meeting("127.0.0.1", taken.getsockname()[1], 0, 2, timedelta(seconds=1))
        said = _meet(meeting)
    assert isinstance(said, GivenUp)
    assert "could not meet at 127.0.0.1" in said.problem
    assert said.fix.endswith("set checkpoint.async_save=false")


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
