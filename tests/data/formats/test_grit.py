"""Ferret's GRIT: boxes and points become MM1.5's text, and follow the pixels of the image."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mm15_megatron.data.boxes import ORIENTATIONS, Point, read_written
from mm15_megatron.data.formats.base import Found, Skipped, opened_items
from mm15_megatron.data.formats.grit import Grit
from mm15_megatron.data.formats.masks import parse_mask
from mm15_megatron.data.sft import Conversation
from mm15_megatron.errors import DataError
from tests.data.formats.conversation_files import outcomes, read_all, simple, write_array, write_lines, write_parquet
from tests.data.images import encode_image, photo

ASK = "<image>\nWhat's the UI type of the widget <bbox_location0>?"


def talk(*values: str, boxes: Any = None, size: tuple[int, int] = (1920, 1080), **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    record = {"id": 0, "image": "a.png", "image_w": size[0], "image_h": size[1], "conversations": turns} | more
    return record if boxes is None else record | {"box_x1y1x2y2": boxes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(encode_image(np.zeros((1080, 1920), np.uint8)))
    (tmp_path / "b.png").write_bytes(photo(40, 20))
    return tmp_path


def read(folder: Path, *records: Any, **options: Any) -> list[Found | Skipped]:
    return read_all(Grit((write_array(folder / "a.json", list(records)),), **options))


def texts(item: Found | Skipped) -> list[str]:
    return [text for _, text in simple(item)[0]]


def one(folder: Path, *values: str, boxes: Any, **options: Any) -> list[str]:
    (found,) = read(folder, talk(*values, boxes=boxes), **options)
    return texts(found)


def test_boxes_of_users_and_answers(folder: Path) -> None:
    boxes = [[[100, 200, 960, 1000]], [[0, 0, 1920, 1080], [960, 540, 5000, 5000]], [], [[0, 0, 20, 40]]]
    values = (ASK, "A <bbox_location1><bbox_location0> <bbox_location1>.", "More?", "At <bbox_location0>")
    (found,) = read(folder, talk(*values, boxes=boxes), point_share=0)
    turns, images = simple(found)
    assert [text for _, text in turns] == [
        "<image>\nWhat's the UI type of the widget <35,70,336,350>?",
        "A <336,189,671,378> <0,0,671,378> <336,189,671,378>.",
        "More?",
        "At <0,0,7,14>",
    ]
    assert [role for role, _ in turns] == ["user", "assistant"] * 2
    assert images == ((folder / "a.png").read_bytes(),)


def test_other_scales(folder: Path) -> None:
    boxes = [[[192, 108, 960, 1080]]]
    assert one(folder, ASK, "B", boxes=boxes, point_share=0, scale=1000)[0].endswith("<100,56,500,563>?")
    ferret = one(folder, ASK, "B", boxes=boxes, point_share=0, scale=1000, scale_each_side=True)
    assert ferret[0].endswith("<100,100,500,999>?")


def test_records_without_boxes_are_plain_conversations(folder: Path) -> None:
    (found,) = read(folder, {key: talk("<image>Q", "A")[key] for key in ("image", "conversations")})
    assert texts(found) == ["<image>Q", "A"]


def test_users_refer_by_points_or_boxes_and_answers_by_boxes(folder: Path) -> None:
    box = [1000, 500, 1200, 700]
    values = (ASK + " <bbox_location1> <bbox_location2>", "<bbox_location0>")
    records = [talk(*values, boxes=[[box, [0, 0, 100, 100], box], [box]]) for _ in range(60)]
    found = [texts(item) for item in read(folder, *records, points="gaussian")]
    assert all(answer == "<350,175,420,245>" for _, answer in found)
    written = [read_written(question) for question, _ in found]
    points = [numbers for numbers in written if len(numbers[0]) == 2]
    assert 15 < len(points) < 45
    assert all(first == third for first, _, third in written)
    assert all(350 <= x <= 420 and 175 <= y <= 245 for (x, y), _, _ in points)
    assert len({first for first, _, _ in points}) > 10
    assert [texts(item) for item in read(folder, *records, points="gaussian")] == found
    assert [texts(item) for item in read(folder, *records, points="gaussian", seed=1)] != found

    repeated = [texts(item) for item in read(folder, *records, points="gaussian", answer_points=True)]
    assert [question for question, _ in repeated] == [question for question, _ in found]
    assert all(read_written(answer)[0] == read_written(question)[0] for question, answer in repeated)

    (always,) = read(folder, records[0], points="center", point_share=1)
    assert texts(always)[0].endswith("<385,210>? <18,18> <385,210>")


def packed(counts: Sequence[int]) -> str:
    """The counts of a mask as COCO packs them."""
    text = ""
    for n, count in enumerate(counts):
        value = count - counts[n - 2] if n > 2 else count
        while True:
            group, value = value & 0x1F, value >> 5
            last = value == (-1 if group & 0x10 else 0)
            text += chr(48 + (group if last else group | 0x20))
            if last:
                break
    return text


def coded(mask: npt.NDArray[np.bool_], *, as_text: bool = True) -> dict[str, Any]:
    flat = mask.T.ravel()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    counts = ([0] if flat[0] else []) + [int(stop - start) for start, stop in zip(edges, edges[1:], strict=False)]
    return {"size": list(mask.shape), "counts": packed(counts) if as_text else counts}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_masks(height: int, width: int, seed: int, share: float, as_text: bool) -> None:
    shape = np.random.default_rng(seed).random((height, width)) < share
    mask = parse_mask(json.loads(json.dumps(coded(shape, as_text=as_text))))
    assert mask.area == shape.sum()
    found = mask.pixels(np.arange(mask.area))
    assert sorted(map(tuple, found.tolist())) == sorted((x, y) for y, x in np.argwhere(shape).tolist())


def test_a_mask_worked_out_by_hand() -> None:
    # columns of three: . X X | X . . | . . X: runs 1 3 4 1, of which the last is written as 1 - 3 = -2
    mask = parse_mask({"size": [3, 3], "counts": "134N"})
    assert mask.pixels(np.arange(mask.area)).tolist() == [[0, 1], [0, 2], [1, 0], [2, 2]]
    assert mask.nearest(np.arange(4), to=Point(1.6, 0.2)) == Point(1.5, 0.5)


def test_points_are_drawn_from_masks(folder: Path) -> None:
    shape = np.zeros((1080, 1920), bool)
    shape[100:140, 500:540] = shape[900:1000, 1800:1900] = True
    # the box has both parts inside; its middle is in neither, and nearer to the first one
    record = talk(ASK, "B", boxes=[[[400, 60, 1910, 1010]], []], masks=[[coded(shape)], []])
    for points, parts in (("mask-center", 1), ("mask-uniform", 2)):
        found = read(folder, *[record] * 40, point_share=1, points=points)
        places = [read_written(texts(item)[0])[0] for item in found]
        pixels = {(int(x / 0.35), int(y / 0.35)) for x, y in places}
        assert all(shape[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4].any() for x, y in pixels), (
            "a point may be rounded by three pixels"
        )
        assert len({x > 1000 for x, _ in pixels}) == parts
    nothing = talk(ASK, "B", boxes=[[[400, 60, 1910, 1010]], []], masks=[[None], []])
    empty = talk(ASK, "B", boxes=[[[400, 60, 1910, 1010]], []], masks=[[coded(shape & False)], []])
    for record in (nothing, empty):
        assert len(read_written(texts(read(folder, record, point_share=1)[0])[0])[0]) == 2


@given(
    st.sampled_from(ORIENTATIONS), st.sampled_from(["auto", "stored", "shown"]), st.sampled_from([1, 2, 3]), st.data()
)
def test_boxes_surround_what_the_model_sees(
    tmp_path_factory: pytest.TempPathFactory, orientation: int, frame: str, smaller: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("grit")
    width, height = 120, 60
    left, top = data.draw(st.integers(0, 16)) * 6, data.draw(st.integers(0, 6)) * 6
    right, bottom = data.draw(st.integers(left // 6 + 2, 20)) * 6, data.draw(st.integers(top // 6 + 2, 10)) * 6
    pixels = np.zeros((height, width), np.uint8)
    pixels[top:bottom, left:right] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (folder / "a.png").write_bytes(encode_image(pixels, exif=exif))
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO((folder / "a.png").read_bytes())))
    size, box = (width, height), [left, top, right, bottom]
    if frame == "shown":
        size, box = shown.size, list(shown.getbbox() or ())
    size, box = (size[0] // smaller, size[1] // smaller), [side / smaller for side in box]
    path = write_lines(folder / "a.jsonl", [talk(ASK, "B", boxes=[[box]], size=size)])
    reader = Grit((path,), frame=frame, point_share=0, scale=121)
    (found,) = opened_items(reader.read(reader.units()[0]))
    assert isinstance(found, Found)
    assert isinstance(found.record, Conversation)
    (numbers,) = read_written(found.record.turns[0].text)
    expected = shown.getbbox()
    assert expected is not None
    # the longer side of 120 pixels has 121 numbers
    assert all(
        abs(number - side * 121 / 120) <= 0.5 + 1e-9 or number == 120
        for number, side in zip(numbers, expected, strict=True)
    )


def test_auto_knows_the_frame_by_its_size(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((60, 120), np.uint8)
    (folder / "a.png").write_bytes(encode_image(pixels, exif=exif))
    stored = talk(ASK, "B", boxes=[[[0, 0, 30, 15]]], size=(120, 60))
    shown = talk(ASK, "B", boxes=[[[45, 0, 60, 30]]], size=(60, 120))
    found = [texts(item)[0] for item in read(folder, stored, shown, point_share=0)]
    assert found[0] == found[1] == ASK.replace("<bbox_location0>", "<252,0,336,168>")
    assert outcomes(read(folder, stored, shown, frame="shown", on_bad="skip")) == [
        "image of another shape than annotated",
        "",
    ]


def test_several_images(folder: Path) -> None:
    record = talk(
        "<image><image>\nIs <bbox_location0> the same as <bbox_location1>?",
        "Yes, <bbox_location0>",
        boxes=[[[0, 0, 10, 20], [960, 540, 1920, 1080]], [[10, 20, 20, 40]]],
        image=["b.png", "a.png"],
        image_w=[20, 1920],
        image_h=[40, 1080],
        box_image=[[0, 1], [0]],
    )
    (found,) = read(folder, record, point_share=0)
    assert texts(found) == [
        "<image><image>\nIs <0,0,168,336> the same as <336,189,671,378>?",
        "Yes, <168,336,336,671>",
    ]
    assert simple(found)[1] == ((folder / "b.png").read_bytes(), (folder / "a.png").read_bytes())
    del record["box_image"]
    with pytest.raises(DataError, match=r"2 boxes on 2 images, box_image is \[\]"):
        read(folder, record)


def test_turns_without_a_partner_keep_the_boxes_of_the_others(folder: Path) -> None:
    record = talk(ASK, "B <bbox_location0>", boxes=[[], [[0, 0, 20, 40]], [[0, 0, 40, 40]]])
    first = {"from": "gpt", "value": "before"}
    record["conversations"] = [first, {"from": "human", "value": ASK}, {"from": "gpt", "value": "<bbox_location0>"}]
    (found,) = read(folder, record, point_share=0)
    assert texts(found) == [ASK.replace("<bbox_location0>", "<0,0,7,14>"), "<0,0,14,14>"]
    assert outcomes([found]) == ["answer before the first question"]


@pytest.mark.parametrize(
    ("record", "problem", "reason"),
    [
        (talk(ASK, "B", boxes=[[[5, 5, 5, 9]]]), "no area", "impossible box"),
        (talk(ASK, "B", boxes=[[[9, 5, 5, 9]]]), "no area", "impossible box"),
        (talk(ASK, "B", boxes=[[[2000, 5, 2010, 9]]]), "outside an image of 1920x1080", "impossible box"),
        (talk(ASK, "B", boxes=[[]]), r"0 boxes and the placeholders \[0\]", "boxes and placeholders differ"),
        (talk(ASK, "B"), r"0 boxes and the placeholders \[0\]", "boxes and placeholders differ"),
        (
            talk("<image>", "B", boxes=[[[0, 0, 5, 5]]]),
            r"1 boxes and the placeholders \[\]",
            "boxes and placeholders differ",
        ),
        (
            talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], size=(1080, 1920)),
            "the boxes are for 1080x1920 .* the image has 1920x1080",
            "image of another shape than annotated",
        ),
        (
            talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], masks=[[{"size": [2, 2], "counts": [4]}]]),
            "a mask of 2x2 for boxes of 1920x1080",
            "mask of another size",
        ),
        (
            talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], masks=[[{"size": [2, 2], "counts": [5]}]]),
            "5 pixels, its size 2x2",
            "malformed mask",
        ),
        (
            talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], masks=[[{"size": [2, 2], "counts": "~"}]]),
            "counts '~' of a mask hold '~'",
            "malformed mask",
        ),
        (
            talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], masks=[[{"size": [2, 2], "counts": "T"}]]),
            "break off",
            "malformed mask",
        ),
        (
            talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], masks=[[{"size": [2], "counts": "4"}]]),
            r"the size \[2\]",
            "malformed mask",
        ),
    ],
)
def test_bad_conversations_are_errors_or_counted(folder: Path, record: Any, problem: str, reason: str) -> None:
    with pytest.raises(DataError, match=problem) as error:
        read(folder, record, point_share=1)
    assert "a.json at a.json:1" in error.value.problem
    assert outcomes(read(folder, record, point_share=1, on_bad="skip")) == [reason]


def test_images_that_are_missing_or_no_images_are_counted(folder: Path) -> None:
    (folder / "c.png").write_bytes(b"not an image")
    boxes = [[[0, 0, 5, 5]]]
    records = [talk(ASK, "B", boxes=boxes, image=name) for name in ("gone.png", "c.png")]
    assert outcomes(read(folder, *records)) == ["image file is missing", "image cannot be read"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (talk(ASK, "B", boxes=[[[0, 0, 5]]]), r"turn 0 has the box \[0, 0, 5\]"),
        (talk(ASK, "B", boxes=[[[0, 0, 5, "6"]]]), "turn 0 has the box"),
        (talk(ASK, "B", boxes=[[0, 0, 5, 6]]), "turn 0 has the box 0"),
        (talk(ASK, "B", boxes=[0, 0, 5, 6]), "has box_x1y1x2y2"),
        (talk(ASK, "B", boxes=[[], [], []]), "3 lists in box_x1y1x2y2 and 2 turns"),
        (talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], masks=[[{}, {}]]), "1 boxes and 2 masks"),
        (talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], masks=[["x"]]), "turn 0 has the mask x"),
        (talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], image_w=None), "image_w None for 1 images"),
        (talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], image_h=[3, 4]), r"image_h \[3, 4\] for 1 images"),
        (talk(ASK, "B", boxes=[[[0, 0, 5, 5]]], image=None), r"1 boxes on 0 images"),
        ({"image": "a.png", "box_x1y1x2y2": []}, "the fields are"),
    ],
)
def test_what_is_not_grit_is_refused(folder: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(folder, record, on_bad="skip")
    assert error.value.fix


def test_the_grit_of_kosmos_is_refused_by_its_fields(folder: Path) -> None:
    record = {
        "key": "000373938", "clip_similarity_vitb32": 0.35, "clip_similarity_vitl14": 0.29, "id": 1795296605919,
        "url": "https://example.com/a.jpg", "caption": "a wire hanger", "width": 1080, "height": 964,
        "noun_chunks": [[2.0, 13.0, 0.01, 0.15, 0.98, 0.9, 0.81]], "ref_exps": [[2.0, 13.0, 0.0, 0.1, 1.0, 0.9, 0.8]],
    }  # fmt: skip
    for path in (write_array(folder / "k.json", [record]), write_parquet(folder / "k.parquet", [record])):
        with pytest.raises(DataError, match=r"fields noun_chunks, ref_exps: this is the GRIT of Kosmos-2"):
            read_all(Grit((path,), on_bad="skip"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": "mask"}, "points is 'mask'"),
        ({"frame": "exif"}, "frame is 'exif'"),
        ({"point_share": 1.5}, "point_share is 1.5"),
        ({"scale": 0}, "0 numbers"),
        ({"on_bad": "x"}, "on_bad is 'x'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Grit((Path("a.json"),), **options)
