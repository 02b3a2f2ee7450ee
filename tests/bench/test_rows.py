"""Rows of the benchmark keep the contract of the data pipeline and are full."""

from __future__ import annotations

import pytest
import torch

from mm15_megatron.bench.rows import full_rows
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.data.packing import MAX_SAMPLES_PER_ROW
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import resolve


def config(*options: str):
    return apply_overrides(resolve("debug_dense"), ["train.global_batch_size=4", "train.micro_batch_size=2", *options])


def test_rows_are_full_and_every_text_token_behind_another_is_a_target():
    cfg = config()
    batches = full_rows(cfg)
    assert len(batches) == 2
    for batch in batches:
        assert batch.num_tokens == 256
        assert not batch.padding_mask_T.any()
        image_T = batch.tokens_T == cfg.language.vocab_size - 1
        assert sorted(batch.slots_NP.flatten().tolist()) == image_T.nonzero().flatten().tolist()
        assert batch.tiles_N3HW.shape == (16, 3, 56, 56)
        for row in range(2):
            part = slice(128 * row, 128 * (row + 1))
            tokens, labels, weights = batch.tokens_T[part], batch.labels_T[part], batch.loss_mask_T[part]
            followed_by_text = torch.cat((~image_T[part][1:], torch.tensor([False])))
            assert torch.equal(weights.bool(), followed_by_text)
            assert torch.equal(labels[followed_by_text], tokens.roll(-1)[followed_by_text])
            assert torch.equal(batch.position_ids_T[part], torch.arange(128))


def test_bounds_have_the_length_of_training():
    (batch, _) = full_rows(config())
    bounds = batch.segment_bounds_G.tolist()
    assert bounds[:3] == [0, 128, 256]
    assert len(bounds) == 2 * (min(128, MAX_SAMPLES_PER_ROW) + 1) + 1
    assert set(bounds[3:]) == {256}


def test_the_first_micro_batch_counts_the_step():
    first, second = full_rows(config())
    assert first.step_counts.tokens == 512
    assert first.step_counts.targets == float(first.loss_mask_T.sum() + second.loss_mask_T.sum())
    assert second.step_counts is None


def test_rows_are_a_function_of_the_seed():
    one, same, other = (full_rows(config(), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one.tokens_T, same.tokens_T)
    assert torch.equal(one.tiles_N3HW, same.tiles_N3HW)
    assert not torch.equal(one.tokens_T, other.tokens_T)


def test_rows_without_room_for_text_are_refused():
    with pytest.raises(ConfigError, match="32 tiles of 4 tokens leave 0 of 128"):
        full_rows(config("data.max_images=32", "data.max_tiles=32"))
