"""What lies on disk: the header of an IndexedDataset ``.idx`` file, the file names of a prefix, and its manifest.

A source is a prefix with these files; the ``.bin``/``.idx`` pairs are Megatron's IndexedDataset, version 1:

    <prefix>_tokens.{bin,idx}       int32, one sequence a document; one sentinel id where each image stands
    <prefix>_loss_mask.{bin,idx}    uint8, same lengths as the tokens (conversations only): 1 = the token is a target
    <prefix>_images.{bin,idx}       uint8, one sequence an image (encoded bytes), grouped by document
    <prefix>_image_sizes.npy        uint32 [images, 2]: height, width in pixels, after EXIF orientation
    <prefix>_image_positions.npy    int32 [images]: index of the image's sentinel among the tokens of its document
    <prefix>.json                   the manifest, written last: a prefix without it is not a dataset
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from mm15_megatron.errors import DataError

MAGIC: Final = b"MMIDIDX\x00\x00"
INDEX_VERSION: Final = 1
HEADER: Final = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, entries of the document index
DTYPE_CODES: Final[dict[int, str]] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16",
}  # fmt: skip

MANIFEST_FORMAT: Final = "mm15-indexed"
MANIFEST_VERSION: Final = 1
# How each kind becomes tokens: name and version of its template. Raise the number when the same documents would give
# other ids; the reader refuses datasets of another rendering.
RENDERINGS: Final[dict[str, str]] = {
    "captions": "captions-1",
    "conversations": "llava15-1",
    "text": "text-1",
    "interleaved": "interleaved-1",
}
KINDS: Final = tuple(RENDERINGS)

_DIGEST_BLOCK: Final = 1 << 16
_DIGEST_BLOCKS: Final = 64


def dtype_code(dtype: str) -> int:
    """Return Megatron's numeric code of a NumPy dtype name.

    Raises:
        DataError: if the format has no such dtype.
    """
    for code, name in DTYPE_CODES.items():
        if name == dtype:
            return code
    raise DataError(f"dtype {dtype!r} has no code in an .idx file", fix="use one of " + ", ".join(DTYPE_CODES.values()))


def pair_names(kind: str) -> tuple[str, ...]:
    """Names of the .bin/.idx pairs a dataset of this kind has."""
    return ("tokens", "images", "loss_mask") if kind == "conversations" else ("tokens", "images")


def suffixes(kind: str) -> tuple[str, ...]:
    """File-name endings of a dataset of this kind, without the manifest."""
    pairs = tuple(f"_{name}.{ending}" for name in pair_names(kind) for ending in ("bin", "idx"))
    return (*pairs, "_image_sizes.npy", "_image_positions.npy")


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """Append ``suffix`` to the last part of ``prefix`` (a dot inside the prefix stays)."""
    path = Path(prefix)
    return path.with_name(path.name + suffix)


def file_digest(path: Path) -> str:
    """SHA-256 over a file's size and up to 64 evenly spaced 64 KiB blocks (all of it below 4 MiB).

    Bounded work whatever the size, so a dataset of 100 M documents is checked as fast as a small one; it tells a
    foreign or truncated file from the right one, not a single flipped bit in the middle of a large one.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(struct.pack("<Q", size))
    last = max(0, size - _DIGEST_BLOCK)
    small = size <= _DIGEST_BLOCK * _DIGEST_BLOCKS
    offsets = (
        range(0, size, _DIGEST_BLOCK) if small else [last * i // (_DIGEST_BLOCKS - 1) for i in range(_DIGEST_BLOCKS)]
    )
    with path.open("rb") as stream:
        for offset in offsets:
            stream.seek(offset)
            digest.update(stream.read(_DIGEST_BLOCK))
    return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and digest (:func:`file_digest`) of one file of a dataset."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What ``<prefix>.json`` says.

    Attributes:
        kind: captions | conversations | text | interleaved.
        documents: documents of the source.
        tokens: token ids stored, one sentinel for each image included.
        images: images stored.
        tokenizer_digest: digest of the tokenizer the ids belong to.
        image_sentinel_id: id that stands where an image stands.
        rendering: name and version of the template that made the tokens (:data:`RENDERINGS`).
        files: one record for each file, keyed by its ending.
        dropped: inputs that were left out when the dataset was built, by reason.
        meta: JSON of any form about how the dataset was made; never read.
        version: format version.
    """

    kind: str
    documents: int
    tokens: int
    images: int
    tokenizer_digest: str
    image_sentinel_id: int
    rendering: str
    files: dict[str, FileRecord]
    dropped: dict[str, int] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    def to_json(self) -> str:
        """Return the manifest as indented JSON text."""
        return json.dumps({"format": MANIFEST_FORMAT, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest without ``meta``: two datasets with the same digest hold the same documents."""
        return hashlib.sha256(replace(self, meta={}).to_json().encode()).hexdigest()


def read_manifest(prefix: str | Path) -> Manifest:
    """Read and check ``<prefix>.json``.

    Raises:
        DataError: if it is missing, not JSON, of another format, of a newer version, or has other fields.
    """
    path = with_suffix(prefix, ".json")
    if not path.is_file():
        raise DataError(
            f"no dataset at prefix {prefix}: {path} does not exist",
            fix="check the prefix; if the builder was interrupted, run it again (the manifest is written last)",
        )
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}", fix="build the dataset again") from error
    if not isinstance(raw, dict) or raw.pop("format", None) != MANIFEST_FORMAT:
        raise DataError(
            f"{path} is not a dataset manifest (no format {MANIFEST_FORMAT!r})", fix="point to a dataset prefix"
        )
    version = raw.get("version")
    if not isinstance(version, int) or version > MANIFEST_VERSION:
        raise DataError(
            f"{path} has format version {version}, this program reads up to {MANIFEST_VERSION}",
            fix="update the program, or build the dataset with this version",
        )
    _check_fields(raw, path)
    try:
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        manifest = Manifest(files=files, **raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}", fix="build the dataset again") from error
    missing = set(suffixes(manifest.kind)) - set(files)
    if manifest.kind not in KINDS or missing:
        raise DataError(
            f"{path} is damaged: kind {manifest.kind!r}, no record of {sorted(missing)}", fix="build the dataset again"
        )
    return manifest


def _check_fields(raw: dict[str, Any], path: Path) -> None:
    required = {f.name for f in fields(Manifest) if f.default is MISSING and f.default_factory is MISSING}
    unknown = sorted(set(raw) - {f.name for f in fields(Manifest)})
    missing = sorted(required - set(raw))
    if unknown:
        raise DataError(
            f"{path} has the unknown fields {', '.join(unknown)}",
            fix="update the program that reads it, or put notes of your own under meta",
        )
    if missing:
        raise DataError(f"{path} lacks the fields {', '.join(missing)}", fix="build the dataset again")


def pair_dtype(pair: str) -> str:
    """Return the dtype name of a pair: int32 for tokens, uint8 for images and loss masks."""
    return "int32" if pair == "tokens" else "uint8"
