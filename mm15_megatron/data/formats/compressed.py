"""Text files that are compressed: read as a stream from their beginning, for they cannot be entered in the middle."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from mm15_megatron.errors import DataError

COMPRESSED: Final = (".gz", ".zst")
"""Endings of names of files that are decompressed on the way."""
_BUFFER: Final = 2**20


def is_compressed(path: Path) -> bool:
    """Whether the name says that the file is compressed."""
    return path.name.endswith(COMPRESSED)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, decompressed where its name ends in ``.gz`` or ``.zst``.

    Raises:
        DataError: the compressed file is damaged or ends too early, or nothing here decompresses it.
    """
    if not is_compressed(path):
        with path.open("rb") as stream:
            yield stream
    elif path.name.endswith(".gz"):
        with _stated(path, (OSError, EOFError, zlib.error)), gzip.open(path) as plain:
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, plain), _BUFFER))
    else:
        import pyarrow as pa  # no other text file needs it

        if not pa.Codec.is_available("zstd"):
            raise DataError(f"{path}: pyarrow is built without zstd", fix="decompress the file first")
        with _stated(path, (OSError, pa.ArrowException)), pa.input_stream(path, compression="zstd") as plain:
            yield cast(BinaryIO, io.BufferedReader(_Counted(plain), _BUFFER))


class _Counted(io.RawIOBase):
    """A stream of pyarrow that knows where it is, which its compressed ones do not."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        count = int(self._stream.readinto(buffer))
        self._at += count
        return count

    def tell(self) -> int:
        """Bytes read."""
        return self._at


@contextmanager
def _stated(path: Path, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise DataError(f"{path} cannot be decompressed: {error}", fix="download or write it again") from error
