"""What a row looks like: the worked example of batch.py, expansion, indicators and weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mm15_megatron.batch import RowRecord, SampleRecord
from mm15_megatron.config.schema import RunConfig, TilingConfig
from mm15_megatron.data.packing import MAX_SAMPLES_PER_ROW, PackingRules
from mm15_megatron.data.row_layout import lay_out, tokens_in_row
from mm15_megatron.data.samples import ImageRef, Sample
from mm15_megatron.data.tile_text import TileTexts
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
    return Sample.whole(
        np.array(tokens), ones if mask is None else np.array(mask, np.bool_), images, source="s", document=document
    )


def test_the_worked_example() -> None:
    a, b, c, d = 11, 12, 13, 14
    first = replace(sample([IMAGE, a, b]), source_index=2)
    layout = lay_out([(5, [first, sample([c, d], document=7)])], RULES)
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
    assert record == RowRecord(5, (SampleRecord(2, 0, 2, 2, 1), SampleRecord(0, 7, 2, 0, 0)), padding=2)
    assert (record.text_tokens, record.image_slots) == (4, 2)
    assert layout.sources_T.tolist() == [2, 2, 2, 2, 0, 0, 0, 0]


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


def encode(text: str) -> list[int]:
    """One id a character."""
    return [1000 + ord(character) for character in text]


def shown(layout_tokens: list[int]) -> str:
    """Texts as they are, an ``I`` for each image slot, other ids as ``#``."""
    return "".join("I" if t == IMAGE else chr(t - 1000) if t > 1000 else "#" for t in layout_tokens)


@pytest.mark.parametrize(
    ("indicator", "overview", "expected"),
    [
        ("index", "after", "#(0,1,1)II(0,1,2)II(0,2,1)II(0,2,2)II(0,0,0)II#"),
        ("index", "before", "#(0,0,0)II(0,1,1)II(0,1,2)II(0,2,1)II(0,2,2)II#"),
        ("seps", "after", "#II,II<n>II,II:II#"),
        ("seps", "before", "#II:II,II<n>II,II#"),
        ("none", "after", "#IIIIIIIIII#"),
    ],
)
def test_tiles_say_where_they_stand(indicator: str, overview: str, expected: str) -> None:
    """MM1.5 4.4: (0,2,1) is image 0, row 2, column 1; the overview is (k,0,0)."""
    tiling = TilingConfig(mode="static", indicator=indicator, overview=overview)
    rules = replace(RULES, seq_length=64, tiling=tiling, tile_texts=TileTexts.build(tiling, encode))
    one = sample([7, IMAGE, 8])
    layout = lay_out([(0, [one])], rules)
    used = tokens_in_row(one, rules)
    assert shown(layout.tokens_T.tolist()[:used]) == expected
    assert layout.padding_mask_T.tolist() == [False] * used + [True] * (64 - used)
    slots = [place for place, letter in enumerate(expected) if letter == "I"]
    assert layout.slots_NP.flatten().tolist() == slots
    assert layout.loss_mask_T.nonzero().flatten().tolist() == [used - 2], "no indicator is a target"
    assert layout.labels_T[used - 2] == 8
    (record,) = layout.records
    assert (record.text_tokens, record.image_slots) == (used - 10, 10)


def test_indicators_number_the_images_of_the_document() -> None:
    tiling = TilingConfig(mode="static", indicator="index", max_split_images=4)
    rules = replace(RULES, seq_length=200, tiling=tiling, tile_texts=TileTexts.build(tiling, encode))
    text = shown(lay_out([(0, [sample([7, IMAGE, IMAGE, 8])])], rules).tokens_T.tolist())
    assert [text.count(f"({k},0,0)") for k in range(3)] == [1, 1, 0]
    later = replace(sample([7, IMAGE, 8]), first_image=2, images_in_document=3)  # a piece of a document
    assert "(2,1,1)II(2,1,2)" in shown(lay_out([(0, [later])], rules).tokens_T.tolist())
    many = replace(later, images_in_document=5)  # too many to split: one tile and no text
    assert shown(lay_out([(0, [many])], rules).tokens_T.tolist()[:5]) == "#II##"


def test_a_sample_longer_than_its_row_is_refused() -> None:
    with pytest.raises(DataError, match="row 0: document 0 of source 's' ends at token 9 of 8"):
        lay_out([(0, [sample([1] * 9)])], RULES)


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
