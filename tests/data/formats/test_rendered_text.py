"""The reader of RenderedText."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm15_megatron.data.formats.base import Found, Interleaved, Skipped
from mm15_megatron.data.formats.rendered_text import RenderedText
from mm15_megatron.errors import DataError
from tests.data.formats.ocr_files import read_all, to_json, write_tar
from tests.data.images import photo


def annotation(*lines: str) -> dict[str, Any]:
    return {"ocr_annotation": {"text": list(lines), "bounding_box": [[0, 0, 1, 1]] * len(lines)}}


PICTURES = [photo(8, 8, seed=n) for n in range(5)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_tar(
        tmp_path / "000044.tar",
        [
            ("440000.json", to_json(annotation(" Call me", "Ishmael. "))), ("440000.png", PICTURES[0]),
            ("440001.png", PICTURES[1]), ("440001.json", to_json(annotation("one"))),
            ("440002.json", to_json(annotation("", " "))), ("440002.png", PICTURES[2]),
            ("440003.json", to_json(annotation("x"))),
            ("440004.png", PICTURES[3]),
        ],
    )  # fmt: skip


def write_parquet(path: Path) -> Path:
    rows = [
        {"png": {"bytes": picture, "path": None}, "json": annotation(f"line {n}", "end"), "__key__": str(n)}
        for n, picture in enumerate(PICTURES)
    ]
    rows[1]["png"] = None
    rows[2]["json"] = None
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_an_image_and_its_lines(archive: Path) -> None:
    assert read_all(RenderedText((archive,))) == [
        Found(Interleaved((PICTURES[0], "Call me\nIshmael.")), "000044.tar:440000"),
        Found(Interleaved((PICTURES[1], "one")), "000044.tar:440001"),
        Skipped("empty text", "000044.tar:440002"),
        Skipped("no image", "000044.tar:440003"),
        Skipped("no json", "000044.tar:440004"),
    ]


def test_parquet(tmp_path: Path) -> None:
    reader = RenderedText((write_parquet(tmp_path / "0000.parquet"),))
    assert [(unit.first, unit.stop) for unit in reader.units()] == [(0, 1), (1, 2), (2, 3)]
    assert read_all(reader) == [
        Found(Interleaved((PICTURES[0], "line 0\nend")), "0000.parquet:0"),
        Skipped("no image", "0000.parquet:1"),
        Skipped("no json", "0000.parquet:2"),
        Found(Interleaved((PICTURES[3], "line 3\nend")), "0000.parquet:3"),
        Found(Interleaved((PICTURES[4], "line 4\nend")), "0000.parquet:4"),
    ]


def test_folders_of_both_and_units_in_any_order(archive: Path) -> None:
    write_parquet(archive.parent / "b.parquet")
    reader = RenderedText((archive.parent,))
    assert reader.kind == "interleaved"
    records = read_all(reader)
    assert len(records) == 10
    assert records == read_all(pickle.loads(pickle.dumps(reader)), backwards=True)


@pytest.mark.parametrize(
    "value", [{}, {"ocr_annotation": []}, {"ocr_annotation": {"text": "x"}}, {"ocr_annotation": {"text": [1]}}]
)
def test_another_annotation_is_an_error(tmp_path: Path, value: dict[str, Any]) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.json", to_json(value)), ("1.png", PICTURES[0])])
    with pytest.raises(DataError, match=r"a.tar:1 has the fields .* and no list of texts in ocr_annotation.text"):
        read_all(RenderedText((path,)))


def test_another_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for row, message in (
        ({"image": b"", "json": {"a": 1}}, "has the columns"),
        ({"png": b""}, "has 0 columns 'json'"),
    ):
        pq.write_table(pa.Table.from_pylist([row]), path)
        with pytest.raises(DataError, match=message):
            RenderedText((path,)).units()
    pq.write_table(pa.Table.from_pylist([{"png": b"x", "json": "{}"}]), path)
    with pytest.raises(DataError, match="json is a str, expected a struct"):
        read_all(RenderedText((path,)))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a sound parquet file"):
        RenderedText((path,)).units()


def test_a_member_over_the_limit_is_left_out(tmp_path: Path) -> None:
    annotation = to_json({"ocr_annotation": {"text": ["x"]}})
    files = [("1.json", annotation), ("1.png", b"p" * 101), ("2.json", annotation), ("2.png", b"p" * 100)]
    path = write_tar(tmp_path / "a.tar", files)
    assert read_all(RenderedText((path,), max_member_bytes=100)) == [
        Skipped("larger than max_member_bytes", "a.tar:1"),
        Found(Interleaved((b"p" * 100, "x")), "a.tar:2"),
    ]
    with pytest.raises(DataError, match="max_member_bytes is 0"):
        RenderedText((path,), max_member_bytes=0)


def test_a_cut_archive_is_an_error(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:1200])
    with pytest.raises(DataError, match="ends (inside|without end marker)"):
        read_all(RenderedText((archive,)))
