"""Merged datasets hold the documents of all, in order, and nothing that does not belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mm15_megatron.data.indexed.merge import merge_datasets
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.errors import DataError

from ..helpers.tools import load_tool


def write(prefix: Path, documents: int, *, kind: str = "conversations", digest: str = "t" * 64, first: int = 5) -> Path:
    with DatasetWriter(prefix, kind=kind, tokenizer_digest=digest, image_sentinel_id=3) as writer:
        for number in range(documents):
            images = [EncodedImage(bytes([first, number, k]), 4 + k, 7) for k in range(number % 3)]
            tokens = [3] * len(images) + [first + number] * (1 + number % 4)
            mask = [0] * len(images) + [1] * (1 + number % 4) if kind == "conversations" else None
            writer.add_document(tokens, images=images, loss_mask=mask)
        writer.count_dropped({"bad image": documents})
    return prefix


def content(source: IndexedSource) -> list[tuple[object, ...]]:
    return [
        (
            source.tokens(d).tolist(),
            source.loss_mask(d).tolist(),
            [source.image_bytes(i).tobytes() for i in range(source.image_index[d], source.image_index[d + 1])],
            source.image_sizes[source.image_index[d] : source.image_index[d + 1]].tolist(),
        )
        for d in range(source.num_documents)
    ]


@pytest.mark.parametrize("kind", ["conversations", "interleaved"])
def test_documents_stand_in_order(tmp_path: Path, kind: str) -> None:
    parts = [write(tmp_path / f"part{n}", size, kind=kind, first=5 + 20 * n) for n, size in enumerate((7, 0, 4))]
    found = merge_datasets(parts, tmp_path / "whole")
    whole = IndexedSource(tmp_path / "whole")
    assert content(whole) == [document for part in parts for document in content(IndexedSource(part))]
    assert (found.documents, found.dropped) == (11, {"bad image": 11})
    theirs = IndexedDataset(str(tmp_path / "whole_tokens"))
    assert all(np.array_equal(theirs[d], whole.tokens(d)) for d in range(11))


def test_a_merged_dataset_is_the_one_that_is_written_at_once(tmp_path: Path) -> None:
    """Byte for byte, so its digest is the same too."""
    parts = [write(tmp_path / f"part{n}", 5, first=5 + 20 * n) for n in range(2)]
    merge_datasets(parts, tmp_path / "merged")
    with DatasetWriter(
        tmp_path / "once", kind="conversations", tokenizer_digest="t" * 64, image_sentinel_id=3
    ) as writer:
        for part in parts:
            for tokens, mask, images, sizes in content(IndexedSource(part)):
                stored = [EncodedImage(data, *size) for data, size in zip(images, sizes, strict=True)]
                writer.add_document(tokens, images=stored, loss_mask=[int(value) for value in mask])
        writer.count_dropped({"bad image": 10})
    assert IndexedSource(tmp_path / "merged").manifest.digest == writer.manifest.digest


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", 3)
    for name, options, message in (
        ("kind", {"kind": "interleaved"}, "has the kind 'interleaved'"),
        ("tokenizer", {"digest": "u" * 64}, "has the tokenizer"),
        ("copy", {}, "hold the same documents"),
    ):
        with pytest.raises(DataError, match=message):
            merge_datasets([first, write(tmp_path / name, 3, **options)], tmp_path / "out")
        assert not list(tmp_path.glob("out*")), "nothing half-written is left"
    with pytest.raises(DataError, match="is one of the datasets"):
        merge_datasets([first], first)
    with pytest.raises(DataError, match="no dataset to merge"):
        merge_datasets([], tmp_path / "out")


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [str(write(tmp_path / f"part{n}", 3, first=5 + 20 * n)) for n in range(2)]
    tool = load_tool("merge_datasets")
    assert tool.main([str(tmp_path / "out"), *parts]) == 0
    assert "6 documents" in capsys.readouterr().out
    assert tool.main([str(tmp_path / "out"), *parts]) == 2
    assert "already holds a dataset" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "out"), *parts, "--overwrite"]) == 0
