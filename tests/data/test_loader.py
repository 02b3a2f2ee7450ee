"""The loader: the same micro-batches whatever the workers and ranks, and errors that say what happened."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mm15_megatron.batch import MMBatch, RankView, tile_share
from mm15_megatron.config.schema import (
    ConnectorConfig,
    DataConfig,
    LanguageConfig,
    RunConfig,
    SourceConfig,
    TilingConfig,
    TrainConfig,
    VisionConfig,
)
from mm15_megatron.data.indexed.format import read_manifest
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.loader import build_loader
from mm15_megatron.data.row_order import RowOrder
from mm15_megatron.data.tokenizer import Tokenizer, train_character_tokenizer
from mm15_megatron.errors import ConfigError, DataError

SLOTS = 4
SUM_ORDER = 1e-12  # float64 sums of float32 weights, taken in another order


@pytest.fixture
def cfg(tmp_path: Path, captions_prefix: Path, conversations_prefix: Path, tokenizer: Tokenizer) -> RunConfig:
    sources = (SourceConfig(prefix=str(captions_prefix)), SourceConfig(prefix=str(conversations_prefix), weight=2.0))
    return RunConfig(
        language=LanguageConfig(vocab_size=128),
        vision=VisionConfig(image_size=14),
        connector=ConnectorConfig(num_tokens=SLOTS),
        tiling=TilingConfig(mode="static"),
        data=DataConfig(
            sources=sources,
            validation_sources=sources[:1],
            tokenizer=str(tokenizer.path),
            seq_length=128,
            max_images=8,
            max_tiles=20,
            num_workers=0,
        ),
        train=TrainConfig(global_batch_size=8, micro_batch_size=2, run_dir=str(tmp_path / "run")),
    )


def with_data(cfg: RunConfig, **changes: object) -> RunConfig:
    return replace(cfg, data=replace(cfg.data, **changes))


def take(cfg: RunConfig, count: int, *, view: RankView = RankView(), **arguments: object) -> list[MMBatch]:  # noqa: B008
    with build_loader(cfg, view=view, **arguments) as loader:
        return list(islice(loader, count))


def assert_equal(a: MMBatch, b: MMBatch) -> None:
    for f in fields(MMBatch):
        x, y = (vars(batch)[f.name] for batch in (a, b))
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, f.name


def test_a_batch_is_whole(cfg: RunConfig, tokenizer: Tokenizer) -> None:
    for batch in take(cfg, 12):
        assert (batch.num_tokens, batch.max_segment, len(batch.rows)) == (256, 128, 2)
        slots = batch.slots_NP
        assert batch.tiles_N3HW.shape == (max(1, len(slots)), 3, 14, 14)
        assert torch.equal(
            batch.tokens_T == tokenizer.image_id, torch.zeros(256).bool().index_fill(0, slots.flatten(), True)
        )
        assert sum(r.image_slots for r in batch.rows) == slots.numel()
        assert sum(r.text_tokens + r.image_slots for r in batch.rows) == int((~batch.padding_mask_T).sum())
        assert not bool((batch.labels_T == tokenizer.image_id).any())
        assert batch.segment_bounds_G[-1] == 256
        assert torch.equal(batch.loss_mask_T > 0, batch.labels_T > 0)


def test_workers_do_not_change_the_batches(cfg: RunConfig) -> None:
    alone = take(cfg, 12)
    state = torch.random.get_rng_state()
    for workers in (1, 2):
        for a, b in zip(alone, take(with_data(cfg, num_workers=workers), 12), strict=True):
            assert_equal(a, b)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("row_dealing", ["balanced", "round_robin"])
def test_ranks_divide_the_rows_of_a_step(cfg: RunConfig, row_dealing: str) -> None:
    cfg = with_data(cfg, row_dealing=row_dealing)
    one = take(cfg, 8)
    two = [take(cfg, 4, view=RankView(data_rank=rank, data_size=2)) for rank in range(2)]
    for step in range(2):
        rows = {r.row: r for batch in one[4 * step : 4 * step + 4] for r in batch.rows}
        dealt = {r.row: r for rank in two for batch in rank[2 * step : 2 * step + 2] for r in batch.rows}
        assert dealt == rows
        assert sorted(rows) == list(range(8 * step, 8 * step + 8))


def test_balanced_ranks_have_equal_tiles(cfg: RunConfig) -> None:
    def spread(row_dealing: str) -> int:
        views = [RankView(data_rank=rank, data_size=4, reads_images=False) for rank in range(4)]
        large = replace(cfg, train=TrainConfig(global_batch_size=32, micro_batch_size=1))
        steps = [take(with_data(large, row_dealing=row_dealing), 8, view=view) for view in views]
        slots = [sum(row.image_slots for batch in batches for row in batch.rows) for batches in steps]
        return (max(slots) - min(slots)) // SLOTS

    assert spread("balanced") <= 5 < spread("round_robin")  # an image has five tiles


def test_a_step_is_dealt_alike_at_any_position(cfg: RunConfig) -> None:
    """A ramp, a change of ranks and a resumption meet the same rows in a step."""
    ramped = replace(cfg, train=TrainConfig(global_batch_size=16, micro_batch_size=2, rampup_batch_size=(8, 8, 16)))
    sizes, at = (8, 8, 16, 16), 0
    for size in sizes:
        for ranks in (1, 2, 4):
            rounds = size // (2 * ranks)
            views = [RankView(data_rank=rank, data_size=ranks, reads_images=False) for rank in range(ranks)]
            dealt = [take(ramped, rounds, view=view, consumed=at) for view in views]
            rows = sorted(row.row for batches in dealt for batch in batches for row in batch.rows)
            assert rows == list(range(at, at + size))
        at += size


@pytest.mark.parametrize("normalisation", ["token", "sample", "sqrt"])
@pytest.mark.parametrize("row_dealing", ["balanced", "round_robin"])
def test_the_first_micro_batch_says_what_the_step_holds(cfg: RunConfig, normalisation: str, row_dealing: str) -> None:
    train = replace(cfg.train, loss_normalisation=normalisation, rampup_batch_size=(4, 4, 12))
    cfg = with_data(replace(cfg, train=train), row_dealing=row_dealing, mixture_unit="sample")
    assert take(cfg, 1, view=RankView(data_size=2))[0].step_counts is None, "a dense model has no use for it"
    cfg = replace(cfg, moe=replace(cfg.moe, num_moe_experts=4))
    rounds = (1, 1, 1, 2, 2)  # steps of 4, 4, 4, 8 and 8 rows over two ranks
    for rank in range(2):
        batches = take(cfg, sum(rounds), view=RankView(data_rank=rank, data_size=2))
        later = take(cfg, sum(rounds), view=RankView(data_rank=rank, data_size=2, reads_images=False))
        assert [batch.step_counts for batch in later] == [batch.step_counts for batch in batches]
        for count in rounds:
            step, batches = batches[:count], batches[count:]
            first = step[0].step_counts
            assert first.tokens == sum(int((~batch.padding_mask_T).sum()) for batch in step)
            targets = sum(float(batch.loss_mask_T.sum(dtype=torch.float64)) for batch in step)
            assert first.targets == pytest.approx(targets, rel=SUM_ORDER)
            assert [batch.step_counts for batch in step[1:]] == [None] * (count - 1)


def row_tensors(batch: MMBatch, cfg: RunConfig) -> dict[int, dict[str, torch.Tensor]]:
    """Cut a micro-batch into its rows; positions of slots and segments count from the start of the row."""
    length = cfg.data.seq_length
    found = {}
    for number, record in enumerate(batch.rows):
        at = number * length
        mine = batch.slots_NP[:, 0] // length == number if len(batch.slots_NP) else torch.zeros(0).bool()
        bounds = batch.segment_bounds_G
        flat = ("tokens_T", "labels_T", "loss_mask_T", "position_ids_T", "padding_mask_T")
        found[record.row] = {name: vars(batch)[name][at : at + length] for name in flat} | {
            "slots": batch.slots_NP[mine] - at,
            "tiles": batch.tiles_N3HW[: len(mine)][mine],
            "bounds": bounds[(bounds > at) & (bounds <= at + length)].unique() - at,
        }
    return found


@pytest.mark.parametrize(
    ("data_size", "micro_batch", "workers"),
    [(size, micro, 0) for size in (1, 2, 4) for micro in (1, 2, 4)] + [(1, 4, 1), (2, 1, 1)],
)
def test_rows_are_the_same_in_every_layout(cfg: RunConfig, data_size: int, micro_batch: int, workers: int) -> None:
    rows = 16

    def all_rows(size: int, micro: int, num_workers: int) -> dict[int, dict[str, torch.Tensor]]:
        changed = with_data(cfg, num_workers=num_workers)
        changed = replace(changed, train=replace(cfg.train, global_batch_size=rows, micro_batch_size=micro))
        views = [RankView(data_rank=rank, data_size=size) for rank in range(size)]
        batches = [batch for view in views for batch in take(changed, rows // (size * micro), view=view)]
        return {row: tensors for batch in batches for row, tensors in row_tensors(batch, cfg).items()}

    expected, found = all_rows(1, 1, 0), all_rows(data_size, micro_batch, workers)
    assert sorted(expected) == sorted(found) == list(range(rows))
    assert sum(len(tensors["tiles"]) for tensors in expected.values()) > rows
    for row, tensors in expected.items():
        for name, value in tensors.items():
            assert torch.equal(value, found[row][name]), (row, name)


def test_the_state_says_where_to_go_on(cfg: RunConfig) -> None:
    """Micro-batches of a step that is not complete do not count: a resumed loader gives them again."""
    straight = take(cfg, 12)
    with build_loader(cfg, view=RankView()) as loader:
        for handed_out in range(1, 11):
            next(loader)
            state = loader.state_dict()
            assert state == {"consumed": 8 * (handed_out // 4), "unit": "rows", "digest": loader.digest}
    with build_loader(cfg, view=RankView(), consumed=int(state["consumed"])) as loader:
        assert loader.consumed == 16
        assert_equal(next(loader), straight[8])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_is_ordered_once(cfg: RunConfig, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for the shape of a step or for the position packs nothing again."""
    asked: list[int] = []
    step = RowOrder.step
    monkeypatch.setattr(RowOrder, "step", lambda self, first, units: asked.append(first) or step(self, first, units))
    with build_loader(with_data(cfg, num_workers=workers), view=RankView()) as loader:
        for number in range(20):
            for _ in range(loader.step(8 * number).micro_batches):
                next(loader)
            assert loader.consumed == 8 * (number + 1)
    assert len(asked) == len(set(asked)) <= 24


def test_resume_continues_the_straight_run(cfg: RunConfig) -> None:
    straight = take(cfg, 12)
    for a, b in zip(straight[8:], take(cfg, 4, consumed=16), strict=True):
        assert_equal(a, b)


def test_tensor_ranks_share_the_tiles(cfg: RunConfig) -> None:
    whole = take(cfg, 6)
    parts = [take(cfg, 6, view=RankView(tensor_rank=rank, tensor_size=3)) for rank in range(3)]
    for index, batch in enumerate(whole):
        total = len(batch.slots_NP)
        for rank in range(3):
            share = tile_share(total, rank=rank, size=3)
            mine = parts[rank][index]
            count = share.stop - share.start
            assert len(mine.tiles_N3HW) == share.padded
            assert torch.equal(mine.tiles_N3HW[:count], batch.tiles_N3HW[share.start : share.stop])
            assert not mine.tiles_N3HW[count:].any()
            assert torch.equal(mine.slots_NP, batch.slots_NP)
            assert torch.equal(mine.tokens_T, batch.tokens_T)
    replicated = take(cfg, 6, view=RankView(tensor_rank=1, tensor_size=3, shares_tiles=False))
    for a, b in zip(whole, replicated, strict=True):
        assert_equal(a, b)


def test_later_stages_never_touch_image_bytes(cfg: RunConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with DatasetWriter(
        tmp_path / "junk", kind="captions", tokenizer_digest=tokenizer.digest, image_sentinel_id=tokenizer.image_id
    ) as writer:
        writer.add_document([tokenizer.image_id, 9, 2], images=[EncodedImage(b"junk", 10, 10)])
    junk = with_data(cfg, sources=(SourceConfig(prefix=str(tmp_path / "junk")),), on_bad_image="raise", num_workers=2)
    (batch,) = take(junk, 1, view=RankView(reads_images=False))
    assert batch.tiles_N3HW is None
    assert batch.slots_NP is None
    assert batch.rows[0].image_slots > 0
    with pytest.raises(DataError, match="image 0 of document 0 of source 'junk' cannot be used: not an allowed"):
        take(with_data(junk, num_workers=0), 1)


def test_a_batch_without_images_has_one_dummy_tile(cfg: RunConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with DatasetWriter(
        tmp_path / "text", kind="conversations", tokenizer_digest=tokenizer.digest, image_sentinel_id=tokenizer.image_id
    ) as writer:
        writer.add_document([9, 8, 7, 2], loss_mask=[0, 0, 1, 1])
    (batch,) = take(with_data(cfg, sources=(SourceConfig(prefix=str(tmp_path / "text")),)), 1)
    assert torch.equal(batch.tiles_N3HW, torch.zeros(1, 3, 14, 14))
    assert batch.slots_NP.shape == (0, SLOTS)


@pytest.fixture
def damaged(cfg: RunConfig, tmp_path: Path, tokenizer: Tokenizer, captions_prefix: Path) -> RunConfig:
    """Three captions; the image of document 1 is cut in the middle."""
    good = IndexedSource(captions_prefix)
    with DatasetWriter(
        tmp_path / "bad", kind="captions", tokenizer_digest=tokenizer.digest, image_sentinel_id=tokenizer.image_id
    ) as writer:
        for document in range(3):
            height, width = good.image_sizes[document].tolist()
            data = good.image_bytes(document).tobytes()
            image = EncodedImage(data[: len(data) // 2] if document == 1 else data, height, width)
            writer.add_document(good.tokens(document).tolist(), images=[image])
    sources = (SourceConfig(prefix=str(tmp_path / "bad")),)
    train = TrainConfig(global_batch_size=1, micro_batch_size=1)
    return replace(with_data(cfg, sources=sources, shuffle="none", seq_length=256), train=train)


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_a_bad_image_is_substituted_counted_and_named(damaged: RunConfig, decoder: str) -> None:
    with build_loader(with_data(damaged, decoder=decoder), view=RankView()) as loader:
        batch = next(loader)
        assert loader.substituted == 1
    (replaced,) = batch.rows[0].substituted
    assert replaced.source == 0
    assert replaced.message.startswith("image 0 of document 1 of source 'bad': ")
    documents = [sample.document for sample in batch.rows[0].samples]
    assert sorted(documents) == [0, 1, 2]
    blank = [bool((tile == 0).all()) for tile in batch.tiles_N3HW]
    assert blank == [document == 1 for document in documents for _ in range(5)]


@pytest.mark.parametrize("shares", [True, False])
def test_a_bad_image_is_reported_by_one_tensor_rank(damaged: RunConfig, shares: bool) -> None:
    views = [RankView(tensor_rank=rank, tensor_size=2, shares_tiles=shares) for rank in range(2)]
    messages = [take(damaged, 1, view=view)[0].rows[0].substituted for view in views]
    assert sorted(map(len, messages)) == [0, 1]


def test_an_error_in_a_worker_arrives_with_its_traceback(damaged: RunConfig) -> None:
    strict = with_data(damaged, on_bad_image="raise", num_workers=1)
    with build_loader(strict, view=RankView()) as loader:
        with pytest.raises(DataError, match="(?s)Traceback.*collate.py.*document 1 of source 'bad' cannot be used"):
            next(loader)
    assert not multiprocessing.active_children()


@pytest.fixture
def working(cfg: RunConfig) -> Iterator[object]:
    with build_loader(with_data(cfg, num_workers=1), view=RankView()) as loader:
        next(loader)
        yield loader


def test_a_dead_worker_is_an_error(working: Iterator[MMBatch]) -> None:
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a data worker died"):
        list(islice(working, 50))


def test_closing(cfg: RunConfig) -> None:
    loader = build_loader(with_data(cfg, num_workers=2), view=RankView())
    next(loader)
    assert loader.wait_seconds > 0
    loader.close()
    loader.close()
    assert not multiprocessing.active_children()
    with pytest.raises(DataError, match="is closed"):
        next(loader)


def test_digest_covers_the_order_and_nothing_else(cfg: RunConfig, tmp_path: Path, captions_prefix: Path) -> None:
    def digest(changed: RunConfig, **view: int) -> str:
        with build_loader(changed, view=RankView(**view)) as loader:
            return loader.digest

    same = digest(cfg)
    for path in captions_prefix.parent.glob(captions_prefix.name + "*"):
        shutil.copy(path, tmp_path / path.name.replace(captions_prefix.name, "renamed"))
    moved = replace(cfg.data.sources[0], prefix=str(tmp_path / "renamed"))
    assert digest(with_data(cfg, sources=(moved, cfg.data.sources[1]))) == same
    assert digest(with_data(cfg, sources=(moved, replace(cfg.data.sources[1], name="other")))) == same
    doubled = tuple(replace(source, weight=2 * (source.weight or 1.0)) for source in cfg.data.sources)
    assert digest(with_data(cfg, sources=doubled)) == same
    assert digest(with_data(cfg, num_workers=1, decoder="pil"), data_rank=1, data_size=2) == same
    assert digest(replace(cfg, train=replace(cfg.train, global_batch_size=16))) == same
    other = (replace(cfg.data.sources[0], weight=3.0), cfg.data.sources[1])
    changed = [
        with_data(cfg, seq_length=256),
        with_data(cfg, shuffle="none"),
        with_data(cfg, mixture_unit="sample"),
        with_data(cfg, sources=other),
        replace(cfg, tiling=TilingConfig(mode="none")),
        replace(cfg, train=replace(cfg.train, seed=2)),
    ]
    assert len({same, *map(digest, changed)}) == 1 + len(changed)


def test_validation_reads_its_own_sources(cfg: RunConfig) -> None:
    ramped = replace(cfg, train=replace(cfg.train, rampup_batch_size=(4, 4, 100)))
    with build_loader(ramped, view=RankView(), validation=True) as loader:
        assert [source.name for source in loader.order.sources] == ["cap.v1"]
        assert {sample.source for row in next(loader).rows for sample in row.samples} == {0}
        assert loader.step(0).micro_batches == 4
    with build_loader(ramped, view=RankView()) as loader:
        assert loader.step(0).micro_batches == 2


def test_rows_before_a_repeat(cfg: RunConfig) -> None:
    single = replace(cfg, train=replace(cfg.train, micro_batch_size=1))
    with build_loader(single, view=RankView(), validation=True) as loader:
        epoch = loader.rows_before_repeat(1000)
        assert loader.rows_before_repeat(epoch - 1) == epoch - 1
        shown = [s.document for batch in islice(loader, epoch) for row in batch.rows for s in row.samples]
    assert sorted(shown) == list(range(40))


def test_losses_are_told_once_an_epoch_by_one_rank(cfg: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    tight = with_data(cfg, sources=cfg.data.sources[1:], max_images=2)  # seven conversations of thirty have three
    tight = replace(tight, train=replace(cfg.train, micro_batch_size=1))
    with build_loader(tight, view=RankView()) as loader:
        epoch = loader.rows_before_repeat(1000)
    take(tight, epoch + 1)
    assert [record.message for record in caplog.records] == [
        f"source talk: of {30 * n} documents {23 * n} kept as {23 * n} samples, 0 truncated (0 tokens), "
        f"dropped: {{'more images than data.max_images': {7 * n}}}"
        for n in (1, 2)
    ]
    caplog.clear()
    for view in (
        RankView(data_rank=1, data_size=2),
        RankView(tensor_rank=1, tensor_size=2),
        RankView(reads_images=False),
    ):
        take(tight, 2, view=view)
    assert not caplog.records


def test_mixed_rows_and_weights(cfg: RunConfig) -> None:
    mixed = with_data(cfg, mixture_unit="sample")
    mixed = replace(mixed, train=replace(mixed.train, loss_normalisation="sample"))
    with build_loader(mixed, view=RankView()) as loader:
        rows = [row for batch in islice(loader, 6) for row in batch.rows]
        assert max(len({sample.source for sample in row.samples}) for row in rows) == 2
        assert sum(report.counts["kept"] for report in loader.reports) > 0
        batch = next(loader)
    weights = batch.loss_mask_T[batch.loss_mask_T > 0]
    assert weights.sum().item() == pytest.approx(sum(len(row.samples) for row in batch.rows), abs=1e-4)


def test_wrong_sources(cfg: RunConfig, tmp_path: Path) -> None:
    def build(changed: RunConfig, **arguments: bool) -> None:
        build_loader(changed, view=RankView(), **arguments)

    with pytest.raises(ConfigError, match="data.sources is empty"):
        build(with_data(cfg, sources=()))
    with pytest.raises(ConfigError, match="data.validation_sources is empty"):
        build(with_data(cfg, validation_sources=()), validation=True)
    with pytest.raises(DataError, match=r"several sources are called cap\.v1"):
        build(with_data(cfg, sources=(cfg.data.sources[0], replace(cfg.data.sources[1], name="cap.v1"))))
    with pytest.raises(DataError, match="the manifest is written last"):
        build(with_data(cfg, sources=(SourceConfig(prefix=str(tmp_path / "none")),)))
    with pytest.raises(DataError, match="the model has 50"):
        build(replace(cfg, language=LanguageConfig(vocab_size=50)))
    train_character_tokenizer(["abc"], tmp_path / "other.json")
    used = read_manifest(cfg.data.sources[0].prefix).tokenizer_digest[:12]
    with pytest.raises(DataError, match=f"was built with tokenizer {used}, the run uses"):
        build(with_data(cfg, tokenizer=str(tmp_path / "other.json")))


def test_images_of_a_batch_are_those_of_its_documents(cfg: RunConfig, captions_prefix: Path) -> None:
    """The tile in a row is the picture of its document, not of a neighbour."""
    from mm15_megatron.data.image.decode_pil import PilCodec
    from mm15_megatron.data.image.geometry import tile_plan
    from mm15_megatron.data.image.views import TileMaker

    plain = with_data(replace(cfg, tiling=TilingConfig(mode="none")), sources=cfg.data.sources[:1], decoder="pil")
    source, maker = IndexedSource(captions_prefix), TileMaker(plain.vision)
    (batch,) = take(plain, 1)
    documents = [sample.document for row in batch.rows for sample in row.samples]
    for document, tile in zip(documents, batch.tiles_N3HW, strict=True):
        (pixels,) = PilCodec().decode([np.asarray(source.image_bytes(document))])
        plan = tile_plan(*pixels.shape[:2], tile_size=14, tiling=plain.tiling)
        assert torch.equal(maker.tiles(pixels, plan)[0], tile)
