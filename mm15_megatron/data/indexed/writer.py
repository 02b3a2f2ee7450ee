"""Writing indexed datasets: temporary names, fsync, atomic rename, the manifest last."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.indexed.format import (
    HEADER,
    INDEX_VERSION,
    KINDS,
    MAGIC,
    FileRecord,
    Manifest,
    dtype_code,
    file_digest,
    pair_dtype,
    pair_names,
    suffixes,
    with_suffix,
)
from mm15_megatron.errors import DataError

_PARTIAL = ".partial"


@dataclass(frozen=True)
class EncodedImage:
    """One image as it is stored: encoded bytes and its size in pixels after EXIF orientation."""

    data: bytes
    height: int
    width: int


class PairWriter:
    """Write one IndexedDataset ``.bin``/``.idx`` pair to the two paths given.

    The lengths and the document index are held in memory as C arrays (12 bytes a document of one sequence).
    """

    def __init__(self, bin_path: Path, idx_path: Path, *, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._code = dtype_code(dtype)
        self._idx_path = idx_path
        self._bin: BinaryIO = bin_path.open("wb")
        self._lengths = array("i")
        self._documents = array("q", [0])

    def add(self, values: npt.ArrayLike) -> None:
        """Append one sequence to the current document."""
        sequence = np.ascontiguousarray(values, dtype=self._dtype)
        self._bin.write(sequence.data)
        self._lengths.append(sequence.size)

    def end_document(self) -> None:
        """Close the current document, which may hold no sequence at all."""
        self._documents.append(len(self._lengths))

    def finish(self) -> None:
        """Write the index and flush both files to disk."""
        _sync_and_close(self._bin)
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        pointers = np.zeros(lengths.size, np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self._dtype.itemsize, out=pointers[1:])
        with self._idx_path.open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, INDEX_VERSION, self._code, lengths.size, len(self._documents)))
            stream.write(lengths.data)
            stream.write(pointers.data)
            stream.write(np.frombuffer(self._documents, dtype=np.int64).data)
            stream.flush()
            os.fsync(stream.fileno())

    def abandon(self) -> None:
        """Close without writing an index."""
        self._bin.close()


class DatasetWriter:
    """Context manager that writes one dataset; nothing appears under the final names unless the block succeeds.

    Example::

        with DatasetWriter(prefix, kind="captions", tokenizer_digest=..., image_sentinel_id=...) as writer:
            writer.add_document([sentinel, 5, 6, eos], images=[EncodedImage(data, 480, 640)])
        writer.manifest.documents

    Args:
        prefix: path prefix of the dataset; its folder is created.
        kind: captions | conversations | text | interleaved.
        tokenizer_digest: digest of the tokenizer the ids belong to.
        image_sentinel_id: id that stands where an image stands.
        overwrite: replace a finished dataset of the same prefix.

    Raises:
        DataError: if the prefix already holds a dataset and ``overwrite`` is False, or the kind is unknown.
    """

    def __init__(
        self, prefix: str | Path, *, kind: str, tokenizer_digest: str, image_sentinel_id: int, overwrite: bool = False
    ) -> None:
        if kind not in KINDS:
            raise DataError(f"unknown kind of dataset {kind!r}", fix="use one of " + ", ".join(KINDS))
        if with_suffix(prefix, ".json").exists() and not overwrite:
            raise DataError(f"{prefix} already holds a dataset", fix="choose another prefix, or pass overwrite=True")
        self._prefix = Path(prefix)
        self._kind = kind
        self._tokenizer_digest = tokenizer_digest
        self._sentinel = image_sentinel_id
        self._pairs: dict[str, PairWriter] = {}
        self._sizes = array("I")
        self._tokens = 0
        self._documents = 0
        self._dropped: Counter[str] = Counter()
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest of the finished dataset.

        Raises:
            DataError: while the dataset is still being written.
        """
        if self._manifest is None:
            raise DataError(f"{self._prefix} is not finished", fix="read the manifest after the with block")
        return self._manifest

    def __enter__(self) -> DatasetWriter:
        """Create the folder and open the temporary files."""
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        for name in pair_names(self._kind):
            paths = self._partial(f"_{name}.bin"), self._partial(f"_{name}.idx")
            self._pairs[name] = PairWriter(*paths, dtype=pair_dtype(name))
        return self

    def add_document(
        self,
        tokens: Sequence[int],
        *,
        images: Sequence[EncodedImage] = (),
        loss_mask: Sequence[int] | None = None,
    ) -> None:
        """Append one document.

        Args:
            tokens: ids, one sentinel for each image.
            images: the images in the order of their sentinels.
            loss_mask: 1 where the token is a target; required for conversations and refused for other kinds.

        Raises:
            DataError: if sentinels and images, or tokens and mask, disagree in number.
        """
        where = f"document {self._documents} of {self._prefix}"
        ids = np.asarray(tokens, dtype=np.int32)
        sentinels = int(np.count_nonzero(ids == self._sentinel))
        if sentinels != len(images):
            raise DataError(
                f"{where} has {sentinels} image placeholders and {len(images)} images",
                fix="give one image for each placeholder, in order",
            )
        if (loss_mask is not None) != ("loss_mask" in self._pairs):
            raise DataError(
                f"{where}: a loss mask belongs to conversations alone", fix="pass loss_mask for kind conversations"
            )
        if loss_mask is not None:
            if len(loss_mask) != ids.size:
                raise DataError(
                    f"{where} has {ids.size} tokens and {len(loss_mask)} mask values", fix="give one a token"
                )
            self._pairs["loss_mask"].add(np.asarray(loss_mask, dtype=np.uint8))
        self._pairs["tokens"].add(ids)
        for image in images:
            self._pairs["images"].add(np.frombuffer(image.data, dtype=np.uint8))
            self._sizes.extend((image.height, image.width))
        for pair in self._pairs.values():
            pair.end_document()
        self._tokens += int(ids.size)
        self._documents += 1

    def count_dropped(self, reasons: Mapping[str, int]) -> None:
        """Add to the manifest's account of inputs that were left out."""
        self._dropped.update(reasons)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the dataset, or remove every temporary file when the block (or publishing) failed."""
        try:
            if kind is None:
                self._publish()
        finally:
            for pair in self._pairs.values():
                pair.abandon()
            for suffix in (*suffixes(self._kind), ".json"):
                self._partial(suffix).unlink(missing_ok=True)

    def _partial(self, suffix: str) -> Path:
        return with_suffix(self._prefix, suffix + _PARTIAL)

    def _publish(self) -> None:
        for pair in self._pairs.values():
            pair.finish()
        sizes = np.asarray(self._sizes, dtype=np.uint32).reshape(-1, 2)
        with self._partial("_image_sizes.npy").open("wb") as stream:
            np.save(stream, sizes)
            stream.flush()
            os.fsync(stream.fileno())
        files = {}
        for suffix in suffixes(self._kind):
            path = self._partial(suffix)
            files[suffix] = FileRecord(bytes=path.stat().st_size, digest=file_digest(path))
        manifest = Manifest(
            kind=self._kind,
            documents=self._documents,
            tokens=self._tokens,
            images=len(sizes),
            tokenizer_digest=self._tokenizer_digest,
            image_sentinel_id=self._sentinel,
            files=files,
            dropped=dict(self._dropped),
        )
        with self._partial(".json").open("wb") as stream:
            stream.write(manifest.to_json().encode())
            stream.flush()
            os.fsync(stream.fileno())
        # A kill between two renames must not leave an old manifest beside new files.
        with_suffix(self._prefix, ".json").unlink(missing_ok=True)
        for suffix in (*suffixes(self._kind), ".json"):
            os.replace(self._partial(suffix), with_suffix(self._prefix, suffix))
        _sync_folder(self._prefix.parent)
        self._manifest = manifest


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
