"""A fixed stream of mixed rows, built straight from the contract in ``mm15_megatron/batch.py``.

It does not use the data room, so it is a second reading of the contract: text-only rows, rows with one image, rows with
several, rows with padding at the end, and whole micro-batches without any image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mm15_megatron.batch import MMBatch, RowRecord
from mm15_megatron.config.schema import RunConfig

# Kinds of the rows of one global batch of eight; with two rows a micro-batch the first one has no image at all.
ROW_KINDS = ("text", "text", "one", "several", "several", "text", "one", "padded")


@dataclass(frozen=True)
class Segment:
    """One sample: token ids (sentinels already expanded to slots), where its tiles stand, and which targets count."""

    tokens: torch.Tensor
    tile_starts: tuple[int, ...]
    tiles: torch.Tensor
    answer_only: bool


def _segment(generator: torch.Generator, cfg: RunConfig, *, text: int, images: int, answer_only: bool) -> Segment:
    slots, size = cfg.connector.num_tokens, cfg.vision.image_size
    sentinel = cfg.language.vocab_size - 1
    pieces, starts, length = [], [], 0
    share = max(1, text // (images + 1))
    for _index in range(images):
        starts.append(length)
        pieces += [torch.full((slots,), sentinel), torch.randint(0, sentinel, (share,), generator=generator)]
        length += slots + share
        text -= share
    pieces.append(torch.randint(0, sentinel, (max(1, text),), generator=generator))
    tiles = torch.randn(images, 3, size, size, generator=generator)
    return Segment(torch.cat(pieces), tuple(starts), tiles, answer_only)


def row_of(kind: str, cfg: RunConfig, *, seed: int) -> list[Segment]:
    """Segments of one row."""
    g = torch.Generator().manual_seed(seed)
    s = cfg.data.seq_length
    plans = {
        "text": [(s // 2, 0, False), (s - s // 2, 0, False)],
        "one": [(s // 3, 1, False), (s // 4, 0, True)],
        "several": [(s // 4, 2, True), (s // 4, 1, False)],
        "padded": [(s // 5, 1, False)],
    }
    return [_segment(g, cfg, text=text, images=images, answer_only=only) for text, images, only in plans[kind]]


def batch_of_rows(rows: list[list[Segment]], cfg: RunConfig, *, max_segments: int = 4) -> MMBatch:
    """Lay rows end to end as one whole micro-batch (every tile, no dummy)."""
    s, slots = cfg.data.seq_length, cfg.connector.num_tokens
    total = s * len(rows)
    tokens, labels = torch.zeros(total, dtype=torch.int64), torch.zeros(total, dtype=torch.int64)
    mask, positions = torch.zeros(total), torch.zeros(total, dtype=torch.int64)
    padding = torch.ones(total, dtype=torch.bool)
    bounds, slot_rows, tiles, records = [0], [], [], []
    sentinel = cfg.language.vocab_size - 1
    for index, row in enumerate(rows):
        at = index * s
        for segment in row:
            n = len(segment.tokens)
            assert at + n <= (index + 1) * s, "a synthetic row is longer than seq_length"
            tokens[at : at + n] = segment.tokens
            following = segment.tokens[1:]
            labels[at : at + n - 1] = torch.where(following == sentinel, 0, following)
            live = (following != sentinel).float()
            if segment.answer_only:
                live[: n // 2] = 0
            mask[at : at + n - 1] = live
            positions[at : at + n] = torch.arange(n)
            padding[at : at + n] = False
            slot_rows += [torch.arange(at + start, at + start + slots) for start in segment.tile_starts]
            tiles.append(segment.tiles)
            at += n
            bounds.append(at)
        rest = (index + 1) * s - at
        if rest:
            positions[at : at + rest] = torch.arange(rest)
            bounds.append((index + 1) * s)
        records.append(RowRecord(row=index))
    bounds += [total] * (len(rows) * max_segments + 1 - len(bounds))
    return MMBatch(
        segment_bounds_G=torch.tensor(bounds, dtype=torch.int32),
        max_segment=s,
        position_ids_T=positions,
        padding_mask_T=padding,
        tokens_T=tokens,
        labels_T=labels,
        loss_mask_T=mask,
        tiles_N3HW=torch.cat(tiles),
        slots_NP=torch.stack(slot_rows) if slot_rows else torch.zeros(0, slots, dtype=torch.int64),
        rows=tuple(records),
    )


def global_batch(cfg: RunConfig, *, step: int) -> list[list[Segment]]:
    """The rows of one step: the same for every layout."""
    kinds = (ROW_KINDS * cfg.train.global_batch_size)[: cfg.train.global_batch_size]
    return [row_of(kind, cfg, seed=1000 * step + index) for index, kind in enumerate(kinds)]
