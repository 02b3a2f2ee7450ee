"""What a dataset holds, and whether every document of it is whole."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.image.pillow import check_image
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.errors import DataError

CHUNK_DOCUMENTS: Final = 4096
_SHOWN: Final = 20


@dataclass(frozen=True)
class Histogram:
    """How many values fall between powers of two: ``counts[i]`` of those in [edges[i], edges[i + 1])."""

    name: str
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    mean: float

    @classmethod
    def of(cls, name: str, values: npt.NDArray[np.integer]) -> Histogram:
        """Count non-negative values: 0, 1, 2 to 3, 4 to 7 and so on."""
        top = int(values.max(initial=0))
        edges = (0, *(1 << power for power in range(top.bit_length() + 1)))
        place = np.searchsorted(edges, values, side="right") - 1
        counts = np.bincount(place, minlength=len(edges) - 1)
        return cls(name, edges, tuple(counts.tolist()), float(values.mean()) if values.size else 0.0)

    def lines(self, *, width: int = 40) -> Iterator[str]:
        """Draw it, without what is empty at either end."""
        yield f"{self.name}: {self.mean:.1f} on average"
        filled = [number for number, count in enumerate(self.counts) if count]
        for number in range(filled[0], filled[-1] + 1) if filled else ():
            first, last = self.edges[number], self.edges[number + 1] - 1
            label = f"{first}" if first == last else f"{first} to {last}"
            bar = "#" * -(-width * self.counts[number] // max(self.counts))
            yield f"  {label:>20} {self.counts[number]:>12,} {bar}"


def histograms(source: IndexedSource) -> tuple[Histogram, ...]:
    """Tokens and images of a document, longer and shorter side of an image; the index alone is read."""
    sizes = np.asarray(source.image_sizes)
    return (
        Histogram.of("stored tokens of a document", source.token_lengths),
        Histogram.of("images of a document", np.diff(source.image_index)),
        Histogram.of("longer side of an image, pixels", sizes.max(axis=1)),
        Histogram.of("shorter side of an image, pixels", sizes.min(axis=1)),
    )


@dataclass
class Integrity:
    """What was found in the documents that were looked at.

    Attributes:
        documents: how many.
        problems: how often each problem occurred.
        examples: the first few, in the order of the documents.
    """

    documents: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, other: Integrity) -> None:
        """Take in what was found behind it."""
        self.documents += other.documents
        self.problems.update(other.problems)
        self.examples = [*self.examples, *other.examples][:_SHOWN]


def check_documents(
    prefix: Path, *, workers: int, decode: bool, max_image_pixels: int, tell: Callable[[int, int], None]
) -> Integrity:
    """Look at every document of a dataset.

    A document has a sentinel for each image and an id for each token; a conversation has a target; an image has allowed
    magic bytes and the size that was stored.

    Args:
        prefix: of the dataset.
        workers: processes; 0 = this one.
        decode: decode every image too.
        max_image_pixels: larger images are a problem.
        tell: takes documents done, and all.

    Raises:
        DataError: the dataset cannot be opened.
    """
    total = IndexedSource(prefix).num_documents
    found = Integrity()
    tasks = [
        _Task(prefix, first, min(first + CHUNK_DOCUMENTS, total), decode, max_image_pixels)
        for first in range(0, total, CHUNK_DOCUMENTS)
    ]
    for part in _parts(tasks, workers=workers):
        found.add(part)
        tell(found.documents, total)
    return found


@dataclass(frozen=True)
class _Task:
    prefix: Path
    first: int
    stop: int
    decode: bool
    max_image_pixels: int


def _parts(tasks: Sequence[_Task], *, workers: int) -> Iterator[Integrity]:
    if workers == 0:
        yield from map(_check, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        yield from pool.map(_check, tasks)


def _check(task: _Task) -> Integrity:
    source, found = IndexedSource(task.prefix), Integrity(task.stop - task.first)
    for document in range(task.first, task.stop):
        for problem, detail in document_problems(
            source, document, decode=task.decode, max_image_pixels=task.max_image_pixels
        ):
            found.problems[problem] += 1
            if len(found.examples) < _SHOWN:
                found.examples.append(f"document {document}: {problem}" + (f": {detail}" if detail else ""))
    return found


def document_problems(
    source: IndexedSource, document: int, *, decode: bool, max_image_pixels: int
) -> Iterator[tuple[str, str]]:
    """Yield (problem, detail) of everything that is wrong with a document, see :func:`check_documents`."""
    tokens, sentinel = source.tokens(document), source.manifest.image_sentinel_id
    first, stop = int(source.image_index[document]), int(source.image_index[document + 1])
    places = np.flatnonzero(tokens == sentinel)
    if tokens.size == 0:
        yield "no token", ""
    if tokens.size and int(tokens.min()) < 0:
        yield "a negative token id", str(int(tokens.min()))
    if len(places) != stop - first:
        yield "placeholders and images differ in number", f"{len(places)} and {stop - first}"
    elif (places != source.image_positions[first:stop]).any():
        yield "placeholders stand elsewhere than was stored", f"{places.tolist()}"
    mask = source.loss_mask(document)
    if len(mask) != len(tokens):
        yield "tokens and loss mask differ in length", f"{len(tokens)} and {len(mask)}"
    elif source.kind == "conversations" and not mask.any():
        yield "no target", ""
    for item in range(first, stop):
        stored = tuple(int(side) for side in source.image_sizes[item])
        try:
            data = source.image_bytes(item).tobytes()
            image = check_image(data, max_pixels=max_image_pixels, decode=decode)
        except DataError as error:
            yield "an image cannot be used", f"image {item - first}: {error.problem}"
            continue
        if (image.height, image.width) != stored:
            yield (
                "an image has another size than was stored",
                f"image {item - first}: {image.height}x{image.width}, {stored}",
            )
