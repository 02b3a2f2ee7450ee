"""Pictures of real scanned digits, and questions about them: a pure function of a seed.

The scans are scikit-learn's ``load_digits``: 1,797 handwritten digits of 8 x 8 pixels. The last 360 are held out before
any picture is composed, so no pixel of a held-out picture was ever seen in training.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

Pixels = npt.NDArray[np.uint8]

HELD_OUT_SCANS = 360
SIDE = 56  # pixels of a picture
JITTER = 2  # pixels a digit may be off the middle of its place, each way
CELLS = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("single", "pair", "three", "four")  # by the number of digits shown


@dataclass(frozen=True)
class Scans:
    """Real scans: uint8 [n, 8, 8], and the digit of each, int [n]."""

    pixels: Pixels
    digits: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """One composed picture.

    Attributes:
        pixels: uint8 [56, 56], white strokes on black.
        digits: the digits in reading order.
        cells: the cell of each digit, an index into ``CELLS``; empty when one digit fills the picture.
        scans: the source scan of each digit, an index into the scans it was composed from.
    """

    pixels: Pixels
    digits: tuple[int, ...]
    cells: tuple[int, ...]
    scans: tuple[int, ...]

    @property
    def kind(self) -> str:
        """How many digits are shown, as a word of ``KINDS``."""
        return KINDS[len(self.digits) - 1]

    @property
    def listing(self) -> str:
        """The digits in reading order, such as ``3 8``."""
        return " ".join(str(digit) for digit in self.digits)


@dataclass(frozen=True)
class Question:
    """A question about a picture; ``kind`` groups the answers in the report."""

    kind: str
    text: str
    answer: str


def split_scans() -> tuple[Scans, Scans]:
    """Return the scans to train on and the held-out ones: the last 360 of scikit-learn's order."""
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    digits = found.target.astype(np.int64)
    cut = len(digits) - HELD_OUT_SCANS
    return Scans(pixels[:cut], digits[:cut]), Scans(pixels[cut:], digits[cut:])


def compose(scans: Scans, chosen: Sequence[int], rng: np.random.Generator) -> Picture:
    """Draw one scan over the whole picture, or two to four in cells of a 2 x 2 grid whose other cells stay empty.

    Args:
        scans: what to draw from.
        chosen: the scans to draw, in reading order.
        rng: decides cells and jitter.
    """
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    shown = tuple(int(scans.digits[scan]) for scan in chosen)
    if len(chosen) == 1:
        _draw(canvas, scans.pixels[chosen[0]], rng)
        return Picture(canvas, shown, (), tuple(chosen))
    cells = sorted(rng.choice(len(CELLS), size=len(chosen), replace=False).tolist())
    half = SIDE // 2
    for cell, scan in zip(cells, chosen, strict=True):
        top, left = cell // 2 * half, cell % 2 * half
        _draw(canvas[top : top + half, left : left + half], scans.pixels[scan], rng)
    return Picture(canvas, shown, tuple(cells), tuple(chosen))


def _draw(square: Pixels, scan: Pixels, rng: np.random.Generator) -> None:
    """Draw a scan near the middle of a square, enlarged by a whole factor: no smoothing, every pixel stays crisp."""
    factor = (len(square) - 2 * JITTER) // len(scan)
    side = factor * len(scan)
    down, right = rng.integers(-JITTER, JITTER + 1, size=2) + (len(square) - side) // 2
    square[down : down + side, right : right + side] = scan.repeat(factor, axis=0).repeat(factor, axis=1)


def questions(picture: Picture, rng: np.random.Generator) -> tuple[Question, ...]:
    """Every kind of question this picture allows: one, or for a grid which digits, how many, and one about a cell."""
    if picture.kind == "single":
        return (Question("single", "What digit is this?", picture.listing),)
    asked = int(rng.integers(len(picture.cells)))
    return (
        Question(picture.kind, "Which digits are shown?", picture.listing),
        Question("count", "How many digits are shown?", str(len(picture.digits))),
        Question("cell", f"Which digit is {CELLS[picture.cells[asked]]}?", str(picture.digits[asked])),
    )


def caption(picture: Picture) -> str:
    """Say what is shown."""
    return f"the digit {picture.listing}" if picture.kind == "single" else f"the digits {picture.listing}"


def encode(pixels: Pixels, *, jpeg: bool) -> bytes:
    """Return a picture as PNG bytes, or as JPEG bytes of quality 90."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, **({"format": "JPEG", "quality": 90} if jpeg else {"format": "PNG"}))
    return stream.getvalue()
