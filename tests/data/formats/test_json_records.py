"""Annotation files are read record by record, from any place in them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm15_megatron.data.formats.base import Unit
from mm15_megatron.data.formats.json_records import array_records, record_units, records
from mm15_megatron.errors import DataError
from tests.data.formats.conversation_files import write_lines, write_parquet

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.lists(st.dictionaries(TEXTS, TEXTS | st.integers() | st.lists(TEXTS, max_size=3), max_size=4), max_size=8)


def read(path: Path, *, size: int = 2**20) -> list[tuple[str, dict[str, Any]]]:
    return [item for unit in record_units((path,), size=size) for item in records(unit)]


@given(VALUES, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 300), st.integers(1, 40))
def test_an_array_is_read_whatever_the_units_and_the_window(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, plain: bool, size: int, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    raw = b"\n " + json.dumps(values, indent=indent, ensure_ascii=plain).encode() + b" \n"
    path.write_bytes(raw)
    found = [item for unit in record_units((path,), size=size) for item in array_records(unit, chunk=chunk)]
    assert [record for _, record in found] == values
    assert all(raw[at : at + 1] == b"{" for at, _ in found)
    assert read(path) == [(f"a.json:{at}", record) for at, record in found]


def test_an_array_after_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf[{"a": "\xc3\xa9"}, {"b": 1}]')
    assert read(path, size=1) == [("a.json:4", {"a": "\u00e9"}), ("a.json:17", {"b": 1})]


def test_large_records_pass_through_a_small_window(tmp_path: Path) -> None:
    path, values = tmp_path / "a.json", [{"a": "\u20ac" * 5000}, {"b": 1}]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert [record for _, record in array_records(Unit(path), chunk=7)] == values


def test_lines_and_rows_and_compressed_files(tmp_path: Path) -> None:
    values = [{"a": n, "b": [{"c": "x" * n}]} for n in range(5)]
    lines, table = write_lines(tmp_path / "a.jsonl", values), write_parquet(tmp_path / "b.parquet", values)
    for size in (1, 30, 1000):
        assert [record for _, record in read(lines, size=size)] == values
    assert read(table) == [(f"b.parquet:{n}", value) for n, value in enumerate(values)]
    assert len(record_units((table,), size=1)) == 3
    for name, text in (("c.json.gz", json.dumps(values)), ("d.jsonl.gz", lines.read_text())):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert [record for _, record in read(tmp_path / name, size=1)] == values
    assert len(record_units((tmp_path,), size=2**20)) == 6


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "begins with nothing"),
        (b"  hello", "begins with b'hello'"),
        (b'"text"', "not with a JSON array or object"),
        (b"[1, 2]", "at byte 1: an object was expected, found '1'"),
        (b'[{"a": 1}, ]', r"at byte 11: an object was expected, found '\]'"),
        (b'[{"a": 1} {"b": 2}]', "at byte 10: ',' was expected, found '{'"),
        (b'[{"a": 1}, {"a": 2}', "it ends without ','"),
        (b'[{"a": 1}, ', "an object was expected, found ''"),
        (b'[{"a": 1}, {"a": "b', "at byte 11: in the object there: Unterminated"),
        (b'[{"a": 1}] {"b": 2}', r"at byte 11: the array is over, but '\{' follows"),
        (b'[{"a": 1}, {"a": oops, "b": "' + b"x" * 3000 + b'"}]', "at byte 11: in the object there: Expecting value"),
        (b'[{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "in the object there: .*recursion"),
        (b'[{"a": ' + b"1" * 5000 + b"}]", "in the object there: .*digits"),
        (b'[{"a": "\xff"}]', "invalid start byte"),
        (b'[{"a": "\xc3', "unexpected end"),
        (b'{"a": 1,\n"b": 2}', "at a.json:0"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert error.value.fix


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(DataError, match="parquet"):
        read(tmp_path / "a.parquet")
