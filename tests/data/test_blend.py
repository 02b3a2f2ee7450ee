"""Weights, epochs and token shares become a mixture, and the mixture does what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.batch import RankView
from mm15_megatron.config.schema import (
    ConnectorConfig,
    DataConfig,
    LanguageConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    VisionConfig,
    WeightChange,
)
from mm15_megatron.data.indexed.writer import DatasetWriter
from mm15_megatron.data.loader import build_loader
from mm15_megatron.data.open_order import open_order, plan_folder, run_shares, write_tables
from mm15_megatron.data.pieces import COUNTED
from mm15_megatron.data.row_order import RowOrder
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import ConfigError, DataError

SHARE_TOLERANCE = 3  # rows: how far a golden-ratio sequence strays from its share over any stretch
LENGTHS = {"short": (60, range(4, 12)), "long": (40, range(20, 90)), "middle": (50, range(8, 30))}


@pytest.fixture
def cfg(tmp_path: Path, tokenizer: Tokenizer) -> RunConfig:
    rng = np.random.default_rng(0)
    for name, (count, lengths) in LENGTHS.items():
        with DatasetWriter(
            tmp_path / name, kind="text", tokenizer_digest=tokenizer.digest, image_sentinel_id=tokenizer.image_id
        ) as writer:
            for _ in range(count):
                writer.add_document([9] * int(rng.choice(lengths)))
    return RunConfig(
        language=LanguageConfig(vocab_size=128),
        vision=VisionConfig(image_size=14),
        connector=ConnectorConfig(num_tokens=4),
        data=DataConfig(tokenizer=str(tokenizer.path), seq_length=64, num_workers=0),
        train=TrainConfig(global_batch_size=8, steps=50, run_dir=str(tmp_path / "run")),
    )


def with_sources(cfg: RunConfig, *sources: dict[str, object], **data: object) -> RunConfig:
    folder = Path(cfg.train.run_dir).parent
    named = tuple(SourceConfig(prefix=str(folder / str(given["name"])), **given) for given in sources)
    return replace(cfg, data=replace(cfg.data, sources=named, **data))


def steps(cfg: RunConfig, count: int) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, steps=count))


def tokens_by_source(order: RowOrder, rows: int) -> Counter[int]:
    found: Counter[int] = Counter()
    for task in order.rows(0, rows).tasks:
        for sample in task.samples:
            found[sample.source] += sample.stop - sample.first
    return found


def test_weights_of_tokens(cfg: RunConfig) -> None:
    """Rows of short documents are less full: as many rows would hold fewer tokens."""
    two = with_sources(cfg, {"name": "short", "weight": 1.0}, {"name": "long", "weight": 3.0}, mixture_unit="token")
    order = open_order(two).order
    found = tokens_by_source(order, 400)
    assert found[1] / found.total() == pytest.approx(0.75, abs=0.01)  # rows of 64 tokens: 400 of them are a sample
    for share, expected in zip(run_shares(two, order), (0.25, 0.75), strict=True):
        assert share.token_share == pytest.approx(expected, abs=0.01)
    kinds = {len({s.source for s in task.samples}) for task in order.rows(0, 100).tasks}
    assert kinds == {1}


def test_epochs_beside_weights(cfg: RunConfig) -> None:
    mixed = with_sources(cfg, {"name": "short", "epochs": 2.0}, {"name": "long", "weight": 3.0}, {"name": "middle"})
    order = open_order(mixed).order
    short, long, middle = run_shares(mixed, order)
    assert short.epochs == pytest.approx(2.0, abs=0.2)  # an epoch is a dozen rows
    assert long.units == pytest.approx(3 * middle.units, rel=0.05)
    seen = Counter(s.document for t in order.rows(0, 400).tasks for s in t.samples if s.source == 0)
    assert set(seen) == set(range(60))
    assert set(seen.values()) <= {1, 2, 3}
    assert (short.given, long.given, middle.given) == ("epochs 2", "weight 3", "weight 1")
    assert str(short).startswith("short: epochs 2 = ")


def test_epochs_alone_decide_the_length(cfg: RunConfig) -> None:
    only = with_sources(cfg, {"name": "short", "epochs": 1.0}, {"name": "long", "epochs": 2.0})
    with pytest.raises(ConfigError, match=r"the epochs of the sources are \d+ rows, and train.steps = 50 takes 400"):
        open_order(only)
    sizes = [source.table.before(source.chunks)[-1] for source in open_order(steps(only, 1)).order.sources]
    longest = int(sizes[0] + 2 * sizes[1]) // 8
    order = open_order(steps(only, longest)).order
    short, long = run_shares(steps(only, longest), order)
    assert long.epochs == pytest.approx(2 * short.epochs, rel=0.1)
    assert short.epochs == pytest.approx(1.0, abs=0.1)


def test_epochs_that_do_not_fit_the_run(cfg: RunConfig) -> None:
    mixed = steps(with_sources(cfg, {"name": "short", "epochs": 200.0}, {"name": "long"}), 10)
    with pytest.raises(ConfigError, match=r"(?s)takes 80.*set train.steps to [0-9]+ or more, or ask for fewer epochs"):
        open_order(mixed)


def test_epochs_of_batches_of_samples(cfg: RunConfig) -> None:
    units = {"mixture_unit": "sample", "batch_unit": "samples"}
    mixed = with_sources(cfg, {"name": "short", "epochs": 3.0}, {"name": "middle"}, **units)
    order = open_order(mixed).order
    samples = [s for step in range(50) for t in order.step(8 * step, 8).tasks for s in t.samples]
    seen = Counter(s.document for s in samples if s.source == 0)
    assert len(samples) == 400
    assert set(seen.values()) <= {2, 3, 4}
    assert sum(seen.values()) == pytest.approx(180, abs=3)
    with pytest.raises(ConfigError, match="epochs of sources cannot be shared out in a run whose length is counted in"):
        open_order(with_sources(cfg, {"name": "short", "epochs": 3.0}, {"name": "middle"}, mixture_unit="sample"))


def test_changes_of_weights(cfg: RunConfig) -> None:
    later = with_sources(
        cfg,
        {"name": "short"},
        {"name": "long", "weight": 0.0, "changes": (WeightChange(100, 1.0), WeightChange(200, 3.0))},
    )
    order = open_order(later).order
    chosen = np.array([task.samples[0].source for task in order.rows(0, 300).tasks])
    for part, expected in zip(np.split(chosen, 3), (0, 50, 75), strict=True):
        assert abs(int(part.sum()) - expected) <= (SHARE_TOLERANCE if expected else 0)
    nobody = with_sources(cfg, {"name": "short", "changes": (WeightChange(10, 0.0),)})
    with pytest.raises(ConfigError, match="from row 10 on no source has a weight above 0"):
        open_order(nobody)


def test_the_same_documents_twice(cfg: RunConfig) -> None:
    folder = Path(cfg.train.run_dir).parent
    for path in folder.glob("short*"):
        (folder / path.name.replace("short", "copy")).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="(?s)short and .*copy hold the same documents.*name each dataset once"):
        open_order(with_sources(cfg, {"name": "short"}, {"name": "copy"}))


def test_tables_are_written_before_the_first_step_where_epochs_count(cfg: RunConfig) -> None:
    plain = with_sources(cfg, {"name": "short"}, {"name": "long"})
    write_tables(plain)
    assert not plan_folder(plain).exists()
    mixed = with_sources(cfg, {"name": "short", "epochs": 1.0}, {"name": "long"})
    write_tables(mixed)
    assert sorted(path.name.split("-")[0] for path in plan_folder(mixed).iterdir()) == ["long", "short"]
    assert plan_folder(cfg) == Path(cfg.train.run_dir) / "plan"
    assert plan_folder(with_sources(cfg, plan_dir="elsewhere")) == Path("elsewhere")


def test_many_chunks_are_packed_by_several_processes(cfg: RunConfig) -> None:
    told: list[tuple[int, int, str]] = []
    blocks = {"shuffle": "blocks", "shuffle_block": 4, "shuffle_window": 2}
    mixed = with_sources(cfg, {"name": "short"}, {"name": "long"}, **blocks)
    straight = open_order(replace(mixed, data=replace(mixed.data, plan_dir="")), writes=False)
    expected = [source.table.before(source.chunks).tolist() for source in straight.order.sources]
    opened = open_order(mixed, writes=True, chunks_of_epoch=lambda *said: told.append(said))
    assert [source.table.before(source.chunks).tolist() for source in opened.order.sources] == expected
    assert told == [(n, 8, "short") for n in range(1, 9)] + [(n, 5, "long") for n in range(1, 6)]
    again = open_order(mixed, chunks_of_epoch=lambda *said: told.append(said))
    assert len(told) == 13, "the tables know it now"
    assert again.order.digest == opened.order.digest


def test_the_plan_of_mixed_rows_follows_the_schedule(cfg: RunConfig) -> None:
    """Long samples that come later make the run's samples fewer: they are counted until their tokens fill the rows."""
    sources = ({"name": "short"}, {"name": "long", "weight": 0.0, "changes": (WeightChange(100, 1.0),)})
    mixed = with_sources(cfg, *sources, mixture_unit="sample")
    order = open_order(mixed).order
    short, long = run_shares(mixed, order)
    lengths = {
        n: open_order(with_sources(cfg, {"name": n})).order.sources[0].table.before(1) for n in ("short", "long")
    }
    mean = {name: line[COUNTED.index("tokens")] / line[COUNTED.index("samples")] for name, line in lengths.items()}
    assert short.units * mean["short"] + long.units * mean["long"] == pytest.approx(400 * 64, rel=0.02)
    assert short.units == pytest.approx(100 + long.units, abs=SHARE_TOLERANCE)


def test_a_source_without_a_usable_document_is_refused_every_time(cfg: RunConfig, tokenizer: Tokenizer) -> None:
    """Also when its table is there already, whoever packed it."""
    folder = Path(cfg.train.run_dir).parent
    with DatasetWriter(
        folder / "bad", kind="text", tokenizer_digest=tokenizer.digest, image_sentinel_id=tokenizer.image_id
    ) as writer:
        for _ in range(40):
            writer.add_document([9])
    blocks = {"shuffle": "blocks", "shuffle_block": 4, "shuffle_window": 2}
    bad = with_sources(cfg, {"name": "bad"}, **blocks)
    for _ in range(2):
        with pytest.raises(DataError, match="no document of source 'bad' fits a row"):
            open_order(bad, writes=True, chunks_of_epoch=lambda *said: None)
    with pytest.raises(DataError, match="no document of source 'bad' fits a row"):
        open_order(bad)


def test_an_interrupted_packing_goes_on(cfg: RunConfig) -> None:
    blocks = {"shuffle": "blocks", "shuffle_block": 4, "shuffle_window": 2}
    one = with_sources(cfg, {"name": "short"}, **blocks)

    def interrupted(done: int, total: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_order(one, writes=True, chunks_of_epoch=interrupted)
    assert len(open_order(one).order.sources[0].table) == 3
    told: list[int] = []
    open_order(one, writes=True, chunks_of_epoch=lambda done, total, name: told.append(total))
    assert told == [5] * 5
    assert len(open_order(one).order.sources[0].table) == 8


def test_a_folder_of_tables_that_cannot_be_written(cfg: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    one = with_sources(cfg, {"name": "short"}, plan_dir=str(Path(cfg.train.run_dir).parent / "short.json"))
    with build_loader(one, view=RankView()) as loader:
        next(loader)
    assert [record.message.split(" cannot")[0].rpartition("/")[2][:6] for record in caplog.records] == ["short-"]
    assert "a resumed run will pack again" in caplog.text


def test_epochs_leave_nothing_for_a_weight(cfg: RunConfig) -> None:
    sizes = open_order(with_sources(cfg, {"name": "short", "epochs": 1.0}, {"name": "long"})).order.sources
    all_of_it = 400 / int(sizes[0].table.before(sizes[0].chunks)[-1])
    with pytest.raises(ConfigError, match="the epochs of the sources are 400 rows, and train.steps = 50 takes 400"):
        open_order(with_sources(cfg, {"name": "short", "epochs": all_of_it}, {"name": "long"}))


def test_a_text_source_trains(cfg: RunConfig) -> None:
    """Every token but a document's first is a target once, though documents are longer than a row."""
    one = with_sources(cfg, {"name": "long"})
    with build_loader(one, view=RankView()) as loader:
        epoch = loader.rows_before_repeat(1000)
        targets = sum(int((next(loader).loss_mask_T > 0).sum()) for _ in range(epoch))
        stored = sum(source.size for source in loader.order.sources)
    lengths = open_order(one).readers[0].token_lengths
    assert max(lengths) > one.data.seq_length
    assert targets == int(lengths.sum()) - stored
