"""The record of a run: appended, truncated after a resume, null where there is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mm15_megatron.utils.metrics import MetricsWriter, truncate_records


def _lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_resume_takes_steps_again(tmp_path: Path) -> None:
    """Records after the resumed step are dropped and counted; each step stays once, in both outputs."""
    with MetricsWriter(tmp_path, resumed_step=0, tensorboard=True) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": float(step)})
    with MetricsWriter(tmp_path, resumed_step=1, tensorboard=True) as writer:
        assert writer.dropped == 2
        for step in (2, 3):
            writer.write(step, {"train/loss": 10.0 * step})
    assert _lines(tmp_path) == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 20.0},
        {"step": 3, "train/loss": 30.0},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_torn_line_is_dropped(tmp_path: Path) -> None:
    """A kill in the middle of a line leaves no half record."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert truncate_records(path, step=5) == 1
    assert path.read_text() == '{"step": 1, "a": 1}\n'
    assert truncate_records(path, step=5) == 0
    assert truncate_records(tmp_path / "absent", step=5) == 0


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """NaN, infinity and None are null: the file stays JSON."""
    with MetricsWriter(tmp_path, resumed_step=0, tensorboard=False) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": None, "d": 2})
    assert _lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 2}]
    assert not (tmp_path / "tensorboard").exists()
