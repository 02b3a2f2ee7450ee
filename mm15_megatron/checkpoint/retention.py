"""Which checkpoints stay on disk."""

from __future__ import annotations

from pathlib import Path

from mm15_megatron.checkpoint.publish import published, remove, tracked


def apply_retention(folder: Path, *, keep: int) -> list[str]:
    """Delete all but the newest ``keep`` checkpoints up to the tracked one, which always stays (0 = keep all).

    Checkpoints beyond the tracked one belong to a future that was abandoned by moving the tracker back; they are left
    alone until the run reaches and replaces them.

    Returns:
        The names of the deleted checkpoints, oldest first.

    Raises:
        CheckpointError: the tracker is damaged; nothing is deleted then.
    """
    newest = tracked(folder)
    if keep == 0 or newest is None:
        return []
    existing = published(folder)
    doomed = existing[: existing.index(newest) + 1][:-keep]
    for path in doomed:
        remove(path)
    return [path.name for path in doomed]
