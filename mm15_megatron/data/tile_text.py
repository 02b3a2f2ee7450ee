"""Position indicators: the text that says where a tile stands in its image (MM1.5 section 4.4).

``index`` (MM1.5's final setting) writes ``(k,i,j)`` before each tile: k counts the images of the sample from 0, i and j
are row and column from 1, and the overview is ``(k,0,0)``. ``seps`` (an ablation) writes ``,`` between columns, ``<n>``
between rows and ``:`` beside the overview. How the paper renders them is unpublished; plain text before the tile is our
default. Only images that are split have indicators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mm15_megatron.config.schema import TilingConfig
from mm15_megatron.data.image.geometry import TilePlan, grid_table

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TileTexts:
    """Token ids of the text before each tile of a split image; plain values, so that a digest can cover them.

    Attributes:
        mode: none | index | seps.
        overview: before | after, as in ``tiling.overview``.
        ids: (text, token ids) of every text that can occur, each once.
    """

    mode: str = "none"
    overview: str = "after"
    ids: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def build(cls, tiling: TilingConfig, encode: Callable[[str], list[int]]) -> TileTexts:
        """Tokenise every text that images of ``tiling`` can need."""
        if tiling.indicator == "none" or tiling.mode == "none":
            return cls()
        grids = [grid for grid in grid_table(tiling) if grid != (1, 1)]
        texts = {
            text
            for number in range(tiling.max_split_images if tiling.indicator == "index" else 1)
            for grid in grids
            for text in _texts(tiling.indicator, tiling.overview, number, grid)
        }
        return cls(tiling.indicator, tiling.overview, tuple((text, tuple(encode(text))) for text in sorted(texts)))

    def before_tiles(self, number: int, plan: TilePlan) -> tuple[tuple[int, ...], ...]:
        """Return the ids before each tile of image ``number`` of its sample, in the order of its tiles."""
        if self.mode == "none" or not plan.overview:
            return ((),) * plan.num_tiles
        ids = dict(self.ids)
        return tuple(ids[text] for text in _texts(self.mode, self.overview, number, plan.grid))

    def lengths(self, tiling: TilingConfig) -> Int64:
        """Return the ids an image adds to a row, int64 [images, grids]: by its number in the sample, and by its grid.

        The last row stands for every later image of a sample; those are never split.
        """
        ids = {text: len(found) for text, found in self.ids}
        table = grid_table(tiling)
        numbers = tiling.max_split_images if self.mode == "index" else 1
        if self.mode == "none":
            return np.zeros((1, len(table)), np.int64)
        return np.array(
            [
                [sum(ids[text] for text in _texts(self.mode, self.overview, k, grid)) for grid in table]
                for k in range(numbers)
            ],
            dtype=np.int64,
        )


def _texts(mode: str, overview: str, number: int, grid: tuple[int, int]) -> list[str]:
    """Return the text before each tile of an image of ``grid``; nothing for an image of one tile."""
    if grid == (1, 1):
        return []
    places = [(i, j) for i in range(1, grid[0] + 1) for j in range(1, grid[1] + 1)]
    if mode == "index":
        tiles, whole = [f"({number},{i},{j})" for i, j in places], f"({number},0,0)"
        return [whole, *tiles] if overview == "before" else [*tiles, whole]
    tiles = ["" if (i, j) == (1, 1) else "," if j > 1 else "<n>" for i, j in places]
    return ["", ":", *tiles[1:]] if overview == "before" else [*tiles, ":"]
