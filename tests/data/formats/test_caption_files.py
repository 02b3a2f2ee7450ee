"""Captions in JSON lines beside images, and in parquet files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm15_megatron.data.formats.base import Caption, Found, Skipped, Unit
from mm15_megatron.data.formats.caption_files import JsonlCaptions, ParquetCaptions
from mm15_megatron.errors import DataError
from tests.data.images import photo

PICTURES = [photo(8 + i, 9, seed=i) for i in range(4)]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(reader: JsonlCaptions | ParquetCaptions) -> list[Found | Skipped]:
    return [record for unit in reader.units() for record in reader.read(unit)]


def folder(root: Path, rows: list[Any], *, name: str = "metadata.jsonl") -> Path:
    """A folder of images as Hugging Face's ImageFolder takes it: ``train/<i>.png`` and a file of JSON lines."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(PICTURES):
        (root / "train" / f"{i}.png").write_bytes(picture)
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / name


def test_json_lines_beside_images(tmp_path: Path) -> None:
    folder(tmp_path / "a", [{"file_name": f"train/{i}.png", "text": f" caption {i}\n"} for i in range(3)])
    folder(tmp_path / "b", [{"file_name": "train/3.png", "text": "ein Hund 🐶"}])
    reader = JsonlCaptions((tmp_path,))
    assert reader.kind == "captions"
    records = read(reader)
    assert [r.record for r in records if isinstance(r, Found)] == [
        Caption(PICTURES[0], "caption 0"),
        Caption(PICTURES[1], "caption 1"),
        Caption(PICTURES[2], "caption 2"),
        Caption(PICTURES[3], "ein Hund 🐶"),
    ]
    assert records[0].where == "metadata.jsonl:0"
    for size in (1, 40, 100):
        small = pickle.loads(pickle.dumps(JsonlCaptions((tmp_path,), unit_bytes=size)))
        units = small.units()
        assert len(units) > len(reader.units())
        pieces = {unit: list(small.read(unit)) for unit in reversed(units)}
        assert [record for unit in units for record in pieces[unit]] == records


def test_fields_and_root_are_options(tmp_path: Path) -> None:
    folder(tmp_path / "images", [])
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(json.dumps({"image": "./train/../train/1.png", "caption": "x", "id": 7}))
    reader = JsonlCaptions((lines,), root=tmp_path / "images", image_field="image", caption_field="caption")
    assert read(reader) == [Found(Caption(PICTURES[1], "x"), "pairs.jsonl:0")]


def test_lines_that_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"file_name": "train/0.png", "text": None},
        {"file_name": "train/0.png", "text": " \t"},
        {"file_name": None, "text": "x"},
        {"file_name": "", "text": "x"},
        {"file_name": "train/0.png", "text": "half \ud83d"},
        {"file_name": "train/9.png", "text": "x"},
        {"file_name": "train/0.png/9.png", "text": "x"},
    ]
    path = folder(tmp_path, rows)
    records = read(JsonlCaptions((path,), missing="skip"))
    assert all(isinstance(record, Skipped) for record in records)
    assert [record.reason for record in records if isinstance(record, Skipped)] == [
        "no caption",
        "empty caption",
        "no image",
        "no image",
        "caption is not Unicode",
        "image file is missing",
        "image file is missing",
    ]
    with pytest.raises(DataError, match=r"metadata\.jsonl:\d+: 'train/9\.png' is not in .*\n.*let missing be 'skip'"):
        read(JsonlCaptions((path,)))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/etc/hostname", "names the image '/etc/hostname'"),
        ("../secret.png", "which is no file below"),
        ("train/../../secret.png", "which is no file below"),
        ("out/../../secret.png", "which is no file below"),
        ("../images-of-others/0.png", "which is no file below"),
        (".", "which is no file below"),
        ("a\0b", "names the image"),
        ("train", "is not a file"),
        ("pipe", "is not a file"),
        ("https://example.org/0.png", "is not in .*\n.*download it first"),
        ("x" * 300, "cannot be read"),
    ],
)
@pytest.mark.parametrize("missing", ["raise", "skip"])
def test_the_root_cannot_be_left(tmp_path: Path, name: str, problem: str, missing: str) -> None:
    root = tmp_path / "images"
    (tmp_path / "images-of-others").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "images-of-others" / "0.png"):
        path.write_bytes(PICTURES[0])
    path = folder(root, [{"file_name": name, "text": "x"}])
    (root / "out").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    if name.startswith("https") and missing == "skip":
        assert read(JsonlCaptions((path,), missing=missing)) == [Skipped("image file is missing", "metadata.jsonl:0")]
        return
    with pytest.raises(DataError, match=problem):
        read(JsonlCaptions((path,), missing=missing))


def test_links_are_followed_wherever_they_lead(tmp_path: Path) -> None:
    """A file, a folder elsewhere as LLaVA's folder of images has it, a root that is a link; a step back is textual."""
    names = ("again.png", "coco/2.png", "coco/../train/2.png")
    folder(tmp_path / "disk", [{"file_name": name, "text": "x"} for name in names])
    (tmp_path / "disk" / "again.png").symlink_to(tmp_path / "disk" / "train" / "2.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").write_bytes(PICTURES[2])
    (tmp_path / "disk" / "coco").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images").symlink_to(tmp_path / "disk")
    found = read(JsonlCaptions((tmp_path / "images" / "metadata.jsonl",)))
    assert [one.record for one in found if isinstance(one, Found)] == [Caption(PICTURES[2], "x")] * 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "train/0.png"}', "has no field 'text'"),
        ('{"filename": "train/0.png", "text": "x"}', "has no field 'file_name'\n.*did you mean 'filename'"),
        ('{"file_name": ["train/0.png"], "text": "x"}', "'file_name' is a list"),
        ('{"file_name": "train/0.png", "text": ["x", "y"]}', "'text' is a list"),
        ('"train/0.png"', "holds a str"),
        ("train/0.png,x", "write one JSON object a line"),
    ],
)
def test_lines_of_another_format_are_errors(tmp_path: Path, line: str, problem: str) -> None:
    path = folder(tmp_path, [])
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=problem):
        read(JsonlCaptions((path,)))


def hugging_face(path: Path) -> Path:
    """A table as Hugging Face writes an Image feature: bytes with their name; and paths, and nothing."""
    images = [
        {"bytes": PICTURES[0], "path": "0.png"},
        {"bytes": PICTURES[1], "path": None},
        {"bytes": None, "path": "train/2.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": PICTURES[3], "path": "/somewhere/else.png"},
        {"bytes": PICTURES[3], "path": None},
    ]
    texts = ["zero", " one ", "two", "three", "four", "five", None]
    schema = pa.schema([("image", IMAGE), ("text", pa.string()), ("id", pa.int64())])
    table = pa.table({"image": images, "text": texts, "id": range(7)}, schema=schema)
    features = {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path, row_group_size=2)
    return path


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    folder(tmp_path, [])
    reader = ParquetCaptions((hugging_face(tmp_path / "train-00000-of-00001.parquet"),))
    name = "train-00000-of-00001.parquet"
    wanted = [
        Found(Caption(PICTURES[0], "zero"), f"{name}:0"),
        Found(Caption(PICTURES[1], "one"), f"{name}:1"),
        Found(Caption(PICTURES[2], "two"), f"{name}:2"),
        Skipped("no image", f"{name}:3"),
        Skipped("no image", f"{name}:4"),
        Found(Caption(PICTURES[3], "five"), f"{name}:5"),
        Skipped("no caption", f"{name}:6"),
    ]
    assert [(unit.first, unit.stop) for unit in reader.units()] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert read(pickle.loads(pickle.dumps(reader))) == wanted
    assert [list(reader.read(unit)) for unit in reversed(reader.units())] == [
        wanted[6:],
        wanted[4:6],
        wanted[2:4],
        wanted[:2],
    ]
    assert list(reader.read(Unit(reader.paths[0]))) == wanted
    assert list(reader.read(Unit(reader.paths[0], 1, 3))) == wanted[2:6]


def test_parquet_of_img2dataset(tmp_path: Path) -> None:
    table = {
        "url": [f"https://example.org/{i}" for i in range(3)],
        "key": [f"{i:09d}" for i in range(3)],
        "status": ["success", "failed_to_download", "failed_to_resize"],
        "error_message": [None, "HTTP Error 404: Not Found", "image decoding error"],
        "jpg": [PICTURES[0], None, None],
        "txt": ["a cat", None, None],
    }
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    reader = ParquetCaptions((tmp_path,), image_column="jpg", caption_column="txt", status_column="status")
    assert read(reader) == [
        Found(Caption(PICTURES[0], "a cat"), "00000.parquet:0"),
        Skipped("status failed_to_download", "00000.parquet:1"),
        Skipped("status failed_to_resize", "00000.parquet:2"),
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_of_paths(tmp_path: Path, kind: Any) -> None:
    folder(tmp_path / "images", [])
    names = pa.array(["train/0.png", None, "train/9.png", "train/1.png"]).cast(kind)
    texts = pa.array(["zero", "one", "two", ""]).cast(kind)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": names, "text": texts}), path)
    assert read(ParquetCaptions((path,), root=tmp_path / "images", missing="skip")) == [
        Found(Caption(PICTURES[0], "zero"), "x.parquet:0"),
        Skipped("no image", "x.parquet:1"),
        Skipped("image file is missing", "x.parquet:2"),
        Skipped("empty caption", "x.parquet:3"),
    ]
    with pytest.raises(DataError, match=r"x\.parquet at x\.parquet:2: 'train/9\.png' is not in"):
        read(ParquetCaptions((path,), root=tmp_path / "images"))
    pq.write_table(pa.table({"image": ["../x.parquet"], "text": ["x"]}), path)
    with pytest.raises(DataError, match="which is no file below"):
        read(ParquetCaptions((path,), root=tmp_path / "images", missing="skip"))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet_of_bytes(tmp_path: Path, kind: Any) -> None:
    images = pa.array([*PICTURES, None]).cast(kind)
    pq.write_table(pa.table({"image": images, "text": list("abcde")}), tmp_path / "x.parquet")
    *pairs, last = read(ParquetCaptions((tmp_path,)))
    assert pairs == [Found(Caption(PICTURES[i], "abcd"[i]), f"x.parquet:{i}") for i in range(4)]
    assert last == Skipped("no image", "x.parquet:4")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"img": [b"x"], "text": ["x"]}, "has 0 columns 'image'\n.*name the right column"),
        ({"image": [b"x"], "caption": ["x"]}, "has 0 columns 'text'"),
        ({"image": [3], "text": ["x"]}, "column 'image' holds int64"),
        ({"image": [[b"x"]], "text": ["x"]}, "column 'image' holds list"),
        ({"image": [{"bytes": 3, "path": "x"}], "text": ["x"]}, "column 'image' holds struct"),
        ({"image": [{"url": "x"}], "text": ["x"]}, "column 'image' holds struct"),
        ({"image": [b"x"], "text": [["x"]]}, "column 'text' holds list<.*>, not texts"),
    ],
)
def test_tables_of_another_schema_are_errors_at_once(tmp_path: Path, table: dict[str, Any], problem: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=problem):
        ParquetCaptions((tmp_path,)).units()


def test_damaged_tables_are_errors(tmp_path: Path) -> None:
    path = hugging_face(tmp_path / "x.parquet")
    units = ParquetCaptions((path,)).units()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is not a sound parquet file"):
        ParquetCaptions((path,)).units()
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])
    with pytest.raises(DataError, match="is not a sound parquet file"):
        list(ParquetCaptions((path,)).read(units[0]))


@pytest.mark.parametrize(
    ("reader", "options", "problem"),
    [
        (JsonlCaptions, {"missing": "drop"}, "missing is 'drop'"),
        (JsonlCaptions, {"image_field": ""}, "image_field is empty"),
        (JsonlCaptions, {"root": Path("/nowhere/at/all")}, "is not a folder"),
        (ParquetCaptions, {"missing": "Skip"}, "missing is 'Skip'"),
        (ParquetCaptions, {"status_column": ""}, "status_column is empty"),
        (ParquetCaptions, {"image_column": "text"}, "the columns are text, text"),
        (ParquetCaptions, {"root": Path("/nowhere/at/all")}, "is not a folder"),
    ],
)
def test_impossible_options(
    tmp_path: Path, reader: type[JsonlCaptions | ParquetCaptions], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        reader((tmp_path,), **options)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        JsonlCaptions((tmp_path / "x.jsonl",)).units()
    with pytest.raises(DataError, match="holds no file that ends in .parquet"):
        ParquetCaptions((tmp_path,)).units()
    with pytest.raises(DataError, match="a unit of 0 bytes"):
        JsonlCaptions((folder(tmp_path, []),), unit_bytes=0).units()
