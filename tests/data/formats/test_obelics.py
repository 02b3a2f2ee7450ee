"""OBELICS in the published structure, and with what may be wrong in it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm15_megatron.data.formats.base import Format
from mm15_megatron.data.formats.image_store import UrlStore
from mm15_megatron.data.formats.interleaved_filters import InterleavedFilters
from mm15_megatron.data.formats.obelics import END_MARK, Obelics
from mm15_megatron.data.formats.url_sources import build_url_index
from mm15_megatron.errors import DataError
from tests.data.formats.interleaved import Shelf, everything, pictures, shown, url
from tests.data.formats.test_image_store import write_tar

IMAGES = pictures(4)
Row = list[tuple[str | None, str | None]]

ROWS: list[Row] = [
    [(url(0), None), (None, "Two cats.\n\nOne sleeps."), (url(1), None)],
    [(None, "before"), (url("gone"), None), (None, "after"), (url(2), None)],
    [(url("gone"), None), (None, "nothing left")],
    [(None, None), (None, "text"), (url(3), None), (None, "")],
    [(None, f"one\n\n{END_MARK}\n\ntwo"), (url(0), None), (None, END_MARK), (url(1), None), (None, "three")],
    [(None, None)],
]


def metadata(src: str) -> dict[str, Any]:
    return {
        "document_url": "https://example.com/page",
        "unformatted_src": src,
        "src": src,
        "formatted_filename": "a picture",
        "alt_text": "A picture",
        "original_width": 160,
        "original_height": 120,
        "format": "jpeg",
    }


def write(path: Path, rows: list[Row], *, group: int = 2) -> Path:
    """As the dataset is published: two lists of strings, two JSON strings."""
    general = {"url": "https://example.com/page", "warc_filename": "w.gz", "warc_record_offset": 1}
    table = pa.table(
        {
            "images": pa.array([[image for image, _ in row] for row in rows], pa.list_(pa.string())),
            "metadata": [json.dumps([metadata(i) if i else None for i, _ in row]) for row in rows],
            "general_metadata": [json.dumps(general)] * len(rows),
            "texts": pa.array([[text for _, text in row] for row in rows], pa.list_(pa.string())),
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return path


def test_documents_images_in_place_and_counts(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00001.parquet", ROWS)
    reader: Format = Obelics((tmp_path,), Shelf(IMAGES))
    assert reader.kind == "interleaved"
    found = everything(pickle.loads(pickle.dumps(reader)))
    assert shown(found, IMAGES) == [
        [[(url(0),), "Two cats.\n\nOne sleeps.", (url(1),)], []],
        [["before", "after", (url(2),)], ["image missing"]],
        "every image missing",
        [["text", (url(3),)], ["place with neither text nor image"]],
        [["one"], []],
        [["two", (url(0),)], []],
        [[(url(1),), "three"], []],
        "empty document",
    ]
    name = "train-00000-of-00001.parquet"
    assert [item.where for item in found] == [f"{name}:{i}" for i in ("0", "1", "2", "3", "4/0", "4/1", "4/2", "5")]


@pytest.mark.parametrize("group", [1, 6])
def test_row_groups_change_nothing(tmp_path: Path, group: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    reader = Obelics((write(tmp_path / "a" / "x.parquet", ROWS),), Shelf(IMAGES))
    other = Obelics((write(tmp_path / "b" / "x.parquet", ROWS, group=group),), Shelf(IMAGES))
    assert len(other.units()) == 6 // group
    assert everything(reader) == everything(other)


def test_other_options(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", ROWS)
    dropped = shown(everything(Obelics((path,), Shelf(IMAGES), on_missing="drop-document")), IMAGES)
    assert dropped[1:3] == ["image missing", "image missing"]
    removed = shown(everything(Obelics((path,), Shelf(IMAGES), end_mark="remove")), IMAGES)
    assert removed[4] == [["one\n\ntwo", (url(0),), (url(1),), "three"], []]
    shelf = Shelf(IMAGES)
    filters = InterleavedFilters(max_images=1)
    filtered = shown(everything(Obelics((path,), shelf, filters=filters)), IMAGES)
    many, few = "more images than max_images", "fewer images than min_images"
    assert filtered[:2] == [many, many]
    assert filtered[4:] == [few, [["two", (url(0),)], []], [[(url(1),), "three"], []], few]
    assert url(2) not in shelf.asked


def test_with_a_store_of_urls(tmp_path: Path) -> None:
    samples = [(f"{i:09d}", data, {"url": key, "status": "success"}) for i, (key, data) in enumerate(IMAGES.items())]
    write_tar(tmp_path / "00000.tar", samples)
    build_url_index(tmp_path / "urls.index", tars=(tmp_path / "00000.tar",))
    path = write(tmp_path / "x.parquet", ROWS)
    reader = pickle.loads(pickle.dumps(Obelics((path,), UrlStore(tmp_path / "urls.index"))))
    assert everything(reader) == everything(Obelics((path,), Shelf(IMAGES)))


def test_malformed_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [ROWS[0], [(url(1), "both")]])
    with pytest.raises(DataError, match=r"x\.parquet at x\.parquet:1, place 0: both an image .* and a text \('both'\)"):
        everything(Obelics((path,), Shelf(IMAGES)))
    lists = pa.list_(pa.string())
    columns: dict[str, Any] = {"images": pa.array([[url(1)]], lists), "texts": pa.array([[None, "b"]], lists)}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match="1 images and 2 texts"):
        everything(Obelics((path,), Shelf(IMAGES)))
    columns["texts"] = pa.array([None], lists)
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match="1 images and None texts"):
        everything(Obelics((path,), Shelf(IMAGES)))


def test_what_is_not_obelics(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for table, match in (
        (pa.table({"images": [["a"]], "text": ["b"]}), "0 columns 'texts'"),
        (pa.table({"images": [["a"]], "texts": ["b"]}), "column 'texts' holds string, not lists of texts"),
        (pa.table({"images": [[b"a"]], "texts": [["b"]]}), "column 'images' holds list"),
    ):
        pq.write_table(table, path)
        with pytest.raises(DataError, match=match):
            Obelics((path,), Shelf({})).units()
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a sound parquet file"):
        Obelics((path,), Shelf({})).units()
    with pytest.raises(DataError, match="on_missing is 'skip'"):
        Obelics((path,), Shelf({}), on_missing="skip")
    with pytest.raises(DataError, match="end_mark is 'eos'"):
        Obelics((path,), Shelf({}), end_mark="eos")
