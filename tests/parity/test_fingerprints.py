"""Fingerprints of a sharded run are those of the whole one, whatever held the pieces."""

from __future__ import annotations

import torch

from mm15_megatron.parity.fingerprints import (
    PADDING,
    SAMPLE,
    Piece,
    fingerprint,
    forward_position,
    merge,
    tile_spans,
    token_spans,
)
from mm15_megatron.parity.stream import batch_of_rows, global_batch, one_segment_a_row

from ..helpers.layouts import debug_config


def test_a_fingerprint_sees_values_and_order() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fingerprint(x), fingerprint(x.clone()))
    assert not torch.allclose(fingerprint(x), fingerprint(x.flip(1)))
    assert torch.allclose(fingerprint(x)[:, 1], x.double().norm(dim=1))


def test_owners_of_tokens_and_tiles() -> None:
    cfg = debug_config()
    rows = global_batch(cfg, step=0)
    batch = batch_of_rows(rows[6:8], cfg)  # one image and two samples; one padded sample with an image
    spans = token_spans(batch)
    assert [key for key, _, _ in spans] == [(SAMPLE, 12), (SAMPLE, 13), (PADDING, 6), (SAMPLE, 14), (PADDING, 7)]
    assert [start for _, start, _ in spans] == [0, *(stop for _, _, stop in spans[:-1])]
    assert spans[-1][2] == batch.num_tokens
    for key, start, stop in spans:
        assert batch.padding_mask_T[start:stop].all() == (key[0] == PADDING)
    assert tile_spans(batch, tokens_of_tile=16) == (((SAMPLE, 12), 0, 16), ((SAMPLE, 14), 16, 32))


def test_segments_alone_keep_their_names() -> None:
    cfg = debug_config()
    rows = global_batch(cfg, step=0)
    alone = one_segment_a_row(rows, multiple=4)
    assert len(alone) % 4 == 0
    packed = {key for key, _, _ in token_spans(batch_of_rows(rows, cfg)) if key[0] == SAMPLE}
    separate = {key for row in alone for key, _, _ in token_spans(batch_of_rows([row], cfg)) if key[0] == SAMPLE}
    assert separate == packed


def test_pieces_come_together() -> None:
    values = torch.arange(24, dtype=torch.float64).view(12, 2)
    spans = (((SAMPLE, 0), 0, 5), ((SAMPLE, 1), 5, 9), ((PADDING, 0), 9, 12))
    whole = merge([Piece("merged_input", spans, 0, values), Piece("merged_input", spans, 0, values)])
    sharded = merge(Piece("merged_input", spans, part, held) for part, held in ((1, values[6:]), (0, values[:6])))
    for key, start, stop in spans:
        assert torch.equal(whole["merged_input"][key], values[start:stop])
        assert torch.equal(sharded["merged_input"][key], values[start:stop])


def test_tiles_of_a_sample_lie_end_to_end() -> None:
    values = torch.arange(8, dtype=torch.float64).view(4, 2)
    spans = (((SAMPLE, 0), 0, 1), ((SAMPLE, 1), 1, 3), ((SAMPLE, 0), 3, 4))
    merged = merge([Piece("connector", spans, 0, values[:2]), Piece("connector", spans, 1, values[2:])])
    assert torch.equal(merged["connector"][SAMPLE, 0], values[[0, 3]])


def test_modules_stand_in_forward_order() -> None:
    order = [
        "vision_encoder",
        "connector",
        "embedding",
        "merged_input",
        "decoder.layers.0.self_attention",
        "decoder.layers.0.mlp",
        "decoder.layers.0",
        "decoder.layers.2.mlp",
        "decoder.layers.10.self_attention",
        "decoder.final_layernorm",
    ]
    assert sorted(reversed(order), key=forward_position) == order
