"""What lies beside the tensors, and the comparison of models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mm15_megatron.checkpoint.publish import begin, checkpoints_folder, publish
from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.checkpoint.schema import state_to_save
from mm15_megatron.checkpoint.store import (
    FORMAT_VERSION,
    check_same_model,
    model_differences,
    open_checkpoint,
    open_latest,
)
from mm15_megatron.config.dump import dump_flat
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.trace import build_parts

from ..helpers.layouts import change, debug_config

META = {
    "format_version": FORMAT_VERSION,
    "step": 7,
    "optimizer_step": 6,
    "data_digest": "d",
    "progress": {"step": 7},
    "layout": {},
    "versions": {},
}


def published_checkpoint(run_dir: Path, cfg: RunConfig, **meta: object) -> Path:
    """Publish a checkpoint without tensors."""
    writing = begin(checkpoints_folder(run_dir), 7)
    (writing / "config.txt").write_text(dump_flat(cfg))
    (writing / "state.json").write_text(json.dumps({**META, **meta}))
    return publish(writing, step=7)


def test_open(tmp_path: Path) -> None:
    """The configuration and the numbers come back as they were."""
    cfg = debug_config()
    published_checkpoint(tmp_path, cfg)
    found = open_latest(tmp_path)
    assert found is not None
    assert found.config == cfg
    assert (found.step, found.optimizer_step, found.data_digest, found.progress) == (7, 6, "d", {"step": 7})
    assert open_latest(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("name", ["config.txt", "state.json"])
@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_damaged(name: str, content: str | None, tmp_path: Path) -> None:
    """Missing or unreadable files are an error that names the checkpoint."""
    folder = published_checkpoint(tmp_path, debug_config())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match="step_00000007 is not a complete checkpoint"):
        open_checkpoint(folder)


def test_newer_format(tmp_path: Path) -> None:
    """A checkpoint of a later format is not guessed at."""
    folder = published_checkpoint(tmp_path, debug_config(), format_version=FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match="newer than this program's"):
        open_checkpoint(folder)


def test_other_model_lists_every_field(tmp_path: Path) -> None:
    """All differing fields are listed with both values; what only training reads may change."""
    cfg = debug_config()
    found = open_checkpoint(published_checkpoint(tmp_path, cfg))
    other = change(cfg, language={"num_layers": 6}, vision={"image_size": 112}, connector={"kind": "average_pool"})
    with pytest.raises(CheckpointError) as caught:
        check_same_model(found, other)
    for line in (
        "language.num_layers: 4 in the checkpoint, 6 here",
        "vision.image_size: 56 in the checkpoint, 112 here",
        'connector.kind: "c_abstractor" in the checkpoint, "average_pool" here',
    ):
        assert line in caught.value.problem
    same = change(cfg, language={"z_loss_coeff": 1e-4}, train={"steps": 9}, parallel={"tensor_model_parallel_size": 2})
    assert model_differences(cfg, same) == []
    check_same_model(replace(found, config=cfg), same)


def _save_twice(cfg: RunConfig) -> None:
    parts = build_parts(cfg)
    for step in (1, 2):
        save_checkpoint(
            cfg,
            parts.chunks,
            parts.optimizer,
            topology=parts.topology,
            step=step,
            data_digest="d",
            progress={"step": step},
        )
    close_topology()


@pytest.mark.parametrize(
    ("kind", "files"), [("torch_dist", {".metadata", "metadata.json", "__0_0.distcp"}), ("zarr", {"zarr.json"})]
)
def test_save_publishes_and_retains(kind: str, files: set[str], tmp_path: Path) -> None:
    """A saved checkpoint is complete and tracked; a save before the first step stores zero moments."""
    cfg = change(debug_config(), train={"run_dir": str(tmp_path)}, checkpoint={"keep": 1, "format": kind})
    run_on_ranks(_save_twice, 2, cfg=cfg)
    folder = checkpoints_folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002"]
    found = open_latest(tmp_path)
    assert found is not None
    assert (found.config, found.step, found.optimizer_step) == (cfg, 2, 0)
    assert found.layout["world_size"] == 2
    assert {path.name for path in (found.folder / "tensors").iterdir()} >= files


def test_unwritable_folder_is_one_error_on_every_rank(tmp_path: Path) -> None:
    """Rank 0 cannot create the folder: no rank is left waiting."""
    (tmp_path / "checkpoints").write_text("a file is in the way")
    cfg = change(debug_config(), train={"run_dir": str(tmp_path)})
    with pytest.raises(
        RankFailure, match=r"(?s)rank 0.*CheckpointError: the checkpoint of step 1.*rank 1.*CheckpointError"
    ):
        run_on_ranks(_save_twice, 2, cfg=cfg)


def _bytes_written(cfg: RunConfig) -> tuple[int, list[str]]:
    """Bytes and keys of what this rank writes."""
    parts = build_parts(cfg)
    tensors = state_to_save(parts.chunks, parts.optimizer).to_write()
    close_topology()
    return sum(tensor.data.nbytes for tensor in tensors.values()), sorted(tensors)


@pytest.mark.parametrize("layout", ["tp2", "tp2dp2", "tp2dp2-distopt"])
def test_what_all_ranks_hold_is_written_by_all(layout: str) -> None:
    """The encoder lies whole on each tensor-parallel rank: each writes a part of it, and nothing is written twice."""
    chosen = parse_layout(layout)
    written = run_on_ranks(_bytes_written, chosen.world_size, cfg=chosen.apply(debug_config()))
    sizes = [size for size, _ in written]
    assert max(sizes) < 1.25 * min(sizes), sizes
    whole = [key for _, keys in written for key in keys if ".vision_encoder." in key]
    assert len(whole) == len(set(whole))
    by_rank = [sum(".vision_encoder." in key for key in keys) for _, keys in written]
    assert all(by_rank), by_rank
