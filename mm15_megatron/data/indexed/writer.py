"""Writing indexed datasets: temporary names, fsync, atomic rename, the manifest last."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.indexed.format import (
    HEADER,
    INDEX_VERSION,
    KINDS,
    MAGIC,
    RENDERINGS,
    FileRecord,
    Manifest,
    dtype_code,
    file_digest,
    pair_dtype,
    pair_names,
    suffixes,
    with_suffix,
)
from mm15_megatron.data.indexed.reader import IndexedSource, PairReader
from mm15_megatron.errors import DataError
from mm15_megatron.utils.files import sync_to_disk

_PARTIAL: Final = ".partial"
_EVERY_SUFFIX: Final = (*suffixes("conversations"), ".json")  # conversations have all the files a kind can have
_TOKEN_STOP: Final = 2**31
_COPIED_BYTES: Final = 16 * 2**20


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

    def append(self, source: PairReader) -> None:
        """Append every document of another pair; its values are copied as bytes."""
        with with_suffix(source.prefix, ".bin").open("rb") as stream:
            shutil.copyfileobj(stream, self._bin, _COPIED_BYTES)
        first = len(self._lengths)
        self._lengths.frombytes(np.ascontiguousarray(source.lengths, dtype=np.int32).tobytes())
        self._documents.frombytes((source.document_index[1:] + first).astype(np.int64).tobytes())

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
        rendering: template that made the tokens; None = the project's own for the kind.
        meta: JSON about how the dataset is made, for people.

    Raises:
        DataError: if the prefix already holds a dataset and ``overwrite`` is False, another builder is writing it, the
            kind is unknown, or ``meta`` is not JSON.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        kind: str,
        tokenizer_digest: str,
        image_sentinel_id: int,
        overwrite: bool = False,
        rendering: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise DataError(f"unknown kind of dataset {kind!r}", fix="use one of " + ", ".join(KINDS))
        try:
            self._meta = json.loads(json.dumps(dict(meta or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"meta of {prefix} is not JSON: {error}", fix="use strings, numbers and lists") from error
        self._prefix = Path(prefix)
        self._overwrite = overwrite
        self._rendering = RENDERINGS[kind] if rendering is None else rendering
        self._held = ExitStack()  # the lock and the temporary files
        self._kind = kind
        self._tokenizer_digest = tokenizer_digest
        self._sentinel = image_sentinel_id
        self._pairs: dict[str, PairWriter] = {}
        self._sizes = array("I")
        self._positions = array("i")
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
        """Create the folder, keep other builders out, and open the temporary files (those of a killed builder go)."""
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            _lock(self._prefix, stack)
            stack.callback(self._clean)
            self._open()
            self._held = stack.pop_all()
        return self

    def _open(self) -> None:
        if with_suffix(self._prefix, ".json").exists() and not self._overwrite:
            raise DataError(
                f"{self._prefix} already holds a dataset", fix="choose another prefix, or pass overwrite=True"
            )
        for name in pair_names(self._kind):
            paths = self._partial(f"_{name}.bin"), self._partial(f"_{name}.idx")
            self._pairs[name] = PairWriter(*paths, dtype=pair_dtype(name))

    def _clean(self) -> None:
        for pair in self._pairs.values():
            pair.abandon()
        for path in map(self._partial, _EVERY_SUFFIX):
            if path.is_file():
                path.unlink()

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
            DataError: if sentinels and images, or tokens and mask, disagree in number, an id is not an integer in
                [0, 2 ** 31), or a mask value is not 0 or 1.
        """
        where = f"document {self._documents} of {self._prefix}"
        ids = _integers(tokens, "int32", stop=_TOKEN_STOP, what=f"{where}: token")
        sentinels = np.flatnonzero(ids == self._sentinel)
        if len(sentinels) != len(images):
            raise DataError(
                f"{where} has {len(sentinels)} image placeholders and {len(images)} images",
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
            self._pairs["loss_mask"].add(_integers(loss_mask, "uint8", stop=2, what=f"{where}: loss mask value"))
        self._pairs["tokens"].add(ids)
        for image in images:
            self._pairs["images"].add(np.frombuffer(image.data, dtype=np.uint8))
            self._sizes.extend((image.height, image.width))
        self._positions.extend(sentinels.tolist())
        for pair in self._pairs.values():
            pair.end_document()
        self._tokens += int(ids.size)
        self._documents += 1

    def add_dataset(self, source: IndexedSource) -> None:
        """Append every document of a finished dataset, and its account of what was left out.

        Raises:
            DataError: it is of another kind, tokenizer, sentinel or rendering.
        """
        theirs = source.manifest
        for what, found, ours in (
            ("kind", theirs.kind, self._kind),
            ("tokenizer", theirs.tokenizer_digest, self._tokenizer_digest),
            ("image sentinel", theirs.image_sentinel_id, self._sentinel),
            ("rendering", theirs.rendering, self._rendering),
        ):
            if found != ours:
                raise DataError(
                    f"{source.prefix} has the {what} {found!r}, {self._prefix} has {ours!r}",
                    fix="merge datasets that were built alike",
                )
        for name, pair in self._pairs.items():
            pair.append(source.pair(name))
        self._sizes.frombytes(np.ascontiguousarray(source.image_sizes, dtype=np.uint32).tobytes())
        self._positions.frombytes(np.ascontiguousarray(source.image_positions, dtype=np.int32).tobytes())
        self._tokens += theirs.tokens
        self._documents += theirs.documents
        self.count_dropped(theirs.dropped)

    def count_dropped(self, reasons: Mapping[str, int]) -> None:
        """Add to the manifest's account of inputs that were left out."""
        self._dropped.update(reasons)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the dataset, or remove every temporary file when the block (or publishing) failed."""
        with self._held:
            if kind is None:
                self._publish()

    def _partial(self, suffix: str) -> Path:
        return with_suffix(self._prefix, suffix + _PARTIAL)

    def _save(self, suffix: str, values: npt.NDArray[np.generic]) -> None:
        with self._partial(suffix).open("wb") as stream:
            np.save(stream, values)
            stream.flush()
            os.fsync(stream.fileno())

    def _publish(self) -> None:
        for pair in self._pairs.values():
            pair.finish()
        sizes = np.asarray(self._sizes, dtype=np.uint32).reshape(-1, 2)
        self._save("_image_sizes.npy", sizes)
        self._save("_image_positions.npy", np.asarray(self._positions, dtype=np.int32))
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
            rendering=self._rendering,
            files=files,
            dropped=dict(self._dropped),
            meta=self._meta,
        )
        with self._partial(".json").open("wb") as stream:
            stream.write(manifest.to_json().encode())
            stream.flush()
            os.fsync(stream.fileno())
        # A kill between two renames must not leave an old manifest beside new files.
        with_suffix(self._prefix, ".json").unlink(missing_ok=True)
        for suffix in set(_EVERY_SUFFIX) - set(files):  # of a dataset of another kind
            with_suffix(self._prefix, suffix).unlink(missing_ok=True)
        for suffix in (*files, ".json"):
            os.replace(self._partial(suffix), with_suffix(self._prefix, suffix))
        sync_to_disk(self._prefix.parent)
        self._manifest = manifest


def _integers(values: Sequence[int], dtype: str, *, stop: int, what: str) -> npt.NDArray[np.generic]:
    """Return the values in ``dtype``; refuse what is not an integer in [0, stop), never round or wrap."""
    found = np.asarray(values)
    if found.size and (found.ndim != 1 or found.dtype.kind not in "iub" or found.min() < 0 or found.max() >= stop):
        whole = (int, np.integer, np.bool_)
        items = found.tolist() if found.dtype.kind in "iub" else values
        wrong = next(value for value in items if not (isinstance(value, whole) and 0 <= value < stop))
        raise DataError(f"{what} {wrong!r}", fix=f"give one flat sequence of integers from 0 to {stop - 1}")
    return found.astype(dtype)


def _lock(prefix: Path, stack: ExitStack) -> None:
    """Hold ``<prefix>.lock`` until the stack unwinds; the system frees the lock of a builder that was killed."""
    path = with_suffix(prefix, ".lock")
    stream = stack.enter_context(path.open("ab"))
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"another builder is writing {prefix}: it holds {path}", fix="wait for it, or choose another prefix"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be locked: {error}", fix="build on a file system with file locks, then copy the dataset"
        ) from error
    if os.fstat(stream.fileno()).st_nlink == 0:  # removed between opening and locking: not the lock others will take
        raise DataError(f"another builder has just finished {prefix}", fix="look at what it wrote, then start again")
    stack.callback(path.unlink)


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
