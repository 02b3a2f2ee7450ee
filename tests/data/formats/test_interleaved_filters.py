"""MM1's filters of interleaved documents, one by one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm15_megatron.data.formats.base import Text
from mm15_megatron.data.formats.image_counts import FrequentImages, count_images
from mm15_megatron.data.formats.interleaved_filters import NO_FILTERS, InterleavedFilters, header_size
from mm15_megatron.data.formats.interleaving import Assembly, Reference
from mm15_megatron.data.formats.positioned import Positioned
from mm15_megatron.errors import DataError
from tests.data.formats.interleaved import Shelf, pictures, shown, url
from tests.data.images import photo

FILTERS = InterleavedFilters()


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (100, 100, None),
        (100, 200, None),
        (200, 100, None),
        (100, 201, "image aspect ratio"),
        (201, 100, "image aspect ratio"),
        (99, 150, "image side under min_side"),
        (150, 99, "image side under min_side"),
    ],
)
def test_sizes(height: int, width: int, reason: str | None) -> None:
    for form in ("JPEG", "PNG"):
        data = photo(height, width, form=form)
        assert header_size(data) == (width, height)
        assert FILTERS.refuse_bytes(data) == reason
        assert NO_FILTERS.refuse_bytes(data) is None


def test_the_largest_side_by_the_header_alone() -> None:
    whole = photo(120, 120, form="JPEG")
    assert InterleavedFilters(max_side=119).refuse_bytes(whole) == "image side over max_side"
    at = whole.index(b"\xff\xc0") + 5  # height and width of the frame, two bytes each
    for side, reason in ((10_000, None), (10_001, "image side over max_side")):
        claimed = whole[:at] + side.to_bytes(2, "big") * 2 + whole[at + 4 :]
        assert header_size(claimed) == (side, side)  # never decoded: the pixels are not there
        assert FILTERS.refuse_bytes(claimed) == reason


@pytest.mark.parametrize("data", [b"", b"hello", photo(120, 120)[:20], photo(120, 120, form="JPEG")[:100]])
def test_headers_that_cannot_be_read(data: bytes) -> None:
    assert FILTERS.refuse_bytes(data) == "image header unreadable"
    assert InterleavedFilters(readable_header=False).refuse_bytes(data) is None


@pytest.mark.parametrize("word", ["logo", "button", "icon", "plugin", "widget"])
def test_words_of_urls(word: str) -> None:
    reason = "image URL contains a word of url_words"
    assert FILTERS.refuse_url(f"https://a.example/x_{word.upper()}.png?v=1") == reason
    assert FILTERS.refuse_url("https://a.example/photo.png") is None
    assert InterleavedFilters(url_words=()).refuse_url(f"https://a.example/{word}") is None


def test_numbers_of_images() -> None:
    images = pictures(3)
    parts: list[str | Reference] = [Reference(key, key) for key in images]

    def assembled(**options: Any) -> object:
        assembly = Assembly(Shelf(images), "drop-image", InterleavedFilters(**options))
        return shown([assembly.assemble(parts, where="x")], images)[0]

    everything = [[(key,) for key in images], []]
    assert assembled(max_images=3, min_images=3) == everything
    assert assembled(max_images=2) == "more images than max_images"
    assert assembled(min_images=4) == "fewer images than min_images"
    assert assembled(url_words=("/2.",), max_images=2) == "more images than max_images"  # counted before
    assert assembled(url_words=("/2.",), min_images=3) == "fewer images than min_images"  # counted after
    assert InterleavedFilters().max_images == 30


def test_the_first_copy_stays() -> None:
    images = pictures(2)
    images[url("same")] = images[url(0)]
    shelf = Shelf(images)
    parts: list[str | Reference] = [Reference(key, key) for key in (url(0), url("same"), url(1), url(0))]
    found = Assembly(shelf, "drop-image", FILTERS).assemble(parts, where="x")
    assert found.repaired == ("copy of an image of the document",) * 2  # type: ignore[union-attr]
    assert found.record.parts == (images[url(0)], images[url(1)])  # type: ignore[union-attr]
    assert shelf.asked == [url(0), url("same"), url(1)]
    kept = Assembly(shelf, "drop-image", InterleavedFilters(first_copy_only=False)).assemble(parts, where="x")
    assert len(kept.record.parts) == 4  # type: ignore[union-attr]


@pytest.fixture
def counted(tmp_path: Path) -> Positioned:
    """Image 0 in twelve documents, image 1 eleven times in one, image 2 in ten, image 3 once."""
    documents = [["0"]] * 12 + [["1"] * 11] + [["2"]] * 10 + [["3"]]
    lines = [{"text": "<image>" * len(names) + "x", "images": names} for names in documents]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shelf = Shelf({str(i): data for i, data in enumerate(pictures(4).values())})
    return Positioned((tmp_path / "x.jsonl",), shelf, unit_bytes=200)


@pytest.mark.parametrize(("workers", "run_records"), [(1, 2**20), (1, 3), (2, 5)])
def test_images_that_are_too_frequent(tmp_path: Path, counted: Positioned, workers: int, run_records: int) -> None:
    table = tmp_path / "frequent.npy"
    report = count_images(counted, table, workers=workers, run_records=run_records)
    assert (report.images, report.different, report.frequent) == (34, 4, 2)
    frequent = pickle.loads(pickle.dumps(FrequentImages(table)))
    images = list(pictures(4).values())
    assert [frequent.contains(data) for data in images] == [True, True, False, False]
    filters = InterleavedFilters(frequent=frequent)
    reasons = [filters.refuse_bytes(data) for data in images]
    assert reasons == ["image too frequent in the dataset"] * 2 + [None] * 2
    with pytest.raises(DataError, match="exists"):
        count_images(counted, table)


def test_none_too_frequent_and_other_kinds(tmp_path: Path, counted: Positioned) -> None:
    table = tmp_path / "frequent.npy"
    assert count_images(counted, table, more_than=100).frequent == 0
    assert not FrequentImages(table).contains(b"x")

    class Texts:
        kind = "text"

        def units(self) -> tuple[()]:
            return ()

        def read(self, unit: object) -> list[Text]:
            return []

    with pytest.raises(DataError, match="gives text"):
        count_images(Texts(), tmp_path / "other.npy")  # type: ignore[arg-type]


def test_what_is_no_table_of_images(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    with pytest.raises(DataError, match="does not exist"):
        FrequentImages(path)
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="not a table"):
        FrequentImages(path).contains(b"x")
    np.save(path, np.zeros((3, 2), dtype=np.uint64))
    with pytest.raises(DataError, match="does not hold uint64"):
        FrequentImages(path).contains(b"x")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"min_images": 31}, "min_images is 31, max_images 30"),
        ({"min_images": -1}, "min_images is -1"),
        ({"min_side": 200, "max_side": 100}, "min_side is 200"),
        ({"min_aspect": float("nan")}, "min_aspect is nan"),
        ({"max_aspect": 0.1}, "max_aspect 0.1"),
        ({"url_words": ("logo", "")}, "empty word"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        InterleavedFilters(**options)
