"""Ferret's referring and grounding data (GRIT): conversations with boxes, in MM1.5's coordinate text.

A record, in one of Ferret's files::

    {"id": 0, "image": "appstore_reminders.png", "image_h": 2532, "image_w": 1170, "conversations": [
        {"from": "human", "value": "<image>\\nWhat's the UI type of the widget <bbox_location0>?"},
        {"from": "gpt", "value": "Button"}],
     "box_x1y1x2y2": [[[445, 524, 692, 632]], []]}

``box_x1y1x2y2`` holds a list of boxes for each turn, in pixels of an image of ``image_w`` x ``image_h``;
``<bbox_location0>``, ``<bbox_location1>``... count the boxes of their own turn. ``masks``, where present, has a COCO
run-length code for each box. A user turn refers by boxes or by points, drawn for each turn; answers have boxes.

Sources read: ``ferret/train/train.py`` (the loaders of ``LazySupervisedDataset``, ``__getitem__``, ``regulate_box``,
``get_obj_center``, ``sample_point_in_segment``), ``experiments/ferret_7b_train.sh`` (``segment_mask|center``, one
``image_folder`` a file) and ``ferretui/playground/sample_data`` of github.com/apple/ml-ferret. There boxes are clipped
to the image and written ``[x1, y1, x2, y2]`` on a scale of 0 to 1000 a side; here as MM1.5 writes them, see
:mod:`mm15_megatron.data.boxes`. Points are those of that code: the pixel of the mask nearest to the middle of the box
among 1,000 drawn from it, or without a mask a Gaussian around the middle with a deviation of 0.15 of the box.

The data set itself was not public when this was written: fields are those that the code reads. Not confirmed: that
every turn has a list (a missing one is taken as empty), where placeholders of several boxes of one phrase stand (those
that touch are parted by a space, as in MM1.5's figures), and in which frame boxes of images with an EXIF orientation
were drawn (``frame``; that code ignores the orientation). Several images are our extension: ``image``, ``image_w`` and
``image_h`` are lists then, and ``box_image`` has the number of the image for each box, in lists like those of the
boxes.

The GRIT of Kosmos-2 (captions with ``noun_chunks`` and ``ref_exps``) is another data set, and refused.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from mm15_megatron.data.boxes import Box, Motion, Point, Scale, resized, turned, upright, written
from mm15_megatron.data.formats.base import Found
from mm15_megatron.data.formats.fields import check_choice
from mm15_megatron.data.formats.llava import llava_turns
from mm15_megatron.data.formats.masks import parse_mask
from mm15_megatron.data.formats.turns import ConversationReader, Draft, LeftOut, Wrong, image_list
from mm15_megatron.data.sft import Conversation, Turn
from mm15_megatron.errors import DataError

BOXES: Final = "box_x1y1x2y2"
FRAMES: Final = ("auto", "stored", "shown")
POINTS: Final = ("mask-center", "mask-uniform", "gaussian", "center")

_KOSMOS: Final = ("noun_chunks", "ref_exps")
_LOCATION: Final = re.compile(r"<bbox_location(\d{1,6})>")
_TOUCHING: Final = re.compile(r"(<bbox_location\d{1,6}>)(?=<bbox_location\d{1,6}>)")
_DRAWN: Final = 1000
_DEVIATION: Final = 0.15
_ORIENTATION_TAG: Final = 0x0112
_UNREADABLE: Final = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, MemoryError, ArithmeticError, LookupError, TypeError,
    AttributeError, RuntimeError, AssertionError, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class Region:
    """A box of a turn: pixels as annotated, its mask (a code), and the number of its image."""

    sides: tuple[float, float, float, float]
    mask: Mapping[str, Any] | None
    image: int


@dataclass(frozen=True)
class Frame:
    """An image: the size that its boxes are annotated in, the motion to the image as shown, and the size of that."""

    width: float
    height: float
    motion: Motion
    shown_width: int
    shown_height: int


@dataclass(frozen=True)
class Grit(ConversationReader):
    """Files of Ferret's GRIT.

    Attributes:
        seed: the draws of points and boxes depend on it and on the place of the record in its file.
        point_share: probability that a user turn refers by points instead of boxes.
        points: how a point is drawn: the pixel nearest to the middle of the box among 1,000 of the mask
            (``mask-center``), any pixel of the mask (``mask-uniform``), both ``gaussian`` where there is no mask; a
            Gaussian around the middle of the box (``gaussian``); the middle (``center``).
        answer_points: an answer repeats the point by which the question before referred to the same box.
        scale: numbers of the coordinate text, 672 for MM1.5, 1000 for Ferret.
        scale_each_side: both sides have ``scale`` numbers (Ferret), not the longer one alone (MM1.5).
        frame: the pixels that boxes were drawn on if the image has an EXIF orientation: as ``stored``, as ``shown``,
            or (``auto``) those whose size is that of the annotation, stored ones if both are.
    """

    seed: int = field(default=0, kw_only=True)
    point_share: float = field(default=0.5, kw_only=True)
    points: str = field(default="mask-center", kw_only=True)
    answer_points: bool = field(default=False, kw_only=True)
    scale: int = field(default=672, kw_only=True)
    scale_each_side: bool = field(default=False, kw_only=True)
    frame: str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is not a choice.
        """
        super().__post_init__()
        check_choice("points", self.points, POINTS)
        check_choice("frame", self.frame, FRAMES)
        if not 0 <= self.point_share <= 1:
            raise DataError(f"point_share is {self.point_share}", fix="use a probability, 0 to 1")
        Scale(self.scale, each_side=self.scale_each_side)

    def parse(self, record: Mapping[str, Any], *, place: str) -> Draft:
        """Take the turns, with their placeholders of boxes, and the images out of a record."""
        if found := [name for name in _KOSMOS if name in record]:
            raise DataError(
                f"{place} has the fields {', '.join(found)}: this is the GRIT of Kosmos-2, captions with grounded"
                " phrases, not the GRIT of Ferret, conversations with boxes",
                fix="give files with 'conversations' and 'box_x1y1x2y2'",
            )
        return Draft(llava_turns(record, place=place), image_list(record.get("image"), name="image", place=place))

    def conversation(self, record: Mapping[str, Any], *, where: str, place: str, folder: Path) -> Found:
        """Make the conversation of one record; raises what :meth:`parse` does."""
        draft = self.parse(record, place=place)
        regions = _regions(record, turns=len(draft.turns), images=len(draft.images), place=place)
        images = tuple(self.load(image, place=place, folder=folder) for image in draft.images)
        frames: list[Frame] = []
        if any(regions):
            sizes = _sizes(record, images=len(images), place=place)
            frames = [
                self._frame(data, width=width, height=height)
                for data, (width, height) in zip(images, sizes, strict=True)
            ]
        arranged = self.arrange(self._written(draft.turns, regions, frames, where=where), images=len(images))
        return Found(Conversation(arranged.turns, images[: arranged.images]), where, arranged.repaired)

    def _frame(self, data: bytes, *, width: float, height: float) -> Frame:
        """Find the pixels that an annotation of this size was drawn on."""
        stored_width, stored_height, orientation = _header(data)
        shown = (stored_height, stored_width) if turned(orientation) else (stored_width, stored_height)
        onward = upright(orientation, width=stored_width, height=stored_height)
        for name, (across, down), motion in (
            ("stored", (stored_width, stored_height), onward),
            ("shown", shown, Motion()),
        ):
            # one pixel of rounding is allowed for, in images that were made smaller after they were annotated
            if self.frame in ("auto", name) and abs(across * height - down * width) <= max(across, down, width, height):
                fit = resized(width=width, height=height, to_width=across, to_height=down)
                return Frame(width, height, fit.then(motion), *shown)
        raise Wrong(
            "image of another shape than annotated",
            f"the boxes are for {width}x{height} (width x height), the image has {stored_width}x{stored_height} and"
            f" EXIF orientation {orientation}",
            fix="use the images that were annotated",
        )

    def _written(
        self, turns: Sequence[Turn], regions: Sequence[Sequence[Region]], frames: Sequence[Frame], *, where: str
    ) -> tuple[Turn, ...]:
        """Write the boxes and points into the texts."""
        done: list[Turn] = []
        points: dict[Region, Point] = {}
        for number, (turn, found) in enumerate(zip(turns, regions, strict=True)):
            if turn.role == "user":
                points = self._points(found, frames, key=f"{self.seed} {where} {number}")
            use = points if turn.role == "user" or self.answer_points else {}
            texts = [self._text(region, frames[region.image], point=use.get(_plain(region))) for region in found]
            done.append(replace(turn, text=_replaced(turn.text, texts, number=number)))
        return tuple(done)

    def _points(self, regions: Sequence[Region], frames: Sequence[Frame], *, key: str) -> dict[Region, Point]:
        """Draw whether a user turn refers by points, and them, one for every different box; in annotated pixels."""
        draw = random.Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest()))
        drawn: dict[Region, Point] = {}
        if draw.random() < self.point_share:
            for region in regions:
                if _plain(region) not in drawn:
                    drawn[_plain(region)] = self._point(region, frames[region.image], draw=draw)
        return drawn

    def _point(self, region: Region, frame: Frame, *, draw: random.Random) -> Point:
        box = _box(region, frame)
        if self.points == "center":
            return box.center
        if region.mask is not None and self.points.startswith("mask"):
            try:
                mask = parse_mask(region.mask)
            except DataError as error:
                raise Wrong("malformed mask", error.problem, fix=error.fix) from error
            if (mask.width, mask.height) != (frame.width, frame.height):
                raise Wrong(
                    "mask of another size",
                    f"a mask of {mask.width}x{mask.height} for boxes of {frame.width}x{frame.height} (width x height)",
                    fix="use the masks of these images",
                )
            if mask.area:
                count = 1 if self.points == "mask-uniform" else min(_DRAWN, mask.area)
                chosen = np.array(draw.sample(range(mask.area), count), dtype=np.int64)
                return mask.nearest(chosen, to=box.center)
        return _around(box, draw=draw)

    def _text(self, region: Region, frame: Frame, *, point: Point | None) -> str:
        scale = Scale(self.scale, each_side=self.scale_each_side)
        width, height = frame.shown_width, frame.shown_height
        if point is not None:
            return written(scale.point(frame.motion.point(point), width=width, height=height))
        return written(scale.box(frame.motion.box(_box(region, frame)), width=width, height=height))


def _plain(region: Region) -> Region:
    """Return the region without its mask: the same box is the same object."""
    return replace(region, mask=None)


def _box(region: Region, frame: Frame) -> Box:
    """Return the box inside the annotated image."""
    try:
        return Box(*region.sides).clipped(width=frame.width, height=frame.height)
    except DataError as error:
        raise Wrong("impossible box", error.problem, fix=error.fix) from error


def _around(box: Box, *, draw: random.Random) -> Point:
    """Draw a point inside a box by a Gaussian around its middle."""
    middle, across, down = box.center, box.right - box.left, box.bottom - box.top
    while True:  # 99.8 of 100 draws are inside
        x, y = draw.gauss(middle.x, _DEVIATION * across), draw.gauss(middle.y, _DEVIATION * down)
        if box.left <= x <= box.right and box.top <= y <= box.bottom:
            return Point(x, y)


def _replaced(text: str, texts: Sequence[str], *, number: int) -> str:
    """Put the texts of the boxes of a turn where its placeholders stand."""
    named = {int(n) for n in _LOCATION.findall(text)}
    if named != set(range(len(texts))):
        raise Wrong(
            "boxes and placeholders differ",
            f"turn {number} has {len(texts)} boxes and the placeholders {sorted(named)}: {text[:80]!r}",
            fix="write <bbox_location0>, <bbox_location1>... for the boxes of the turn",
        )
    return _LOCATION.sub(lambda found: texts[int(found[1])], _TOUCHING.sub(r"\1 ", text))


def _header(data: bytes) -> tuple[int, int, int]:
    """Return (width, height) as stored, and the EXIF orientation, of an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                # Pillow decodes a whole PNG to look for EXIF behind the pixels: ask only when it stands before them.
                exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
                orientation = exif.get(_ORIENTATION_TAG, 1)
                return *image.size, orientation if isinstance(orientation, int) else 1
    except _UNREADABLE as error:
        raise LeftOut("image cannot be read") from error


def _sizes(record: Mapping[str, Any], *, images: int, place: str) -> list[tuple[float, float]]:
    """Return the annotated (width, height) of every image."""
    sides = []
    for name in ("image_w", "image_h"):
        value = record.get(name)
        values: list[Any] = value if isinstance(value, list) else [value]
        if len(values) != images or not all(type(v) in (int, float) and v > 0 for v in values):
            raise DataError(f"{place} has {name} {value!r} for {images} images", fix="give the size of every image")
        sides.append(values)
    return list(zip(*sides, strict=True))


def _regions(record: Mapping[str, Any], *, turns: int, images: int, place: str) -> list[list[Region]]:
    """Return the boxes of every turn."""
    boxes = _nested(record.get(BOXES), name=BOXES, place=place)
    masks = _nested(record.get("masks"), name="masks", place=place)
    numbers = _nested(record.get("box_image"), name="box_image", place=place)
    if len(boxes) > turns:
        raise DataError(
            f"{place} has {len(boxes)} lists in {BOXES} and {turns} turns", fix="give one list for each turn"
        )
    regions: list[list[Region]] = []
    for turn in range(turns):
        sides = boxes[turn] if turn < len(boxes) else []
        codes = masks[turn] if turn < len(masks) else []
        image: list[Any] = [0] * len(sides) if images <= 1 else []
        if turn < len(numbers):
            image = numbers[turn]
        here = f"{place}: turn {turn}"
        if codes and len(codes) != len(sides):
            raise DataError(f"{here} has {len(sides)} boxes and {len(codes)} masks", fix="give a mask or null a box")
        if len(image) != len(sides) or not all(type(n) is int and 0 <= n < images for n in image):
            raise DataError(
                f"{here} has {len(sides)} boxes on {images} images, box_image is {image}",
                fix="give the number of its image for each box, as box_image",
            )
        codes = codes or [None] * len(sides)
        regions.append([_region(*parts, here=here) for parts in zip(sides, codes, image, strict=True)])
    return regions


def _nested(value: Any, *, name: str, place: str) -> list[list[Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(turn, list) for turn in value):
        raise DataError(f"{place} has {name} {str(value)[:60]}", fix="give a list for each turn")
    return value


def _region(sides: Any, mask: Any, image: int, *, here: str) -> Region:
    if not isinstance(sides, list) or len(sides) != 4 or not all(type(side) in (int, float) for side in sides):
        raise DataError(f"{here} has the box {str(sides)[:60]}", fix="write left, top, right, bottom in pixels")
    if not (mask is None or isinstance(mask, dict)):
        raise DataError(f"{here} has the mask {str(mask)[:60]}", fix="give COCO's run-length code: size and counts")
    return Region((sides[0], sides[1], sides[2], sides[3]), mask, image)
