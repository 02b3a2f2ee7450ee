"""What holds for any sources, weights, ranks, workers and restarts, on drawn cases.

The rows are the same; no document comes again before every other was shown; after k epochs each was shown k times less
the counted drops; no image is split or lost; the ledger adds up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.batch import MMBatch, RankView, RowRecord
from mm15_megatron.config.schema import (
    ConnectorConfig,
    DataConfig,
    LanguageConfig,
    RunConfig,
    SourceConfig,
    TilingConfig,
    TrainConfig,
    VisionConfig,
    WeightChange,
)
from mm15_megatron.data.indexed.format import KINDS
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.ledger import Ledger, count_rows
from mm15_megatron.data.loader import build_loader
from mm15_megatron.data.open_order import open_order
from mm15_megatron.data.pieces import Pieces, cut_documents
from mm15_megatron.data.source_order import CHUNK_SAMPLES
from mm15_megatron.data.tokenizer import Tokenizer
from tests.data.images import photo

SEEDS = range(10)
SLOTS = 4


@dataclass(frozen=True)
class Case:
    """A drawn run and what its sources hold."""

    cfg: RunConfig
    rng: np.random.Generator

    @property
    def by_sample(self) -> bool:
        """Whether a step takes samples."""
        return self.cfg.data.batch_unit == "samples"


def source(folder: Path, name: str, kind: str, rng: np.random.Generator, tokenizer: Tokenizer) -> None:
    """Documents of drawn lengths and pictures, some of which no row holds, and some pictures that do not decode."""
    pictures = [photo(int(rng.integers(8, 40)), int(rng.integers(8, 40)), seed=n) for n in range(3)]
    sizes = [EncodedImage(data, *_size(data)) for data in pictures]
    with DatasetWriter(
        folder / name, kind=kind, tokenizer_digest=tokenizer.digest, image_sentinel_id=tokenizer.image_id
    ) as writer:
        for _ in range(int(rng.integers(3, 40))):
            tokens = [9] * int(rng.integers(1, 150 if kind in ("text", "interleaved") else 60))
            count = 0 if kind == "text" else int(rng.integers(0, 9 if kind == "interleaved" else 3))
            for _ in range(count):
                tokens.insert(int(rng.integers(len(tokens) + 1)), tokenizer.image_id)
            images = [sizes[int(rng.integers(3))] for _ in range(count)]
            broken = [replace(i, data=i.data[: len(i.data) // 2]) if rng.random() < 0.1 else i for i in images]
            mask = rng.integers(0, 2, len(tokens)).tolist() if kind == "conversations" else None
            writer.add_document(tokens, images=broken, loss_mask=mask)


def _size(data: bytes) -> tuple[int, int]:
    from mm15_megatron.data.image.pillow import check_image

    image = check_image(data, max_pixels=10**6)
    return image.height, image.width


@pytest.fixture(params=SEEDS)
def case(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> Case:
    rng = np.random.default_rng(request.param)
    unit = ("row", "sample", "token", "sample")[request.param % 4]
    names = [f"s{n}" for n in range(int(rng.integers(1, 5)))]
    for name in names:
        source(tmp_path, name, str(rng.choice(KINDS)), rng, tokenizer)
    weights = rng.uniform(0.2, 3, len(names)).tolist()
    later = [
        (WeightChange(int(rng.integers(1, 60)), float(rng.uniform(0.1, 2))),) if rng.random() < 0.3 else ()
        for _ in names
    ]
    sources = tuple(
        SourceConfig(prefix=str(tmp_path / name), weight=weight, changes=changes)
        for name, weight, changes in zip(names, weights, later, strict=True)
    )
    tiling = TilingConfig(
        mode=str(rng.choice(["none", "static", "dynamic"])),
        max_tiles=6,
        indicator=str(rng.choice(["none", "index", "seps"])),
    )
    data = DataConfig(
        sources=sources,
        tokenizer=str(tokenizer.path),
        seq_length=int(rng.choice([96, 160])),
        max_images=int(rng.integers(3, 7)),
        max_tiles=int(rng.integers(14, 20)),
        mixture_unit=unit,
        batch_unit="samples" if request.param % 4 == 3 else "rows",
        shuffle=str(rng.choice(["full", "blocks", "none"])),
        shuffle_block=int(rng.integers(1, 6)),
        shuffle_window=int(rng.integers(1, 6)),
        num_workers=0,
        decoder="pil",
    )
    cfg = RunConfig(
        language=LanguageConfig(vocab_size=128),
        vision=VisionConfig(image_size=14),
        connector=ConnectorConfig(num_tokens=SLOTS),
        tiling=tiling,
        data=data,
        train=TrainConfig(global_batch_size=12, steps=20, seed=int(rng.integers(100)), run_dir=str(tmp_path / "run")),
    )
    return Case(cfg, rng)


def take_steps(cfg: RunConfig, *, first: int, stop: int, view: RankView) -> list[list[MMBatch]]:
    """The micro-batches of some steps of one rank."""
    units = cfg.train.global_batch_size
    with build_loader(cfg, view=view, consumed=first * units) as loader:
        return [list(islice(loader, loader.step(step * units).micro_batches)) for step in range(first, stop)]


def records(steps: list[list[MMBatch]]) -> list[dict[int, RowRecord]]:
    return [{row.row: row for batch in step for row in batch.rows} for step in steps]


def held(records: list[dict[int, RowRecord]]) -> list[list[RowRecord]]:
    """Rows that hold something; how many empty ones fill a step up depends on the ranks."""
    return [[row for _, row in sorted(step.items()) if row.samples] for step in records]


def test_rows_are_the_same_for_any_ranks_workers_and_restarts(case: Case) -> None:
    cfg, rng = case.cfg, case.rng
    straight = held(records(take_steps(cfg, first=0, stop=6, view=RankView())))
    for _ in range(2):
        size, micro = [(2, 1), (3, 2), (4, 1), (1, 3), (2, 3)][int(rng.integers(5))]
        other = replace(cfg, train=replace(cfg.train, micro_batch_size=micro))
        other = replace(other, data=replace(other.data, row_dealing="round_robin"))
        middle = int(rng.integers(1, 6))
        found: list[dict[int, RowRecord]] = [{} for _ in range(6)]
        for rank in range(size):
            view = RankView(data_rank=rank, data_size=size)
            workers = int(rank == 0 and rng.random() < 0.3)  # starting one takes seconds
            begun = replace(other, data=replace(other.data, num_workers=workers))
            parts = take_steps(begun, first=0, stop=middle, view=view)
            parts += take_steps(other, first=middle, stop=6, view=view)
            for step, rows in zip(found, records(parts), strict=True):
                assert not step.keys() & rows.keys(), "a row goes to one rank"
                step |= rows
        assert held(found) == straight


def _names(pieces: Pieces) -> set[tuple[int, int, int]]:
    return set(zip(pieces.documents.tolist(), pieces.first.tolist(), pieces.stop.tolist(), strict=True))


def test_epochs(case: Case) -> None:
    """By the order alone: what each source was shown, against the pieces that its documents become."""
    opened = open_order(case.cfg)
    order, units = opened.order, case.cfg.train.global_batch_size
    shown: list[Counter[tuple[int, int, int]]] = [Counter() for _ in order.sources]
    for step in range(60):
        for task in order.step(step * units, units).tasks:
            for sample in task.samples:
                shown[sample.source][sample.document, sample.first, sample.stop] += 1
    reports, seen = order.reports, order.seen(60 * units)
    for number, reader in enumerate(opened.readers):
        cut = cut_documents(reader, np.arange(reader.num_documents), opened.rules)
        expected = _names(cut.pieces)
        assert set(shown[number]) <= expected
        often = [shown[number][piece] for piece in expected]
        if case.by_sample and case.cfg.data.mixture_unit == "sample":
            # samples are in order: an epoch ends before the next begins
            assert max(often) - min(often) <= 1
            assert min(often) <= seen[number].epochs <= max(often) or not max(often)
        assert max(often) <= max(1, reports[number].epochs)
        if case.by_sample or case.cfg.data.mixture_unit != "sample":
            # rows of a chunk are in no order of their documents; chunks of mixed samples hold many short epochs
            assert np.mean(often) == pytest.approx(seen[number].epochs, abs=1)
        dropped = sum(reports[number].dropped.values())
        assert dropped + reports[number].counts["kept"] == reports[number].counts["documents"]
    assert sum(sum(counts.values()) for counts in shown) > 0


@pytest.mark.parametrize("case", [seed for seed in SEEDS if seed % 4 == 1], indirect=True)
def test_a_chunk_of_mixed_rows_goes_through_each_source_in_order(case: Case) -> None:
    """Behind a whole chunk every piece of a source was shown equally often, or once more, as the mixture said."""
    assert (case.cfg.data.mixture_unit, case.cfg.data.batch_unit) == ("sample", "rows")
    opened = open_order(case.cfg)
    order = opened.order
    shown: list[Counter[tuple[int, int, int]]] = [Counter() for _ in order.sources]
    taken = row = 0
    while taken < CHUNK_SAMPLES:
        samples = order.row(row).samples
        for sample in samples:
            shown[sample.source][sample.document, sample.first, sample.stop] += 1
        row, taken = row + 1, taken + len(samples)
    assert taken == CHUNK_SAMPLES, "no row holds samples of two chunks"
    assert [sum(counts.values()) for counts in shown] == order.mixture.count_before(CHUNK_SAMPLES).tolist()
    for counts, reader in zip(shown, opened.readers, strict=True):
        cut = cut_documents(reader, np.arange(reader.num_documents), opened.rules)
        often = [counts[piece] for piece in _names(cut.pieces)]
        assert sum(often) == sum(counts.values())
        assert max(often) - min(often) <= 1


def test_images_are_whole_and_the_ledger_adds_up(case: Case) -> None:
    cfg = case.cfg
    readers = [IndexedSource(source.prefix) for source in cfg.data.sources]
    names = [reader.name for reader in readers]
    ledger = Ledger.empty(names, [r.kind for r in readers], [r.manifest.digest for r in readers])
    steps = take_steps(cfg, first=0, stop=8, view=RankView())
    sentinel = readers[0].manifest.image_sentinel_id
    for step in steps:
        for batch in step:
            slots = batch.slots_NP
            assert (batch.tokens_T[slots] == sentinel).all()
            assert int((batch.tokens_T == sentinel).sum()) == slots.numel()
            bounds = batch.segment_bounds_G.numpy()
            owner = np.searchsorted(bounds, slots.numpy(), side="right")
            assert (owner == owner[:, :1]).all(), "a tile lies inside one sample"
            rows = slots.numpy() // cfg.data.seq_length
            assert (rows == rows[:, :1]).all()
            images = Counter(np.atleast_1d(rows[:, 0]).tolist())
            assert all(count <= cfg.data.max_tiles for count in images.values())
            for row in batch.rows:
                assert sum(sample.images for sample in row.samples) <= cfg.data.max_images
                assert row.text_tokens + row.image_slots + row.padding == cfg.data.seq_length
            assert batch.sources_T[~batch.padding_mask_T].unique().tolist() == sorted(
                {sample.source for row in batch.rows for sample in row.samples}
            )
            ledger = ledger.after(count_rows(batch.rows, sources=len(names)), loss=np.zeros((len(names), 2)))
    rows = sum(len(batch.rows) for step in steps for batch in step)
    assert (ledger.rows, ledger.tokens) == (rows, rows * cfg.data.seq_length)
    samples = sum(len(row.samples) for step in steps for batch in step for row in batch.rows)
    assert ledger.column("samples").sum() == samples
    if case.by_sample:
        assert samples == 8 * cfg.train.global_batch_size
    broken = sum(len(row.substituted) for step in steps for batch in step for row in batch.rows)
    assert ledger.column("substituted").sum() == broken
