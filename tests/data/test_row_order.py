"""The order of rows: bijections, mixtures, epochs, random access, and the rows of a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.config.schema import TilingConfig
from mm15_megatron.data import row_order
from mm15_megatron.data.batch_plan import BatchPlan
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.mixture import Mixture
from mm15_megatron.data.packing import measure
from mm15_megatron.data.permutation import derive_key, permute
from mm15_megatron.data.row_order import EpochOrder, RowOrder
from mm15_megatron.errors import ConfigError, DataError
from tests.data.rows import RULES, image_source, text_source

SHARE_TOLERANCE = 3  # rows: how far a golden-ratio sequence strays from its share over any stretch


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[IndexedSource]:
    folder = tmp_path_factory.mktemp("order")
    rng = np.random.default_rng(1)
    return [text_source(folder / name, rng.integers(2, 20, n).tolist()) for name, n in (("a", 97), ("b", 41), ("c", 5))]


def order(sources: list[IndexedSource], *, unit: str = "row", seed: int = 1, shuffle: bool = True) -> RowOrder:
    return RowOrder(sources, [0.5, 0.3, 0.2], RULES, seed=seed, unit=unit, shuffle=shuffle)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permutations_are_bijections(size: int) -> None:
    everything = np.arange(size)
    image = permute(everything, size, key=5)
    assert sorted(image.tolist()) == everything.tolist()
    assert permute(everything[size // 2 :], size, key=5).tolist() == image[size // 2 :].tolist()
    if size >= 64:
        assert image.tolist() != everything.tolist()
        assert image.tolist() != permute(everything, size, key=6).tolist()


def test_keys_depend_on_every_part() -> None:
    assert len({derive_key(*parts) for parts in ((1,), (2,), (1, "a"), (1, "b"), (1, "a", 0), (1, "a", 1))}) == 6


def test_mixture_keeps_its_shares_over_any_stretch() -> None:
    mixture = Mixture([4.5, 4.5, 1.0], seed=3)
    for first, stop in ((0, 20), (1000, 1100), (65_000, 67_000)):
        counts = np.bincount(mixture.choose(first, stop), minlength=3)
        assert np.abs(counts - (stop - first) * np.array([0.45, 0.45, 0.1])).max() <= SHARE_TOLERANCE


def test_mixture_counts_are_what_was_chosen() -> None:
    mixture = Mixture([1, 2, 3], seed=9)
    everything = mixture.choose(0, 140_000)
    for index in (0, 1, 65_536, 65_537, 140_000, 3):
        assert mixture.count_before(index).tolist() == np.bincount(everything[:index], minlength=3).tolist()
    before = np.concatenate(([[0, 0, 0]], np.cumsum(np.eye(3, dtype=np.int64)[everything], axis=0)))
    for first, step in ((0, 1), (65_530, 1), (3, 4), (131_000, 16)):  # forward by strides, over the ends of blocks
        for index in range(first, first + 20 * step, step):
            assert mixture.count_before(index).tolist() == before[index].tolist()


def test_counting_forward_looks_at_new_indices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, looked_at = Mixture([1, 2], seed=0), []
    choose = mixture.choose
    monkeypatch.setattr(mixture, "choose", lambda first, stop: looked_at.append(stop - first) or choose(first, stop))
    for index in range(65_000, 66_000, 8):
        mixture.count_before(index)
    assert looked_at == [65_000] + [8] * 124
    assert Mixture([7], seed=0).choose(0, 5).tolist() == [0] * 5


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [float("nan")]])
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(DataError, match="mixture weights"):
        Mixture(weights, seed=0)


def test_no_document_repeats_inside_an_epoch() -> None:
    epochs = EpochOrder(11, seed=1, source=0, shuffle=True)
    first, second = epochs.documents(0, 11), epochs.documents(11, 22)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(11))
    assert first.tolist() != second.tolist()
    assert epochs.documents(5, 17).tolist() == [*first[5:], *second[:6]]
    assert EpochOrder(4, seed=1, source=0, shuffle=False).documents(2, 9).tolist() == [2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("unit", ["row", "sample"])
def test_rows_are_random_access(sources: list[IndexedSource], unit: str) -> None:
    first, fresh, other = order(sources, unit=unit), order(sources, unit=unit), order(sources, unit=unit, seed=2)
    straight = [first.row(r) for r in range(120)]
    for r in (119, 3, 60, 0):
        assert fresh.row(r) == straight[r]
    assert [other.row(r) for r in range(120)] != straight
    kinds = {len({source for source, _ in task.samples}) for task in straight}
    assert kinds == {1} if unit == "row" else max(kinds) > 1


@pytest.mark.parametrize("unit", ["row", "sample"])
def test_whole_epochs_show_every_document_equally_often(
    sources: list[IndexedSource], unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_order, "CHUNK_DOCUMENTS", 32)
    monkeypatch.setattr(row_order, "CHUNK_SAMPLES", 128)
    rows = order(sources, unit=unit)
    seen: list[list[int]] = [[], [], []]
    for r in range(400):
        for source, document in rows.row(r).samples:
            seen[source].append(document)
    for source, documents in zip(sources, seen, strict=True):
        size = source.num_documents
        epochs = len(documents) // size
        assert epochs >= 2
        for epoch in range(epochs):
            assert sorted(documents[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_rows_respect_the_length(sources: list[IndexedSource]) -> None:
    rows = order(sources)
    for r in range(100):
        task = rows.row(r)
        assert 0 < sum(int(sources[s].token_lengths[d]) for s, d in task.samples) <= RULES.seq_length


def test_shares_by_row(sources: list[IndexedSource]) -> None:
    rows = order(sources)
    counts = Counter(rows.row(r).samples[0][0] for r in range(200))
    assert all(abs(counts[s] - 200 * share) <= SHARE_TOLERANCE for s, share in enumerate((0.5, 0.3, 0.2)))


def test_dropped_documents_are_reported(tmp_path: Path) -> None:
    rows = RowOrder([text_source(tmp_path / "s", [5, 1, 40, 6])], [1.0], RULES, seed=0, unit="row", shuffle=False)
    assert [rows.row(r).samples for r in range(3)] == [((0, 0),), ((0, 2),), ((0, 3),)]
    (report,) = rows.reports
    assert (report.documents, report.kept, report.truncated, report.truncated_tokens) == (4, 3, 1, 8)
    assert dict(report.dropped) == {"too short": 1}


@pytest.mark.parametrize("unit", ["row", "sample"])
def test_a_source_without_a_usable_document(tmp_path: Path, unit: str) -> None:
    with pytest.raises(DataError, match=r"no document of source 's' fits a row: .*too short.*: "):
        RowOrder([text_source(tmp_path / "s", [1, 1])], [1.0], RULES, seed=0, unit=unit, shuffle=True).row(0)
    with pytest.raises(DataError, match="source 'e' holds no document"):
        RowOrder([text_source(tmp_path / "e", [])], [1.0], RULES, seed=0, unit=unit, shuffle=True)


@pytest.mark.parametrize("unit", ["row", "sample"])
def test_tiles_of_rows_are_those_of_their_documents(tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_order, "CHUNK_DOCUMENTS", 32)
    monkeypatch.setattr(row_order, "CHUNK_SAMPLES", 64)
    rules = replace(RULES, tiling=TilingConfig(mode="static"), seq_length=64, max_tiles=12)
    readers = [image_source(tmp_path / "a", [0, 1, 2] * 30), image_source(tmp_path / "b", [1, 3, 0, 0, 1] * 9)]
    rows = RowOrder(readers, [0.7, 0.3], rules, seed=1, unit=unit, shuffle=True)
    for first, stop in ((150, 190), (0, 60), (60, 61), (7, 7)):
        expected = [
            sum(int(measure(readers[s], np.array([d]), rules).tiles[0]) for s, d in rows.row(r).samples)
            for r in range(first, stop)
        ]
        assert rows.tiles(first, stop).tolist() == expected
    assert len(set(rows.tiles(0, 60).tolist())) > 3


# --- The rows of a step


@pytest.mark.parametrize("row_dealing", ["balanced", "round_robin"])
def test_each_row_of_a_step_goes_to_one_rank(row_dealing: str) -> None:
    plan = BatchPlan(global_batch_size=24, micro_batch_size=2, data_size=3, row_dealing=row_dealing)
    tiles = np.arange(24) % 7
    dealt = [plan.micro_batches(48, rank, tiles_R=tiles) for rank in range(3)]
    assert sorted(row for rank in dealt for batch in rank for row in batch) == list(range(48, 72))
    assert (dealt[1] == ((50, 51), (56, 57), (62, 63), (68, 69))) == (row_dealing == "round_robin")
    totals = [sum(int(tiles[row - 48]) for batch in rank for row in batch) for rank in dealt]
    assert (max(totals) - min(totals) <= 1) == (row_dealing == "balanced")
    assert plan.micro_batches_per_step(0) == 4


def test_ramp() -> None:
    plan = BatchPlan(global_batch_size=16, micro_batch_size=1, data_size=2, rampup=(4, 4, 300))
    assert [plan.rows_of_step(c) for c in (0, 99, 100, 199, 200, 299, 300, 10_000)] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert [plan.micro_batches_per_step(c) for c in (0, 300)] == [2, 8]
    assert BatchPlan(8, 1, 1, rampup=(8, 4, 10)).rows_of_step(0) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 2, 3, None), r"batches of \[10\] rows cannot be split over 3 data-parallel ranks x micro-batches of 2"),
        ((12, 1, 4, (2, 2, 100)), r"batches of \[2, 6, 10\] rows"),
        ((12, 1, 1, (5, 2, 100)), r"\(5, 2, 100\) does not reach global_batch_size 12"),
        ((12, 1, 1, (16, 2, 100)), "does not reach"),
        ((12, 0, 1, None), "cannot be split"),
    ],
)
def test_impossible_plans(arguments: tuple[int, int, int, tuple[int, int, int] | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchPlan(*arguments)
