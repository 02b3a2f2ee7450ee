"""How a checkpoint becomes visible: written under another name, synced, renamed, and only then named by the tracker.

    <run_dir>/checkpoints/step_00001234/   a published checkpoint
    <run_dir>/checkpoints/.writing_...     one being written; what a killed run left behind is never read and is removed
    <run_dir>/checkpoints/latest           the tracker: the name of the checkpoint to resume from, moved last; "none"
                                           while the first is being written

Nothing but the tracker decides what is loaded. These functions run on one rank; the caller keeps the others waiting.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from mm15_megatron.errors import CheckpointError
from mm15_megatron.utils.files import sync_to_disk

TRACKER = "latest"
NOTHING_YET = "none"
_LOG = logging.getLogger(__name__)
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
    """Return the checkpoint that the tracker names; None where none ever was tracked.

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
    if name == NOTHING_YET:
        return None
    if step_of_name(name) is None:
        raise CheckpointError(f"the tracker {tracker} holds {name[:80]!r}, not the name of a checkpoint", fix=choice)
    if name not in existing:
        raise CheckpointError(f"the tracker {tracker} names {name}, which does not exist", fix=choice)
    return folder / name


def offer_before(checkpoint: Path) -> str:
    """Return what to do about a published checkpoint that cannot be opened, as an imperative sentence."""
    older = [path.name for path in published(checkpoint.parent) if path.name < checkpoint.name]
    if not older:
        return "no older checkpoint is there: restore the file from a copy"
    return (
        f"write {older[-1]} into {checkpoint.parent / TRACKER} to go on from the one before it, whose files are "
        "checked when it is loaded"
    )


def begin(folder: Path, step: int) -> Path:
    """Remove what killed runs left half-written or half-removed and return an empty folder to write ``step`` into."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TRACKER).exists() and not published(folder):
        _move_tracker(folder, NOTHING_YET)  # killed before it is moved on, the run starts again
    for path in folder.iterdir():
        if path.name.startswith(_HIDDEN):
            _discard(path)
    writing = folder / f"{_HIDDEN[0]}{name_of_step(step)}"
    writing.mkdir()
    return writing


def publish(writing: Path, *, step: int) -> Path:
    """Sync a completely written folder to disk, give it its name and move the tracker to it.

    A checkpoint of the same step (published, but perhaps not yet tracked when its run was killed) is replaced.
    """
    folder = writing.parent
    for path in [*writing.rglob("*"), writing]:
        sync_to_disk(path)
    final = folder / name_of_step(step)
    replaced = _hide(final) if final.exists() else None
    writing.rename(final)
    sync_to_disk(folder)
    _move_tracker(folder, final.name)
    if replaced is not None:
        _discard(replaced)
    return final


def abandon(folder: Path, step: int) -> None:
    """Remove what was written of a checkpoint that will not be published."""
    shutil.rmtree(folder / f"{_HIDDEN[0]}{name_of_step(step)}", ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed in between, it is already hidden from every reader."""
    try:
        _discard(_hide(checkpoint))
    except OSError as error:
        _LOG.warning("%s could not be removed: %s", checkpoint, error)


def _discard(path: Path) -> None:
    """Delete what no reader sees; what stays is tried again by the next save, and no reason to fail this one."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        _LOG.warning("%s could not be removed: %s", path, error)


def _hide(checkpoint: Path) -> Path:
    return checkpoint.rename(checkpoint.with_name(f"{_HIDDEN[1]}{checkpoint.name}"))


def _move_tracker(folder: Path, name: str) -> None:
    temporary = folder / f".{TRACKER}"
    temporary.write_text(name + "\n", encoding="utf-8")
    sync_to_disk(temporary)
    temporary.replace(folder / TRACKER)
    sync_to_disk(folder)
