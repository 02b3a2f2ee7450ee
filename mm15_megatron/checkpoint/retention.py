"""Which checkpoints stay on disk."""

from __future__ import annotations

from pathlib import Path

from mm15_megatron.checkpoint.publish import published, remove, tracked


def apply_retention(folder: Path, *, keep: int) -> list[str]:
    """Delete all but the newest ``keep`` checkpoints (0 = keep all), and never the one that the tracker names.

    Returns:
        The names of the deleted checkpoints, oldest first.

    Raises:
        CheckpointError: the tracker is damaged; nothing is deleted then.
    """
    existing = published(folder)
    if keep == 0 or len(existing) <= keep:
        return []
    spared = tracked(folder)
    doomed = [path for path in existing[:-keep] if path != spared]
    for path in doomed:
        remove(path)
    return [path.name for path in doomed]
