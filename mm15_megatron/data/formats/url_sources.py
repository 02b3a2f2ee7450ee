"""What a download left on disk, read into the index URL -> bytes (``image_store.py`` says which layouts)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mm15_megatron.data.formats import tar_samples
from mm15_megatron.data.formats.base import folders_below, input_files, json_lines, line_units
from mm15_megatron.data.formats.fields import path_inside
from mm15_megatron.data.formats.sorted_runs import RUN_RECORDS, key_of, ordered_map
from mm15_megatron.data.formats.tables import image_column
from mm15_megatron.data.formats.url_index import IndexWriter
from mm15_megatron.errors import DataError

IMAGE_ENDINGS: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
_BATCH: Final = 4096
_JSON: Final = "json"
_MOST_JSON: Final = 2**26
_MOST_IMAGE: Final = 2**28
_NO_JSON: Final = "image without a .json"
_LARGE_JSON: Final = "image with a .json of more than 64 MiB"
_LARGE_IMAGE: Final = "image of more than 256 MiB"
_FAILED: Final = "download failed"
_GONE: Final = "file of a map is missing"

Member = tuple[bytes, int, int]
"""Key of the URL, offset in the tar, bytes."""


@dataclass(frozen=True)
class UrlMap:
    """A table URL -> place: JSON lines (.jsonl) or parquet.

    Args:
        path: the file.
        root: the folder below which the files or tars lie; no path of the table may leave it by ``..``.
        url: field with the URL.
        file: field with the path of a loose file; the empty name: there are tars alone.
        tar: field with the path of a tar.
        member: field with the member of that tar.
    """

    path: Path
    root: Path
    url: str = "url"
    file: str = "path"
    tar: str = "tar"
    member: str = "member"


@dataclass(frozen=True)
class UrlIndexReport:
    """What an index holds: ``urls``, ``duplicates`` (later places of a URL, left out), and what was passed over."""

    urls: int
    duplicates: int
    passed_over: dict[str, int]


def build_url_index(
    index: Path,
    *,
    tars: tuple[Path, ...] = (),
    folders: tuple[Path, ...] = (),
    maps: tuple[UrlMap, ...] = (),
    workers: int = 1,
    run_records: int = RUN_RECORDS,
) -> UrlIndexReport:
    """Write the index of everything named; of several places of a URL the first one counts.

    First are the tars (sorted by path), then the folders, then the maps, each in its own order.

    Args:
        index: the file to write, in a folder that exists; beside or above the images if both are to move together.
        tars: tar files with .json members, or folders of them.
        folders: folders of image files with their .json beside them, at any depth.
        maps: tables.
        workers: processes that read tars.
        run_records: records sorted in memory at a time.

    Raises:
        DataError: if the index exists, an input is not what it should be, or there is not one URL.
    """
    if index.exists():
        raise DataError(f"{index} exists", fix="remove it to build it again")
    work = Path(tempfile.mkdtemp(dir=index.parent, prefix=f".{index.name}."))
    try:
        with IndexWriter(index, work=work, run_records=run_records) as writer:
            files = input_files(tars, endings=(".tar",)) if tars else ()
            for path, (entries, passed) in zip(files, ordered_map(read_tar, files, workers=workers), strict=True):
                writer.add_members(path, entries)
                writer.counts.update(passed)
            for folder in folders:
                _add_folder(folder, writer)
            for table in maps:
                _add_map(table, writer)
            counts = writer.publish()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    urls, duplicates = counts.pop("urls"), counts.pop("duplicates")
    return UrlIndexReport(urls, duplicates, counts)


def url_key(url: str) -> bytes:
    """Return the key of a URL; white space around it does not count."""
    return key_of(url.strip().encode("utf-8", "surrogatepass"))


def _url_of(raw: bytes, *, where: str) -> str | None:
    """Return the URL in a sample's JSON, or None if the sample failed to download."""
    try:
        about = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{where}: {error}", fix="repair or remove the sample") from error
    url = about.get("url") if isinstance(about, dict) else None
    if not isinstance(url, str) or not url.strip():
        raise DataError(
            f"{where} holds no url ({sorted(about) if isinstance(about, dict) else type(about).__name__})",
            fix="download with img2dataset's metadata, or give a map of URLs",
        )
    return None if about.get("status", "success") not in ("success", None) else url


def read_tar(path: Path) -> tuple[list[Member], Counter[str]]:
    """Return the images of one tar with their URLs, and what was passed over.

    Raises:
        DataError: if it is not an uncompressed tar, is broken or cut, or a .json of it holds no URL.
    """
    entries: list[Member] = []
    passed: Counter[str] = Counter()
    try:
        for sample in tar_samples.samples(path, wanted=_JSON.__eq__, largest=_MOST_JSON):
            image = next((member for suffix, member in sample.members.items() if f".{suffix}" in IMAGE_ENDINGS), None)
            about = sample.members.get(_JSON)
            if image is None:
                continue
            if about is None or about.data is None:
                passed[_NO_JSON if about is None else _LARGE_JSON] += 1
                continue
            if image.size > _MOST_IMAGE:
                passed[_LARGE_IMAGE] += 1
                continue
            url = _url_of(about.data, where=f"{path} at {about.name}")
            if url is None:
                passed[_FAILED] += 1
            else:
                entries.append((url_key(url), image.offset, image.size))
    except tar_samples.TarCut as cut:
        raise cut.error(path, fix="download the shard again, or leave it out") from cut
    return entries, passed


def _add_folder(folder: Path, writer: IndexWriter) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", fix="name a folder that img2dataset wrote")
    for at, inside in folders_below(folder):
        _refuse_packed(at, inside)
        entries = []
        there = set(inside)
        for name in inside:
            stem, ending = os.path.splitext(name)
            if ending.lower() not in IMAGE_ENDINGS:
                continue
            if f"{stem}.json" not in there:
                writer.counts[_NO_JSON] += 1
                continue
            beside = at / f"{stem}.json"
            url = _url_of(beside.read_bytes(), where=str(beside))
            if url is None:
                writer.counts[_FAILED] += 1
            else:
                entries.append((url_key(url), at / name))
        writer.add_files(entries)


def _refuse_packed(folder: Path, names: list[str]) -> None:
    """Refuse images that have no place in a file that could be read without unpacking it."""
    for name in names:
        if name.endswith(".tfrecord") or (name.endswith(".parquet") and image_column(folder / name) is not None):
            raise DataError(
                f"{folder / name} holds images inside, which cannot be indexed",
                fix="download with output_format=webdataset or files, or write the images to tars",
            )


def _add_map(table: UrlMap, writer: IndexWriter) -> None:
    if not table.root.is_dir():
        raise DataError(f"{table.root} is not a folder", fix="name the folder of the images of the map")
    members = lru_cache(maxsize=16)(_by_name)
    loose: list[tuple[bytes, Path]] = []
    for where, row in _map_rows(table):
        url, name, tar, member = (row.get(key) for key in (table.url, table.file, table.tar, table.member))
        if not isinstance(url, str) or not (
            isinstance(name, str) or (isinstance(tar, str) and isinstance(member, str))
        ):
            raise DataError(
                f"{where} has no {table.url} with {table.file}, or with {table.tar} and {table.member}: {sorted(row)}",
                fix="name the fields of the map",
            )
        path = path_inside(table.root, name if isinstance(name, str) else str(tar), place=where, noun="file")
        place = None if isinstance(name, str) or not path.is_file() else members(path).get(str(member))
        if isinstance(name, str) and path.is_file():
            loose.append((url_key(url), path))
        elif place is not None:
            writer.add_files(loose)  # the order of the map decides which of two places counts
            loose = []
            writer.add_members(path, [(url_key(url), *place)])
        else:
            writer.counts[_GONE] += 1
        if len(loose) >= _BATCH:
            writer.add_files(loose)
            loose = []
    writer.add_files(loose)


def _by_name(path: Path) -> Mapping[str, tuple[int, int]]:
    try:
        inside = tar_samples.members(path, wanted=lambda name: False, largest=0)
        return {member.name: (member.offset, member.size) for member in inside}
    except tar_samples.TarCut as cut:
        raise cut.error(path) from cut


def _map_rows(table: UrlMap) -> Iterator[tuple[str, dict[str, Any]]]:
    if not table.path.is_file():
        raise DataError(f"{table.path} does not exist", fix="name a map that does")
    if table.path.suffix != ".parquet":
        for unit in line_units((table.path,)):
            for where, row in json_lines(unit):
                yield f"{table.path} at {where}", row
        return
    try:
        with pq.ParquetFile(table.path) as file:
            wanted = [n for n in file.schema_arrow.names if n in (table.url, table.file, table.tar, table.member)]
            at = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                for row in batch.to_pylist():
                    yield f"{table.path} row {at}", row
                    at += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{table.path} is not parquet, or is damaged: {error}", fix="write the map again") from error
