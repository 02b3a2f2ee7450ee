"""Rows: the worked example of batch.py, expansion, caps, truncation and weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mm15_megatron.config.schema import RunConfig, TilingConfig
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.packing import MAX_SAMPLES_PER_ROW, Measured, PackingRules, lay_out, measure, pack_rows, select
from mm15_megatron.data.samples import ImageRef, Sample
from mm15_megatron.errors import DataError

IMAGE = 99
RULES = PackingRules(
    seq_length=8,
    slots_per_tile=2,
    tile_size=14,
    tiling=TilingConfig(mode="none"),
    max_images=4,
    max_tiles=8,
    image_sentinel_id=IMAGE,
)


def sample(tokens: list[int], *, mask: list[int] | None = None, document: int = 0, size: int = 10) -> Sample:
    images = tuple(ImageRef(0, i, size, size) for i in range(tokens.count(IMAGE)))
    ones = np.ones(len(tokens), np.bool_)
    return Sample(
        np.array(tokens), ones if mask is None else np.array(mask, np.bool_), images, source="s", document=document
    )


def test_the_worked_example() -> None:
    a, b, c, d = 11, 12, 13, 14
    layout = lay_out([(5, [sample([IMAGE, a, b]), sample([c, d], document=7)])], RULES)
    assert layout.tokens_T.tolist() == [IMAGE, IMAGE, a, b, c, d, 0, 0]
    assert layout.labels_T.tolist() == [0, a, b, 0, d, 0, 0, 0]
    assert layout.loss_mask_T.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert layout.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert layout.padding_mask_T.tolist() == [False] * 6 + [True] * 2
    assert layout.segment_bounds_G.tolist() == [0, 4, 6] + [8] * (RULES.num_bounds(1) - 3)
    assert layout.slots_NP.tolist() == [[0, 1]]
    assert layout.segment_bounds_G.dtype == torch.int32
    assert {t.dtype for t in (layout.tokens_T, layout.labels_T, layout.position_ids_T, layout.slots_NP)} == {
        torch.int64
    }
    (record,) = layout.records
    assert (record.row, record.sources, record.documents) == (5, ("s", "s"), (0, 7))
    assert (record.text_tokens, record.image_slots) == (4, 2)


def test_rows_lie_end_to_end() -> None:
    layout = lay_out([(0, [sample([1, 2, 3])]), (1, [sample([IMAGE, 4]), sample([IMAGE, 5])])], RULES)
    assert layout.segment_bounds_G.tolist() == [0, 3, 8, 11, 14] + [16] * (RULES.num_bounds(2) - 5)
    assert layout.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 0, 1]
    assert layout.slots_NP.tolist() == [[8, 9], [11, 12]]
    assert [(image.first_tile, image.row) for image in layout.images] == [(0, 1), (1, 1)]
    assert layout.padding_mask_T.tolist() == [False] * 3 + [True] * 5 + [False] * 6 + [True] * 2


def test_a_full_row_has_no_pad_segment_and_an_empty_row_is_all_pads() -> None:
    layout = lay_out([(0, [sample([1] * 8)]), (1, [])], RULES)
    assert layout.segment_bounds_G.tolist() == [0, 8] + [16] * (RULES.num_bounds(2) - 2)
    assert layout.loss_mask_T.sum() == 7
    assert layout.slots_NP.shape == (0, 2)


def test_several_tiles_an_image() -> None:
    rules = replace(RULES, seq_length=32, tiling=TilingConfig(mode="static"))
    layout = lay_out([(0, [sample([7, IMAGE, 8])])], rules)
    assert layout.slots_NP.tolist() == [[1 + 2 * i, 2 + 2 * i] for i in range(5)]
    assert layout.labels_T.tolist()[:12] == [0] * 10 + [8, 0]
    assert layout.images[0].plan.num_tiles == 5
    many = lay_out([(0, [sample([IMAGE, IMAGE, IMAGE, 8])])], rules)  # three images are never split
    assert len(many.slots_NP) == 3


def test_masked_prompts_have_no_label() -> None:
    layout = lay_out([(0, [sample([1, 2, 3, 4], mask=[0, 0, 1, 0])])], RULES)
    assert layout.labels_T.tolist() == [0, 3, 0, 0, 0, 0, 0, 0]
    assert layout.loss_mask_T.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("normalisation", "weights"), [("token", (1, 1)), ("sample", (1 / 4, 1.0)), ("sqrt", (1 / 2, 1.0))]
)
def test_weights_of_targets(normalisation: str, weights: tuple[float, float]) -> None:
    rules = replace(RULES, normalisation=normalisation)
    layout = lay_out([(0, [sample([1, 2, 3, 4, 5]), sample([6, 7])])], rules)
    assert layout.loss_mask_T.tolist() == [weights[0]] * 4 + [0, weights[1], 0, 0]
    assert lay_out([(0, [sample([1, 2], mask=[0, 0])])], rules).loss_mask_T.sum() == 0


def test_text_is_truncated_at_the_end_and_an_image_never() -> None:
    layout = lay_out([(0, [sample([IMAGE, *range(1, 9)])])], replace(RULES, normalisation="sample"))
    assert layout.tokens_T.tolist() == [IMAGE, IMAGE, 1, 2, 3, 4, 5, 6]
    assert layout.loss_mask_T.sum().item() == pytest.approx(1.0)
    with pytest.raises(DataError, match="has 9 tokens: a row of 8 would cut an image"):
        lay_out([(0, [sample([1] * 7 + [IMAGE])])], RULES)


def test_impossible_rows_are_named() -> None:
    with pytest.raises(DataError, match="row 3: document 9 of source 's' ends at token 10 of 8"):
        lay_out([(3, [sample([1] * 5), sample([2] * 5, document=9)])], RULES)
    broken = replace(sample([IMAGE, 1, IMAGE], document=4), images=())
    with pytest.raises(DataError, match="document 4 of source 's' has 2 image placeholders and 0 images"):
        lay_out([(0, [broken])], RULES)


def test_rules_from_a_config() -> None:
    rules = PackingRules.from_config(RunConfig(), image_sentinel_id=5)
    assert (rules.seq_length, rules.slots_per_tile, rules.tile_size, rules.max_images) == (4096, 144, 378, 16)
    assert rules.num_bounds(3) == 3 * (MAX_SAMPLES_PER_ROW + 1) + 1


# --- Which documents share a row


def measured(lengths: list[int], images: list[int] | None = None, tiles: list[int] | None = None) -> Measured:
    zero = [0] * len(lengths)
    return Measured(np.array(lengths), np.array(images or zero), np.array(tiles or images or zero))


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        (measured([4, 4, 1]), [0, 2, 3]),
        (measured([8, 1, 7, 8]), [0, 1, 3, 4]),
        (measured([1] * 6, [2] * 6), [0, 2, 4, 6]),
        (measured([1] * 4, [1] * 4, [5, 3, 1, 8]), [0, 2, 3, 4]),
        (measured([]), [0]),
    ],
)
def test_rows_are_closed_at_each_cap(sizes: Measured, starts: list[int]) -> None:
    assert pack_rows(sizes, RULES).tolist() == starts


def test_samples_of_a_row_are_bounded() -> None:
    rules = replace(RULES, seq_length=10_000)
    assert pack_rows(measured([2] * 600), rules).tolist() == [0, 256, 512, 600]


def test_rows_hold_every_document_once_within_the_caps() -> None:
    rng = np.random.default_rng(3)
    sizes = Measured(rng.integers(1, 9, 2000), rng.integers(0, 5, 2000), rng.integers(0, 9, 2000))
    starts = pack_rows(sizes, RULES)
    assert (starts[0], starts[-1]) == (0, 2000)
    for first, stop, following in zip(starts[:-1], starts[1:], [*starts[2:], None], strict=True):
        assert sizes.lengths[first:stop].sum() <= 8
        assert sizes.images[first:stop].sum() <= 4
        assert sizes.tiles[first:stop].sum() <= 8
        if following is not None:  # greedy: the next document would not have fitted
            more = slice(first, stop + 1)
            assert sizes.lengths[more].sum() > 8 or sizes.images[more].sum() > 4 or sizes.tiles[more].sum() > 8


@pytest.fixture
def odd_source(tmp_path: Path) -> IndexedSource:
    """Documents that fit, must be cut, or cannot be used; row of 8, two slots a tile."""
    picture = EncodedImage(b"x", 20, 10)
    documents = [
        ([IMAGE, 1, 2], None),
        ([IMAGE, *range(1, 11)], None),  # 12 tokens: text is cut to 8
        ([1, 2, 3, 4, 5, 6, 7, IMAGE], None),  # the image would be cut
        ([1], None),  # nothing to predict
        ([IMAGE] * 5, None),  # more than max_images
        ([*range(1, 11)], [0] * 9 + [1]),  # no target before the cut
        ([5, 6], None),
    ]
    with DatasetWriter(tmp_path / "odd", kind="conversations", tokenizer_digest="", image_sentinel_id=IMAGE) as writer:
        for tokens, mask in documents:
            images = [picture] * tokens.count(IMAGE)
            writer.add_document(tokens, images=images, loss_mask=mask or [1] * len(tokens))
    return IndexedSource(tmp_path / "odd")


def test_selection_counts_what_it_drops_and_cuts(odd_source: IndexedSource) -> None:
    found = select(odd_source, np.array([6, 0, 1, 2, 3, 4, 5]), RULES)
    assert found.kept.tolist() == [0, 1, 2]
    assert found.measured.lengths.tolist() == [2, 4, 8]
    assert found.measured.images.tolist() == [0, 1, 1]
    assert (found.truncated, found.truncated_tokens) == (1, 4)
    assert found.dropped == {
        "too short": 1,
        "more images than data.max_images": 1,
        "longer than a row, an image would be cut": 1,
        "longer than a row, no target would be left": 1,
    }


def test_measures_equal_the_rows(odd_source: IndexedSource) -> None:
    rules = replace(RULES, seq_length=64, tiling=TilingConfig(mode="dynamic"), max_tiles=100)
    found = measure(odd_source, np.array([0, 4, 6]), rules)
    assert found.images.tolist() == [1, 5, 0]
    assert found.tiles.tolist() == [9, 5, 0]  # 20x10 splits into 4x2 and an overview; five images are not split
    assert found.lengths.tolist() == [2 + 18, 10, 2]
    few = select(odd_source, np.array([0]), replace(rules, max_tiles=8))
    assert few.dropped == {"more tiles than data.max_tiles": 1}
