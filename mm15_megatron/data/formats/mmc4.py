"""MMC4: lists of sentences, and images each assigned to one of them, as JSON lines, zipped or not.

Looked up: README and ``scripts/download_images.py`` of github.com/allenai/mmc4; ``open_flamingo/train/data.py`` of
github.com/mlfoundations/open_flamingo for its use. A document: ``text_list``, ``url``, ``image_info`` (a list of
``image_name``, ``raw_url``, ``matched_text_index``, ``matched_sim``, ``face_detections``: null if there is no face),
``similarity_matrix`` (images x sentences), ``could_have_url_duplicate`` (0 | 1; absent in the first version). Shards
are published as ``docs_no_face_shard_{N}_v3.jsonl.zip`` with one JSONL of that name inside; those with faces are named
``docs_shard_{N}_v3``. The download script puts images into ``<shard>_images/<image_name>``.

Ours: sentences between images are joined by spaces into one paragraph; ``random`` placement is drawn for each image
from (seed, place of the document), where OpenFlamingo shifts all images of a document or none. Not confirmed: what
``face_detections`` holds where there are faces (those files need a request); anything but null and an empty list counts
as faces.
"""

from __future__ import annotations

import json
import random
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from mm15_megatron.data.formats.base import UNIT_BYTES, Found, Skipped, Unit, input_files, json_lines, line_units
from mm15_megatron.data.formats.image_store import ImageSource
from mm15_megatron.data.formats.interleaved_filters import InterleavedFilters
from mm15_megatron.data.formats.interleaving import Assembly, Reference
from mm15_megatron.errors import DataError

URL_DUPLICATE: Final = "could have a URL duplicate"
UNSIMILAR: Final = "image less similar than min_similarity"
FACES: Final = "image with faces"
_CHOICES: Final = {
    "placement": ("before", "after", "random"),
    "assignment": ("matched", "most-similar"),
    "image_key": ("url", "name", "shard/name"),
    "faces": ("keep", "drop-image"),
    "url_duplicates": ("keep", "drop-document"),
}


@dataclass(frozen=True)
class Mmc4:
    """A reader of MMC4.

    Args:
        paths: .jsonl or .zip files, or folders of them.
        images: where the downloaded images are.
        image_key: what ``images`` knows them by: url | name | shard/name (``<shard>_images/<name>``, as the dataset's
            own script puts them).
        placement: before | after | random: where an image stands beside its sentence.
        seed: of ``random``.
        assignment: matched (``matched_text_index``, computed so that images spread over the sentences) | most-similar
            (the highest of the image's row in ``similarity_matrix``, the first of equals).
        min_similarity: images less similar to their sentence are left out; None = off.
        faces: keep | drop-image.
        url_duplicates: keep | drop-document, for documents with ``could_have_url_duplicate``.
        on_missing: drop-image | drop-document.
        filters: filters of images and documents; None = none.
        unit_bytes: about the size of a unit of .jsonl files; a .zip is one unit.

    Raises:
        DataError: for another value of an option.
    """

    paths: tuple[Path, ...]
    images: ImageSource
    image_key: str = "url"
    placement: str = "before"
    seed: int = 0
    assignment: str = "matched"
    min_similarity: float | None = None
    faces: str = "keep"
    url_duplicates: str = "keep"
    on_missing: str = "drop-image"
    filters: InterleavedFilters | None = None
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self) -> None:
        chosen = {
            "placement": self.placement,
            "assignment": self.assignment,
            "image_key": self.image_key,
            "faces": self.faces,
            "url_duplicates": self.url_duplicates,
        }
        for name, value in chosen.items():
            if value not in _CHOICES[name]:
                raise DataError(f"{name} is {value!r}", fix=f"choose {' or '.join(_CHOICES[name])}")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise DataError(f"min_similarity is {self.min_similarity}", fix="give a cosine between -1 and 1")
        if self.unit_bytes < 1:
            raise DataError(f"unit_bytes is {self.unit_bytes}", fix="give a positive number")
        self._assembly()  # checks on_missing

    def _assembly(self) -> Assembly:
        return Assembly(self.images, self.on_missing, self.filters, joint=" ")

    @property
    def kind(self) -> str:
        """Interleaved documents."""
        return "interleaved"

    def units(self) -> tuple[Unit, ...]:
        """Cut .jsonl files at bytes; a .zip is a unit of its own.

        Raises:
            DataError: there is no such file.
        """
        units: list[Unit] = []
        for path in input_files(self.paths, endings=(".jsonl", ".zip")):
            units += [Unit(path)] if path.suffix == ".zip" else line_units((path,), size=self.unit_bytes)
        return tuple(units)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read the documents of a unit.

        Raises:
            DataError: a document is malformed, or a file or the store of images is damaged.
        """
        assembly = self._assembly()
        shard = unit.path.name.removesuffix(".zip").removesuffix(".jsonl")
        for where, row in _zipped_lines(unit.path) if unit.path.suffix == ".zip" else json_lines(unit):
            document = _Document(row, place=f"{unit.path} at {where}")
            if self.url_duplicates == "drop-document" and row.get("could_have_url_duplicate") == 1:
                yield Skipped(URL_DUPLICATE, where)
                continue
            parts, repaired = self._parts(document, shard=shard, where=where)
            yield assembly.assemble(parts, where=where, repaired=repaired)

    def _parts(self, document: _Document, *, shard: str, where: str) -> tuple[list[str | Reference], tuple[str, ...]]:
        before: dict[int, list[Reference]] = {}
        after: dict[int, list[Reference]] = {}
        repaired: list[str] = []
        draw = random.Random(f"{self.seed} {where}")
        for number in range(len(document.images)):
            sentence, similarity = document.sentence_of(
                number, matched=self.assignment == "matched", similarity=self.min_similarity is not None
            )
            first = draw.random() < 0.5 if self.placement == "random" else self.placement == "before"
            if self.faces == "drop-image" and document.has_faces(number):
                repaired.append(FACES)
            elif self.min_similarity is not None and similarity < self.min_similarity:
                repaired.append(UNSIMILAR)
            else:
                (before if first else after).setdefault(sentence, []).append(self._reference(document, number, shard))
        parts: list[str | Reference] = []
        for number, sentence_text in enumerate(document.sentences):
            parts += [*before.get(number, ()), sentence_text, *after.get(number, ())]
        return parts, tuple(repaired)

    def _reference(self, document: _Document, number: int, shard: str) -> Reference:
        url = document.text_of(number, "raw_url")
        if self.image_key == "url":
            return Reference(url, url)
        name = document.text_of(number, "image_name")
        return Reference(name if self.image_key == "name" else f"{shard}_images/{name}", url)


class _Document:
    """A row whose shape was checked."""

    def __init__(self, row: dict[str, Any], *, place: str) -> None:
        sentences, images = row.get("text_list"), row.get("image_info")
        if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
            raise DataError(f"{place}: text_list is not a list of texts ({sorted(row)})", fix="give MMC4's documents")
        if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
            raise DataError(
                f"{place}: image_info is not a list of objects ({sorted(row)})", fix="give MMC4's documents"
            )
        self.place = place
        self.sentences: list[str] = sentences
        self.images: list[dict[str, Any]] = images
        self._row = row

    def text_of(self, number: int, name: str) -> str:
        value = self.images[number].get(name)
        if not isinstance(value, str) or not value:
            raise DataError(f"{self.place}: image {number} has {name} {value!r}", fix="give it a text")
        return value

    def has_faces(self, number: int) -> bool:
        if "face_detections" not in self.images[number]:
            raise DataError(
                f"{self.place}: image {number} has no face_detections",
                fix="keep faces, or give documents that name them",
            )
        return bool(self.images[number]["face_detections"])

    def sentence_of(self, number: int, *, matched: bool, similarity: bool) -> tuple[int, float]:
        """Return the sentence of an image and, if asked for, their similarity."""
        if not matched:
            scores = self._scores(number)
            best = max(range(len(scores)), key=scores.__getitem__)
            return best, scores[best]
        index = self.images[number].get("matched_text_index")
        if type(index) is not int or not 0 <= index < len(self.sentences):
            raise DataError(
                f"{self.place}: image {number} is matched to sentence {index!r} of {len(self.sentences)}",
                fix="repair matched_text_index",
            )
        score = self.images[number].get("matched_sim") if similarity else 0.0
        if type(score) not in (int, float):
            raise DataError(f"{self.place}: image {number} has matched_sim {score!r}", fix="give it a number")
        return index, float(score or 0.0)

    def _scores(self, number: int) -> list[float]:
        matrix = self._row.get("similarity_matrix")
        row = matrix[number] if isinstance(matrix, list) and len(matrix) == len(self.images) else None
        if not isinstance(row, list) or len(row) != len(self.sentences) or not row:
            raise DataError(
                f"{self.place}: similarity_matrix is not {len(self.images)} images x {len(self.sentences)} sentences",
                fix="choose assignment=matched, or repair the matrix",
            )
        if not all(type(score) in (int, float) for score in row):
            raise DataError(f"{self.place}: similarity_matrix row {number} holds more than numbers", fix="repair it")
        return [float(score) for score in row]


def _zipped_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, object); where is ``member:byte``, what it would be if the file were unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            junk = "__MACOSX/"
            names = sorted(n for n in archive.namelist() if n.endswith(".jsonl") and not n.startswith(junk))
            if not names:
                raise DataError(f"{path} holds no .jsonl: {archive.namelist()[:3]}", fix="give MMC4's shards")
            for name in names:
                with closing(archive.open(name)) as stream:
                    yield from _lines(stream, path=path, name=PurePosixPath(name).name)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise DataError(f"{path} is not a sound zip file: {error}", fix="download the shard again") from error


def _lines(stream: IO[bytes], *, path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    at = 0
    for raw in stream:
        where, at = f"{name}:{at}", at + len(raw)
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except ValueError as error:  # also what is not UTF-8
            raise DataError(f"{path} at {where}: {error}", fix="write one JSON object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} at {where} holds a {type(row).__name__}", fix="write one JSON object a line")
        yield where, row
