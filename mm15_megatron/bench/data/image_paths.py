"""From encoded pictures to normalised tiles, by our path and by those of Pillow and OpenCV: the same rule for all.

Each takes pictures and yields, for each, float32 [tiles, 3, side, side]; a loader copies them into its batch and lets
go. How a picture is cut and which size its views have is our ``tile_plan``; Pillow resizes with its bicubic filter, as
ours does, OpenCV by areas. Both peers write their views straight into the tiles and normalise them there with torch: no
faster way was found for them.

Legend: H, W pixels; N tiles; C = 3 channels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageOps

from mm15_megatron.bench.data.pictures import Picture, Pixels
from mm15_megatron.config.schema import TilingConfig, VisionConfig
from mm15_megatron.data.image.decoder import build_decoder
from mm15_megatron.data.image.geometry import TilePlan, View, tile_plan
from mm15_megatron.data.image.views import TileMaker
from mm15_megatron.errors import BackendError, DataError

OURS, PILLOW, OPENCV = "ours", "Pillow", "OpenCV area"
MAX_PIXELS: Final = 64_000_000
_DECODED_TOGETHER: Final = 8  # as the loader does
_PIXEL: Final = 255.0


@dataclass(frozen=True)
class TileRule:
    """How pictures become tiles.

    Attributes:
        vision: side of a tile, mean and deviation.
        tiling: how pictures are cut.
    """

    vision: VisionConfig
    tiling: TilingConfig

    def plan(self, size: tuple[int, int]) -> TilePlan:
        """Return the views of a picture of (height, width)."""
        height, width = size
        return tile_plan(height, width, tile_size=self.vision.image_size, tiling=self.tiling)

    def levels(self, difference_N3TT: torch.Tensor) -> float:
        """Return the largest of normalised differences as levels of an 8-bit pixel."""
        std_C11 = torch.tensor(self.vision.image_std).view(3, 1, 1) * _PIXEL
        return float((difference_N3TT.abs() * std_C11).max())


Path = Callable[[Sequence[Picture]], Iterator[torch.Tensor]]
"""Makes the tiles of pictures."""


def our_path(rule: TileRule, *, decoder: str = "dali") -> Path:
    """Return the loader's own path.

    Raises:
        BackendError: the decoder cannot be imported.
    """
    images, maker = build_decoder(decoder, max_pixels=MAX_PIXELS), TileMaker(rule.vision)

    def run(pictures: Sequence[Picture]) -> Iterator[torch.Tensor]:
        for at in range(0, len(pictures), _DECODED_TOGETHER):
            group = pictures[at : at + _DECODED_TOGETHER]
            decoded = images.decode([one.array for one in group], sizes=[one.size for one in group])
            for picture, found in zip(group, decoded, strict=True):
                if found.pixels_HWC is None:
                    raise DataError(f"a picture does not decode: {found.problem}", fix="report it: it was made here")
                yield maker.tiles(found.pixels_HWC, rule.plan(picture.size))

    return run


def pillow_path(rule: TileRule) -> Path:
    """Return the path of Pillow."""

    def run(pictures: Sequence[Picture]) -> Iterator[torch.Tensor]:
        for one in pictures:
            yield pillow_tiles(pillow_pixels(one.encoded), rule)

    return run


def pillow_pixels(encoded: bytes) -> Image.Image:
    """Decode upright RGB without a copy that is not needed."""
    image = Image.open(io.BytesIO(encoded))
    ImageOps.exif_transpose(image, in_place=True)
    return image if image.mode == "RGB" else image.convert("RGB")


def _pillow_resized(image: Image.Image, view: View) -> Pixels:
    return np.array(image.resize((view.width, view.height), Image.Resampling.BICUBIC))


def pillow_tiles(image: Image.Image, rule: TileRule) -> torch.Tensor:
    """Return the tiles of one decoded picture."""
    return _all_views(image, rule, (image.height, image.width), _pillow_resized)


def opencv_path(rule: TileRule) -> Path:
    """Return the path of OpenCV, on one thread.

    Raises:
        BackendError: OpenCV cannot be imported.
    """
    try:
        import cv2
    except ImportError as error:
        raise BackendError(
            f"OpenCV cannot be imported: {error}", fix="pip install opencv-python-headless to have it beside ours"
        ) from error
    cv2.setNumThreads(1)

    def resized(pixels_HW3: Pixels, view: View) -> Pixels:
        return cv2.resize(pixels_HW3, (view.width, view.height), interpolation=cv2.INTER_AREA)

    def run(pictures: Sequence[Picture]) -> Iterator[torch.Tensor]:
        for one in pictures:
            pixels_HW3 = cv2.cvtColor(cv2.imdecode(one.array, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            yield _all_views(pixels_HW3, rule, one.size, resized)

    return run


def opencv_version() -> str:
    """Return the version of an OpenCV that can be imported."""
    import cv2

    return str(cv2.__version__)


def _all_views(
    image: Any, rule: TileRule, size: tuple[int, int], resize: Callable[[Any, View], Pixels]
) -> torch.Tensor:
    plan, side, first = rule.plan(size), rule.vision.image_size, 0
    tiles_N3TT = torch.empty(plan.num_tiles, 3, side, side)
    for view in plan.views:
        _write_view(resize(image, view), view, tiles_N3TT[first : first + view.num_tiles], vision=rule.vision)
        first += view.num_tiles
    return tiles_N3TT


def _write_view(pixels_HW3: Pixels, view: View, tiles_N3TT: torch.Tensor, *, vision: VisionConfig) -> None:
    """Cut one resized view into ``tiles_N3TT``, normalised; what it does not cover becomes the mean colour."""
    side, values = vision.image_size, torch.from_numpy(pixels_HW3)
    mean_C11, std_C11 = (torch.tensor(three).view(3, 1, 1) * _PIXEL for three in (vision.image_mean, vision.image_std))
    if values.shape[:2] != (view.rows * side, view.columns * side):
        canvas_HW3 = (torch.tensor(vision.image_mean) * _PIXEL).expand(view.rows * side, view.columns * side, 3).clone()
        canvas_HW3[: view.height, : view.width] = values
        values = canvas_HW3
    cut = values.view(view.rows, side, view.columns, side, 3).permute(0, 2, 4, 1, 3)
    tiles_N3TT.view(view.rows, view.columns, 3, side, side).copy_(cut).sub_(mean_C11).mul_(1 / std_C11)
