"""megatron-core's format: what cannot be read is an error that names the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from mm15_megatron.checkpoint.torch_dist import ShardReader, load_tensors, save_tensors, stored_shapes
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parity.ranks import run_on_ranks


def _tensors(rank: int) -> dict[str, ShardedTensor]:
    """A matrix whose halves two ranks hold, and a vector of rank 0's."""
    found = {"halves": ShardedTensor.from_rank_offsets("halves", torch.full((2, 3), float(rank)), (0, rank, 2))}
    if rank == 0:
        found["vector"] = ShardedTensor.from_rank_offsets("vector", torch.arange(5.0))
    return found


def _save(folder: str) -> list[str]:
    written = save_tensors(_tensors(torch.distributed.get_rank()), Path(folder))
    torch.distributed.barrier()
    return sorted(path.name for path in written)


def _load(folder: str) -> dict[str, torch.Tensor]:
    request = ShardedTensor.from_rank_offsets("halves", torch.empty(4, 3, device="meta")).without_data()
    return load_tensors({"halves": request}, Path(folder))


def test_every_rank_says_which_files_it_wrote(tmp_path: Path) -> None:
    first, second = run_on_ranks(_save, 2, folder=str(tmp_path))
    assert first == [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json"]
    assert second == ["__1_0.distcp", "__1_1.distcp"]
    assert sorted(first + second) == sorted(path.name for path in tmp_path.iterdir())
    assert stored_shapes(tmp_path) == {"halves": (4, 3), "vector": (5,)}
    (loaded,) = run_on_ranks(_load, 1, folder=str(tmp_path))
    assert loaded["halves"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2


def test_single_shards_are_read(tmp_path: Path) -> None:
    run_on_ranks(_save, 2, folder=str(tmp_path))
    read = ShardReader(tmp_path)
    assert read("halves", (2, 0)).tolist() == [[1.0] * 3] * 2
    assert read("vector", (0,)).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    with pytest.raises(KeyError):
        read("halves", (1, 0))


def _load_error(folder: str) -> str:
    try:
        _load(folder)
    except CheckpointError as error:
        return error.problem
    return ""


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    run_on_ranks(_save, 2, folder=str(tmp_path))
    (tmp_path / "__1_0.distcp").write_bytes(b"short")
    assert f"the checkpoint in {tmp_path} cannot be read" in run_on_ranks(_load_error, 1, folder=str(tmp_path))[0]
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        stored_shapes(tmp_path)
