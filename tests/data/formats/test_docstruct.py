"""The reader of DocStruct4M."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm15_megatron.data.boxes import Scale
from mm15_megatron.data.formats.base import Found, Interleaved, Skipped
from mm15_megatron.data.formats.docstruct import DocStruct
from mm15_megatron.data.sft import Conversation, Turn
from mm15_megatron.errors import DataError
from tests.data.formats.ocr_files import read_all
from tests.data.images import photo

ASK = "<|image|>Identify the text within the bounding box <bbox>0, 333, 999, 999</bbox>"
PICTURE = photo(333, 999)


def line(user: str, answer: str, image: Any = ("./imgs/a.png",), **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    images = list(image) if isinstance(image, tuple) else image
    return {"image": images, "messages": messages, "task_name": "t", "dataset_name": "DocVQA", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs" / "a.png").write_bytes(PICTURE)
    return tmp_path


def write(folder: Path, *records: dict[str, Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def one(folder: Path, record: dict[str, Any], **options: Any) -> Any:
    (found,) = read_all(DocStruct((write(folder, record),), **options))
    assert isinstance(found, Found), found
    return found.record


def test_documents_with_the_loss_on_everything(folder: Path) -> None:
    assert one(folder, line(ASK, "<ocr> 18. Receipt \n 64 </ocr>")) == Interleaved(
        (PICTURE, "Identify the text within the bounding box <0,75,671,224>", "<ocr> 18. Receipt \n 64 </ocr>")
    )


def test_conversations_with_the_loss_on_answers(folder: Path) -> None:
    record = line(
        "<|image|>Predict the bounding box of the text <ocr> 17. Loans </ocr>", "<bbox>120,538,753,584</bbox>"
    )
    expected = Conversation(
        (
            Turn("user", "<image>Predict the bounding box of the text 17. Loans"),
            Turn("assistant", "<120,179,753,195>"),
        ),
        (PICTURE,),
    )
    reader = {"form": "conversations", "markup": "strip", "scale": Scale(999)}
    assert one(folder, record, **reader) == expected


@pytest.mark.parametrize(
    ("numbers", "scale", "text"),
    [
        ("212, 52, 896, 418", Scale(1000, each_side=True), "<212,52,897,418>"),
        ("0,0,999,999", Scale(), "<0,0,671,224>"),
        ("5,7,5,7", Scale(), "<3,2,3,2>"),
        ("0, 0, 2000, 10", Scale(), "<0,0,671,2>"),
    ],
)
def test_scales(folder: Path, numbers: str, scale: Scale, text: str) -> None:
    record = one(folder, line("<|image|>Where?", f"<bbox>{numbers}</bbox>"), scale=scale)
    assert record.parts[-1] == text


def test_boxes_follow_the_orientation(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise: what is on the left is shown above
    (folder / "imgs" / "b.jpg").write_bytes(photo(333, 999, form="JPEG", exif=exif))
    record = line("<|image|>Where?", "<bbox>0, 0, 333, 999</bbox>", ("imgs/b.jpg",))
    assert one(folder, record, scale=Scale(999)).parts[-1] == "<0,0,333,333>"


def test_several_images_and_turns(folder: Path) -> None:
    (folder / "imgs" / "c.png").write_bytes(photo(8, 9))
    record = line("<|image|><|image|> <doc> 1 </doc>", "<md> | a | </md>", ("imgs/a.png", "imgs/c.png"))
    record["messages"] += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    assert one(folder, record, markup="strip") == Interleaved((PICTURE, photo(8, 9), "1", "| a |", "more", "no"))


def test_a_missing_image_leaves_the_document_out(folder: Path) -> None:
    path = write(folder, line("<|image|>x", "y", ("imgs/none.png",)), line("<|image|>x", "y"))
    skipped, found = read_all(DocStruct((path,)))
    assert skipped == Skipped("image file is missing", "data.jsonl:0")
    assert isinstance(found, Found)


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        (line("x", "y"), "placeholders and images differ", "0 <image> placeholders and 1 images"),
        (line("<|image|><|image|>x", "y"), "placeholders and images differ", "2 <image> placeholders and 1 images"),
        (line("<|image|>x <image>", "y"), "<image> in a text", "turn 0 holds <image>"),
        (line("<|image|>x", "<bbox>1,2,3</bbox>"), "malformed box", "'<bbox>1,2,3</bbox>' is no box"),
        (line("<|image|>x", "<bbox>1,2,3,4"), "malformed box", "is no box"),
        (line("<|image|>x", "<bbox>9,2,3,4</bbox>"), "malformed box", "ends before it begins"),
        (line("x", "<bbox>1,2,3,4</bbox>", ()), "box without one image", "a box and 0 images"),
        (line("<|image|>x", 5), "turn without a text", "turn 1 has the content 5"),  # type: ignore[arg-type]
    ],
)
def test_wrong_records_are_errors_or_left_out(folder: Path, record: dict[str, Any], reason: str, message: str) -> None:
    path = write(folder, record)
    with pytest.raises(DataError, match=message):
        read_all(DocStruct((path,)))
    assert read_all(DocStruct((path,), on_bad="skip")) == [Skipped(reason, "data.jsonl:0")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": ["imgs/a.png"]}, "the fields are"),
        (line("<|image|>x", "y") | {"messages": [{"role": "human", "content": "x"}]}, "has the role 'human'"),
        (line("<|image|>x", "y", [3]), "'image' holds '3', a int"),
        (line("<|image|>x", "y", ("../secret",)), "no file below"),
    ],
)
def test_another_structure_is_an_error(folder: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_all(DocStruct((write(folder, record),), on_bad="skip"))


def test_a_box_of_an_unreadable_image_is_left_out(folder: Path) -> None:
    (folder / "imgs" / "a.png").write_bytes(b"no image")
    assert read_all(DocStruct((write(folder, line(ASK, "y")),))) == [Skipped("image cannot be read", "data.jsonl:0")]


@pytest.mark.parametrize("option", [{"form": "captions"}, {"markup": "html"}])
def test_unknown_options_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(DataError, match=next(iter(option))):
        DocStruct((Path("."),), **option)  # type: ignore[arg-type]


def test_units_are_independent_and_the_reader_travels(folder: Path) -> None:
    path = write(folder, *(line(f"<|image|>{'x' * n}", f"{n}") for n in range(40)))
    assert DocStruct((path,)).kind == "interleaved"
    whole = read_all(DocStruct((path,)))
    assert len(whole) == 40
    for size in (1000, 37):
        reader = DocStruct((path,), unit_bytes=size)
        assert len(reader.units()) > 4
        assert read_all(pickle.loads(pickle.dumps(reader)), backwards=True) == whole
