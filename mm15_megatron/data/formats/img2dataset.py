"""What img2dataset wrote, whole: its shards and what it could not download.

Read from img2dataset's ``writer.py``, ``downloader.py`` and ``logger.py`` (github.com/rom1504/img2dataset, commit
95523bc). Every finished shard has a ``00000_stats.json`` (count, successes, failed_to_download, failed_to_resize), and,
by ``output_format``:

- ``webdataset``: ``00000.tar`` with the successes; ``00000.parquet`` with the metadata of all rows, failures too.
- ``files``: the same samples as files in a folder ``00000``; the same ``00000.parquet``.
- ``parquet``: ``00000.parquet`` with all rows; the image's bytes in a column named by encode_format (``jpg``, ``png``,
  ``webp``), null where it failed, the caption in ``txt``.
- ``tfrecord``: refused. ``dummy`` writes no shards.

A shard without its ``_stats.json`` was interrupted, which is an error here as img2dataset too downloads it again. A row
on which the downloader itself failed is printed by it and written nowhere: the difference to ``count`` says how many.

Not confirmed on a download, only in its code: older releases wrote ``_stats.json`` with the same four fields.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from mm15_megatron.data.formats.base import Found, Skipped, Unit, folders_below
from mm15_megatron.data.formats.caption_files import ParquetCaptions
from mm15_megatron.data.formats.fields import check_named, status_fault
from mm15_megatron.data.formats.tables import check_text_column, image_column, rows, table_schema
from mm15_megatron.data.formats.tar_samples import Member, Sample, check_limit, split_name
from mm15_megatron.data.formats.webdataset import WebDatasetCaptions
from mm15_megatron.errors import DataError

UNRECORDED: Final = "lost by img2dataset without a record"
_STATS: Final = "_stats.json"
_FAILURES: Final = ("failed_to_download", "failed_to_resize")
_COUNTS: Final = ("count", "successes", *_FAILURES)
_SHARD: Final = re.compile(r"(\d+)\.(?:tar|parquet|tfrecord)")
_ROWS: Final = 1024


@dataclass(frozen=True)
class Img2Dataset:
    """Reader of the folders that img2dataset writes, of any output_format but tfrecord; a unit is a shard.

    Attributes:
        paths: its output folders.
        caption_field: take the caption from this field of the metadata; None = the caption that it saved.
        max_member_bytes: a sample with a larger file or member is left out and counted.
    """

    paths: tuple[Path, ...]
    caption_field: str | None = None
    max_member_bytes: int = 2**28

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is impossible.
        """
        check_limit(self.max_member_bytes)
        if self.caption_field is not None:
            check_named(caption_field=self.caption_field)

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        return "captions"

    def units(self) -> tuple[Unit, ...]:
        """One unit a shard: its tar, its folder, or its parquet file.

        Raises:
            DataError: there is none, one was interrupted, or is of a format that is not read.
        """
        units: list[Unit] = []
        for path in self.paths:
            if not path.is_dir():
                raise DataError(f"{path} is not a folder", fix="name the output folder of img2dataset")
            for folder, names in folders_below(path):
                units += _shards(folder, names)
        if not units:
            raise DataError(
                f"{', '.join(map(str, self.paths))} holds no file that ends in {_STATS}",
                fix="name the output folder of img2dataset; shards without them are read as webdataset or parquet",
            )
        if len({os.path.realpath(unit.path) for unit in units}) < len(units):
            raise DataError(
                f"a shard of {', '.join(map(str, self.paths))} is named twice", fix="name every folder once"
            )
        return tuple(units)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read one shard, then what it records as failed.

        Raises:
            DataError: it is damaged, or does not hold what its ``_stats.json`` counts.
        """
        path = unit.path
        stats = _stats(_beside(path, _STATS))
        if path.suffix == ".parquet":
            total = 0
            for item in self._rows(unit):
                total += 1
                yield item
            lost = stats["count"] - total
        else:
            samples = 0
            for item in self._tar(unit) if path.suffix == ".tar" else self._folder(path):
                samples += 1
                yield item
            if samples != stats["successes"]:
                raise DataError(
                    f"{path} holds {samples} samples, its {_STATS} counts {stats['successes']} successes",
                    fix="download the shard again; a shard that was changed on purpose is read as webdataset",
                )
            failed = 0
            for item in _failures(path, stats):
                failed += 1
                yield item
            lost = stats["count"] - samples - failed
        if lost < 0:
            raise DataError(
                f"{path} and its records hold {-lost} rows more than the {stats['count']} of its {_STATS}",
                fix="keep shards of one download in one folder, or download the shard again",
            )
        yield from [Skipped(UNRECORDED, f"{_beside(path, _STATS).name}")] * lost

    def _captions(self) -> WebDatasetCaptions:
        return WebDatasetCaptions(self.paths, caption_field=self.caption_field, max_member_bytes=self.max_member_bytes)

    def _tar(self, unit: Unit) -> Iterator[Found | Skipped]:
        yield from self._captions().read(unit)

    def _folder(self, folder: Path) -> Iterator[Found | Skipped]:
        reader = self._captions()
        wanted = {*reader.image_suffixes, reader.caption_suffix, "json"}
        named = [(*parts, name) for name in os.listdir(folder) if (parts := split_name(name)) and parts[1] in wanted]
        for key, files in groupby(sorted(named), key=lambda one: one[0]):
            members = {suffix: self._member(folder / name) for _, suffix, name in files}
            yield reader.outcome(Sample(key, members), path=folder)

    def _member(self, path: Path) -> Member:
        size = path.stat().st_size
        if size > self.max_member_bytes:
            return Member(path.name, 0, size, too_large=True)
        return Member(path.name, 0, size, path.read_bytes())

    def _rows(self, unit: Unit) -> Iterator[Found | Skipped]:
        reader = ParquetCaptions(
            (unit.path,),
            image_column=str(image_column(unit.path)),
            caption_column=self.caption_field or "txt",
            status_column="status",
        )
        reader.units()  # checks the columns
        yield from reader.read(unit)


def _beside(shard: Path, ending: str) -> Path:
    return shard.with_name(f"{shard.name.partition('.')[0]}{ending}")


def _shards(folder: Path, names: list[str]) -> Iterator[Unit]:
    done = {name.removesuffix(_STATS) for name in names if name.endswith(_STATS)}
    begun = {found[1] for name in names if (found := _SHARD.fullmatch(name))}
    if begun and (open_ := sorted(begun - done)):
        raise DataError(
            f"{folder}: {len(open_)} shards have no {_STATS}, for the download was interrupted: {', '.join(open_[:5])}",
            fix="let img2dataset finish them, or move them away; tars alone are read as webdataset",
        )
    for shard in sorted(done):
        yield Unit(_data(folder, shard))


def _data(folder: Path, shard: str) -> Path:
    """Return what holds the samples of a shard."""
    table = folder / f"{shard}.parquet"
    if (folder / f"{shard}.tfrecord").is_file():
        raise DataError(
            f"{folder / shard}.tfrecord is a TFRecord file, which is not read",
            fix="download again with output_format=webdataset, or convert the files to tars",
        )
    for path in (folder / f"{shard}.tar", folder / shard):
        if path.exists():
            return path
    if table.is_file() and image_column(table) is not None:
        return table
    raise DataError(
        f"{folder / shard}{_STATS} stands without its shard: no tar, no folder, no parquet file with images",
        fix="put the shards beside it; output_format=dummy writes none",
    )


def _stats(path: Path) -> dict[str, int]:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", fix="download the shard again") from error
    found = value if isinstance(value, dict) else {}
    if not all(isinstance(found.get(name), int) and found[name] >= 0 for name in _COUNTS):
        raise DataError(f"{path} does not hold {', '.join(_COUNTS)}", fix="download the shard again")
    return {name: found[name] for name in _COUNTS}


def _failures(path: Path, stats: dict[str, int]) -> Iterator[Skipped]:
    """What a tar or a folder does not hold: row by row from the parquet file beside it, else by their counts."""
    table = _beside(path, ".parquet")
    if table.is_file():
        check_text_column(table_schema(table), "status", path=table)
        for where, (status,) in rows(Unit(table), ("status",), batch=_ROWS):
            if (fault := status_fault(status)) is not None:
                yield Skipped(fault, where)
        return
    for name in _FAILURES:
        yield from [Skipped(str(status_fault(name)), _beside(path, _STATS).name)] * stats[name]
