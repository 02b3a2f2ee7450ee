"""Pixels to tiles: resize, pad, normalise and cut.

Legend: H, W pixels; N tiles of an image; T side of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import interpolate

from mm15_megatron.config.schema import VisionConfig
from mm15_megatron.data.image.geometry import TilePlan, View

Resize = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(pixels uint8 [H, W, 3], height, width) to uint8 [3, height, width]."""


class TileMaker:
    """Cut decoded images into normalised tiles.

    Padding is 0 after normalisation: the mean colour.

    Args:
        vision: side of a tile, mean and deviation of the colour channels.
    """

    def __init__(self, vision: VisionConfig) -> None:
        self.tile_size = vision.image_size
        self._mean_C11 = torch.tensor(vision.image_mean).view(3, 1, 1) * 255.0
        self._inverse_std_C11 = 1.0 / (torch.tensor(vision.image_std).view(3, 1, 1) * 255.0)

    def tiles(self, pixels_HWC: torch.Tensor, plan: TilePlan) -> torch.Tensor:
        """Return the tiles of one image, float32 [N, 3, T, T], in the order of the plan, where the pixels are.

        Args:
            pixels_HWC: uint8 [H, W, 3]; on a GPU (``data.decoder=dali_gpu``) it is DALI that resizes them there.
            plan: what :func:`~mm15_megatron.data.image.geometry.tile_plan` says for this size.
        """
        resized = _dali_resize() if pixels_HWC.is_cuda else _resized
        return torch.cat([self._view_tiles(pixels_HWC, view, resized) for view in plan.views])

    def pixels(self, tiles_N3TT: torch.Tensor) -> torch.Tensor:
        """Return the colours of normalised tiles, uint8 [N, T, T, 3]: of what :meth:`tiles` makes, the exact pixels.

        Args:
            tiles_N3TT: float32 [N, 3, T, T].
        """
        device = tiles_N3TT.device
        colours = tiles_N3TT / self._inverse_std_C11.to(device) + self._mean_C11.to(device)
        return colours.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def blank(self, count: int) -> torch.Tensor:
        """Return ``count`` tiles of the mean colour, float32 zeros [count, 3, T, T]."""
        return torch.zeros(count, 3, self.tile_size, self.tile_size)

    def _view_tiles(self, pixels_HWC: torch.Tensor, view: View, resized: Resize) -> torch.Tensor:
        device, side = pixels_HWC.device, self.tile_size
        canvas_CHW = torch.zeros(3, view.rows * side, view.columns * side, device=device)
        inside_CHW = canvas_CHW[:, : view.height, : view.width]
        inside_CHW.copy_(resized(pixels_HWC, view.height, view.width))
        inside_CHW.sub_(self._mean_C11.to(device)).mul_(self._inverse_std_C11.to(device))
        grid = canvas_CHW.view(3, view.rows, side, view.columns, side)
        return grid.permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)


def _resized(pixels_HWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # Permuted [H, W, C] memory is channels-last uint8: torch's fast antialiased path.
    return interpolate(pixels_HWC.permute(2, 0, 1)[None], size=(height, width), mode="bicubic", antialias=True)[0]


def _dali_resize() -> Resize:
    """DALI's resize, which decoded these pixels: torch has no antialiased bicubic of bytes on a GPU."""
    from mm15_megatron.data.image import decode_dali

    return decode_dali.resized
