"""Indexed datasets: exchange with megatron-core, atomic writing, and every way a file can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from mm15_megatron.data.indexed.format import HEADER, file_digest, read_manifest, suffixes
from mm15_megatron.data.indexed.reader import IndexedSource, PairReader
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage, PairWriter
from mm15_megatron.errors import DataError

SENTINEL = 3


def write(prefix: Path, *, kind: str = "conversations", overwrite: bool = False) -> None:
    mask = [0, 1, 1] if kind == "conversations" else None
    short = [1] if kind == "conversations" else None
    with DatasetWriter(
        prefix, kind=kind, tokenizer_digest="t" * 64, image_sentinel_id=SENTINEL, overwrite=overwrite
    ) as writer:
        writer.add_document([3, 5, 6], images=[EncodedImage(b"one image", 4, 7)], loss_mask=mask)
        writer.add_document([8], loss_mask=short)
        images = [EncodedImage(b"a", 1, 2), EncodedImage(b"bc", 3, 4)]
        writer.add_document([3, 3, 9], images=images, loss_mask=mask)
        writer.count_dropped({"bad image": 2})


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write(tmp_path / "set.v1")
    return tmp_path / "set.v1"


def edit_manifest(prefix: Path, **changes: object) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_our_reader_returns_what_was_written(prefix: Path) -> None:
    source = pickle.loads(pickle.dumps(IndexedSource(prefix, tokenizer_digest="t" * 64, kinds=("conversations",))))
    assert source.name == "set.v1"
    assert [source.tokens(d).tolist() for d in range(3)] == [[3, 5, 6], [8], [3, 3, 9]]
    assert [source.loss_mask(d).tolist() for d in range(3)] == [[False, True, True], [True], [False, True, True]]
    assert source.image_index.tolist() == [0, 1, 1, 3]
    assert [source.image_bytes(i).tobytes() for i in range(3)] == [b"one image", b"a", b"bc"]
    assert source.image_sizes.tolist() == [[4, 7], [1, 2], [3, 4]]
    found = source.manifest
    assert (found.documents, found.tokens, found.images, found.dropped) == (3, 7, 3, {"bad image": 2})


def test_megatron_core_reads_our_files(prefix: Path) -> None:
    tokens = IndexedDataset(f"{prefix}_tokens")
    assert [tokens[i].tolist() for i in range(len(tokens))] == [[3, 5, 6], [8], [3, 3, 9]]
    assert tokens.index.document_indices.tolist() == [0, 1, 2, 3]
    images = IndexedDataset(f"{prefix}_images")
    assert [images[i].tobytes() for i in range(3)] == [b"one image", b"a", b"bc"]
    assert images.index.document_indices.tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("multimodal", [False, True])
def test_we_read_files_of_megatron_core(tmp_path: Path, multimodal: bool) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16, multimodal=multimodal)
    builder.add_item(torch.tensor([1, 2, 3]))
    builder.add_item(torch.tensor([4]))
    builder.end_document()
    builder.end_document()
    builder.add_item(torch.tensor([5, 6]))
    builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    pair = PairReader(tmp_path / "m")
    assert [pair[i].tolist() for i in range(len(pair))] == [[1, 2, 3], [4], [5, 6]]
    assert pair.document_index.tolist() == [0, 2, 2, 3]
    assert (pair.num_documents, pair.dtype) == (3, np.uint16)


def test_a_dataset_without_images_or_documents(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "e", kind="text", tokenizer_digest="", image_sentinel_id=3) as writer:
        writer.add_document([4, 5])
    source = IndexedSource(tmp_path / "e")
    assert source.tokens(0).tolist() == [4, 5]
    assert source.image_index.tolist() == [0, 0]
    assert source.loss_mask(0).tolist() == [True, True]
    with DatasetWriter(tmp_path / "n", kind="text", tokenizer_digest="", image_sentinel_id=3):
        pass
    assert IndexedSource(tmp_path / "n").num_documents == 0


def write_half(prefix: Path) -> None:
    with DatasetWriter(prefix, kind="captions", tokenizer_digest="", image_sentinel_id=3) as writer:
        writer.add_document([1])
        _ = writer.manifest


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not finished"):
        write_half(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_kept_unless_asked(prefix: Path) -> None:
    before = read_manifest(prefix).digest
    with pytest.raises(DataError, match="already holds a dataset"):
        write(prefix)
    assert read_manifest(prefix).digest == before
    write(prefix, overwrite=True)
    assert read_manifest(prefix).digest == before


def test_another_kind_leaves_no_file_of_the_old_one(prefix: Path) -> None:
    write(prefix, kind="captions", overwrite=True)
    assert IndexedSource(prefix).kind == "captions"
    assert sorted(path.name for path in prefix.parent.iterdir()) == sorted(
        ["set.v1.json", *(f"set.v1{suffix}" for suffix in suffixes("captions"))]
    )


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    arguments = {"kind": "text", "tokenizer_digest": "", "image_sentinel_id": 3, "overwrite": True}
    with DatasetWriter(tmp_path / "x", **arguments) as first:
        with pytest.raises(DataError, match="another builder is writing"), DatasetWriter(tmp_path / "x", **arguments):
            pass
        first.add_document([5, 6])
    assert IndexedSource(tmp_path / "x").tokens(0).tolist() == [5, 6]
    assert not list(tmp_path.glob("*.lock")) + list(tmp_path.glob("*.partial"))


KILLED = """
import os, signal, sys
from mm15_megatron.data.indexed.writer import DatasetWriter
with DatasetWriter(sys.argv[1], kind="conversations", tokenizer_digest="", image_sentinel_id=3) as writer:
    writer.add_document([5, 6], loss_mask=[0, 1])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_leftovers_of_a_killed_builder_are_in_nobodys_way(tmp_path: Path) -> None:
    prefix = tmp_path / "x"
    assert subprocess.run([sys.executable, "-c", KILLED, str(prefix)], check=False).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} > {"x.lock", "x_loss_mask.bin.partial"}
    write(prefix, kind="captions")
    assert not list(tmp_path.glob("*.lock")) + list(tmp_path.glob("*.partial"))
    assert IndexedSource(prefix).num_documents == 3


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    obstacle = tmp_path / "x_images.bin.partial"
    obstacle.mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "x")
    assert list(tmp_path.iterdir()) == [obstacle]
    obstacle.rmdir()
    write(tmp_path / "x")


def test_documents_are_checked_when_written(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "c", kind="conversations", tokenizer_digest="", image_sentinel_id=3) as writer:
        with pytest.raises(DataError, match="document 0 .* has 2 image placeholders and 0 images"):
            writer.add_document([3, 3], loss_mask=[0, 0])
        with pytest.raises(DataError, match="2 tokens and 1 mask values"):
            writer.add_document([4, 5], loss_mask=[1])
        with pytest.raises(DataError, match="conversations alone"):
            writer.add_document([4, 5])
        for values, mask, wrong in (
            ([4, -1], [0, 1], "token -1"),
            ([4, 2**31], [0, 1], f"token {2**31}"),
            ([4, 2**70], [0, 1], f"token {2**70}"),
            ([4, 2.5], [0, 1], "token 2.5"),
            (np.array([4.0, 5.0]), [0, 1], "token .*4.0"),
            ([[4], [5]], [0, 1], r"token \[4\]"),
            ([4, 5], [0, 2], "loss mask value 2"),
            ([4, 5], [0, -1], "loss mask value -1"),
            ([4, 5], [0, 0.5], "loss mask value 0.5"),
        ):
            with pytest.raises(DataError, match=f"document 0 of .*c: {wrong}"):
                writer.add_document(values, loss_mask=mask)
    assert (writer.manifest.documents, writer.manifest.tokens) == (0, 0)
    assert len(PairReader(tmp_path / "c_loss_mask")) == len(PairReader(tmp_path / "c_tokens")) == 0
    with pytest.raises(DataError, match="unknown kind"):
        DatasetWriter(tmp_path / "k", kind="poems", tokenizer_digest="", image_sentinel_id=3)
    with pytest.raises(DataError, match="no code"):
        PairWriter(tmp_path / "p.bin", tmp_path / "p.idx", dtype="complex64")


@pytest.mark.parametrize(
    "suffix",
    ["_tokens.bin", "_tokens.idx", "_images.bin", "_loss_mask.idx", "_image_sizes.npy", "_image_positions.npy"],
)
def test_missing_truncated_and_foreign_files(prefix: Path, tmp_path: Path, suffix: str) -> None:
    path = Path(f"{prefix}{suffix}")
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        IndexedSource(prefix)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"has {len(content) - 1} bytes, the manifest says {len(content)}"):
        IndexedSource(prefix)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match="other content, same size"):
        IndexedSource(prefix)


def test_damaged_pairs(prefix: Path) -> None:
    idx, data = Path(f"{prefix}_tokens.idx"), Path(f"{prefix}_tokens.bin")
    content = idx.read_bytes()
    magic, version, code, sequences, entries = HEADER.unpack(content[: HEADER.size])
    body = content[HEADER.size :]

    def expect(message: str, new: bytes) -> None:
        idx.write_bytes(new)
        with pytest.raises(DataError, match=message):
            PairReader(f"{prefix}_tokens")

    expect("not an IndexedDataset index", b"PK\x03\x04" + content[4:])
    expect("not an IndexedDataset index", b"")
    expect("index version 2", HEADER.pack(magic, 2, code, sequences, entries) + body)
    expect("dtype code 99", HEADER.pack(magic, version, 99, sequences, entries) + body)
    expect("its header describes", content[:-4])
    expect("does not end at", content[:-8] + bytes(8))
    idx.write_bytes(content)
    data.write_bytes(data.read_bytes() + b"\0")
    with pytest.raises(DataError, match="has 29 bytes, its index describes 28"):
        PairReader(f"{prefix}_tokens")
    data.unlink()
    with pytest.raises(DataError, match="is missing"):
        PairReader(f"{prefix}_tokens")


def test_wrong_manifests(prefix: Path) -> None:
    path = Path(f"{prefix}.json")
    good = path.read_text()
    edit_manifest(prefix, version=2)
    with pytest.raises(DataError, match="format version 2, this program reads up to 1"):
        IndexedSource(prefix)
    for changes, message in (
        ({"format": "other"}, "not a dataset manifest"),
        ({"kind": "poems"}, "damaged"),
        ({"files": {}}, "no record of"),
        ({"files": 3}, "damaged"),
        ({"surprise": 1, "more": 2}, "has the unknown fields more, surprise"),
        ({"rendering": "llava15-0"}, "was rendered as 'llava15-0', this program renders 'llava15-1'"),
        ({"documents": 4}, "the manifest says 4 documents"),
        ({"images": 4}, "4 images"),
        ({"tokens": 4}, "4 tokens"),
    ):
        path.write_text(good)
        edit_manifest(prefix, **changes)
        with pytest.raises(DataError, match=message):
            IndexedSource(prefix)
    path.write_text(json.dumps({k: v for k, v in json.loads(good).items() if k not in ("images", "meta")}))
    with pytest.raises(DataError, match="lacks the fields images"):
        IndexedSource(prefix)
    path.write_text("[")
    with pytest.raises(DataError, match="not valid JSON"):
        IndexedSource(prefix)
    path.unlink()
    with pytest.raises(DataError, match="the manifest is written last"):
        IndexedSource(prefix)


def test_meta_is_free_and_decides_nothing(prefix: Path, tmp_path: Path) -> None:
    before = read_manifest(prefix).digest
    edit_manifest(prefix, meta={"program": "another", "notes": [1, {"a": None}]})
    assert IndexedSource(prefix).manifest.meta["notes"] == [1, {"a": None}]
    assert read_manifest(prefix).digest == before
    for meta in ({"path": tmp_path}, {"value": float("nan")}):
        with pytest.raises(DataError, match="is not JSON"):
            DatasetWriter(tmp_path / "m", kind="text", tokenizer_digest="", image_sentinel_id=3, meta=meta)


def test_a_copy_in_another_process_is_not_checked_twice(prefix: Path) -> None:
    packed = pickle.dumps(IndexedSource(prefix))
    sizes = Path(f"{prefix}_images.bin")
    sizes.write_bytes(bytes(len(sizes.read_bytes())))
    assert pickle.loads(packed).tokens(0).tolist() == [3, 5, 6]  # the content was hashed by the process that sent it
    with pytest.raises(DataError, match="other content"):
        IndexedSource(prefix)
    edit_manifest(prefix, documents=9)
    with pytest.raises(DataError, match="was built again since it was opened"):
        pickle.loads(packed)


@pytest.mark.parametrize("pointer", [16, -4])
def test_an_index_that_points_outside_its_file(prefix: Path, pointer: int) -> None:
    idx = Path(f"{prefix}_tokens.idx")
    content = bytearray(idx.read_bytes())
    at = HEADER.size + 3 * 4  # the pointer of sequence 0, of 3 values
    content[at : at + 8] = (pointer + 4 * (pointer > 0)).to_bytes(8, "little", signed=True)
    idx.write_bytes(content)
    with pytest.raises(DataError, match="sequence 0 of .* has 3 values from .*, its file 7"):
        PairReader(f"{prefix}_tokens")[0]


def test_wrong_tokenizer_and_kind(prefix: Path) -> None:
    with pytest.raises(DataError, match="built with tokenizer tttttttttttt, the run uses uuuuuuuuuuuu"):
        IndexedSource(prefix, tokenizer_digest="u" * 64)
    with pytest.raises(DataError, match="kind 'conversations', expected captions or text"):
        IndexedSource(prefix, kinds=("captions", "text"))


def test_a_file_of_another_dataset(prefix: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", kind="captions")
    shutil.copy(f"{tmp_path}/other_image_sizes.npy", f"{prefix}_image_sizes.npy")  # same content: still the right file
    IndexedSource(prefix)
    shutil.copy(f"{tmp_path}/other_images.idx", f"{prefix}_tokens.idx")
    with pytest.raises(DataError, match="_tokens.idx"):
        IndexedSource(prefix)


def test_digest_of_a_large_file_sees_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "big"
    content = bytearray(6 << 20)
    path.write_bytes(content)
    first = file_digest(path)
    for position in (0, len(content) - 1):
        changed = bytearray(content)
        changed[position] = 1
        path.write_bytes(changed)
        assert file_digest(path) != first
