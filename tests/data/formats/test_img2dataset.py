"""Whole folders of img2dataset, in the layouts that its writers make, with what it could not download."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm15_megatron.data.formats.base import Caption, Found, Skipped
from mm15_megatron.data.formats.img2dataset import Img2Dataset
from mm15_megatron.data.formats.url_sources import build_url_index
from mm15_megatron.errors import DataError

FORMATS = ("webdataset", "files", "parquet")
STATUSES = ("success", "failed_to_download", "success", "failed_to_resize", "failed_to_download")


def metadata(key: str, status: str, number: int) -> dict[str, Any]:
    return {
        "url": f"http://x/{number}",
        "caption": f"caption {number}",
        "synthetic": f"synthetic {number}",
        "key": key,
        "status": status,
        "error_message": None if status == "success" else "HTTP Error 404: Not Found",
        "width": 8,
        "height": 8,
        "original_width": 80,
        "original_height": 80,
        "exif": None,
        "sha256": None,
    }


def shard(folder: Path, form: str, *, number: int = 0, image: str = "jpg", **stats: int) -> None:
    """Write one shard: a row a status, rows of success with an image; its metadata; its counts."""
    folder.mkdir(exist_ok=True)
    keys = [f"{number:05d}{place:04d}" for place in range(len(STATUSES))]
    rows = [metadata(key, status, place) for place, (key, status) in enumerate(zip(keys, STATUSES, strict=True))]
    good = [row for row in rows if row["status"] == "success"]
    files = [
        (f"{row['key']}.{ending}", data)
        for row in good
        for ending, data in (
            (image, row["key"].encode()),
            ("json", json.dumps(row, indent=4).encode()),
            ("txt", row["caption"].encode()),
        )
    ]
    name = f"{number:05d}"
    if form == "webdataset":
        with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for member, data in files:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    elif form == "files":
        (folder / name).mkdir()
        for member, data in files:
            (folder / name / member).write_bytes(data)
    else:
        for row in rows:
            won = row["status"] == "success"
            row.update({image: row["key"].encode() if won else None, "txt": row["caption"] if won else None})
    kinds = {image: pa.binary(), **dict.fromkeys(("width", "height", "original_width", "original_height"), pa.int32())}
    schema = pa.schema([(column, kinds.get(column, pa.string())) for column in rows[0]])
    with pq.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
        for start in range(0, len(rows), 2):  # img2dataset closes a row group every hundred rows
            writer.write_table(pa.Table.from_pylist(rows[start : start + 2], schema))
    counts = Counter(STATUSES)
    found = {"count": len(rows), "successes": counts.pop("success"), **counts, **stats}
    (folder / f"{name}_stats.json").write_text(json.dumps({**found, "status_dict": {}}))


def read(reader: Img2Dataset) -> list[Found | Skipped]:
    return [record for unit in reader.units() for record in reader.read(unit)]


@pytest.mark.parametrize("image", ["jpg", "webp"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_output_gives_the_same_pairs_and_failures(tmp_path: Path, form: str, image: str) -> None:
    for number in (1, 0):
        shard(tmp_path / "out", form, number=number, image=image)
    reader = pickle.loads(pickle.dumps(Img2Dataset((tmp_path / "out",))))
    assert reader.kind == "captions"
    assert len(reader.units()) == 2
    items = read(reader)
    pairs = [item.record for item in items if isinstance(item, Found)]
    assert pairs == [
        Caption(f"{number:05d}{place:04d}".encode(), f"caption {place}") for number in (0, 1) for place in (0, 2)
    ]
    reasons = Counter(item.reason for item in items if isinstance(item, Skipped))
    assert reasons == {"status failed_to_download": 4, "status failed_to_resize": 2}
    assert {item.where for item in items if isinstance(item, Skipped)} == {
        f"0000{number}.parquet:{row}" for number in (0, 1) for row in (1, 3, 4)
    }
    captions = read(Img2Dataset((tmp_path / "out",), caption_field="synthetic"))
    assert [item.record.text for item in captions if isinstance(item, Found)] == ["synthetic 0", "synthetic 2"] * 2


@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_failures_without_their_table_are_counted_from_the_statistics(tmp_path: Path, form: str) -> None:
    shard(tmp_path, form)
    (tmp_path / "00000.parquet").unlink()
    where = "00000_stats.json"
    assert [item for item in read(Img2Dataset((tmp_path,))) if isinstance(item, Skipped)] == [
        Skipped("status failed_to_download", where),
        Skipped("status failed_to_download", where),
        Skipped("status failed_to_resize", where),
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_that_are_recorded_nowhere_are_counted(tmp_path: Path, form: str) -> None:
    shard(tmp_path, form, count=7)
    lost = Skipped("lost by img2dataset without a record", "00000_stats.json")
    assert read(Img2Dataset((tmp_path,)))[-2:] == [lost, lost]
    assert read(Img2Dataset((tmp_path,))).count(lost) == 2


def test_files_over_the_limit_are_left_out(tmp_path: Path) -> None:
    for form in ("webdataset", "files"):
        shard(tmp_path / form, form)
        items = read(Img2Dataset((tmp_path / form,), max_member_bytes=10))
        assert Counter(item.reason for item in items if isinstance(item, Skipped))["larger than max_member_bytes"] == 2


def test_what_is_not_a_finished_download_is_an_error(tmp_path: Path) -> None:
    def fails(match: str) -> None:
        with pytest.raises(DataError, match=match):
            read(Img2Dataset((tmp_path,)))

    fails("holds no file that ends in _stats.json")
    (tmp_path / "00001_stats.json").write_text("{}")
    fails(r"00001_stats\.json stands without its shard")
    (tmp_path / "00001.tfrecord").touch()
    fails(r"00001\.tfrecord is a TFRecord file(.|\n)*output_format=webdataset")
    (tmp_path / "00001.tfrecord").unlink()
    (tmp_path / "00001_stats.json").unlink()
    shard(tmp_path, "webdataset")
    with pytest.raises(DataError, match="named twice"):
        Img2Dataset((tmp_path, tmp_path)).units()
    shard(tmp_path, "webdataset", successes=3)
    fails("holds 2 samples, its _stats.json counts 3 successes")
    shard(tmp_path, "webdataset", count=4)
    fails("1 rows more than the 4 of its _stats.json")
    for text, match in (("{", "cannot be read"), ("[]", "does not hold count"), ('{"count": -1}', "does not hold")):
        (tmp_path / "00000_stats.json").write_text(text)
        fails(match)
    (tmp_path / "00000_stats.json").unlink()
    fails("1 shards have no _stats.json, for the download was interrupted: 00000")
    with pytest.raises(DataError, match="is not a folder"):
        Img2Dataset((tmp_path / "00000.tar",)).units()
    for options in ({"max_member_bytes": 0}, {"caption_field": ""}):
        with pytest.raises(DataError, match=next(iter(options))):
            Img2Dataset((tmp_path,), **options)  # type: ignore[arg-type]


def test_images_that_cannot_be_indexed_are_refused(tmp_path: Path) -> None:
    """By URL: a place in a parquet or TFRecord file is no place to read from."""
    shard(tmp_path, "parquet")
    with pytest.raises(DataError, match=r"00000\.parquet holds images inside"):
        build_url_index(tmp_path / "i", folders=(tmp_path,))
    (tmp_path / "00000.parquet").unlink()
    (tmp_path / "00000.tfrecord").touch()
    with pytest.raises(DataError, match=r"00000\.tfrecord holds images inside"):
        build_url_index(tmp_path / "i", folders=(tmp_path,))
