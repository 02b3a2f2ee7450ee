"""Pixels to tiles: resize, pad, normalise and cut.

Legend: H, W pixels; N tiles of an image; T side of a tile.
"""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from mm15_megatron.config.schema import VisionConfig
from mm15_megatron.data.image.geometry import TilePlan, View


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
        """Return the tiles of one image, float32 [N, 3, T, T], in the order of the plan.

        Args:
            pixels_HWC: uint8 [H, W, 3].
            plan: what :func:`~mm15_megatron.data.image.geometry.tile_plan` says for this size.
        """
        return torch.cat([self._view_tiles(pixels_HWC, view) for view in plan.views])

    def blank(self, count: int) -> torch.Tensor:
        """Return ``count`` tiles of the mean colour, float32 zeros [count, 3, T, T]."""
        return torch.zeros(count, 3, self.tile_size, self.tile_size)

    def _view_tiles(self, pixels_HWC: torch.Tensor, view: View) -> torch.Tensor:
        # Permuted [H, W, C] memory is channels-last uint8: torch's fast antialiased path.
        small_1CHW = interpolate(
            pixels_HWC.permute(2, 0, 1)[None], size=(view.height, view.width), mode="bicubic", antialias=True
        )
        side = self.tile_size
        canvas_CHW = torch.zeros(3, view.rows * side, view.columns * side)
        inside_CHW = canvas_CHW[:, : view.height, : view.width]
        inside_CHW.copy_(small_1CHW[0]).sub_(self._mean_C11).mul_(self._inverse_std_C11)
        grid = canvas_CHW.view(3, view.rows, side, view.columns, side)
        return grid.permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
