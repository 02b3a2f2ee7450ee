"""Tile shares and moving batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm15_megatron.batch import tile_share
from mm15_megatron.errors import DataError
from mm15_megatron.parity.stream import batch_of_rows, row_of
from tests.helpers.layouts import debug_config


@given(tiles=st.integers(0, 200), size=st.integers(1, 16))
def test_shares_cover_every_tile_once_and_in_order(tiles: int, size: int) -> None:
    """Equal padded sizes, and the real tiles are the first of the gathered shares."""
    shares = [tile_share(tiles, rank=rank, size=size) for rank in range(size)]
    assert len({share.padded for share in shares}) == 1
    assert shares[0].padded >= 1
    gathered = []
    for share in shares:
        real = list(range(share.start, share.stop))
        gathered += real + [-1] * (share.padded - len(real))
    assert gathered[:tiles] == list(range(tiles))


def test_impossible_share_is_refused() -> None:
    """The values are in the message."""
    with pytest.raises(DataError, match="rank 2 of a group of 2"):
        tile_share(3, rank=2, size=2)


def test_to_moves_every_tensor() -> None:
    """Tensors move, the rest stays."""
    cfg = debug_config()
    batch = batch_of_rows([row_of("one", cfg, seed=0)], cfg)
    moved = batch.to(torch.device("meta"))
    assert moved.tokens_T is not None
    assert moved.tokens_T.is_meta
    assert moved.segment_bounds_G.is_meta
    assert moved.max_segment == batch.max_segment
    assert moved.num_tokens == cfg.data.seq_length
