"""The reader of PDFA."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm15_megatron.data.formats.base import Found, Interleaved, Pending, Skipped, opened_items
from mm15_megatron.data.formats.ocr_pages import ImageEncoding, Paging
from mm15_megatron.data.formats.pdfa import Pdfa, render_scale
from mm15_megatron.errors import DataError
from tests.data.formats.ocr_files import outcome, pdfa_page, read_all, to_json, write_tar


def make_pdf(*boxes: tuple[int, int, int, int], size: tuple[float, float] = (144, 72), extra: str = "") -> bytes:
    """A PDF with one page a box (x, y, width, height in points from the bottom left), which is filled in red."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(boxes)))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(boxes)}>>"]
    for number, box in enumerate(boxes):
        draw = f"1 0 0 rg {' '.join(map(str, box))} re f"
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {size[0]} {size[1]}]/Resources<<>>/Contents {4 + 2 * number} 0 R>>"
        )
        objects.append(f"<</Length {len(draw)}>>stream\n{draw}\nendstream")
    out, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += f"{number} 0 obj{body}endobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    trailer = f"<</Size {len(objects) + 1}/Root 1 0 R{extra}>>"
    return (
        f"{out}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer{trailer}\nstartxref\n{len(out)}\n%%EOF"
    ).encode()


ENCRYPTED = make_pdf((0, 0, 9, 9), extra=f"/Encrypt<</Filter/Standard/V 1/R 2/O<{'0' * 64}>/U<{'0' * 64}>/P -4>>"
                     f"/ID[<{'0' * 32}><{'0' * 32}>]")  # fmt: skip


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def image_and_text(record: Found | Skipped) -> tuple[bytes, str]:
    assert isinstance(record, Found)
    assert isinstance(record.record, Interleaved)
    image, text = record.record.parts
    assert isinstance(image, bytes)
    assert isinstance(text, str)
    return image, text


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A document of three pages, one without text; a broken, an encrypted, a mismatched one, two without a member."""
    pages = [pdfa_page("Title", " first  line "), pdfa_page(), pdfa_page("third page")]
    good = make_pdf((0, 0, 72, 72), (0, 0, 1, 1), (72, 36, 72, 36))
    one = to_json({"pages": [pdfa_page("x")]})
    return write_tar(
        tmp_path / "pdfa-eng-train-0000.tar",
        [
            ("6368667.json", to_json({"pages": pages})), ("6368667.pdf", good),
            ("0000002.json", one), ("0000002.pdf", b"%PDF-1.7 not really"),
            ("0000003.json", one), ("0000003.pdf", ENCRYPTED),
            ("0000004.json", one), ("0000004.pdf", good),
            ("0000005.json", one),
            ("0000006.pdf", good),
            ("0000007.json", to_json({"pages": []})), ("0000007.pdf", good[:300]),
        ],
    )  # fmt: skip


def test_a_record_a_page(archive: Path) -> None:
    records = read_all(Pdfa((archive,), dpi=144))
    name = archive.name
    assert [outcome(record) for record in records] == [
        (f"{name}:6368667#0", "found"),
        (f"{name}:6368667#1", "empty text"),
        (f"{name}:6368667#2", "found"),
        (f"{name}:0000002", "broken pdf"),
        (f"{name}:0000003", "encrypted pdf"),
        (f"{name}:0000004", "page counts of pdf and json differ"),
        (f"{name}:0000005", "no pdf"),
        (f"{name}:0000006", "no json"),
        (f"{name}:0000007", "broken pdf"),
    ]
    first, text = image_and_text(records[0])
    assert text == "Title\nfirst  line"
    assert first.startswith(b"\x89PNG")
    red, white = [255, 0, 0], [255, 255, 255]
    expected = np.full((144, 288, 3), white, np.uint8)
    expected[:, :144] = red
    np.testing.assert_array_equal(pixels(first), expected)
    third, text = image_and_text(records[2])
    expected[:] = white
    expected[:72, 144:] = red  # y of a PDF points up
    assert text == "third page"
    np.testing.assert_array_equal(pixels(third), expected)


def test_a_record_a_document(archive: Path) -> None:
    (record, *_) = read_all(Pdfa((archive,), paging=Paging(per="document"), dpi=72))
    assert isinstance(record, Found)
    assert (record.where, record.repaired) == (f"{archive.name}:6368667", ("empty text",))
    assert isinstance(record.record, Interleaved)
    assert [part if isinstance(part, str) else pixels(part).shape for part in record.record.parts] == [
        (72, 144, 3), "Title\nfirst  line", (72, 144, 3), "third page",
    ]  # fmt: skip


def test_pages_beyond_the_limit_are_counted_and_not_rendered(tmp_path: Path) -> None:
    pages = 1000
    path = write_tar(
        tmp_path / "long.tar",
        [
            ("a.json", to_json({"pages": [pdfa_page(f"page {n}") for n in range(pages)]})),
            ("a.pdf", make_pdf(*[(0, 0, 1, 1)] * pages, size=(4, 4))),
        ],
    )
    records = read_all(Pdfa((path,), paging=Paging(max_pages=3), dpi=72))
    assert [reason for _, reason in map(outcome, records)] == ["found"] * 3 + ["page beyond max_pages"] * (pages - 3)
    (record,) = read_all(Pdfa((path,), paging=Paging(per="document", max_pages=2), dpi=72))
    assert isinstance(record, Found)
    assert len(record.repaired) == pages - 2
    assert isinstance(record.record, Interleaved)
    assert record.record.parts[1::2] == ("page 0", "page 1")


def test_a_document_without_a_usable_page_is_left_out(tmp_path: Path) -> None:
    pages = to_json({"pages": [pdfa_page(), pdfa_page("\ud800")]})
    path = write_tar(tmp_path / "a.tar", [("a.json", pages), ("a.pdf", make_pdf((0, 0, 1, 1), (0, 0, 1, 1)))])
    assert read_all(Pdfa((path,), paging=Paging(per="document"))) == [Skipped("empty text", "a.tar:a")]
    assert [outcome(r)[1] for r in read_all(Pdfa((path,)))] == ["empty text", "text is not Unicode"]


def test_large_pages_are_rendered_smaller(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [("a.json", to_json({"pages": [pdfa_page("x")]})), ("a.pdf", make_pdf((0, 0, 1, 1), size=(14400, 7200)))],
    )
    (record,) = read_all(Pdfa((path,), max_page_pixels=20_000))
    height, width, _ = pixels(image_and_text(record)[0]).shape
    assert height * width <= 20_000
    assert (height, width) == (100, 200)


@pytest.mark.parametrize(
    ("size", "scale"),
    [((612, 792), 150 / 72), ((0, 10), None), ((-1, 10), None), ((float("nan"), 1), None), ((float("inf"), 1), None)],
)
def test_scale(size: tuple[float, float], scale: float | None) -> None:
    assert render_scale(*size, dpi=150, max_pixels=16_000_000) == scale


def test_scale_of_a_strip_keeps_the_limit() -> None:
    scale = render_scale(1e-3, 14400, dpi=2400, max_pixels=1000)
    assert scale is not None
    assert scale * 14400 <= 1000


def test_words_stand_in_for_missing_lines_and_jpeg_is_an_option(tmp_path: Path) -> None:
    page = {"words": {"text": ["a", "b "], "bbox": [[0, 0, 1, 1]] * 2}}
    path = write_tar(
        tmp_path / "a.tar", [("d/a.json", to_json({"pages": [page]})), ("d/a.pdf", make_pdf((0, 0, 9, 9)))]
    )
    (record,) = read_all(Pdfa((path,), encoding=ImageEncoding("jpeg", jpeg_quality=80)))
    image, text = image_and_text(record)
    assert (record.where, text) == ("a.tar:d/a#0", "a b")
    assert image.startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (b"{", "a.tar:a.json"),
        (b"[" * 100_000, "a.tar:a.json"),
        (b"[]", "holds a list, expected an object"),
        (to_json({"pages": {}}), "'pages' is a dict"),
        (to_json({}), "'pages' is a NoneType"),
        (to_json({"pages": [[]]}), "page 0: a page is a list"),
        (to_json({"pages": [{"lines": [{"text": "x"}]}]}), "page 0: 'lines' holds no list of texts"),
        (to_json({"pages": [{"lines": {"text": [1]}}]}), "page 0: 'lines' holds no list of texts"),
        (to_json({"pages": [{"bbox": []}]}), r"page 0: a page has the fields \['bbox'\]"),
    ],
)
def test_another_structure_is_an_error(tmp_path: Path, annotation: bytes, message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.json", annotation), ("a.pdf", make_pdf((0, 0, 1, 1)))])
    with pytest.raises(DataError, match=message):
        read_all(Pdfa((path,)))


def test_documents_are_named_before_they_are_opened(archive: Path) -> None:
    reader = Pdfa((archive,))
    items = list(reader.read(reader.units()[0]))
    assert any(isinstance(item, Pending) for item in items)
    assert not any(isinstance(item, Found) for item in items)


def test_a_file_over_the_limit_is_left_out(tmp_path: Path) -> None:
    small, large = make_pdf((0, 0, 5, 5)), make_pdf((0, 0, 5, 5)) + b" " * 3000
    annotation = to_json({"pages": [pdfa_page("z")]})
    members = [("a.json", annotation), ("a.pdf", large), ("b.json", annotation), ("b.pdf", small)]
    reader = Pdfa((write_tar(tmp_path / "0.tar", members),), max_member_bytes=3000)
    outcomes = [outcome(record) for record in read_all(reader)]
    assert outcomes == [("0.tar:a", "larger than max_member_bytes"), ("0.tar:b#0", "found")]


def test_a_cut_archive_is_an_error_behind_its_good_documents(archive: Path) -> None:
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])
    reader = Pdfa((archive,))
    found = []
    with pytest.raises(DataError, match="ends (inside|without end marker)"):
        found += opened_items(reader.read(reader.units()[0]))
    archive.write_bytes(b"x" * 2048)
    with pytest.raises(DataError, match="not an uncompressed tar"):
        read_all(reader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dpi": 0}, "dpi is 0"),
        ({"max_page_pixels": 0}, "max_page_pixels is 0"),
        ({"max_member_bytes": 0}, "max_member_bytes is 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Pdfa((Path("."),), **options)


def test_impossible_paging_and_encoding_are_refused() -> None:
    for make, message in (
        (lambda: Paging(per="word"), "per is 'word'"),
        (lambda: Paging(max_pages=0), "max_pages is 0"),
        (lambda: ImageEncoding("gif"), "form is 'gif'"),
        (lambda: ImageEncoding("jpeg", jpeg_quality=0), "jpeg_quality is 0"),
    ):
        with pytest.raises(DataError, match=message):
            make()


def test_units_are_independent_and_the_reader_travels(archive: Path, tmp_path: Path) -> None:
    write_tar(
        tmp_path / "pdfa-eng-train-0001.tar",
        [("1.json", to_json({"pages": [pdfa_page("z")]})), ("1.pdf", make_pdf((0, 0, 5, 5)))],
    )
    reader = Pdfa((tmp_path,))
    assert reader.kind == "interleaved"
    assert [unit.path.name for unit in reader.units()] == ["pdfa-eng-train-0000.tar", "pdfa-eng-train-0001.tar"]
    records = read_all(reader)
    assert records == read_all(pickle.loads(pickle.dumps(reader)), backwards=True)
    assert records[-1].where == "pdfa-eng-train-0001.tar:1#0"
