"""Packing: every sample once, every cap held, rows nearly as few as can be, the same on every machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mm15_megatron.config.schema import TilingConfig
from mm15_megatron.data.packing import PackingRules, Sizes, least_rows, pack

RULES = PackingRules(
    seq_length=4096,
    slots_per_tile=144,
    tile_size=378,
    tiling=TilingConfig(mode="none"),
    max_images=16,
    max_tiles=160,
    image_sentinel_id=3,
)
SMALL = replace(RULES, seq_length=8, max_images=4, max_tiles=8)


def sizes(tokens: list[int], images: list[int] | None = None, tiles: list[int] | None = None) -> Sizes:
    zero = [0] * len(tokens)
    return Sizes(np.array(tokens), np.array(images or zero), np.array(tiles or images or zero))


def check(found: Sizes, rules: PackingRules) -> int:
    """Every sample is in one row, and no row breaks a cap; return the number of rows."""
    row = pack(found, rules)
    assert row.shape == (len(found),)
    rows = int(row.max()) + 1
    assert set(row.tolist()) == set(range(rows))
    for cap, values in zip(rules.caps_C.tolist(), found.matrix_NC.T, strict=True):
        assert np.bincount(row, weights=values).max() <= cap
    assert rows >= least_rows(found, rules)
    return rows


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (sizes([4, 4, 1]), 2),
        (sizes([8, 1, 7, 8]), 3),
        (sizes([5, 1, 3, 2, 5]), 2),
        (sizes([1] * 6, [2] * 6), 3),
        (sizes([1] * 4, [1] * 4, [5, 3, 1, 7]), 2),
        (sizes([1, 1], [4, 1], [1, 8]), 2),
    ],
)
def test_every_cap_is_held(given: Sizes, rows: int) -> None:
    assert check(given, SMALL) == rows


def test_nothing_to_pack() -> None:
    assert pack(sizes([]), SMALL).tolist() == []
    assert least_rows(sizes([]), SMALL) == 0


def test_samples_of_a_row_are_bounded() -> None:
    assert check(sizes([2] * 600), replace(RULES, seq_length=10_000)) == 3


@pytest.mark.parametrize("seed", range(5))
def test_random_samples_are_packed_within_the_caps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    check(Sizes(rng.integers(1, 9, 2000), rng.integers(0, 5, 2000), rng.integers(0, 9, 2000)), SMALL)


def of_kind(kind: str, count: int) -> Sizes:
    """Sizes as the papers' kinds of data have them, of drawn lengths."""
    rng = np.random.default_rng(0)
    none, one = np.zeros(count, np.int64), np.ones(count, np.int64)
    if kind == "captions":  # a tile and a short text
        return Sizes(144 + np.clip(rng.lognormal(2.9, 0.7, count), 3, 256).astype(np.int64), one, one)
    if kind == "long captions":  # images and tokens are both near their caps
        return Sizes(144 + np.clip(rng.lognormal(4.6, 0.4, count), 3, 400).astype(np.int64), one, one)
    if kind == "text":  # what is left of documents behind whole rows, and whole rows
        lengths = np.maximum(2, rng.lognormal(6.2, 1.1, count).astype(np.int64))
        return Sizes(
            np.concatenate([np.full(int((lengths // 4096).sum()), 4096), lengths % 4096 + 1])[:count], none, none
        )
    if kind == "interleaved":
        images = np.minimum(rng.geometric(0.35, count), 16)
        tokens = np.maximum(8, rng.lognormal(6.2, 0.9, count)).astype(np.int64) + 144 * images
        return Sizes(np.minimum(tokens, 4096), images, images)
    images = rng.integers(0, 2, count)  # conversations with dynamic splitting
    tiles = images * rng.integers(5, 11, count)
    return Sizes(np.minimum(tiles * 144 + rng.lognormal(5, 0.8, count), 4096).astype(np.int64), images, tiles)


@pytest.mark.parametrize("kind", ["captions", "long captions", "text", "interleaved", "conversations"])
def test_rows_are_nearly_as_few_as_the_caps_allow(kind: str) -> None:
    """The bound is what the binding cap needs on average; nothing can be below it."""
    given = of_kind(kind, 40_000)
    assert least_rows(given, RULES) / check(given, RULES) >= 0.98
