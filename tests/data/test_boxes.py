"""Boxes follow their pixels, and become the text of MM1.5."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mm15_megatron.data.boxes import (
    ORIENTATIONS,
    Box,
    Motion,
    Point,
    Scale,
    cropped,
    padded,
    read_written,
    resized,
    turned,
    upright,
    written,
)
from mm15_megatron.errors import DataError


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[int, int, Box]:
    """Width and height of an image, and a box of whole pixels inside."""
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return width, height, Box(left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


def picture(width: int, height: int, box: Box) -> Image.Image:
    pixels = np.zeros((height, width), np.uint8)
    pixels[int(box.top) : int(box.bottom), int(box.left) : int(box.right)] = 255
    return Image.fromarray(pixels)


def drawn(image: Image.Image) -> Box:
    found = image.getbbox()
    assert found is not None
    return Box(*found)


@given(rectangles(), st.sampled_from(ORIENTATIONS))
def test_a_box_still_surrounds_its_rectangle_after_exif_transposition(
    case: tuple[int, int, Box], orientation: int
) -> None:
    width, height, box = case
    image = picture(width, height, box)
    image.getexif()[0x0112] = orientation
    shown = ImageOps.exif_transpose(image)
    assert shown.size == ((height, width) if turned(orientation) else (width, height))
    assert upright(orientation, width=width, height=height).box(box) == drawn(shown)


@given(rectangles(), st.integers(-5, 30), st.integers(-5, 30), st.integers(1, 40), st.integers(1, 40))
def test_a_box_follows_a_crop(case: tuple[int, int, Box], left: int, top: int, across: int, down: int) -> None:
    width, height, box = case
    image = picture(width, height, box).crop((left, top, left + across, top + down))
    moved = cropped(left=left, top=top).box(box)
    if image.getbbox() is None:
        with pytest.raises(DataError, match="lies outside"):
            moved.clipped(width=across, height=down)
    else:
        assert moved.clipped(width=across, height=down) == drawn(image)


@given(rectangles(), st.integers(0, 9), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4))
def test_a_box_follows_padding_and_resizing(
    case: tuple[int, int, Box], left: int, top: int, wider: int, higher: int
) -> None:
    width, height, box = case
    image = ImageOps.expand(picture(width, height, box), (left, top, 0, 0))
    size = (image.width * wider, image.height * higher)
    shown = image.resize(size, Image.Resampling.NEAREST)
    motion = padded(left=left, top=top).then(
        resized(width=image.width, height=image.height, to_width=size[0], to_height=size[1])
    )
    assert motion.box(box) == drawn(shown)


@given(rectangles(), st.lists(st.sampled_from(ORIENTATIONS), max_size=4))
def test_motions_follow_each_other(case: tuple[int, int, Box], turns: list[int]) -> None:
    width, height, box = case
    whole, step_by_step = Motion(), box
    for orientation in turns:
        motion = upright(orientation, width=width, height=height)
        whole, step_by_step = whole.then(motion), motion.box(step_by_step)
        width, height = (height, width) if turned(orientation) else (width, height)
    assert whole.box(box) == step_by_step
    assert step_by_step.clipped(width=width, height=height) == step_by_step


def test_the_scale_of_the_paper() -> None:
    box = Scale().box(Box(100, 200, 960, 1000), width=1920, height=1080)
    assert written(box) == "<35,70,336,350>"
    assert Scale().box(Box(0, 0, 1920, 1080), width=1920, height=1080) == (0, 0, 671, 378)
    assert Scale(1000, each_side=True).box(Box(0, 0, 1920, 1080), width=1920, height=1080) == (0, 0, 999, 999)
    assert written(Scale().point(Point(960, 540), width=1920, height=1080)) == "<336,189>"
    assert Scale().point(Point(-3, 5000), width=10, height=20) == (0, 671)


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([Scale(), Scale(1000, each_side=True), Scale(1000)]),
)
def test_numbers_and_back_is_within_one_of_them(width: int, height: int, x: float, y: float, scale: Scale) -> None:
    point = Point(x * width, y * height)
    numbers = scale.point(point, width=width, height=height)
    assert all(0 <= n < scale.size for n in numbers)
    back = scale.pixels(numbers, width=width, height=height)
    assert scale.point(back, width=width, height=height) == numbers
    wide, high = (width, height) if scale.each_side else (max(width, height),) * 2
    assert abs(back.x - point.x) * scale.size / wide <= 1 + 1e-6
    assert abs(back.y - point.y) * scale.size / high <= 1 + 1e-6


def test_the_text_is_read_back() -> None:
    assert read_written("a <1,2,3,4> <5,6>, <b> <7> <image> <1,2,3>") == ((1, 2, 3, 4), (5, 6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(3, 1, 3, 5), "no area"),
        (lambda: Box(1, 5, 3, 4), "no area"),
        (lambda: Box(0, 0, math.nan, 4), "not finite"),
        (lambda: Point(math.inf, 0), "not finite"),
        (lambda: Box(11, 0, 12, 4).clipped(width=10, height=10), r"lies outside an image of 10x10"),
        (lambda: Scale(1), "1 numbers"),
        (lambda: Scale().point(Point(0, 0), width=0, height=3), "0x3"),
        (lambda: resized(width=3, height=0, to_width=1, to_height=1), "3x0"),
    ],
)
def test_impossible_boxes_are_refused(make: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()  # type: ignore[operator]
