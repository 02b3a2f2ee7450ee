"""Pictures for the benchmark: photographs in the sizes of the web, and screenshots drawn here.

The photographs are those that scikit-learn and, where it is installed, scikit-image ship. A picture larger than its
photograph is continued by mirror images, so that the detail in a pixel stays a photograph's: an enlarged one would be
smooth and decode faster. Encoded as JPEG of quality 85 with halved colour, as cameras and the web do.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]

PHOTO_SIZES: Final = ((640, 480), (1024, 768), (1600, 1200), (2000, 1500))
SCREEN_SIZES: Final = ((1280, 800), (1920, 1080), (750, 1334))
PHOTO_QUALITY, SCREEN_QUALITY = 85, 90
_PHOTOGRAPHS: Final = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/rocket.jpg"),
)
_WORDS: Final = (
    "Settings account total of the week Save Cancel report is ready 1,204 items in your basket Sign out Search "
    "messages today at 14:30 invoice number due date status open closed pending https://example.org/page?id=42 "
    "def main() -> None: return value for key in sorted(table) price 19.99 per month The quick brown fox"
).split()


@dataclass(frozen=True)
class Picture:
    """An encoded picture.

    Attributes:
        encoded: bytes of the file.
        size: (height, width) in pixels.
    """

    encoded: bytes
    size: tuple[int, int]

    @cached_property
    def array(self) -> Pixels:
        """The encoded bytes as uint8 [bytes], read-only, as an indexed dataset gives them."""
        return np.frombuffer(self.encoded, np.uint8)


def photographs(limit: int) -> tuple[list[Pixels], list[str]]:
    """Return at most ``limit`` photographs, uint8 [H, W, 3], and their names."""
    found, names = [], []
    for package, path in _PHOTOGRAPHS:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        file = Path(spec.submodule_search_locations[0]) / path
        if file.is_file() and len(found) < limit:
            with Image.open(file) as image:
                found.append(np.asarray(image.convert("RGB")))
            names.append(f"{package}/{file.name}")
    return found, names


def photo(source_HW3: Pixels, *, width: int, height: int) -> Picture:
    """Return a JPEG of the top left of a photograph, continued by mirror images where it ends."""
    more = [max(0, wanted - found) for wanted, found in zip((height, width), source_HW3.shape[:2], strict=True)]
    pixels = np.pad(source_HW3, ((0, more[0]), (0, more[1]), (0, 0)), mode="symmetric")[:height, :width]
    return encode(pixels, form="JPEG", quality=PHOTO_QUALITY)


def encode(pixels_HW3: Pixels, *, form: str, quality: int = SCREEN_QUALITY) -> Picture:
    """Encode pixels; a PNG has no quality."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HW3)).save(
        stream, form, **({"quality": quality} if form != "PNG" else {})
    )
    height, width = pixels_HW3.shape[:2]
    return Picture(stream.getvalue(), (height, width))


def screen(*, width: int, height: int, seed: int) -> Pixels:
    """Draw a screenshot, uint8 [H, W, 3]: bars, panels, tables, buttons and lines of text in several sizes."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), (250, 250, 252))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width, 44), fill=tuple(random.integers(20, 120, 3).tolist()))
    draw.text((14, 12), _line(random, 5), font=ImageFont.load_default(18), fill=(255, 255, 255))
    side = int(width * 0.22)
    draw.rectangle((0, 45, side, height), fill=(236, 238, 242))
    for top in range(60, height - 30, 34):
        draw.text((16, top), _line(random, 2)[:22], font=ImageFont.load_default(14), fill=(60, 60, 70))
    top = 62
    while top < height - 40:
        top = _block(draw, random, left=side + 16, right=width - 16, top=top)
    return np.asarray(image)


def _line(random: np.random.Generator, words: int) -> str:
    return " ".join(_WORDS[i] for i in random.integers(0, len(_WORDS), words))


def _block(draw: ImageDraw.ImageDraw, random: np.random.Generator, *, left: int, right: int, top: int) -> int:
    """Draw one block of a page from ``top`` on; return where the next one begins."""
    kind = int(random.integers(0, 4))
    if kind == 0:  # a heading and its paragraph
        draw.text((left, top), _line(random, 4), font=ImageFont.load_default(24), fill=(25, 25, 30))
        for number in range(4):
            line = _line(random, (right - left) // 52)
            draw.text((left, top + 36 + 19 * number), line, font=ImageFont.load_default(13), fill=(50, 50, 55))
        return top + 128
    if kind == 1:  # a table
        for number in range(5):
            box = (left, top + 24 * number, right, top + 24 * number + 24)
            draw.rectangle(box, outline=(205, 208, 214), fill=(255, 255, 255) if number % 2 else (244, 246, 250))
            for column in range(left + 8, right - 90, 120):
                draw.text(
                    (column, box[1] + 5), _line(random, 2)[:15], font=ImageFont.load_default(12), fill=(40, 44, 52)
                )
        return top + 140
    if kind == 2:  # buttons
        for column in range(left, right - 120, 140):
            draw.rounded_rectangle(
                (column, top, column + 120, top + 32), radius=6, fill=tuple(random.integers(40, 220, 3).tolist())
            )
            draw.text((column + 18, top + 8), _line(random, 1), font=ImageFont.load_default(14), fill=(255, 255, 255))
        return top + 52
    points = [
        (left + 12 * i, top + 50 + int(40 * v)) for i, v in enumerate(random.uniform(-1, 1, (right - left) // 12))
    ]
    draw.rectangle((left, top, right, top + 100), outline=(220, 222, 228), fill=(255, 255, 255))
    draw.line(points, fill=(36, 110, 200), width=2)
    return top + 116


def photo_set(sources: Sequence[Pixels]) -> dict[str, list[Picture]]:
    """Return every photograph in every size, by a name of the group."""
    return {f"photo {w}x{h} JPEG": [photo(one, width=w, height=h) for one in sources] for w, h in PHOTO_SIZES}


def screen_set(count: int) -> dict[str, list[Picture]]:
    """Return ``count`` screenshots in every size and both formats, by a name of the group."""
    groups = {}
    for width, height in SCREEN_SIZES:
        drawn = [screen(width=width, height=height, seed=seed) for seed in range(count)]
        for form in ("PNG", "JPEG"):
            groups[f"screenshot {width}x{height} {form}"] = [encode(one, form=form) for one in drawn]
    return groups
