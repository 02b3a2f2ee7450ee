"""A fixed stream of mixed rows, built straight from the contract in ``mm15_megatron/batch.py``.

It does not use the data room, so it is a second reading of the contract: text-only rows, rows with one image, rows with
several, targets on answers only, rows with padding at the end, and whole micro-batches without any image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mm15_megatron.batch import MMBatch, RowRecord, SampleRecord, StepCounts
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError

# Kinds of the rows of one global batch of eight; with two rows a micro-batch the first one has no image at all.
ROW_KINDS = ("text", "text", "one", "several", "several", "text", "one", "padded")
# Samples of a row at most, and tiles of the eight rows above.
ROW_SAMPLES, EIGHT_ROWS_TILES = 2, 9


@dataclass(frozen=True)
class Segment:
    """One sample of a row.

    Attributes:
        tokens: ids, image sentinels already expanded to slots.
        tile_starts: where its tiles stand.
        tiles: [tiles, 3, H, H].
        answer_only: the first half carries no target.
        sample: number of the sample in its step, equal however rows are dealt.
    """

    tokens: torch.Tensor
    tile_starts: tuple[int, ...]
    tiles: torch.Tensor
    answer_only: bool
    sample: int = 0


@dataclass(frozen=True)
class Row:
    """One row of the stream.

    Attributes:
        segments: its samples, in order.
        number: number of the row in its step.
    """

    segments: Sequence[Segment]
    number: int = 0


def check_stream(cfg: RunConfig) -> None:
    """Check that the rows of the stream have room.

    Raises:
        ConfigError: a tile's tokens are too many for a row.
    """
    least = 6 * cfg.connector.num_tokens + 16
    if cfg.data.seq_length < least:
        raise ConfigError(
            f"data.seq_length = {cfg.data.seq_length} is too short for rows of three tiles of "
            f"{cfg.connector.num_tokens} tokens with text between them",
            fix=f"use at least {least} tokens, or fewer a tile",
        )


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


def _target_weights(segment: Segment, cfg: RunConfig) -> torch.Tensor:
    """Weight of the target behind each token but the last."""
    live = (segment.tokens[1:] != cfg.language.vocab_size - 1).float()
    if segment.answer_only:
        live[: len(segment.tokens) // 2] = 0
    targets = live.sum().clamp(min=1)
    divisors = {"token": torch.ones(()), "sample": targets, "sqrt": targets.sqrt()}
    return live / divisors[cfg.train.loss_normalisation]


class _Packed:
    """Rows laid end to end, filled segment by segment."""

    def __init__(self, rows: int, cfg: RunConfig) -> None:
        total = cfg.data.seq_length * rows
        self.cfg, self.bounds = cfg, [0]
        self.tokens, self.labels = torch.zeros(total, dtype=torch.int64), torch.zeros(total, dtype=torch.int64)
        self.mask, self.positions = torch.zeros(total), torch.zeros(total, dtype=torch.int64)
        self.padding = torch.ones(total, dtype=torch.bool)
        self.slots: list[torch.Tensor] = []

    def put(self, segment: Segment, at: int) -> int:
        """Write a segment and return where it ends."""
        cfg, n = self.cfg, len(segment.tokens)
        following = segment.tokens[1:]
        self.tokens[at : at + n] = segment.tokens
        self.labels[at : at + n - 1] = torch.where(following == cfg.language.vocab_size - 1, 0, following)
        self.mask[at : at + n - 1] = _target_weights(segment, cfg)
        self.positions[at : at + n] = torch.arange(n)
        self.padding[at : at + n] = False
        self.slots += [torch.arange(at + s, at + s + cfg.connector.num_tokens) for s in segment.tile_starts]
        self.bounds.append(at + n)
        return at + n

    def pad(self, at: int, end: int) -> None:
        """Make what is left of a row a segment of padding."""
        if at < end:
            self.positions[at:end] = torch.arange(end - at)
            self.bounds.append(end)


def batch_of_rows(rows: Sequence[Row | Sequence[Segment]], cfg: RunConfig, *, max_segments: int = 4) -> MMBatch:
    """Lay rows end to end as one whole micro-batch (every tile, no dummy)."""
    s, slots, size = cfg.data.seq_length, cfg.connector.num_tokens, cfg.vision.image_size
    packed, records = _Packed(len(rows), cfg), []
    tiles = [torch.zeros(0, 3, size, size)]
    for index, given in enumerate(rows):
        row = given if isinstance(given, Row) else Row(given, index)
        at, end = index * s, (index + 1) * s
        for segment in row.segments:
            assert at + len(segment.tokens) <= end, "a synthetic row is longer than seq_length"
            at = packed.put(segment, at)
            tiles.append(segment.tiles)
        packed.pad(at, end)
        records.append(RowRecord(row.number, tuple(SampleRecord(document=segment.sample) for segment in row.segments)))
    total = s * len(rows)
    bounds = packed.bounds + [total] * (len(rows) * max_segments + 1 - len(packed.bounds))
    return MMBatch(
        segment_bounds_G=torch.tensor(bounds, dtype=torch.int32),
        max_segment=s,
        position_ids_T=packed.positions,
        padding_mask_T=packed.padding,
        tokens_T=packed.tokens,
        labels_T=packed.labels,
        loss_mask_T=packed.mask,
        tiles_N3HW=torch.cat(tiles),
        slots_NP=torch.stack(packed.slots) if packed.slots else torch.zeros(0, slots, dtype=torch.int64),
        rows=tuple(records),
    )


def global_batch(cfg: RunConfig, *, step: int, rows: int | None = None) -> list[Row]:
    """The rows of one step (``train.global_batch_size`` of them): the same for every layout."""
    count = cfg.train.global_batch_size if rows is None else rows
    kinds = (ROW_KINDS * count)[:count]
    batch = []
    for number, kind in enumerate(kinds):
        segments = row_of(kind, cfg, seed=1000 * step + number)
        named = [replace(segment, sample=number * ROW_SAMPLES + k) for k, segment in enumerate(segments)]
        batch.append(Row(named, number))
    return batch


def one_segment_a_row(rows: Sequence[Row], *, multiple: int = 1) -> list[Row]:
    """Give every segment a row of its own; empty rows make their number a multiple of ``multiple``."""
    segments = [[segment] for row in rows for segment in row.segments]
    return [Row(own, number) for number, own in enumerate(segments + [[]] * (-len(segments) % multiple))]


def rank_batches(rows: Sequence[Row], cfg: RunConfig, *, data_rank: int, data_size: int) -> Iterator[MMBatch]:
    """Whole micro-batches of one data-parallel rank: row r goes to rank (r // micro_batch_size) % data_size.

    The first one carries the counts of the rank's step.
    """
    size = cfg.train.micro_batch_size
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    batches = [batch_of_rows(group, cfg) for group in groups[data_rank::data_size]]
    targets = sum(float(batch.loss_mask_T.sum()) for batch in batches if batch.loss_mask_T is not None)
    tokens = sum(int((~batch.padding_mask_T).sum()) for batch in batches)
    yield replace(batches[0], step_counts=StepCounts(targets=targets, tokens=tokens))
    yield from batches[1:]
