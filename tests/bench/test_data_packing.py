"""The cases that pack and plan run on small inputs; drawn documents are what the published figures say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.bench.data.documents import KINDS, MM15_TILES_PER_IMAGE, OBELICS_MEDIAN_TOKENS, draw
from mm15_megatron.bench.data.packing import first_fit_decreasing, next_fit, packing
from mm15_megatron.bench.data.planning import planning, write_index
from mm15_megatron.data.image.geometry import tile_counts
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.packing import PackingRules, Sizes, least_rows
from mm15_megatron.presets import resolve

from .test_data_turns import request

HISTOGRAMS = Path(__file__).parents[2] / "benchmarks" / "data" / "length_histograms.json"
DRAWN = 20_000


def test_interleaved_documents_are_as_obelics_says() -> None:
    drawn = draw("interleaved", DRAWN, cfg=resolve("mm1_3b"))
    images = np.diff(drawn.image_index)
    text = drawn.token_lengths - images
    assert np.median(text) == pytest.approx(OBELICS_MEDIAN_TOKENS, rel=0.05)
    assert text.mean() == pytest.approx(115e9 / 141_047_697, rel=0.05)
    assert (np.median(images), images.max() <= 30) == (1, True)
    assert images.mean() == pytest.approx(353e6 / 141_047_697, rel=0.05)
    owner = np.repeat(np.arange(DRAWN), images)
    assert (drawn.image_positions < drawn.token_lengths[owner]).all()
    same = owner[1:] == owner[:-1]
    assert (np.diff(drawn.image_positions)[same] > 0).all()


def test_instruction_images_split_as_mm15_says() -> None:
    cfg = resolve("mm15_3b_sft")
    drawn = draw("sft", DRAWN, cfg=cfg)
    alone = np.ones(len(drawn.image_sizes), np.int64)
    tiles = tile_counts(drawn.image_sizes, alone, tile_size=cfg.vision.image_size, tiling=cfg.tiling)
    assert tiles.mean() == pytest.approx(MM15_TILES_PER_IMAGE, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_committed_histograms_are_of_these_documents(kind: str) -> None:
    content = json.loads(HISTOGRAMS.read_text())
    drawn = draw(kind, content["documents"], cfg=resolve("mm15_3b_sft" if kind == "sft" else "mm1_3b"))
    shares = {int(n): share for n, share in content["images"][kind].items()}
    found = np.bincount(np.diff(drawn.image_index), minlength=max(shares) + 1) / drawn.num_documents
    assert {n: round(float(share), 6) for n, share in enumerate(found) if share} == shares
    assert sum(content["text_tokens"][kind].values()) == pytest.approx(1.0, abs=1e-4)


def test_the_simple_packings() -> None:
    rules = PackingRules.from_config(resolve("mm1_3b"), image_sentinel_id=0)
    none = np.zeros(5, np.int64)
    sizes = Sizes(np.array([3000, 2000, 1000, 2000, 90]), none, none)
    assert (next_fit(sizes, rules), first_fit_decreasing(sizes, rules), least_rows(sizes, rules)) == (3, 2, 2)


def test_packing(tmp_path: Path) -> None:
    found = packing(request(tmp_path))
    bounds = [one for one in found.comparisons if one.peer == "the bound of the caps"]
    assert [one.what.split(":")[0] for one in bounds] == list(KINDS)
    assert all(0.9 < one.ratio.median <= 1 for one in bounds)
    simple = [one for one in found.comparisons if one.peer in ("next fit", "first fit decreasing")]
    assert len(simple) == 8
    assert all(one.ratio.median > 0.98 for one in simple)
    rates = [one for one in found.comparisons if one.unit == "documents/s a core"]
    assert len(rates) == 4
    assert all(one.ours > 0 for one in rates)
    assert set(found.details) == set(KINDS)


def test_plan(tmp_path: Path) -> None:
    found = planning(request(tmp_path))
    plan, memory, resumed = found.figures
    assert (plan.at_most, memory.at_most, resumed.at_most) == (None, None, 2.0)
    assert all(figure.value.median > 0 for figure in found.figures)
    assert found.details["planned"]["rows"] >= 2500 / 16
    assert [turn["samples"] > 500 for turn in found.details["resumed"]] == [True]
    assert not list(tmp_path.iterdir())


def test_the_dataset_of_holes_is_one(tmp_path: Path) -> None:
    source = IndexedSource(write_index(tmp_path / "many", documents=1234))
    assert (source.num_documents, source.kind, len(source.image_sizes)) == (1234, "captions", 1234)
    assert source.tokens(1233).tolist() == [0] * int(source.token_lengths[1233])
    assert len(source.image_bytes(7)) == 16_000
