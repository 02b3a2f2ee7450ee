"""Tokens of a synthetic batch given to two sources."""

from __future__ import annotations

from dataclasses import replace

import torch

from mm15_megatron.batch import MMBatch


def with_sources(batch: MMBatch) -> MMBatch:
    """Give every third token to the second of two sources."""
    return replace(batch, sources_T=(torch.arange(batch.num_tokens, dtype=torch.int32) % 3 == 0).int())
