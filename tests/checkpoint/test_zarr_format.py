"""The zarr format: whole tensors for any reader, the same resumption as the other format, nothing lost silently."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from mm15_megatron.checkpoint import schema
from mm15_megatron.checkpoint.publish import checkpoints_folder
from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.checkpoint.store import load_training, open_checkpoint
from mm15_megatron.checkpoint.zarr_format import _CHUNK_BYTES, _chunk, load_tensors, stored_shapes
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.trace import build_parts, gathered

from ..helpers.layouts import change, debug_config
from ..helpers.steps import train_steps

BEFORE, AFTER = 3, 5
WORDS = "model.language_model.embedding.word_embeddings.weight"
ADAFACTOR = {"name": "adafactor", "weight_decay": 1e-3}


def _save_in_both(cfg: RunConfig) -> dict[str, torch.Tensor]:
    """Train, save the same state in both formats; whole parameters on the ranks that speak for them."""
    parts = build_parts(cfg)
    train_steps(parts, 0, BEFORE)
    for name in ("torch_dist", "zarr"):
        run_dir = f"{cfg.train.run_dir}/{name}"
        save_checkpoint(
            change(cfg, checkpoint={"format": name}, train={"run_dir": run_dir}),
            parts.chunks,
            parts.optimizer,
            topology=parts.topology,
            step=BEFORE,
            data_digest="stream",
            progress={},
        )
    whole = gathered(parts, lambda item: item.parameter.data)
    close_topology()
    return whole


def _resume(cfg: RunConfig, folder: str) -> list[tuple[float, float]]:
    parts = build_parts(cfg)
    load_training(open_checkpoint(Path(folder)), cfg, parts.chunks, parts.optimizer)
    found = train_steps(parts, BEFORE, AFTER)
    close_topology()
    return found


def _folder(run_dir: Path, name: str = "zarr") -> Path:
    return checkpoints_folder(run_dir / name) / f"step_{BEFORE:08}"


def _config(run_dir: Path, **sections: dict[str, object]) -> RunConfig:
    return change(debug_config("debug_moe", **sections), train={"run_dir": str(run_dir)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A bf16 model saved by four ranks, and its whole parameters."""
    run_dir = tmp_path_factory.mktemp("bf16")
    cfg = parse_layout("tp2sp-ep2-etp1-distopt").apply(_config(run_dir, kernels={"params_dtype": "bf16"}))
    shares = run_on_ranks(_save_in_both, 4, cfg=cfg)
    return run_dir, {name: whole for share in shares for name, whole in share.items()}


def test_any_zarr_reader_sees_whole_tensors(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    run_dir, parameters = saved
    group = zarr.open(str(_folder(run_dir) / "tensors"), mode="r")
    assert isinstance(group, zarr.Group)
    arrays = dict(group.arrays())
    assert {key.removeprefix("model.") for key in arrays if key.startswith("model.")} == set(parameters)
    for name, whole in parameters.items():
        array = arrays[f"model.{name}"]
        assert (array.metadata.zarr_format, array.attrs["dtype"]) == (3, str(whole.dtype).removeprefix("torch."))
        stored = np.asarray(array[...])
        if whole.dtype == torch.bfloat16:
            assert stored.dtype == np.uint16
            stored, whole = stored.view(np.uint16), whole.view(torch.uint16)
        assert np.array_equal(stored, whole.reshape(stored.shape).numpy()), name
        master = arrays[f"optimizer.{name}.master"]
        assert (master.shape, master.dtype) == (array.shape, np.float32)


def test_each_shard_is_a_file_of_one_writer(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Shards are the slices of the ranks that wrote them; those of a split tensor are two files."""
    tensors = _folder(saved[0]) / "tensors"
    for key, array in zarr.open_group(tensors, mode="r").arrays():
        files = [path for path in (tensors / key / "c").rglob("*") if path.is_file()]
        assert len(files) == math.prod(whole // shard for whole, shard in zip(array.shape, array.shards, strict=True))
    qkv = "model.language_model.decoder.layers.0.self_attention.linear_qkv.weight"
    assert len([path for path in (tensors / qkv / "c").rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("optimizer", [{}, ADAFACTOR], ids=["adamw", "adafactor"])
def test_both_formats_resume_alike(optimizer: dict[str, object], tmp_path: Path) -> None:
    """Saved by four ranks in both, resumed in another layout: the same five losses and norms, bitwise."""
    cfg = _config(tmp_path, optimizer=optimizer)
    run_on_ranks(_save_in_both, 4, cfg=parse_layout("tp2pp2").apply(cfg))
    into = parse_layout("dp2")
    found = [
        run_on_ranks(_resume, 2, cfg=into.apply(cfg), folder=str(_folder(tmp_path, name)))[0]
        for name in ("torch_dist", "zarr")
    ]
    assert found[0] == found[1]
    assert len(found[0]) == AFTER


def test_a_missing_shard_is_named(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """zarr itself would read zeros."""
    folder = _folder(saved[0])
    shard = next(path for path in (folder / "tensors").rglob("c/*") if path.is_file())
    content = shard.read_bytes()
    shard.unlink()
    try:
        with pytest.raises(RankFailure, match=r"is damaged: tensors/\S+/c/\S+ is missing"):
            run_on_ranks(_resume, 1, cfg=_config(tmp_path), folder=str(folder))
    finally:
        shard.write_bytes(content)


def _load_alone(cfg: RunConfig, tensors: str) -> None:
    parts = build_parts(cfg)
    load_tensors(schema.weights_to_load(parts.chunks).tensors, Path(tensors))


def test_an_array_that_cannot_be_read_is_named(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Damage between the check of the files and the reading: an index of chunks that is none."""
    tensors = _folder(saved[0]) / "tensors"
    shard = next(path for path in (tensors / WORDS).rglob("c/*/*") if path.is_file())
    content = shard.read_bytes()
    shard.write_bytes(content[:-20] + bytes(20))
    try:
        with pytest.raises(RankFailure, match=r"rank 0: the checkpoint in \S+ cannot be read: \w+Error"):
            run_on_ranks(_load_alone, 2, cfg=parse_layout("dp2").apply(_config(tmp_path)), tensors=str(tensors))
    finally:
        shard.write_bytes(content)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        stored_shapes(tmp_path / "nowhere")
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        stored_shapes(tmp_path)


@pytest.mark.parametrize(
    ("shard", "chunk"),
    [
        ((1,), (1,)),
        ((64, 3, 14, 14), (64, 3, 14, 14)),
        ((32000, 7168), (500, 7168)),
        ((2, 9600, 7168), (1, 480, 7168)),
        ((5_000_011,), (5_000_011,)),  # a prime number
        ((3, 16_777_259), (1, 16_777_259)),
    ],
)
def test_chunks_divide_a_shard(shard: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    assert _chunk(shard, 4) == chunk
    assert math.prod(chunk) * 4 <= _CHUNK_BYTES or max(chunk) > _CHUNK_BYTES // 4
