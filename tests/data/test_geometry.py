"""Image splitting: every published or derived test vector, tie-breaks, and the vectorised counts."""

from __future__ import annotations

import numpy as np
import pytest

from mm15_megatron.config.schema import TilingConfig
from mm15_megatron.data.image.geometry import candidate_grids, grid_indices, grid_tiles, tile_counts, tile_plan
from mm15_megatron.errors import ConfigError

SIDE = 672
DYNAMIC = TilingConfig(mode="dynamic")
HALF_PIXEL = 0.5 + 0.05  # integer pixels against a published value with one decimal

# (height, width), grid, tiles with the overview, resized (height, width)
VECTORS = [
    ((224, 224), (2, 2), 5, (1344.0, 1344.0)),
    ((300, 300), (2, 2), 5, (1344.0, 1344.0)),
    ((480, 640), (2, 2), 5, (1008.0, 1344.0)),
    ((640, 480), (2, 2), 5, (1344.0, 1008.0)),
    ((1344, 1344), (2, 2), 5, (1344.0, 1344.0)),
    ((1344, 1345), (3, 3), 10, (2014.5, 2016.0)),
    ((1500, 1500), (3, 3), 10, (2016.0, 2016.0)),
    ((2016, 2016), (3, 3), 10, (2016.0, 2016.0)),
    ((2017, 2017), (3, 3), 10, (2016.0, 2016.0)),
    ((1100, 850), (2, 2), 5, (1344.0, 1038.5)),
    ((2200, 1700), (3, 3), 10, (2016.0, 1557.8)),
    ((3300, 2550), (3, 3), 10, (2016.0, 1557.8)),
    ((3000, 4000), (3, 3), 10, (1512.0, 2016.0)),
    ((1080, 1920), (2, 3), 7, (1134.0, 2016.0)),
    ((1792, 828), (4, 2), 9, (2688.0, 1242.0)),
    ((2532, 1170), (4, 2), 9, (2688.0, 1242.1)),
    ((1344, 672), (4, 2), 9, (2688.0, 1344.0)),
    ((1000, 1500), (2, 3), 7, (1344.0, 2016.0)),
    ((500, 2000), (1, 4), 5, (672.0, 2688.0)),
    ((400, 3000), (1, 7), 8, (627.2, 4704.0)),
    ((200, 2000), (1, 9), 10, (604.8, 6048.0)),
    ((10, 1000), (1, 4), 5, (26.9, 2688.0)),
    ((672, 6048), (1, 9), 10, (672.0, 6048.0)),
    ((6048, 672), (9, 1), 10, (6048.0, 672.0)),
    ((800, 5000), (1, 6), 7, (645.1, 4032.0)),
    ((5000, 800), (6, 1), 7, (4032.0, 645.1)),
    ((8000, 400), (9, 1), 10, (6048.0, 302.4)),
    ((1920, 1080), (3, 2), 7, (2016.0, 1134.0)),
]
OTHER_SIZES = [(480, 640), (1344, 1344), (1500, 1500), (1080, 1920), (2200, 1700), (3000, 4000), (500, 2000)]
OTHER_RANGES = [
    ((1, 4), 8, [(1, 1), (2, 2), (2, 2), (2, 2), (2, 2), (2, 2), (1, 4)]),
    ((1, 9), 23, [(1, 1), (2, 2), (3, 3), (2, 3), (3, 3), (3, 3), (1, 4)]),
    ((4, 4), 3, [(2, 2), (2, 2), (2, 2), (2, 2), (2, 2), (2, 2), (1, 4)]),
    ((4, 16), 45, [(3, 4), (2, 2), (3, 3), (2, 3), (4, 4), (3, 4), (1, 4)]),
    ((9, 9), 3, [(3, 3), (3, 3), (3, 3), (3, 3), (3, 3), (3, 3), (3, 3)]),
]


@pytest.mark.parametrize(("size", "grid", "tiles", "resized"), VECTORS)
def test_vectors(size: tuple[int, int], grid: tuple[int, int], tiles: int, resized: tuple[float, float]) -> None:
    plan = tile_plan(*size, tile_size=SIDE, tiling=DYNAMIC)
    assert (plan.grid, plan.num_tiles, plan.overview) == (grid, tiles, True)
    main, overview = plan.views
    assert (main.height, main.width) == pytest.approx(resized, abs=HALF_PIXEL)
    assert (overview.rows, overview.columns, max(overview.height, overview.width)) == (1, 1, SIDE)


def test_candidates() -> None:
    expected = {(1, n) for n in range(4, 10)} | {(n, 1) for n in range(4, 10)}
    expected |= {(2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3)}
    assert set(candidate_grids(4, 9)) == expected
    assert candidate_grids(4, 9)[:3] == ((1, 4), (2, 2), (4, 1))  # fewest tiles first, then fewest rows


@pytest.mark.parametrize(("limits", "count", "grids"), OTHER_RANGES)
def test_other_ranges(limits: tuple[int, int], count: int, grids: list[tuple[int, int]]) -> None:
    assert len(candidate_grids(*limits)) == count
    tiling = TilingConfig(mode="dynamic", min_tiles=limits[0], max_tiles=limits[1])
    plans = [tile_plan(*size, tile_size=SIDE, tiling=tiling) for size in OTHER_SIZES]
    assert [plan.grid for plan in plans] == grids
    assert all(plan.overview == (plan.grid != (1, 1)) for plan in plans)


def test_order_of_the_overview() -> None:
    before = tile_plan(480, 640, tile_size=SIDE, tiling=TilingConfig(mode="dynamic", overview="before"))
    after = tile_plan(480, 640, tile_size=SIDE, tiling=DYNAMIC)
    assert before.views == after.views[::-1]
    assert [view.num_tiles for view in after.views] == [4, 1]


def test_the_last_images_of_a_prompt_have_mixed_resolution() -> None:
    """MM1 8.3: eight shots and a query of which the last three are split take 3 x 720 + 6 x 144 tokens."""
    tiling = TilingConfig(mode="static", mixed_resolution_images=3)
    tiles = [
        tile_plan(480, 640, tile_size=SIDE, tiling=tiling, images_in_sample=9, number=number).num_tiles
        for number in range(9)
    ]
    assert tiles == [1] * 6 + [5] * 3
    assert 144 * sum(tiles) == 3 * 720 + 6 * 144 == 3024
    counts = grid_tiles(tiling)[
        grid_indices(np.full((9, 2), 480), np.full(9, 9), np.arange(9), tile_size=SIDE, tiling=tiling)
    ]
    assert counts.tolist() == tiles
    both = [tile_plan(9, 9, tile_size=SIDE, tiling=tiling, images_in_sample=2, number=n).num_tiles for n in (0, 1)]
    assert both == [5, 5], "few images are split anyway"


def test_samples_with_many_images_are_not_split() -> None:
    assert tile_plan(480, 640, tile_size=SIDE, tiling=DYNAMIC, images_in_sample=2).num_tiles == 5
    plan = tile_plan(480, 640, tile_size=SIDE, tiling=DYNAMIC, images_in_sample=3)
    assert (plan.num_tiles, plan.overview) == (1, False)
    assert (plan.views[0].height, plan.views[0].width) == (504, 672)


@pytest.mark.parametrize(
    ("resize", "sizes"), [("stretch", [(1344, 1344), (672, 672)]), ("fit", [(1008, 1344), (504, 672)])]
)
def test_static_splitting(resize: str, sizes: list[tuple[int, int]]) -> None:
    plan = tile_plan(480, 640, tile_size=SIDE, tiling=TilingConfig(mode="static", resize=resize))
    assert (plan.grid, plan.num_tiles, plan.overview) == ((2, 2), 5, True)
    assert [(view.height, view.width) for view in plan.views] == sizes


@pytest.mark.parametrize(("resize", "size"), [("stretch", (56, 56)), ("fit", (1, 56))])
def test_no_splitting(resize: str, size: tuple[int, int]) -> None:
    plan = tile_plan(1, 900, tile_size=56, tiling=TilingConfig(mode="none", resize=resize))
    assert (plan.grid, plan.num_tiles, plan.overview) == ((1, 1), 1, False)
    assert (plan.views[0].height, plan.views[0].width) == size


@pytest.mark.parametrize("mode", ["none", "static", "dynamic"])
def test_counts_of_many_images_equal_their_plans(mode: str) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5000, (300, 2))
    images = rng.integers(1, 5, 300)
    tiling = TilingConfig(mode=mode, min_tiles=1)
    counts = tile_counts(sizes, images, tile_size=SIDE, tiling=tiling)
    plans = [
        tile_plan(int(h), int(w), tile_size=SIDE, tiling=tiling, images_in_sample=int(k))
        for (h, w), k in zip(sizes, images, strict=True)
    ]
    assert counts.tolist() == [plan.num_tiles for plan in plans]
    assert all(v.height <= v.rows * SIDE and v.width <= v.columns * SIDE for plan in plans for v in plan.views)
    assert tile_counts(sizes[:0], images[:0], tile_size=SIDE, tiling=tiling).shape == (0,)


@pytest.mark.parametrize("limits", [(5, 4), (0, 4)])
def test_an_empty_range_is_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"between {limits[0]} and {limits[1]} tiles"):
        tile_plan(10, 10, tile_size=SIDE, tiling=TilingConfig(mode="dynamic", min_tiles=limits[0], max_tiles=limits[1]))
