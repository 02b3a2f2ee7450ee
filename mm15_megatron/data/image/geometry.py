"""How an image becomes tiles: one tile, 2x2 and an overview, or the best grid and an overview (MM1.5 section 4).

Sizes are (height, width) in pixels, grids are (rows, columns) of square tiles, tiles are in row-major order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.config.schema import TilingConfig
from mm15_megatron.errors import ConfigError

Int64 = npt.NDArray[np.int64]

_STATIC_GRID: Final = (2, 2)
_TOLERANCE: Final = 1e-6
_BLOCK: Final = 1 << 16  # images whose candidates are compared at once: bounds the memory of a large dataset


@dataclass(frozen=True)
class View:
    """One resized copy of an image, anchored top left on a canvas of ``rows`` x ``columns`` tiles.

    Attributes:
        rows: tiles from top to bottom.
        columns: tiles from left to right.
        height: pixels of the resized image; the rest of the canvas is padding.
        width: pixels of the resized image.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the canvas."""
        return self.rows * self.columns


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one image: the tiles of each view, views in order.

    Attributes:
        grid: (rows, columns) of the main view.
        overview: whether a one-tile view of the whole image stands beside the grid.
        views: the views in the order in which their tiles stand in the sequence.
    """

    grid: tuple[int, int]
    overview: bool
    views: tuple[View, ...]

    @property
    def num_tiles(self) -> int:
        """Tiles of all views."""
        return sum(view.num_tiles for view in self.views)


def tile_plan(
    height: int, width: int, *, tile_size: int, tiling: TilingConfig, images_in_sample: int = 1, number: int = 0
) -> TilePlan:
    """Plan the tiles of one image.

    Args:
        height: pixels, after EXIF orientation.
        width: pixels.
        tile_size: side of a tile, pixels.
        tiling: mode, range of tiles, place of the overview.
        images_in_sample: images of the sample; above ``tiling.max_split_images`` only the last
            ``tiling.mixed_resolution_images`` of them are split.
        number: number of the image in its sample, from 0.

    Raises:
        ConfigError: if the range of tiles holds no grid.
    """
    few = images_in_sample <= tiling.max_split_images
    last = number >= images_in_sample - tiling.mixed_resolution_images
    return _tile_plan(height, width, tile_size=tile_size, tiling=tiling, split=tiling.mode != "none" and (few or last))


@lru_cache(maxsize=65536)
def _tile_plan(height: int, width: int, *, tile_size: int, tiling: TilingConfig, split: bool) -> TilePlan:
    # Dynamic splitting keeps the aspect ratio everywhere; ``resize`` decides for the other modes.
    fit = tiling.mode == "dynamic" or tiling.resize == "fit"
    whole = _view((1, 1), height, width, tile_size=tile_size, fit=fit)
    if not split:
        return TilePlan(grid=(1, 1), overview=False, views=(whole,))
    grid = _STATIC_GRID if tiling.mode == "static" else _best_grid(height, width, tile_size=tile_size, tiling=tiling)
    if grid == (1, 1):
        return TilePlan(grid=grid, overview=False, views=(whole,))
    tiles = _view(grid, height, width, tile_size=tile_size, fit=fit)
    views = (whole, tiles) if tiling.overview == "before" else (tiles, whole)
    return TilePlan(grid=grid, overview=True, views=views)


def _view(grid: tuple[int, int], height: int, width: int, *, tile_size: int, fit: bool) -> View:
    rows, columns = grid
    canvas_height, canvas_width = rows * tile_size, columns * tile_size
    if not fit:
        return View(rows, columns, canvas_height, canvas_width)
    if height >= width:  # the longer side fills the canvas; the other is rounded to the nearest pixel
        return View(rows, columns, canvas_height, max(1, (2 * width * canvas_height + height) // (2 * height)))
    return View(rows, columns, max(1, (2 * height * canvas_width + width) // (2 * width)), canvas_width)


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return every (rows, columns) with ``min_tiles <= rows * columns <= max_tiles``: fewest tiles first, then by rows.

    Raises:
        ConfigError: if there is none.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ConfigError(
            f"no grid has between {min_tiles} and {max_tiles} tiles",
            fix="set 1 <= tiling.min_tiles <= tiling.max_tiles",
        )
    sides = range(1, max_tiles + 1)
    grids = [(rows, columns) for rows in sides for columns in sides if min_tiles <= rows * columns <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def _best_grid(height: int, width: int, *, tile_size: int, tiling: TilingConfig) -> tuple[int, int]:
    grids = candidate_grids(tiling.min_tiles, tiling.max_tiles)
    (best,) = best_grids(np.array([[height, width]]), tile_size=tile_size, grids=grids).tolist()
    return grids[best]


def best_grids(sizes_N2: Int64, *, tile_size: int, grids: tuple[tuple[int, int], ...]) -> Int64:
    """Return the index of the best grid of each image (MM1.5 Eq. 1; tie-breaks as the project's notes derive them).

    The image is scaled so that its longer side fills the grid; a grid whose other side overflows is out. Grids that
    need no downscaling win by least padding; if there is none, the largest scale wins, then least padding. What is
    still equal goes to the earlier candidate: fewest tiles, then fewest rows.

    Args:
        sizes_N2: int [n, 2], height and width.
        tile_size: side of a tile, pixels.
        grids: candidates as :func:`candidate_grids` orders them.
    """
    rows_K, columns_K = np.array(grids, dtype=np.float64).T
    height_N1, width_N1 = np.split(sizes_N2.astype(np.float64), 2, axis=1)
    scale_NK = np.where(height_N1 >= width_N1, rows_K * tile_size / height_N1, columns_K * tile_size / width_N1)
    high_NK, wide_NK = scale_NK * height_N1, scale_NK * width_N1
    fits_NK = (high_NK <= rows_K * tile_size + _TOLERANCE) & (wide_NK <= columns_K * tile_size + _TOLERANCE)
    padding_NK = np.rint(rows_K * columns_K * tile_size**2 - high_NK * wide_NK)
    covers_NK = fits_NK & (scale_NK >= 1.0)
    rounded_NK = np.where(fits_NK, np.round(scale_NK, 6), -1.0)
    largest_NK = rounded_NK == rounded_NK.max(axis=1, keepdims=True)
    allowed_NK = np.where(covers_NK.any(axis=1, keepdims=True), covers_NK, largest_NK)
    return np.argmin(np.where(allowed_NK, padding_NK, np.inf), axis=1)


def grid_table(tiling: TilingConfig) -> tuple[tuple[int, int], ...]:
    """Return the grids an image can have, (1, 1) first; :func:`grid_indices` points into it."""
    if tiling.mode == "none":
        return ((1, 1),)
    if tiling.mode == "static":
        return ((1, 1), _STATIC_GRID)
    others = (grid for grid in candidate_grids(tiling.min_tiles, tiling.max_tiles) if grid != (1, 1))
    return ((1, 1), *others)


def grid_tiles(tiling: TilingConfig) -> Int64:
    """Return the tiles of each grid of :func:`grid_table`, overview included, int64 [grids]."""
    return np.array([rows * columns + (rows * columns > 1) for rows, columns in grid_table(tiling)], dtype=np.int64)


def grid_indices(
    sizes_N2: npt.NDArray[np.integer],
    images_in_sample_N: Int64,
    numbers_N: Int64,
    *,
    tile_size: int,
    tiling: TilingConfig,
) -> Int64:
    """Return the grid of many images at once, as ``tile_plan(...).grid`` does for one.

    Args:
        sizes_N2: [n, 2], height and width, pixels.
        images_in_sample_N: int64 [n], images of the sample each belongs to.
        numbers_N: int64 [n], number of each image in its sample.
        tile_size: side of a tile, pixels.
        tiling: mode and range of tiles.

    Returns:
        int64 [n], index into :func:`grid_table`.
    """
    found_N = np.zeros(len(sizes_N2), np.int64)
    if tiling.mode == "none":
        return found_N
    split_N = images_in_sample_N <= tiling.max_split_images
    split_N |= numbers_N >= images_in_sample_N - tiling.mixed_resolution_images
    if tiling.mode == "static":
        found_N[split_N] = 1
        return found_N
    table = grid_table(tiling)
    grids = candidate_grids(tiling.min_tiles, tiling.max_tiles)
    place_K = np.array([table.index(grid) for grid in grids], dtype=np.int64)
    for chosen in np.array_split(np.flatnonzero(split_N), max(1, -(-len(sizes_N2) // _BLOCK))):
        if chosen.size:
            best = best_grids(sizes_N2[chosen].astype(np.int64), tile_size=tile_size, grids=grids)
            found_N[chosen] = place_K[best]
    return found_N


def tile_counts(
    sizes_N2: npt.NDArray[np.integer], images_in_sample_N: Int64, *, tile_size: int, tiling: TilingConfig
) -> Int64:
    """Return ``tile_plan(...).num_tiles`` of many first images at once, int64 [n]."""
    first_N = np.zeros(len(sizes_N2), np.int64)
    return grid_tiles(tiling)[grid_indices(sizes_N2, images_in_sample_N, first_N, tile_size=tile_size, tiling=tiling)]
