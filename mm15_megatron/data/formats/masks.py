"""COCO's run-length masks, in both spellings: a list of counts, or those counts packed into a text.

A mask of ``size`` [height, width] is read down its columns, left to right; the counts are the lengths of the runs,
background first. In a text every number is written in groups of five bits, lowest first, as characters from ``0`` on;
bit 5 of a character says that another one follows, bit 4 of the last one is the sign; from the fourth number on it is
the difference from the number two places before. Source read: ``common/maskApi.c`` of github.com/cocodataset/cocoapi.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.boxes import Point
from mm15_megatron.errors import DataError

_FIX: Final = "give a mask as COCO's run-length code: 'size' [height, width] and 'counts'"
_FIRST, _LAST, _MORE, _SIGN, _BITS = 48, 111, 0x20, 0x10, 5
_LONGEST: Final = 12


@dataclass(frozen=True)
class Mask:
    """A region of an image.

    Attributes:
        height: pixels.
        width: pixels.
        starts_R: int64 [R], the first pixel of every run inside the region, counted down the columns.
        ends_R: int64 [R], pixels of the region up to the end of every run.
    """

    height: int
    width: int
    starts_R: npt.NDArray[np.int64]
    ends_R: npt.NDArray[np.int64]

    @property
    def area(self) -> int:
        """Pixels of the region."""
        return int(self.ends_R[-1]) if len(self.ends_R) else 0

    def pixels(self, indices_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return (column, row) [N, 2] of the pixels of the region with these numbers, 0 to ``area`` - 1."""
        run_N = np.searchsorted(self.ends_R, indices_N, side="right")
        before_R = np.concatenate(([0], self.ends_R[:-1]))
        flat_N = self.starts_R[run_N] + indices_N - before_R[run_N]
        return np.stack((flat_N // self.height, flat_N % self.height), axis=1)

    def nearest(self, indices_N: npt.NDArray[np.int64], *, to: Point) -> Point:
        """Return the middle of the one of these pixels that is nearest to a point (the first of equals)."""
        middles_N2 = self.pixels(indices_N) + 0.5
        best = int(np.argmin(((middles_N2 - np.array([to.x, to.y])) ** 2).sum(axis=1)))
        return Point(float(middles_N2[best, 0]), float(middles_N2[best, 1]))


def parse_mask(code: Mapping[str, Any]) -> Mask:
    """Read ``{"size": [height, width], "counts": ...}``.

    Raises:
        DataError: it is malformed, or the counts do not fill the size.
    """
    size, counts = code.get("size"), code.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise DataError(f"a mask has the size {size!r}", fix=_FIX)
    if isinstance(counts, str):
        counts = _unpacked(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise DataError(f"a mask has the counts {str(counts)[:60]}", fix=_FIX)
    if sum(counts) != size[0] * size[1]:
        raise DataError(f"the counts of a mask make {sum(counts)} pixels, its size {size[0]}x{size[1]}", fix=_FIX)
    edges = np.cumsum(np.array([0, *counts, *([0] * (len(counts) % 2))], dtype=np.int64))
    return Mask(size[0], size[1], edges[1:-1:2], np.cumsum(edges[2::2] - edges[1:-1:2]))


def _unpacked(text: str) -> list[int]:
    """Return the counts that a text holds."""
    counts: list[int] = []
    value, shift = 0, 0
    for char in text:
        if not _FIRST <= ord(char) <= _LAST or shift >= _LONGEST * _BITS:
            raise DataError(f"the counts {text[:40]!r} of a mask hold {char!r}", fix=_FIX)
        group = ord(char) - _FIRST
        value |= (group & 0x1F) << shift
        shift += _BITS
        if not group & _MORE:
            if group & _SIGN:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise DataError(f"the counts {text[:40]!r} of a mask break off", fix=_FIX)
    return counts
