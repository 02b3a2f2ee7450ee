"""Images of a dataset that are also in a benchmark: equal bytes, or equal to the eye.

Two pictures look alike when their difference hashes differ in few of 64 bits: the picture, upright and gray, is shrunk
to 9 x 8, and a bit says whether a pixel is brighter than its left neighbour. Scaling, recompression and small changes
of brightness keep it; crops and turns do not. A picture without structure (a blank page) has no bit set and is compared
by its bytes alone.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mm15_megatron.data.formats.base import input_files
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.errors import DataError

ENDINGS: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CHUNK_IMAGES: Final = 1024
_COMPARED: Final = 1 << 22  # pairs at a time
_FAILURES: Final = (OSError, SyntaxError, ValueError, EOFError, MemoryError, RuntimeError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Match:
    """An image of the dataset that a benchmark holds too.

    Attributes:
        document: of the dataset.
        image: which of the document's images.
        file: of the benchmark.
        distance: bits of 64 that differ; None = the bytes are equal.
    """

    document: int
    image: int
    file: str
    distance: int | None


@dataclass(frozen=True)
class Prints:
    """Fingerprints of n images: uint64 [n, 4] of the bytes, uint64 [n] of the picture; 0 = no structure."""

    exact: npt.NDArray[np.uint64]
    looks: npt.NDArray[np.uint64]


def look_hash(data: bytes) -> int:
    """Return the difference hash of an image; 0 if it has no structure or cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            image.draft("L", (64, 64))  # a JPEG is decoded at a fraction of its size
            gray = ImageOps.exif_transpose(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    except _FAILURES:
        return 0
    pixels = np.asarray(gray, dtype=np.int16)
    brighter = (pixels[:, 1:] > pixels[:, :-1]).reshape(-1)
    return int.from_bytes(np.packbits(brighter).tobytes(), "big")


def prints_of(images: Sequence[bytes]) -> Prints:
    """Fingerprint images."""
    exact = [np.frombuffer(hashlib.sha256(data).digest(), dtype="<u8") for data in images]
    looks = np.array([look_hash(data) for data in images], dtype=np.uint64)
    return Prints(np.array(exact, dtype=np.uint64).reshape(-1, 4), looks)


def benchmark_files(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the images named, and those below the folders named.

    Raises:
        DataError: there is none.
    """
    return input_files(paths, endings=(*ENDINGS, *(ending.upper() for ending in ENDINGS)))


def find_duplicates(
    prefix: Path,
    benchmarks: tuple[Path, ...],
    *,
    max_distance: int,
    workers: int,
    tell: Callable[[int, int], None],
) -> Iterator[Match]:
    """Yield the matches in the order of the dataset; of one image the nearest file counts, and of equals the first.

    Every image is compared with every file of the benchmarks: the work grows with their product, 64 bits a pair.

    Args:
        prefix: of the dataset.
        benchmarks: files, or folders of them.
        max_distance: bits that may differ; 0 to 64.
        workers: processes; 0 = this one.
        tell: takes images done, and all.

    Raises:
        DataError: a distance is impossible, the dataset cannot be opened, or a benchmark holds no image.
    """
    if not 0 <= max_distance <= 64:
        raise DataError(f"max_distance is {max_distance}", fix="give 0 to 64 bits; 4 finds recompressed pictures")
    source, files = IndexedSource(prefix), benchmark_files(benchmarks)
    theirs = Prints(
        *(
            np.concatenate(parts)
            for parts in zip(*((p.exact, p.looks) for p in _file_prints(files, workers)), strict=True)
        )
    )
    known = {row.tobytes(): number for number, row in reversed(list(enumerate(theirs.exact)))}
    total = source.manifest.images
    tasks = [(prefix, first, min(first + CHUNK_IMAGES, total)) for first in range(0, total, CHUNK_IMAGES)]
    for (_, first, stop), ours in zip(tasks, _mapped(_dataset_prints, tasks, workers=workers), strict=True):
        nearest, distances = _nearest(ours.looks, theirs.looks)
        for offset in range(stop - first):
            equal = known.get(ours.exact[offset].tobytes())
            if equal is not None:
                yield _match(source, first + offset, files[equal], None)
            elif ours.looks[offset] and distances[offset] <= max_distance:
                yield _match(source, first + offset, files[int(nearest[offset])], int(distances[offset]))
        tell(stop, total)


def _match(source: IndexedSource, item: int, file: Path, distance: int | None) -> Match:
    document = int(np.searchsorted(source.image_index, item, side="right")) - 1
    return Match(document, item - int(source.image_index[document]), str(file), distance)


def _nearest(ours: npt.NDArray[np.uint64], theirs: npt.NDArray[np.uint64]) -> tuple[Any, Any]:
    """Index of the nearest of ``theirs`` for each of ``ours``, and its distance; those without structure are far."""
    nearest, distances = np.zeros(len(ours), np.int64), np.full(len(ours), 65, np.int64)
    step = max(1, _COMPARED // max(len(theirs), 1))
    for first in range(0, len(ours), step):
        bits = np.bitwise_count(ours[first : first + step, None] ^ theirs[None]).astype(np.int64)
        bits[:, theirs == 0] = 65
        nearest[first : first + step] = bits.argmin(axis=1)
        distances[first : first + step] = bits.min(axis=1)
    return nearest, distances


def _file_prints(files: tuple[Path, ...], workers: int) -> Iterator[Prints]:
    chunks = [files[first : first + CHUNK_IMAGES] for first in range(0, len(files), CHUNK_IMAGES)]
    yield from _mapped(_prints_of_files, chunks, workers=workers)


def _prints_of_files(files: tuple[Path, ...]) -> Prints:
    return prints_of([path.read_bytes() for path in files])


def _dataset_prints(task: tuple[Path, int, int]) -> Prints:
    prefix, first, stop = task
    source = IndexedSource(prefix)
    return prints_of([source.image_bytes(item).tobytes() for item in range(first, stop)])


def _mapped(function: Callable[[Any], Prints], tasks: Sequence[Any], *, workers: int) -> Iterator[Prints]:
    if workers == 0:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(max_workers=workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, tasks)
