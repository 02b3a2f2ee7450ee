"""Where a run's figures go: TensorBoard, and a JSONL file of the same values, one record a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

JSONL = "metrics.jsonl"


def truncate_records(path: Path, *, step: int) -> int:
    """Drop the records of steps after ``step`` (from a killed run; they are taken again), and a torn last line.

    The file is replaced at once, so a kill leaves either the old or the new one.

    Returns:
        How many lines were dropped; 0 where there is no file.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
    return len(lines) - len(kept)


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class MetricsWriter:
    """Writes the figures of a step under slash-separated names; a context manager.

    Args:
        run_dir: holds ``metrics.jsonl`` and the folder ``tensorboard``.
        resumed_step: step the run starts from; records of later steps are dropped from both.
        tensorboard: whether to write TensorBoard events.
    """

    def __init__(self, run_dir: str | Path, *, resumed_step: int, tensorboard: bool) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSONL
        self.dropped = truncate_records(path, step=resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            # imported here: it costs a second, and a run may do without
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Append one record; None and numbers that are not finite become null, and are left out of TensorBoard."""
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in finite.items():
                if value is not None:
                    self._events.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the writer."""
        self.close()
