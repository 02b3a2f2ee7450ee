"""Positioned JSON lines, both forms."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm15_megatron.data.formats.image_store import ImageFolder
from mm15_megatron.data.formats.interleaved_filters import InterleavedFilters
from mm15_megatron.data.formats.positioned import Positioned
from mm15_megatron.errors import DataError
from tests.data.formats.interleaved import Shelf, everything, pictures, shown, url

IMAGES = {f"{i}.jpg": data for i, data in enumerate(pictures(3).values())}
LINES: list[dict[str, Any]] = [
    {"text": "one <image>\ntwo<image><image> ", "images": ["0.jpg", "1.jpg", "0.jpg"], "id": 7},
    {"parts": [{"type": "image", "path": "2.jpg"}, {"type": "text", "text": " an <image> tag "}]},
    {"text": "no image"},
    {"text": "<image> x <image>", "images": ["gone.jpg", "1.jpg"]},
    {"parts": []},
]
WHOLE = [
    [["one", ("0.jpg",), "two", ("1.jpg",), ("0.jpg",)], []],
    [[("2.jpg",), " an <image> tag "], []],
    [["no image"], []],
    "image missing",
    "empty document",
]


def write(folder: Path, lines: list[Any]) -> Path:
    path = folder / "part.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_both_forms_and_units(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for name, data in IMAGES.items():
        (root / name).write_bytes(data)
    reader = Positioned((write(tmp_path, LINES),), ImageFolder(root))
    assert reader.kind == "interleaved"
    found = everything(pickle.loads(pickle.dumps(reader)))
    assert shown(found, IMAGES) == WHOLE
    assert found[0].where == "part.jsonl:0"
    for size in (1, 40, 10_000):
        assert everything(replace(reader, unit_bytes=size)) == found


def test_options(tmp_path: Path) -> None:
    path = write(tmp_path, LINES)
    kept = shown(everything(Positioned((path,), Shelf(IMAGES), on_missing="drop-image")), IMAGES)
    assert kept[3] == [["x", ("1.jpg",)], ["image missing"]]
    filtered = shown(everything(Positioned((path,), Shelf(IMAGES), filters=InterleavedFilters())), IMAGES)
    assert filtered[0] == [["one", ("0.jpg",), "two", ("1.jpg",)], ["copy of an image of the document"]]
    assert filtered[2] == "fewer images than min_images"
    other = write(tmp_path, [{"text": "a [IMG] <image>", "images": ["0.jpg"]}])
    assert shown(everything(Positioned((other,), Shelf(IMAGES), placeholder="[IMG]")), IMAGES) == [
        [["a", ("0.jpg",), "<image>"], []]
    ]


def test_urls_are_filtered_by_their_words(tmp_path: Path) -> None:
    images = pictures(1) | {url("logo"): b"x"}
    shelf = Shelf(images)
    path = write(tmp_path, [{"text": "<image>a<image>", "images": [url(0), url("logo")]}])
    found = shown(everything(Positioned((path,), shelf, filters=InterleavedFilters())), images)
    assert found == [[[(url(0),), "a"], ["image URL contains a word of url_words"]]]
    assert shelf.asked == [url(0)]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ({"text": "a <image>", "images": []}, "1 placeholders '<image>' and 0 images"),
        ({"text": "a", "images": ["0.jpg"]}, "0 placeholders '<image>' and 1 images"),
        ({"text": "a", "parts": []}, "either text"),
        ({"caption": "a"}, r"has the fields \['caption'\]"),
        ({"text": ["a"]}, "text is not a text"),
        ({"text": "<image>", "images": "0.jpg"}, "images not a list of texts"),
        ({"text": "<image>", "images": [None]}, "images not a list of texts"),
        ({"parts": {}}, "parts is a dict"),
        ({"parts": ["a"]}, "part 0 is a"),
        ({"parts": [{"type": "text", "text": "a"}, {"type": "video", "path": "b"}]}, "part 1 is .*video"),
        ({"parts": [{"type": "image", "text": "b"}]}, "part 0"),
        ([1], "holds a list"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: object, match: str) -> None:
    path = write(tmp_path, [LINES[0], line])
    with pytest.raises(DataError, match=match):
        everything(Positioned((path,), Shelf(IMAGES)))


def test_names_do_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = write(tmp_path, [{"text": "<image>", "images": ["../part.jsonl"]}])
    with pytest.raises(DataError, match="no file below"):
        everything(Positioned((path,), ImageFolder(tmp_path / "images")))


@pytest.mark.parametrize("options", [{"placeholder": " "}, {"on_missing": "raise"}, {"unit_bytes": 0}])
def test_options_are_checked(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        Positioned((tmp_path,), Shelf({}), **options)
