"""Rows as full as training makes them: tiles spread evenly, text between, a target behind every text token.

A row is one sample, so attention sees the whole row, as the model FLOPs count it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mm15_megatron.accounting import planned_tiles_per_row
from mm15_megatron.batch import MMBatch, RowRecord, SampleRecord, StepCounts
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.packing import MAX_SAMPLES_PER_ROW
from mm15_megatron.errors import ConfigError


def full_rows(cfg: RunConfig, *, seed: int = 0) -> list[MMBatch]:
    """Return the micro-batches of one step, on the CPU; equal arguments give equal rows.

    Raises:
        ConfigError: the tiles leave no room for text.
    """
    tiles, slots, length = planned_tiles_per_row(cfg), cfg.connector.num_tokens, cfg.data.seq_length
    if length - tiles * slots <= tiles:
        raise ConfigError(
            f"{tiles} tiles of {slots} tokens leave {length - tiles * slots} of {length} tokens for text",
            fix="lower data.max_images",
        )
    size = cfg.train.micro_batch_size
    generator = torch.Generator().manual_seed(seed)
    batches = [
        _micro_batch(cfg, range(first, first + size), tiles=tiles, generator=generator)
        for first in range(0, cfg.train.global_batch_size, size)
    ]
    targets = sum(float(batch.loss_mask_T.sum()) for batch in batches if batch.loss_mask_T is not None)
    counts = StepCounts(targets=targets, tokens=length * cfg.train.global_batch_size)
    return [replace(batches[0], step_counts=counts), *batches[1:]]


def _micro_batch(cfg: RunConfig, rows: range, *, tiles: int, generator: torch.Generator) -> MMBatch:
    length, slots, size = cfg.data.seq_length, cfg.connector.num_tokens, cfg.vision.image_size
    sentinel, total = cfg.language.vocab_size - 1, length * len(rows)
    image_L = torch.zeros(length, dtype=torch.bool)
    starts = [n * (length // tiles) for n in range(tiles)]
    slots_NP = torch.stack([torch.arange(start, start + slots) for start in starts])
    image_L[slots_NP.flatten()] = True
    text_RL = torch.randint(0, sentinel, (len(rows), length), generator=generator)
    tokens_RL = torch.where(image_L, sentinel, text_RL)
    target_L = torch.cat((~image_L[1:], torch.tensor([False])))
    labels_RL = torch.where(target_L, tokens_RL.roll(-1, dims=1), 0)
    bounds = [length * r for r in range(len(rows) + 1)]
    bounds += [total] * (len(rows) * (min(length, MAX_SAMPLES_PER_ROW) + 1) + 1 - len(bounds))
    return MMBatch(
        segment_bounds_G=torch.tensor(bounds, dtype=torch.int32),
        max_segment=length,
        position_ids_T=torch.arange(length).repeat(len(rows)),
        padding_mask_T=torch.zeros(total, dtype=torch.bool),
        tokens_T=tokens_RL.flatten(),
        labels_T=labels_RL.flatten(),
        loss_mask_T=target_L.float().repeat(len(rows)),
        tiles_N3HW=torch.randn(len(rows) * tiles, 3, size, size, generator=generator),
        slots_NP=torch.cat([slots_NP + length * r for r in range(len(rows))]),
        rows=tuple(
            RowRecord(r, (SampleRecord(image_slots=tiles * slots, text_tokens=length - tiles * slots, images=tiles),))
            for r in rows
        ),
    )
