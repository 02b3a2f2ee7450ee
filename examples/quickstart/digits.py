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
TURN, STRETCH, SHEAR = 10.0, 0.1, 0.1  # distortion of training pictures, each way: degrees, share, share
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


def compose(scans: Scans, chosen: Sequence[int], rng: np.random.Generator, *, distort: bool) -> Picture:
    """Draw one scan over the whole picture, or two to four in cells of a 2 x 2 grid whose other cells stay empty.

    Args:
        scans: what to draw from.
        chosen: the scans to draw, in reading order.
        rng: decides cells, jitter and distortion.
        distort: turn, stretch and shear each scan a little: training pictures, so that few scans teach more.
    """
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    shown = tuple(int(scans.digits[scan]) for scan in chosen)
    if len(chosen) == 1:
        canvas[:] = _drawn(scans.pixels[chosen[0]], side=SIDE, rng=rng, distort=distort)
        return Picture(canvas, shown, (), tuple(chosen))
    cells = sorted(rng.choice(len(CELLS), size=len(chosen), replace=False).tolist())
    half = SIDE // 2
    for cell, scan in zip(cells, chosen, strict=True):
        top, left = cell // 2 * half, cell % 2 * half
        canvas[top : top + half, left : left + half] = _drawn(scans.pixels[scan], side=half, rng=rng, distort=distort)
    return Picture(canvas, shown, tuple(cells), tuple(chosen))


def _drawn(scan: Pixels, *, side: int, rng: np.random.Generator, distort: bool) -> Pixels:
    """Return a square with a scan near its middle, enlarged without smoothing; what leaves the square is cut off."""
    enlarge = np.eye(2) * ((side - 2 * JITTER) // len(scan))
    if distort:
        turn, shear = np.radians(rng.uniform(-TURN, TURN)), rng.uniform(-SHEAR, SHEAR)
        enlarge = enlarge @ np.diag(rng.uniform(1 - STRETCH, 1 + STRETCH, size=2)) @ [[1.0, shear], [0.0, 1.0]]
        enlarge = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ enlarge
    back = np.linalg.inv(enlarge)  # where in the scan a pixel of the square comes from
    shift = len(scan) / 2 - back @ (side / 2 + rng.integers(-JITTER, JITTER + 1, size=2))
    affine = (back[0, 0], back[0, 1], shift[0], back[1, 0], back[1, 1], shift[1])
    drawn = Image.fromarray(scan).transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.NEAREST)
    return np.asarray(drawn)


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
