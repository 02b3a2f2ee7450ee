"""Boxes and points: where they go when pixels are turned, cropped, padded or resized, and the text they become.

Coordinates are those of the edges of pixels: x from 0 (left edge of the image) to its width, y from 0 (top edge) to its
height, so the pixel in column 3 reaches from x = 3 to x = 4, and a box around columns 3 to 5 is [3, 6].

MM1.5 writes a box as ``<x1,y1,x2,y2>`` and a point as ``<x,y>``. The scale of the numbers is unpublished; its figures
fit pixels of the overview, whose longer side has 672 of them, so :class:`Scale` does that unless told otherwise::

    image of height 1080, width 1920: 672 / 1920 = 0.35; box (100, 200, 960, 1000) -> <35,70,336,350>
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from mm15_megatron.errors import DataError

ORIENTATIONS: Final = range(1, 9)
"""The values of the EXIF orientation tag."""

_WRITTEN: Final = re.compile(r"<(\d{1,6}),(\d{1,6})(?:,(\d{1,6}),(\d{1,6}))?>")


@dataclass(frozen=True)
class Point:
    """A place in an image, in pixels.

    Raises:
        DataError: a coordinate is not finite.
    """

    x: float
    y: float

    def __post_init__(self) -> None:
        """Check the coordinates."""
        if not (math.isfinite(self.x) and math.isfinite(self.y)):
            raise DataError(f"the point ({self.x}, {self.y}) is not finite", fix="correct the annotation")


@dataclass(frozen=True)
class Box:
    """A rectangle in an image, in pixels; it may reach beyond the image.

    Raises:
        DataError: a coordinate is not finite, or the box has no area.
    """

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        """Check the coordinates."""
        sides = (self.left, self.top, self.right, self.bottom)
        if not all(map(math.isfinite, sides)):
            raise DataError(f"the box {sides} is not finite", fix="correct the annotation")
        if self.left >= self.right or self.top >= self.bottom:
            raise DataError(
                f"the box {sides} has no area", fix="write left, top, right, bottom with left < right and top < bottom"
            )

    @property
    def center(self) -> Point:
        """The middle."""
        return Point((self.left + self.right) / 2, (self.top + self.bottom) / 2)

    def clipped(self, *, width: float, height: float) -> Box:
        """Return the part inside an image.

        Raises:
            DataError: nothing of it is inside.
        """
        sides = (max(self.left, 0), max(self.top, 0), min(self.right, width), min(self.bottom, height))
        if sides[0] >= sides[2] or sides[1] >= sides[3]:
            raise DataError(
                f"the box ({self.left}, {self.top}, {self.right}, {self.bottom}) lies outside an image of"
                f" {width}x{height} (width x height)",
                fix="correct the annotation",
            )
        return Box(*sides)


@dataclass(frozen=True)
class Motion:
    """Where the pixels of an image go: x' = xx x + xy y + x0, y' = yx x + yy y + y0; sides stay parallel to axes."""

    xx: float = 1.0
    xy: float = 0.0
    x0: float = 0.0
    yx: float = 0.0
    yy: float = 1.0
    y0: float = 0.0

    def point(self, point: Point) -> Point:
        """Return where a point goes."""
        return Point(
            self.xx * point.x + self.xy * point.y + self.x0,
            self.yx * point.x + self.yy * point.y + self.y0,
        )

    def box(self, box: Box) -> Box:
        """Return where a box goes."""
        one, other = self.point(Point(box.left, box.top)), self.point(Point(box.right, box.bottom))
        return Box(min(one.x, other.x), min(one.y, other.y), max(one.x, other.x), max(one.y, other.y))

    def then(self, after: Motion) -> Motion:
        """Return this motion followed by another one."""
        return Motion(
            after.xx * self.xx + after.xy * self.yx,
            after.xx * self.xy + after.xy * self.yy,
            after.xx * self.x0 + after.xy * self.y0 + after.x0,
            after.yx * self.xx + after.yy * self.yx,
            after.yx * self.xy + after.yy * self.yy,
            after.yx * self.x0 + after.yy * self.y0 + after.y0,
        )


def upright(orientation: int, *, width: float, height: float) -> Motion:
    """Return the motion from stored pixels to the image as it is shown.

    Args:
        orientation: EXIF tag 0x0112, 1 to 8; any other number is treated as 1, as image libraries do.
        width: stored pixels from left to right.
        height: stored pixels from top to bottom.
    """
    return {
        2: Motion(xx=-1, x0=width),
        3: Motion(xx=-1, x0=width, yy=-1, y0=height),
        4: Motion(yy=-1, y0=height),
        5: Motion(xx=0, xy=1, yx=1, yy=0),
        6: Motion(xx=0, xy=-1, x0=height, yx=1, yy=0),
        7: Motion(xx=0, xy=-1, x0=height, yx=-1, yy=0, y0=width),
        8: Motion(xx=0, xy=1, yx=-1, yy=0, y0=width),
    }.get(orientation, Motion())


def turned(orientation: int) -> bool:
    """Tell whether an orientation exchanges width and height."""
    return orientation in (5, 6, 7, 8)


def cropped(*, left: float, top: float) -> Motion:
    """Return the motion of a crop whose top left corner is (left, top); clip the boxes to its size afterwards."""
    return Motion(x0=-left, y0=-top)


def padded(*, left: float, top: float) -> Motion:
    """Return the motion of padding by ``left`` columns before and ``top`` rows above the image."""
    return Motion(x0=left, y0=top)


def resized(*, width: float, height: float, to_width: float, to_height: float) -> Motion:
    """Return the motion of a resize from (width, height) to (to_width, to_height).

    Raises:
        DataError: a size is not positive.
    """
    if min(width, height, to_width, to_height) <= 0:
        raise DataError(
            f"a resize from {width}x{height} to {to_width}x{to_height} (width x height)", fix="use sizes above zero"
        )
    return Motion(xx=to_width / width, yy=to_height / height)


@dataclass(frozen=True)
class Scale:
    """How pixels become the whole numbers of the text.

    Attributes:
        size: the numbers go from 0 to ``size`` - 1.
        each_side: False = the longer side of the image is ``size`` long and the aspect ratio is kept (MM1.5's figures);
            True = both sides are ``size`` long (Ferret's 1000).

    Raises:
        DataError: ``size`` is below 2.
    """

    size: int = 672
    each_side: bool = False

    def __post_init__(self) -> None:
        """Check the size."""
        if self.size < 2:
            raise DataError(f"coordinates of {self.size} numbers", fix="use a scale of 2 or more, 672 for MM1.5")

    def point(self, point: Point, *, width: float, height: float) -> tuple[int, int]:
        """Return the numbers of a point of an image of ``width`` x ``height`` pixels."""
        across, down = self._factors(width=width, height=height)
        return self._number(point.x * across), self._number(point.y * down)

    def box(self, box: Box, *, width: float, height: float) -> tuple[int, int, int, int]:
        """Return the numbers of a box."""
        return (
            *self.point(Point(box.left, box.top), width=width, height=height),
            *self.point(Point(box.right, box.bottom), width=width, height=height),
        )

    def pixels(self, numbers: tuple[int, int], *, width: float, height: float) -> Point:
        """Return the point that a pair of numbers stands for: the inverse, to within half a number."""
        across, down = self._factors(width=width, height=height)
        return Point(numbers[0] / across, numbers[1] / down)

    def _factors(self, *, width: float, height: float) -> tuple[float, float]:
        if min(width, height) <= 0:
            raise DataError(f"an image of {width}x{height} (width x height)", fix="use sizes above zero")
        longer = max(width, height)
        return (self.size / width, self.size / height) if self.each_side else (self.size / longer, self.size / longer)

    def _number(self, value: float) -> int:
        return max(0, min(math.floor(value + 0.5), self.size - 1))


def written(numbers: tuple[int, ...]) -> str:
    """Return the text of a point (two numbers) or a box (four)."""
    return f"<{','.join(map(str, numbers))}>"


@dataclass(frozen=True)
class Written:
    """A point (two numbers) or a box (four) of a text, which stands at ``text[start:stop]``."""

    start: int
    stop: int
    numbers: tuple[int, ...]


def find_written(text: str) -> tuple[Written, ...]:
    """Return every point and box of a text, in order."""
    return tuple(
        Written(*found.span(), tuple(int(n) for n in found.groups() if n is not None))
        for found in _WRITTEN.finditer(text)
    )


def read_written(text: str) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of every point and box of a text, in order."""
    return tuple(found.numbers for found in find_written(text))
