"""Dealing rows to ranks: every row once, equal counts, and as little waiting as the rows allow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.accounting import step_flops
from mm15_megatron.accounting.row_cost import row_cost
from mm15_megatron.data.dealing import deal_evenly, deal_in_order
from mm15_megatron.data.mixture import Mixture, Weights
from mm15_megatron.errors import DataError
from mm15_megatron.presets import resolve

Int64 = np.ndarray
HISTOGRAMS = Path(__file__).parents[2] / "benchmarks" / "data" / "tile_histograms.json"
WORST_RANK = 1.05  # what the project promises for 32 ranks x 16 rows: the costliest rank over the mean
SUM_ORDER = 1e-12  # float64 sums taken in another order
SHARE_TOLERANCE = 1e-4  # shares of the file are rounded to six places


def total(tiles_R: Int64, dealt_DKM: Int64) -> int:
    """Largest total of a rank: what the end of a step waits for."""
    return int(tiles_R[dealt_DKM].sum(axis=(1, 2)).max())


def in_step(tiles_R: Int64, dealt_DKM: Int64) -> int:
    """Sum over k of the largest k-th micro-batch: what experts spread over all ranks wait for."""
    return int(tiles_R[dealt_DKM].sum(axis=2).max(axis=0).sum())


def random_steps(count: int, *, least_rows: int = 1, micro: int = 3) -> list[tuple[Int64, int, int]]:
    """Steps of random shape and histogram: (tiles, data size, micro-batch size)."""
    rng = np.random.default_rng(3)
    steps = []
    while len(steps) < count:
        ranks, rounds, size = rng.integers(2, 17), rng.integers(1, 17), rng.integers(1, micro + 1)
        if (rows := int(ranks * rounds * size)) >= least_rows:
            values = rng.integers(0, 40, rng.integers(1, 12))
            shares = rng.dirichlet(np.ones(len(values)))
            steps.append((rng.choice(values, rows, p=shares).astype(np.int64), int(ranks), int(size)))
    return steps


def test_every_row_goes_to_one_place() -> None:
    for tiles, ranks, size in random_steps(300):
        dealt = deal_evenly(tiles, data_size=ranks, micro_batch_size=size)
        assert dealt.shape == (ranks, len(tiles) // (ranks * size), size)
        assert sorted(dealt.ravel().tolist()) == list(range(len(tiles)))
        assert (np.diff(dealt, axis=2) > 0).all()


def test_pure_and_blind_to_the_price_of_a_tile() -> None:
    for tiles, ranks, size in random_steps(50):
        before = tiles.copy()
        dealt = deal_evenly(tiles, data_size=ranks, micro_batch_size=size)
        assert np.array_equal(tiles, before)
        assert np.array_equal(dealt, deal_evenly(tiles.copy(), data_size=ranks, micro_batch_size=size))
        assert np.array_equal(dealt, deal_evenly(5 + 3 * tiles, data_size=ranks, micro_batch_size=size))


def test_a_worked_example() -> None:
    tiles = np.array([9, 0, 8, 1, 5, 5, 2, 4])
    dealt = deal_evenly(tiles, data_size=2, micro_batch_size=1)[:, :, 0]
    # slabs (9, 8), (5, 5), (4, 2), (1, 0): the most to who has least; they take turns: first, last, second, third
    assert dealt.tolist() == [[0, 3, 5, 6], [2, 1, 4, 7]]
    assert tiles[dealt].sum(axis=1).tolist() == [17, 17]


def test_in_order_deals_consecutive_rows() -> None:
    dealt = deal_in_order(24, data_size=3, micro_batch_size=2)
    assert dealt[1].tolist() == [[2, 3], [8, 9], [14, 15], [20, 21]]
    tiles = np.arange(24)[::-1].copy()
    alone = deal_evenly(tiles, data_size=1, micro_batch_size=2)
    assert alone[0].ravel().tolist() == list(range(24))  # one rank waits for nobody


@pytest.mark.parametrize(("rows", "ranks", "size"), [(10, 3, 2), (0, 2, 1), (8, 0, 1), (8, 2, 0)])
def test_rows_that_cannot_be_shared(rows: int, ranks: int, size: int) -> None:
    message = f"{rows} rows cannot be dealt to {ranks} data-parallel ranks in micro-batches of {size}"
    with pytest.raises(DataError, match=message):
        deal_evenly(np.zeros(rows, np.int64), data_size=ranks, micro_batch_size=size)


def test_single_row_micro_batches_never_wait_longer_in_a_step() -> None:
    """Slabs of sorted rows have the least sum of their maxima that any dealing can have."""
    for tiles, ranks, size in random_steps(300, micro=1):
        even = deal_evenly(tiles, data_size=ranks, micro_batch_size=size)
        in_order = deal_in_order(len(tiles), data_size=ranks, micro_batch_size=size)
        assert in_step(tiles, even) == int(np.sort(tiles)[::-1][::ranks].sum()) <= in_step(tiles, in_order)


def test_the_busiest_rank_is_never_busier_than_in_order() -> None:
    """In steps of 64 rows or more; among fewer rows luck may beat slabs (about once in a thousand steps)."""
    for tiles, ranks, size in random_steps(300, least_rows=64):
        even = deal_evenly(tiles, data_size=ranks, micro_batch_size=size)
        in_order = deal_in_order(len(tiles), data_size=ranks, micro_batch_size=size)
        assert total(tiles, even) <= total(tiles, in_order), (tiles.tolist(), ranks, size)
        assert in_step(tiles, even) <= in_step(tiles, in_order)


@pytest.mark.parametrize("name", ["mm1_3b", "mm15_3b_sft", "mm15_3b_moe"])
@pytest.mark.parametrize("tiles", [0, 7, 16])
def test_the_cost_of_a_row_is_that_of_a_step_of_one(name: str, tiles: int) -> None:
    cfg = resolve(name)
    assert cfg.parallel.pipeline_model_parallel_size == 1
    assert row_cost(cfg, tiles) == pytest.approx(step_flops(cfg, rows=1, tiles=tiles).total, rel=SUM_ORDER)


@pytest.mark.parametrize("profile", ["mm1", "mm1, 4 stages", "mm15", "mm15 sft"])
def test_realistic_rows_keep_the_promise(profile: str) -> None:
    content = json.loads(HISTOGRAMS.read_text(encoding="utf-8"))
    rows_of, cfg = content["profiles"][profile]["rows"], resolve(content["profiles"][profile]["preset"])
    constant = 0.0 if "stages" in profile else row_cost(cfg, 0)  # no decoder layer on stage 0: the hardest case
    price = row_cost(cfg, 1) - row_cost(cfg, 0)
    kinds, rng = list(rows_of), np.random.default_rng(5)
    mixture = Mixture([Weights(0, tuple(rows_of[kind] for kind in kinds))], seed=5)
    for step in range(10):
        chosen = mixture.choose(512 * step, 512 * (step + 1))
        tiles = np.zeros(512, np.int64)
        for index, kind in enumerate(kinds):
            shares = content["tiles_of_rows"][kind]
            p = np.array(list(shares.values()))
            mine = chosen == index
            tiles[mine] = rng.choice([int(n) for n in shares], int(mine.sum()), p=p / p.sum())
        cost = (constant + price * tiles[deal_evenly(tiles, data_size=32, micro_batch_size=1)]).sum(axis=(1, 2))
        assert cost.max() / cost.mean() <= WORST_RANK


def test_the_histograms_are_whole() -> None:
    content = json.loads(HISTOGRAMS.read_text(encoding="utf-8"))
    for shares in content["tiles_of_rows"].values():
        assert abs(sum(shares.values()) - 1) <= SHARE_TOLERANCE
    for profile in content["profiles"].values():
        cfg = resolve(profile["preset"])
        assert sum(profile["rows"].values()) == pytest.approx(1)
        most = max(int(n) for kind in profile["rows"] for n in content["tiles_of_rows"][kind])
        assert most <= min(cfg.data.max_tiles, cfg.data.seq_length // cfg.connector.num_tokens)
    assert set(content) >= {"published", "modelled (ours)"}
