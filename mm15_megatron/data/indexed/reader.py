"""Reading indexed datasets: memory-mapped, checked at opening, picklable (a copy opens the files again)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.indexed.format import (
    DTYPE_CODES,
    HEADER,
    INDEX_VERSION,
    MAGIC,
    RENDERINGS,
    Manifest,
    file_digest,
    pair_dtype,
    pair_names,
    read_manifest,
    suffixes,
    with_suffix,
)
from mm15_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]


class PairReader:
    """One IndexedDataset ``.bin``/``.idx`` pair, as written here or by megatron-core.

    Attributes:
        lengths: int32 [sequences], values of each sequence.
        document_index: int64 [documents + 1], first sequence of each document, then the number of sequences.
        dtype: dtype of the values.

    Raises:
        DataError: if a file is missing, is not an IndexedDataset, is of another version, or has the wrong size.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        idx_path, bin_path = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise DataError(f"{path} is missing", fix="build the dataset again, or copy all files of its prefix")
        sequences, entries, self.dtype = _read_header(idx_path)
        body = np.asarray(np.memmap(idx_path, dtype=np.uint8, mode="r", offset=HEADER.size))
        at = np.cumsum([0, 4 * sequences, 8 * sequences, 8 * entries])
        self.lengths: npt.NDArray[np.int32] = body[at[0] : at[1]].view(np.int32)
        self._pointers: Int64 = body[at[1] : at[2]].view(np.int64)
        self.document_index: Int64 = body[at[2] : at[3]].view(np.int64)
        expected = int(self._pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        found = bin_path.stat().st_size
        if found != expected:
            raise DataError(
                f"{bin_path} has {found} bytes, its index describes {expected}",
                fix="the file is truncated or belongs to another index: copy or build it again",
            )
        if entries == 0 or int(self.document_index[-1]) != sequences:
            raise DataError(
                f"{idx_path}: the document index does not end at {sequences} sequences", fix="build it again"
            )
        # An empty file cannot be mapped; a dataset without a single image has one.
        self._values = np.asarray(np.memmap(bin_path, dtype=self.dtype, mode="r")) if found else np.zeros(0, self.dtype)

    @property
    def num_documents(self) -> int:
        """Documents of the pair."""
        return len(self.document_index) - 1

    def __len__(self) -> int:
        """Sequences of the pair."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.generic]:
        """Return sequence ``index`` as a read-only view of the mapped file.

        Raises:
            DataError: if the index points outside the file.
        """
        start, length = int(self._pointers[index]) // self.dtype.itemsize, int(self.lengths[index])
        values = self._values[max(start, 0) : start + length]
        if start < 0 or len(values) != length:
            raise DataError(
                f"sequence {index} of {self.prefix} has {length} values from {start} on, its file {len(self._values)}",
                fix="the index is damaged: copy or build the dataset again",
            )
        return values


def _read_header(path: Path) -> tuple[int, int, np.dtype[np.generic]]:
    """Return (sequences, document-index entries, dtype) after checking magic, version, dtype and file size."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        raw = stream.read(HEADER.size)
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise DataError(
            f"{path} is not an IndexedDataset index (magic {raw[:9]!r})", fix="point to a file this project wrote"
        )
    _, version, code, sequences, entries = HEADER.unpack(raw)
    if version != INDEX_VERSION:
        raise DataError(
            f"{path} has index version {version}, only {INDEX_VERSION} is known", fix="build the dataset again"
        )
    if code not in DTYPE_CODES:
        raise DataError(f"{path} has the unknown dtype code {code}", fix="the file is damaged: build the dataset again")
    plain = HEADER.size + 12 * sequences + 8 * entries
    if size not in (plain, plain + sequences):  # megatron-core may append one mode byte a sequence
        raise DataError(
            f"{path} has {size} bytes, its header describes {plain}",
            fix="the file is truncated or damaged: copy or build it again",
        )
    return sequences, entries, np.dtype(DTYPE_CODES[code])


def _mapped(prefix: Path, suffix: str) -> npt.NDArray[Any]:
    """Map an array file; plain arrays are indexed faster than ``np.memmap``, which wraps every result."""
    return np.asarray(np.load(with_suffix(prefix, suffix), mmap_mode="r"))


class IndexedSource:
    """One dataset of the mixture, open for reading.

    Args:
        prefix: path prefix of the dataset.
        name: name in logs and errors; empty = the last part of the prefix.
        tokenizer_digest: digest of the tokenizer in use; None = do not compare.
        kinds: kinds the caller can use; empty = any.

    Attributes:
        manifest: the checked manifest.
        image_sizes: uint32 [images, 2], height and width.
        image_positions: int32 [images], index of each image's sentinel among the stored tokens of its document.

    Raises:
        DataError: if anything is missing, truncated, foreign, of a newer version, or of another kind, rendering or
            tokenizer.
    """

    def __init__(
        self, prefix: str | Path, *, name: str = "", tokenizer_digest: str | None = None, kinds: Sequence[str] = ()
    ) -> None:
        self.prefix = Path(prefix)
        self.name = name or self.prefix.name
        self.manifest: Manifest = read_manifest(prefix)
        self._check_manifest(tokenizer_digest, kinds)
        for suffix in suffixes(self.manifest.kind):
            self._check_file(suffix)
        self._check_counts(self._open())

    def __getstate__(self) -> tuple[Path, str, Manifest]:
        """Send the prefix, not the mapped bytes, to another process."""
        return self.prefix, self.name, self.manifest

    def __setstate__(self, state: tuple[Path, str, Manifest]) -> None:
        """Open the files again; they were checked already, so only a new manifest is looked for.

        Raises:
            DataError: if the dataset was built again in the meantime, or a file is gone.
        """
        self.prefix, self.name, self.manifest = state
        if read_manifest(self.prefix) != self.manifest:
            raise DataError(f"{self.prefix} was built again since it was opened", fix="start the run again")
        self._open()

    def _open(self) -> dict[str, PairReader]:
        pairs = {name: PairReader(with_suffix(self.prefix, f"_{name}")) for name in pair_names(self.kind)}
        self._tokens, self._images, self._loss_mask = pairs["tokens"], pairs["images"], pairs.get("loss_mask")
        self.image_sizes: npt.NDArray[np.uint32] = _mapped(self.prefix, "_image_sizes.npy")
        self.image_positions: npt.NDArray[np.int32] = _mapped(self.prefix, "_image_positions.npy")
        return pairs

    @property
    def kind(self) -> str:
        """The captions | conversations | text | interleaved of the manifest."""
        return self.manifest.kind

    @property
    def num_documents(self) -> int:
        """Documents of the source."""
        return self.manifest.documents

    @property
    def token_lengths(self) -> npt.NDArray[np.int32]:
        """int32 [documents], stored tokens of each document, one for each image."""
        return self._tokens.lengths

    @property
    def image_index(self) -> Int64:
        """int64 [documents + 1], first image of each document, then the number of images."""
        return self._images.document_index

    def pair(self, name: str) -> PairReader:
        """Return one of the pairs: tokens, images, or the loss_mask of conversations."""
        pairs = {"tokens": self._tokens, "images": self._images, "loss_mask": self._loss_mask}
        found = pairs[name]
        assert found is not None, f"{self.prefix} has no {name}"
        return found

    def tokens(self, document: int) -> Int64:
        """Token ids of a document, int64."""
        return self._tokens[document].astype(np.int64)

    def loss_mask(self, document: int) -> npt.NDArray[np.bool_]:
        """True where the token is a target; every token of a source that is not conversations."""
        if self._loss_mask is None:
            return np.ones(int(self.token_lengths[document]), np.bool_)
        return self._loss_mask[document].astype(np.bool_)

    def has_target(self, document: int, stop: int) -> bool:
        """Tell whether one of the tokens 1 to ``stop`` - 1 of a document is a target."""
        text = self._tokens[document][1:stop] != self.manifest.image_sentinel_id
        return bool((self.loss_mask(document)[1:stop] & text).any())

    def image_bytes(self, item: int) -> npt.NDArray[np.uint8]:
        """Encoded bytes of image ``item`` of the source, a read-only view of the mapped file."""
        return self._images[item].view(np.uint8)

    def _check_manifest(self, tokenizer_digest: str | None, kinds: Sequence[str]) -> None:
        found = self.manifest
        if kinds and found.kind not in kinds:
            raise DataError(
                f"{self.prefix} is a dataset of kind {found.kind!r}, expected {' or '.join(kinds)}",
                fix="use a source of the expected kind here",
            )
        if found.rendering != RENDERINGS[found.kind]:
            raise DataError(
                f"{self.prefix} was rendered as {found.rendering!r}, this program renders {RENDERINGS[found.kind]!r}",
                fix="build the dataset again with this program",
            )
        if tokenizer_digest is not None and found.tokenizer_digest != tokenizer_digest:
            raise DataError(
                f"{self.prefix} was built with tokenizer {found.tokenizer_digest[:12]}, the run uses "
                f"{tokenizer_digest[:12]}",
                fix="set data.tokenizer to the file the dataset was built with, or build the dataset again",
            )

    def _check_file(self, suffix: str) -> None:
        path, record = with_suffix(self.prefix, suffix), self.manifest.files[suffix]
        if not path.is_file():
            raise DataError(f"{path} is missing", fix="build the dataset again, or copy all files of its prefix")
        size = path.stat().st_size
        if size != record.bytes:
            raise DataError(
                f"{path} has {size} bytes, the manifest says {record.bytes}",
                fix="the file is truncated or foreign: copy or build it again",
            )
        if file_digest(path) != record.digest:
            raise DataError(
                f"{path} is not the file its manifest describes (other content, same size)",
                fix="the file is foreign or damaged: copy or build it again",
            )

    def _check_counts(self, pairs: dict[str, PairReader]) -> None:
        documents, images = self.manifest.documents, self.manifest.images
        found = {f"{name} documents": pair.num_documents for name, pair in pairs.items()}
        wrong = {label: count for label, count in found.items() if count != documents}
        if {len(self._images), len(self.image_sizes), len(self.image_positions)} != {images}:
            wrong["images"] = len(self._images)
        if int(self._tokens.lengths.sum(dtype=np.int64)) != self.manifest.tokens:
            wrong["tokens"] = int(self._tokens.lengths.sum(dtype=np.int64))
        if len(self._tokens) != documents:
            wrong["token sequences"] = len(self._tokens)
        wrong |= {f"dtype of {n}": p.dtype.num for n, p in pairs.items() if p.dtype != np.dtype(pair_dtype(n))}
        if wrong:
            raise DataError(
                f"{self.prefix}: the manifest says {documents} documents, {images} images and "
                f"{self.manifest.tokens} tokens, the files hold {wrong}",
                fix="the files belong to different datasets: build the dataset again",
            )
