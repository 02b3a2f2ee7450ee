"""The order of rows: bijections, epochs, shuffles, random access, and the rows of a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm15_megatron.config.schema import TilingConfig
from mm15_megatron.data.batch_plan import BatchPlan
from mm15_megatron.data.epoch_order import EpochOrder, Shuffle
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.packing import Sizes
from mm15_megatron.data.permutation import derive_key, permute
from mm15_megatron.data.pieces import Pieces, cut_documents
from mm15_megatron.data.row_order import RowOrder, RowRange, RowTask
from mm15_megatron.data.row_table import ChunkTable
from mm15_megatron.data.samples import SampleRef
from mm15_megatron.data.source_order import OrderOptions, pack_samples
from mm15_megatron.errors import ConfigError, DataError
from tests.data.rows import RULES, image_source, row_order, text_source

SHARE_TOLERANCE = 3  # rows: how far a golden-ratio sequence strays from its share over any stretch
OPTIONS = OrderOptions(seed=1, chunk_documents=32, chunk_samples=128)
UNITS = ("row", "sample")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[IndexedSource]:
    folder = tmp_path_factory.mktemp("order")
    rng = np.random.default_rng(1)
    return [text_source(folder / name, rng.integers(2, 20, n).tolist()) for name, n in (("a", 97), ("b", 41), ("c", 5))]


def order(sources: list[IndexedSource], *, unit: str = "row", options: OrderOptions = OPTIONS) -> RowOrder:
    return row_order(sources, [0.5, 0.3, 0.2], options=options, unit=unit)


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


def epochs(documents: int, shuffle: Shuffle, *, source: str = "s", seed: int = 1, chunk: int = 4) -> EpochOrder:
    return EpochOrder(documents, seed=seed, source=source, shuffle=shuffle, chunk=chunk)


@pytest.mark.parametrize("documents", [1, 3, 11, 12, 64, 65])
@pytest.mark.parametrize("shuffle", [Shuffle("full"), Shuffle("blocks", block=4, window=3), Shuffle("none")])
def test_no_document_repeats_inside_an_epoch(documents: int, shuffle: Shuffle) -> None:
    order = epochs(documents, shuffle)
    seen = [np.concatenate([order.chunk(e * order.chunks + c) for c in range(order.chunks)]) for e in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(documents)) for epoch in seen)
    if documents > 10:
        assert (seen[0].tolist() != seen[1].tolist()) == (shuffle.mode != "none") == order.shuffles
        other = epochs(documents, shuffle, source="t")
        assert (other.chunk(0).tolist() != order.chunk(0).tolist()) == order.shuffles


def test_the_stored_order() -> None:
    order = epochs(6, Shuffle("none"))
    assert [order.chunk(c).tolist() for c in range(4)] == [[0, 1, 2, 3], [4, 5], [0, 1, 2, 3], [4, 5]]


def test_a_window_of_blocks_is_read_from_few_places() -> None:
    order = epochs(1003, Shuffle("blocks", block=10, window=5))
    assert order.chunks == 21
    for window in range(order.chunks):
        documents = order.chunk(window)
        blocks = Counter((documents // 10).tolist())
        assert len(blocks) == (5 if window < 20 else 1)
        assert all(count == 10 for block, count in blocks.items() if block < 100)
        assert len(documents) == (50 if window < 20 else 3)
    first = order.chunk(0).tolist()
    assert first != sorted(first)
    assert len({number // 10 for number in first[:10]}) > 1, "blocks are mixed inside a window"


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shuffle", ["full", "blocks", "none"])
def test_rows_are_random_access(sources: list[IndexedSource], unit: str, shuffle: str) -> None:
    options = replace(OPTIONS, shuffle=Shuffle(shuffle, block=4, window=4))
    first, fresh = order(sources, unit=unit, options=options), order(sources, unit=unit, options=options)
    straight = [first.row(r) for r in range(120)]
    for r in (119, 3, 60, 0):
        assert fresh.row(r) == straight[r]
    assert list(fresh.rows(17, 90).tasks) == straight[17:90]
    assert [task.row for task in straight] == list(range(120))
    other = order(sources, unit=unit, options=replace(options, seed=2))
    assert [other.row(r) for r in range(120)] != straight
    kinds = {len({sample.source for sample in task.samples}) for task in straight}
    assert kinds == {1} if unit == "row" else max(kinds) > 1


@pytest.mark.parametrize("unit", UNITS)
def test_whole_epochs_show_every_document_equally_often(sources: list[IndexedSource], unit: str) -> None:
    rows = order(sources, unit=unit)
    by_source: list[Counter[int]] = [Counter() for _ in sources]
    shown, r = 0, 0
    while shown < 1000 or (unit == "sample" and shown % OPTIONS.chunk_samples):  # the end of a mixed chunk
        task = rows.row(r)
        for sample in task.samples:
            by_source[sample.source][sample.document] += 1
        shown, r = shown + len(task.samples), r + 1
    for source, counts, report in zip(sources, by_source, rows.reports, strict=True):
        assert set(counts) == set(range(source.num_documents))
        # rows stand in a keyed order inside a chunk: the epochs that are complete are shown equally often
        assert max(counts.values()) - min(counts.values()) <= 1
        assert report.epochs - 1 <= min(counts.values()) <= max(counts.values()) <= report.epochs
        assert min(counts.values()) >= 2


def test_rows_respect_the_length(sources: list[IndexedSource]) -> None:
    rows = order(sources)
    for r in range(100):
        assert 0 < sum(sample.stop - sample.first for sample in rows.row(r).samples) <= RULES.seq_length


def test_shares_by_row(sources: list[IndexedSource]) -> None:
    rows = order(sources)
    counts = Counter(rows.row(r).samples[0].source for r in range(200))
    assert all(abs(counts[s] - 200 * share) <= SHARE_TOLERANCE for s, share in enumerate((0.5, 0.3, 0.2)))


def test_shares_by_sample(sources: list[IndexedSource]) -> None:
    rows = order(sources, unit="sample")
    counts = Counter(sample.source for r in range(128) for sample in rows.row(r).samples)
    total = sum(counts.values())
    for s, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(counts[s] - total * share) <= SHARE_TOLERANCE + OPTIONS.chunk_samples


def test_pieces_of_a_long_document_are_spread_over_rows(tmp_path: Path) -> None:
    reader = text_source(tmp_path / "s", [9, 200, 9, 9, 9, 9])
    rows = row_order([reader], [1.0], options=OrderOptions(seed=1))
    epoch = [rows.row(r) for r in range(rows.rows_before_repeat(100))]
    pieces = sorted(s for task in epoch for s in task.samples if s.document == 1)
    assert [(s.first, s.stop) for s in pieces] == [(31 * i, min(31 * i + 32, 200)) for i in range(7)]
    (report,) = rows.reports
    assert (report.counts["documents"], report.counts["samples"], report.epochs) == (12, 24, 2)  # the next was begun
    assert not report.loses


def test_dropped_documents_are_reported(tmp_path: Path) -> None:
    reader = text_source(tmp_path / "s", [5, 1, 40, 6])
    rows = row_order([reader], [1.0], options=replace(OPTIONS, shuffle=Shuffle("none")))
    found = sorted(sample for r in range(2) for sample in rows.row(r).samples)
    assert found == [SampleRef(0, 0, 0, 5), SampleRef(0, 2, 0, 32), SampleRef(0, 2, 31, 40), SampleRef(0, 3, 0, 6)]
    (report,) = rows.reports
    assert (report.counts["documents"], report.counts["kept"], report.counts["samples"]) == (4, 3, 4)
    assert report.dropped == {"nothing to predict": 1}
    assert report.loses
    assert str(report) == (
        "source s: of 4 documents 3 kept as 4 samples, 0 truncated (0 tokens), dropped: {'nothing to predict': 1}"
    )


@pytest.mark.parametrize("unit", UNITS)
def test_a_source_without_a_usable_document(tmp_path: Path, unit: str) -> None:
    with pytest.raises(DataError, match=r"no document of source 's' fits a row: .*nothing to predict.*: "):
        row_order([text_source(tmp_path / "s", [1, 1])], [1.0], unit=unit).row(0)
    with pytest.raises(DataError, match="source 'e' holds no document"):
        row_order([text_source(tmp_path / "e", [])], [1.0], unit=unit)


@pytest.mark.parametrize("unit", UNITS)
def test_tiles_of_rows_are_those_of_their_documents(tmp_path: Path, unit: str) -> None:
    rules = replace(RULES, tiling=TilingConfig(mode="static"), seq_length=64, max_tiles=12)
    readers = [image_source(tmp_path / "a", [0, 1, 2] * 30), image_source(tmp_path / "b", [1, 3, 0, 0, 1] * 9)]
    rows = row_order(readers, [0.7, 0.3], rules, options=replace(OPTIONS, chunk_samples=64), unit=unit)
    for first, stop in ((150, 190), (0, 60), (60, 61), (7, 7)):
        found = rows.rows(first, stop)
        expected = [
            sum(
                int(cut_documents(readers[s.source], np.array([s.document]), rules).pieces.sizes.tiles.sum())
                for s in task.samples
            )
            for task in found.tasks
        ]
        assert found.tiles_R.tolist() == expected
    assert len(set(rows.rows(0, 60).tiles_R.tolist())) > 2


def test_documents_beyond_four_bytes_keep_their_number() -> None:
    far = np.array([2**31 + 5, 7])
    pieces = Pieces(far, np.zeros(2, np.int64), np.array([3, 3]), Sizes(np.array([3, 3]), *[np.zeros(2, np.int64)] * 2))
    rows = pack_samples(np.zeros(2, np.int64), pieces, RULES, key=None)
    assert [sample.document for sample in rows.samples(0)] == far.tolist()


def test_the_digest_of_a_source_does_not_depend_on_the_others(sources: list[IndexedSource]) -> None:
    alone, together = row_order(sources[1:2], [1.0]), row_order(sources, [1.0, 1.0, 1.0])
    assert alone.sources[0].stream.digest == together.sources[1].stream.digest
    assert alone.digest != together.digest


# --- The table


def squares(chunk: int) -> np.ndarray:
    return np.array([1 + chunk, chunk * chunk])


def test_a_table_grows_and_is_found_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def measure(chunk: int) -> np.ndarray:
        asked.append(chunk)
        return squares(chunk)

    path = tmp_path / "plan" / "s.rows"
    table = ChunkTable(path, columns=2, measure=measure, writes=True)
    assert table.find(0, column=0) == (0, 0)
    assert table.find(5, column=0) == (2, 3)
    assert (table.before(3).tolist(), table.line(1).tolist(), len(table)) == ([6, 5], [2, 1], 3)
    assert [p.name for p in path.parent.iterdir()] == ["s.rows"]
    again = ChunkTable(path, columns=2, measure=measure)
    assert again.before(3).tolist() == [6, 5]
    assert asked == [0, 1, 2]
    again.extend(5)
    assert len(ChunkTable(path, columns=2, measure=measure)) == 3, "only one process writes"
    ahead = ChunkTable(path, columns=2, measure=measure, writes=True, together=4)
    ahead.extend(6)
    assert len(ChunkTable(path, columns=2, measure=measure)) == 3
    ahead.extend(7)
    assert len(ChunkTable(path, columns=2, measure=measure)) == 7
    behind = ChunkTable(None, columns=2, measure=measure, writes=True)
    behind.extend(1)
    assert len(behind) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "other columns", "empty"])
def test_a_damaged_table_is_computed_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.rows"
    ChunkTable(path, columns=2, measure=squares, writes=True).extend(4)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    path.write_bytes(content[: {"cut": -8, "empty": 0}.get(damage, len(content))])
    columns = 3 if damage == "other columns" else 2
    table = ChunkTable(path, columns=columns, measure=lambda chunk: np.arange(columns) + chunk, writes=True)
    assert len(table) == 0
    table.extend(2)
    assert len(ChunkTable(path, columns=columns, measure=squares)) == 2


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_table_of_other_rows_is_an_error(sources: list[IndexedSource], unit: str, wrong: int, tmp_path: Path) -> None:
    """A valid file whose numbers are another program's: never other rows, never an endless search."""
    options = replace(OPTIONS, chunk_samples=16, tables=tmp_path, writes=True)
    order(sources, unit=unit, options=options).rows(0, 100)
    source = order(sources, unit=unit, options=options).sources[0]
    columns = len(source.stream.columns)
    lines = [source.table.line(chunk) for chunk in range(4)]
    lines[0] = lines[0] + wrong
    source.table.path.unlink()
    ChunkTable(source.table.path, columns=columns, measure=lines.__getitem__, writes=True).extend(4)
    with pytest.raises(DataError, match=r"(?s)chunk 0 of source 'a' packs into .*, its table says .*remove it"):
        order(sources, unit=unit, options=options).rows(0, 100)


@pytest.mark.parametrize("unit", UNITS)
def test_a_resumed_run_finds_its_row_in_the_table(sources: list[IndexedSource], unit: str, tmp_path: Path) -> None:
    options = replace(OPTIONS, chunk_samples=16, tables=tmp_path, writes=True)
    straight = order(sources, unit=unit, options=options)
    expected = [straight.row(r) for r in range(400)]
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == (4 if unit == "sample" else 3)
    resumed = order(sources, unit=unit, options=replace(options, writes=False))
    assert all(len(source.table) >= 4 for source in resumed.sources)
    assert [resumed.row(r) for r in range(390, 400)] == expected[390:]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
    assert [report.epochs for report in resumed.reports] == [report.epochs for report in straight.reports]


# --- The rows of a step


@pytest.mark.parametrize("row_dealing", ["balanced", "round_robin"])
def test_each_row_of_a_step_goes_to_one_rank(row_dealing: str) -> None:
    plan = BatchPlan(global_batch_size=24, micro_batch_size=2, data_size=3, row_dealing=row_dealing)
    tiles = np.arange(24) % 7
    rows = RowRange(tuple(RowTask(row, ()) for row in range(48, 72)), tiles)
    dealt = [
        tuple(tuple(task.row for task in batch) for batch in plan.micro_batches(rank, plan.filled_up(rows)))
        for rank in range(3)
    ]
    assert sorted(row for rank in dealt for batch in rank for row in batch) == list(range(48, 72))
    assert (dealt[1] == ((50, 51), (56, 57), (62, 63), (68, 69))) == (row_dealing == "round_robin")
    totals = [sum(int(tiles[row - 48]) for batch in rank for row in batch) for rank in dealt]
    assert (max(totals) - min(totals) <= 1) == (row_dealing == "balanced")


def test_ramp() -> None:
    plan = BatchPlan(global_batch_size=16, micro_batch_size=1, data_size=2, rampup=(4, 4, 300))
    assert [plan.units_of_step(c) for c in (0, 99, 100, 199, 200, 299, 300, 10_000)] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert BatchPlan(8, 1, 1, rampup=(8, 4, 10)).units_of_step(0) == 8


# --- Batches of samples


@pytest.mark.parametrize("samples", [10, 64])
def test_a_step_of_samples_holds_exactly_so_many(sources: list[IndexedSource], samples: int) -> None:
    options = replace(OPTIONS, batch_unit="samples")
    rows = order(sources, unit="sample", options=options)
    stream = [s for step in range(12) for task in rows.step(step * samples, samples).tasks for s in task.samples]
    assert len(stream) == 12 * samples
    counts = Counter(sample.source for sample in stream)
    assert all(abs(counts[s] - len(stream) * share) <= SHARE_TOLERANCE for s, share in enumerate((0.5, 0.3, 0.2)))
    for source, size in enumerate((97, 41, 5)):
        shown = Counter(sample.document for sample in stream if sample.source == source)
        often = [shown[document] for document in range(size)]
        assert max(often) - min(often) <= 1, "no document comes again before every other was shown"
    fresh = order(sources, unit="sample", options=options)
    assert fresh.step(5 * samples, samples) != RowRange((), np.zeros(0))
    assert fresh.step(5 * samples, samples).tasks == rows.step(5 * samples, samples).tasks
    for task in rows.step(0, samples).tasks:
        assert 0 < sum(s.stop - s.first for s in task.samples) <= RULES.seq_length


def test_empty_rows_fill_a_step_up() -> None:
    plan = BatchPlan(16, 2, 3, batch_unit="samples", micro_batch_multiple=2)
    rows = RowRange(tuple(RowTask(16 + i, (SampleRef(0, i, 0, 4),)) for i in range(7)), np.arange(7))
    full = plan.filled_up(rows)
    assert len(full.tasks) == len(full.tiles_R) == 12
    assert full.tasks[:7] == rows.tasks
    assert [task.row for task in full.tasks] == list(range(16, 28))
    assert all(task.samples == () for task in full.tasks[7:])
    dealt = [plan.micro_batches(rank, full) for rank in range(3)]
    assert [len(batches) for batches in dealt] == [2, 2, 2]
    assert sorted(t.row for batches in dealt for batch in batches for t in batch) == list(range(16, 28))
    assert plan.filled_up(full) is full


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 2, 3, None), r"batches of \[10\] rows cannot be split over 3 data-parallel ranks x micro-batches of 2"),
        ((12, 1, 4, (2, 2, 100)), r"batches of \[2, 6, 10\] rows"),
        ((12, 1, 1, (5, 2, 100)), r"\(5, 2, 100\) does not reach global_batch_size 12"),
        ((12, 1, 1, (16, 2, 100)), "does not reach"),
        ((12, 0, 1, None), "cannot be split"),
        ((12, 2, 2, None, "balanced", "rows", 2), r"batches of \[12\] rows cannot .* in multiples of 2"),
    ],
)
def test_impossible_plans(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchPlan(*arguments)
