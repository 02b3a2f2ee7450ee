"""The publish protocol: what is visible when, after which kill, and what is deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mm15_megatron.checkpoint.publish import begin, name_of_step, publish, published, remove, step_of_name, tracked
from mm15_megatron.checkpoint.retention import apply_retention
from mm15_megatron.errors import CheckpointError


def _publish(folder: Path, *steps: int) -> None:
    for step in steps:
        writing = begin(folder, step)
        (writing / "content").write_text(str(step))
        publish(writing, step=step)


def _names(folder: Path) -> list[str]:
    return [path.name for path in published(folder)]


def test_nothing_published_is_no_error(tmp_path: Path) -> None:
    """A run directory without checkpoints has nothing to resume from."""
    assert tracked(tmp_path / "absent") is None
    tmp_path.joinpath("checkpoints").mkdir()
    assert tracked(tmp_path / "checkpoints") is None


def test_killed_before_the_first_is_tracked(tmp_path: Path) -> None:
    """Published and not tracked, it is no checkpoint to resume from, and no obstacle to the run that starts again."""
    writing = begin(tmp_path, 1)
    assert (tmp_path / "latest").read_text() == "none\n"
    writing.rename(tmp_path / "step_00000001")
    assert tracked(tmp_path) is None
    _publish(tmp_path, 1)
    assert tracked(tmp_path) == tmp_path / "step_00000001"
    assert (tmp_path / "step_00000001" / "content").read_text() == "1"


def test_names() -> None:
    """Names sort as steps do, and only they are checkpoints."""
    assert name_of_step(1234) == "step_00001234"
    assert step_of_name("step_00001234") == 1234
    assert step_of_name("step_1234567890") == 1234567890
    assert step_of_name("step_12") is None
    assert step_of_name(".writing_step_00001234") is None


def test_tracker_follows_the_last_publication(tmp_path: Path) -> None:
    """The tracker decides, not the newest directory."""
    _publish(tmp_path, 10, 20)
    assert tracked(tmp_path) == tmp_path / "step_00000020"
    (tmp_path / "latest").write_text("step_00000010\n")
    assert tracked(tmp_path) == tmp_path / "step_00000010"


def test_half_written_is_never_read_and_goes_with_the_next_save(tmp_path: Path) -> None:
    """A kill while writing leaves a hidden folder; a kill while deleting too."""
    _publish(tmp_path, 10)
    writing = begin(tmp_path, 20)
    (writing / "content").write_text("half")
    (tmp_path / ".removing_step_00000005").mkdir()
    assert tracked(tmp_path) == tmp_path / "step_00000010"
    assert _names(tmp_path) == ["step_00000010"]
    _publish(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000010", "step_00000020"]
    assert (tmp_path / "step_00000020" / "content").read_text() == "20"


def test_untracked_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    """A run killed between the rename and the tracker takes the step again."""
    _publish(tmp_path, 10, 20)
    (tmp_path / "latest").write_text("step_00000010\n")
    writing = begin(tmp_path, 20)
    (writing / "content").write_text("again")
    publish(writing, step=20)
    assert tracked(tmp_path) == tmp_path / "step_00000020"
    assert (tmp_path / "step_00000020" / "content").read_text() == "again"
    assert _names(tmp_path) == ["step_00000010", "step_00000020"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds '', not the name of a checkpoint"),
        (b"\xff\x00garbage", "not the name of a checkpoint"),
        (b"../elsewhere", "holds '../elsewhere', not the name"),
        (b"step_00000030", "names step_00000030, which does not exist"),
    ],
)
def test_damaged_tracker(content: bytes, message: str, tmp_path: Path) -> None:
    """A tracker that cannot be followed is an error that offers the checkpoints there are."""
    _publish(tmp_path, 10, 20)
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        tracked(tmp_path)
    assert "step_00000010, step_00000020" in caught.value.fix


def test_missing_tracker_beside_checkpoints(tmp_path: Path) -> None:
    """Checkpoints without a tracker are not silently ignored."""
    _publish(tmp_path, 10)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match="holds step_00000010 but no tracker file 'latest'"):
        tracked(tmp_path)


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    """``keep`` newest stay; 0 keeps all."""
    _publish(tmp_path, 1, 2, 3, 4)
    assert apply_retention(tmp_path, keep=0) == []
    assert apply_retention(tmp_path, keep=2) == ["step_00000001", "step_00000002"]
    assert _names(tmp_path) == ["step_00000003", "step_00000004"]
    assert apply_retention(tmp_path, keep=5) == []


def test_retention_never_deletes_the_tracked_one(tmp_path: Path) -> None:
    """After the tracker was moved back, it and what leads up to it count; the abandoned future is left alone."""
    _publish(tmp_path, 1, 2, 3, 4)
    (tmp_path / "latest").write_text("step_00000002\n")
    assert apply_retention(tmp_path, keep=1) == ["step_00000001"]
    assert _names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_retention_stops_at_a_damaged_tracker(tmp_path: Path) -> None:
    """Nothing is deleted when it is unknown what is needed."""
    _publish(tmp_path, 1, 2, 3)
    (tmp_path / "latest").write_text("?")
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        apply_retention(tmp_path, keep=1)
    assert len(_names(tmp_path)) == 3


def test_what_cannot_be_removed_costs_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that keeps a file is complained of; saves go on, and try again."""
    _publish(tmp_path, 1, 2)

    def refuse(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        assert apply_retention(tmp_path, keep=1) == ["step_00000001"]
        _publish(tmp_path, 3)
        assert "could not be removed: [Errno 16] Device or resource busy" in caplog.text
        patched.setattr(Path, "rename", lambda path, target: refuse(path))
        remove(tmp_path / "step_00000002")
        assert "step_00000002 could not be removed" in caplog.text
    assert _names(tmp_path) == ["step_00000002", "step_00000003"]
    _publish(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_remove(tmp_path: Path) -> None:
    """A removed checkpoint leaves nothing behind."""
    _publish(tmp_path, 1, 2)
    remove(tmp_path / "step_00000001")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]
