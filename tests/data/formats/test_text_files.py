"""Documents without images."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm15_megatron.data.formats.base import Found, Skipped, Text, Unit
from mm15_megatron.data.formats.text_files import JsonlText, ParquetText, PlainText
from mm15_megatron.errors import DataError

Reader = JsonlText | ParquetText | PlainText
DOCUMENTS = ["First.\n\nTwo paragraphs.", "", "  kept as it is \n", " \n\t", "Grüße 🐶", "\u2028 a separator", "end"]


def read(reader: Reader) -> list[Found | Skipped]:
    return [record for unit in reader.units() for record in reader.read(unit)]


def texts(records: list[Found | Skipped]) -> list[str]:
    """The texts, or the reasons in brackets."""
    return [
        r.record.text if isinstance(r, Found) and isinstance(r.record, Text) else f"[{getattr(r, 'reason', r)}]"
        for r in records
    ]


def wanted(documents: list[str]) -> list[str]:
    return [document if document.strip() else "[empty text]" for document in documents]


def json_lines(documents: list[str], *, field: str = "text") -> bytes:
    rows = ({"id": i, field: document} for i, document in enumerate(documents))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(json_lines(["last"]))
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCUMENTS).replace(b"\n", b"\r\n\n", 2))
    reader = JsonlText((tmp_path,))
    records = read(reader)
    assert reader.kind == "text"
    assert texts(records) == [*wanted(DOCUMENTS), "last"]
    assert records[0] == Found(Text(DOCUMENTS[0]), "a.jsonl:0")
    assert records[1] == Skipped("empty text", "a.jsonl:49")
    for size in (1, 7, 64, 100):
        small = pickle.loads(pickle.dumps(JsonlText((tmp_path,), unit_bytes=size)))
        units = list(small.units())
        pieces = {unit: list(small.read(unit)) for unit in random.Random(size).sample(units, len(units))}
        assert [record for unit in units for record in pieces[unit]] == records


def test_the_field_is_an_option_and_bad_texts_are_counted(tmp_path: Path) -> None:
    lines = [{"content": "a"}, {"content": None}, {"content": "half \udc00"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert texts(read(JsonlText((path,), field="content"))) == ["a", "[no text]", "[text is not Unicode]"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"txt": "x"}', "at a.jsonl:0 has no field 'text'\n.*did you mean 'txt'"),
        (b'{"text": ["a", "b"]}', "'text' is a list"),
        (b'{"text": "x"', "write one JSON object a line"),
        (b'{"text": "\xff"}', "write it as UTF-8"),
        (b"[1]", "holds a list"),
    ],
)
def test_lines_of_another_format_are_errors(tmp_path: Path, line: bytes, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    with pytest.raises(DataError, match=problem):
        read(JsonlText((tmp_path,)))


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
def test_compressed_json_lines_are_one_unit(tmp_path: Path, ending: str, compress: Any) -> None:
    many = [f"document {i} " * 40 for i in range(5000)]
    path = tmp_path / f"a.jsonl{ending}"
    # files that were compressed in pieces hold several streams
    path.write_bytes(compress(json_lines(DOCUMENTS)) + compress(json_lines(many)))
    reader = JsonlText((tmp_path,), unit_bytes=100)
    assert reader.units() == (Unit(path),)
    records = read(reader)
    assert texts(records) == [*wanted(DOCUMENTS), *many]
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(json_lines(DOCUMENTS) + json_lines(many))
    places = [record.where.split(":")[1] for record in read(JsonlText((plain,)))]
    assert [record.where.split(":")[1] for record in records] == places

    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be decompressed"):
        read(JsonlText((path,)))
    path.write_bytes(b"plain after all\n")
    with pytest.raises(DataError, match="cannot be decompressed"):
        read(JsonlText((path,)))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: Any) -> None:
    table = pa.table({"id": range(8), "text": pa.array([*DOCUMENTS, None], kind)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=3)
    reader = pickle.loads(pickle.dumps(ParquetText((path,))))
    records = read(reader)
    assert texts(records) == [*wanted(DOCUMENTS), "[no text]"]
    assert [record.where for record in records] == [f"a.parquet:{row}" for row in range(8)]
    assert [(unit.first, unit.stop) for unit in reader.units()] == [(0, 1), (1, 2), (2, 3)]
    assert [list(reader.read(unit)) for unit in reversed(reader.units())] == [records[6:], records[3:6], records[:3]]
    assert list(reader.read(Unit(path))) == records


def test_parquet_of_another_schema_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has 0 columns 'text'"):
        ParquetText((tmp_path,)).units()
    with pytest.raises(DataError, match="column 'n' holds int64, not texts"):
        ParquetText((tmp_path,), column="n").units()
    assert texts(read(ParquetText((tmp_path,), column="content"))) == ["x"]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="is not a sound parquet file"):
        ParquetText((tmp_path,)).units()


def test_parquet_with_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    buffers = [None, pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00"), pa.py_buffer(b"\xff")]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, buffers)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="is not a sound parquet file.*utf-8"):
        read(ParquetText((tmp_path,)))


def test_a_plain_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\r\n")
    (tmp_path / "a.txt").write_bytes(b"\n\n")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("Grüße\n".encode()))
    reader = pickle.loads(pickle.dumps(PlainText((tmp_path,), unit_bytes=1)))
    assert read(reader) == [
        Skipped("empty text", "a.txt"),
        Found(Text("One.\r\n\r\nTwo."), "b.txt"),
        Skipped("empty text", "c.txt"),
        Found(Text("Grüße"), "d.txt.gz"),
    ]
    assert len(reader.units()) == 4


def test_documents_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n  \nOne,\n still one.\n\n\n \t\nZwei: äöü\r\n\r\nthree".encode())
    reader = PlainText((path,), documents="blank-lines")
    records = read(reader)
    assert records == [
        Found(Text("One,\n still one."), "a.txt:4"),
        Found(Text("Zwei: äöü"), "a.txt:26"),
        Found(Text("three"), "a.txt:42"),
    ]
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert texts(read(PlainText((packed,), documents="blank-lines", unit_bytes=3))) == texts(records)


@pytest.mark.parametrize("seed", range(12))
def test_cuts_between_blank_lines_lose_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    lines = [chance.choice(["", "", " ", "a", "bc", "def ghi", "ü" * 9]) for _ in range(60)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines) + "\n" * chance.randrange(3))
    expected = [
        document.strip("\n")
        for document in "\n".join("" if not line.strip() else line for line in lines).split("\n\n")
        if document.strip("\n")
    ]
    whole = read(PlainText((path,), documents="blank-lines"))
    assert texts(whole) == expected
    for size in (1, 2, 3, 10, 50):
        reader = PlainText((path,), documents="blank-lines", unit_bytes=size)
        units = list(reader.units())
        pieces = {unit: list(reader.read(unit)) for unit in reversed(units)}
        assert [record for unit in units for record in pieces[unit]] == whole


def test_plain_text_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"Gr\xfc\xdfe\n\nx" + b"y" * 100)
    for documents in ("file", "blank-lines"):
        with pytest.raises(DataError, match=r"a\.txt, document at byte 0: .*\n.*write it as UTF-8"):
            read(PlainText((path,), documents=documents))
    with pytest.raises(DataError, match="document at byte 0 is longer than 50 bytes"):
        read(PlainText((path,), max_bytes=50))
    path.write_bytes(b"short\n\n" + b"y" * 100)
    with pytest.raises(DataError, match="document at byte 7 is longer than 50 bytes"):
        read(PlainText((path,), documents="blank-lines", max_bytes=50))


@pytest.mark.parametrize(
    ("reader", "options", "problem"),
    [
        (JsonlText, {"field": ""}, "field is empty"),
        (ParquetText, {"column": ""}, "column is empty"),
        (PlainText, {"documents": "lines"}, "documents is 'lines'"),
        (PlainText, {"max_bytes": 0}, "max_bytes is 0"),
    ],
)
def test_impossible_options(tmp_path: Path, reader: type[Reader], options: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        reader((tmp_path,), **options)


@pytest.mark.parametrize("reader", [JsonlText, ParquetText, PlainText])
def test_no_files(tmp_path: Path, reader: type[Reader]) -> None:
    with pytest.raises(DataError, match="holds no file that ends in"):
        reader((tmp_path,)).units()


def test_json_that_is_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    """Python's parser raises RecursionError for it, which is no ValueError."""
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    reader = JsonlText((tmp_path / "deep.jsonl",))
    with pytest.raises(DataError, match=r"deep\.jsonl at deep\.jsonl:0"):
        list(reader.read(reader.units()[0]))
