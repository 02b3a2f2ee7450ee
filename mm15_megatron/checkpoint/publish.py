"""How a checkpoint becomes visible: written under another name, synced, renamed, and only then named by the tracker.

    <run_dir>/checkpoints/step_00001234/   a published checkpoint
    <run_dir>/checkpoints/.writing_...     one being written; what a killed run left behind is never read and is removed
    <run_dir>/checkpoints/latest           the tracker: the name of the checkpoint to resume from, moved last

Nothing but the tracker decides what is loaded. These functions run on one rank; the caller keeps the others waiting.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mm15_megatron.errors import CheckpointError

TRACKER = "latest"
_NAME = re.compile(r"step_(\d{8,})")
_HIDDEN = (".writing_", ".removing_")


def checkpoints_folder(run_dir: str | Path) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(run_dir) / "checkpoints"


def name_of_step(step: int) -> str:
    """Name of a published checkpoint."""
    return f"step_{step:08d}"


def step_of_name(name: str) -> int | None:
    """Step of a published checkpoint's name; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def published(folder: Path) -> list[Path]:
    """Return the published checkpoints, oldest first."""
    found = [path for path in folder.iterdir() if step_of_name(path.name) is not None] if folder.is_dir() else []
    return sorted(found, key=lambda path: step_of_name(path.name) or 0)


def tracked(folder: Path) -> Path | None:
    """Return the checkpoint that the tracker names; None where nothing was ever published.

    Raises:
        CheckpointError: the tracker names no checkpoint or one that is gone, or is missing beside checkpoints.
    """
    tracker, existing = folder / TRACKER, [path.name for path in published(folder)]
    choice = f"write one of {', '.join(existing)} into {tracker}" if existing else "start a new run directory"
    if not tracker.exists():
        if existing:
            raise CheckpointError(f"{folder} holds {', '.join(existing)} but no tracker file {TRACKER!r}", fix=choice)
        return None
    name = tracker.read_bytes().decode("utf-8", errors="replace").strip()
    if step_of_name(name) is None:
        raise CheckpointError(f"the tracker {tracker} holds {name[:80]!r}, not the name of a checkpoint", fix=choice)
    if name not in existing:
        raise CheckpointError(f"the tracker {tracker} names {name}, which does not exist", fix=choice)
    return folder / name


def begin(folder: Path, step: int) -> Path:
    """Remove what killed runs left half-written or half-removed and return an empty folder to write ``step`` into."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name.startswith(_HIDDEN):
            shutil.rmtree(path)
    writing = folder / f"{_HIDDEN[0]}{name_of_step(step)}"
    writing.mkdir()
    return writing


def publish(writing: Path, *, step: int) -> Path:
    """Sync a completely written folder to disk, give it its name and move the tracker to it.

    A checkpoint of the same step (published, but perhaps not yet tracked when its run was killed) is replaced.
    """
    folder = writing.parent
    for path in [*writing.rglob("*"), writing]:
        _sync(path)
    final = folder / name_of_step(step)
    replaced = _hide(final) if final.exists() else None
    writing.rename(final)
    _sync(folder)
    _move_tracker(folder, final.name)
    if replaced is not None:
        shutil.rmtree(replaced)
    return final


def abandon(folder: Path, step: int) -> None:
    """Remove what was written of a checkpoint that will not be published."""
    shutil.rmtree(folder / f"{_HIDDEN[0]}{name_of_step(step)}", ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed in between, it is already hidden from every reader."""
    shutil.rmtree(_hide(checkpoint))


def _hide(checkpoint: Path) -> Path:
    return checkpoint.rename(checkpoint.with_name(f"{_HIDDEN[1]}{checkpoint.name}"))


def _move_tracker(folder: Path, name: str) -> None:
    temporary = folder / f".{TRACKER}"
    temporary.write_text(name + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(folder / TRACKER)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
