"""The reader of IDL."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm15_megatron.data.formats.base import Found, Interleaved
from mm15_megatron.data.formats.idl import Idl
from mm15_megatron.data.formats.ocr_pages import Paging
from mm15_megatron.errors import DataError
from tests.data.formats.ocr_files import outcome, read_all, to_json, write_tar


def idl_page(*lines: str) -> dict[str, Any]:
    return {
        "text": list(lines),
        "bbox": [[0.1, 0.1, 0.5, 0.02]] * len(lines),
        "poly": [[{"X": 0.1, "Y": 0.1}] * 4] * len(lines),
        "score": [0.9] * len(lines),
    }


def tiff(*frames: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    frames[0].save(stream, "TIFF", save_all=True, append_images=list(frames[1:]), **options)
    return stream.getvalue()


def bilevel(height: int, width: int, every: int) -> Image.Image:
    return Image.fromarray(np.arange(height * width).reshape(height, width) % every == 0)


FRAMES = (
    bilevel(40, 30, 3),
    bilevel(20, 50, 7),
    Image.new("L", (9, 8), 77),
    Image.new("CMYK", (4, 3), (0, 255, 255, 0)),
)
PAGES = [idl_page("MEMO", " to all "), idl_page("second"), idl_page("gray"), idl_page("cmyk")]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    one = to_json({"pages": [idl_page("x")]})
    return write_tar(
        tmp_path / "idl-train-00000.tar",
        [
            ("ffbb0127.json", to_json({"pages": PAGES})), ("ffbb0127.ocr", b"old"), ("ffbb0127.pdf", b"%PDF"),
            ("ffbb0127.tif", tiff(*FRAMES)),
            ("ffbb0128.json", one), ("ffbb0128.tif", tiff(*FRAMES[:2])),
            ("ffbb0129.json", one), ("ffbb0129.tif", b"II*\x00 nothing"),
            ("ffbb0130.json", one), ("ffbb0130.tif", b"\x89PNG"),
            ("ffbb0131.json", one), ("ffbb0131.ocr", b""),
            ("ffbb0132.tif", tiff(FRAMES[0])),
            ("ffbb0133.json", to_json({"pages": []})), ("ffbb0133.tif", tiff(FRAMES[0])),
        ],
    )  # fmt: skip


def test_frames_become_pages(archive: Path) -> None:
    records = read_all(Idl((archive,)))
    assert [outcome(record) for record in records] == [
        *((f"{archive.name}:ffbb0127#{n}", "found") for n in range(4)),
        (f"{archive.name}:ffbb0128", "page counts of tif and json differ"),
        (f"{archive.name}:ffbb0129", "broken tif"),
        (f"{archive.name}:ffbb0130", "broken tif"),
        (f"{archive.name}:ffbb0131", "no tif"),
        (f"{archive.name}:ffbb0132", "no json"),
        (f"{archive.name}:ffbb0133", "page counts of tif and json differ"),
    ]
    modes = []
    for record, frame, text in zip(records[:4], FRAMES, ("MEMO\nto all", "second", "gray", "cmyk"), strict=True):
        assert isinstance(record, Found)
        assert isinstance(record.record, Interleaved)
        assert record.record.parts[1] == text
        image = Image.open(io.BytesIO(record.record.parts[0]))  # type: ignore[arg-type]
        assert image.format == "PNG"
        np.testing.assert_array_equal(
            np.asarray(image), np.asarray(frame if frame.mode in "1L" else frame.convert("RGB"))
        )
        modes.append(image.mode)
    assert modes == ["1", "1", "L", "RGB"]


def test_group4_scans_keep_black_on_white(tmp_path: Path) -> None:
    white = Image.new("1", (16, 8), 1)
    path = write_tar(
        tmp_path / "a.tar",
        [("a.json", to_json({"pages": [idl_page("x")]})), ("a.tif", tiff(white, compression="group4"))],
    )
    (record,) = read_all(Idl((path,)))
    assert isinstance(record, Found)
    assert isinstance(record.record, Interleaved)
    assert np.asarray(Image.open(io.BytesIO(record.record.parts[0]))).all()  # type: ignore[arg-type]


def test_a_scan_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_tar(
        tmp_path / "a.tar",
        [("a.json", to_json({"pages": [idl_page("x")]})), ("a.tif", tiff(FRAMES[0], exif=exif))],
    )
    (record,) = read_all(Idl((path,)))
    assert isinstance(record, Found)
    assert isinstance(record.record, Interleaved)
    image = Image.open(io.BytesIO(record.record.parts[0]))  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.asarray(image), np.rot90(np.asarray(FRAMES[0]), -1))
    assert image.getexif().get(0x0112, 1) == 1


def test_a_broken_frame_costs_its_page_alone(tmp_path: Path) -> None:
    data = bytearray(tiff(*FRAMES[:3], compression="tiff_lzw"))
    at = data.index(b"\x80", 100)  # every LZW stream begins with a clear code
    data[at : at + 12] = b"\xff" * 12
    path = write_tar(tmp_path / "a.tar", [("a.json", to_json({"pages": PAGES[:3]})), ("a.tif", bytes(data))])
    reasons = [reason for _, reason in map(outcome, read_all(Idl((path,))))]
    assert sorted(reasons) == ["broken page", "found", "found"]
    (record,) = read_all(Idl((path,), paging=Paging(per="document")))
    assert isinstance(record, Found)
    assert record.repaired == ("broken page",)


def test_documents_are_named_before_they_are_opened(archive: Path) -> None:
    reader = Idl((archive,))
    assert [type(item) for item in reader.read(reader.units()[0])].count(Found) == 0


def test_limits(archive: Path) -> None:
    records = read_all(Idl((archive,), max_page_pixels=1000, paging=Paging(max_pages=3)))
    assert [reason for _, reason in map(outcome, records[:4])] == [
        "page too large",
        "found",
        "found",
        "page beyond max_pages",
    ]
    for name in ("max_page_pixels", "max_member_bytes"):
        with pytest.raises(DataError, match=f"{name} is 0"):
            Idl((archive,), **{name: 0})
    records = read_all(Idl((archive,), max_member_bytes=10))
    assert {reason for _, reason in map(outcome, records)} == {"larger than max_member_bytes"}


def test_another_structure_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.json", to_json({"pages": [{"text": "x"}]})), ("a.tif", tiff(FRAMES[0]))])
    with pytest.raises(DataError, match="a.tar:a.json, page 0: 'text' holds no list of texts"):
        read_all(Idl((path,)))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match="ends (inside|without end marker)"):
        read_all(Idl((path,)))


def test_units_are_independent_and_the_reader_travels(archive: Path) -> None:
    write_tar(
        archive.parent / "idl-train-00001.tar",
        [("b.json", to_json({"pages": [idl_page("z")]})), ("b.tif", tiff(FRAMES[1]))],
    )
    reader = Idl((archive.parent,))
    assert reader.kind == "interleaved"
    assert len(reader.units()) == 2
    records = read_all(reader)
    assert records == read_all(pickle.loads(pickle.dumps(reader)), backwards=True)
    assert records[-1].where == "idl-train-00001.tar:b#0"
