"""Give a rank its part of a micro-batch: the fields its stage needs and, with a shared encoder, its share of the tiles.

Loaders build exactly this part from the start. A batch that every rank holds whole (a synthetic stream, a recorded one)
is cut here by the same rules.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mm15_megatron.batch import MMBatch, tile_share
from mm15_megatron.parallel.topology import Topology


def local_batch(batch: MMBatch, *, topology: Topology, image_size: int) -> MMBatch:
    """Cut a whole micro-batch down to this rank's part and move it to its device.

    Args:
        batch: the whole micro-batch: every tile, no dummies; ``tiles_N3HW`` may be None when there is no image.
        topology: the rank.
        image_size: side of a tile, pixels, for dummy tiles.
    """
    part = stage_fields(batch, topology=topology)
    if topology.is_first_stage:
        part = replace(part, tiles_N3HW=_share(batch.tiles_N3HW, topology, image_size))
    return part.to(topology.device)


def stage_fields(batch: MMBatch, *, topology: Topology) -> MMBatch:
    """Drop the fields that this pipeline stage does not need."""
    if not topology.is_first_stage:
        batch = replace(batch, tokens_T=None, tiles_N3HW=None, slots_NP=None)
    if not topology.is_last_stage:
        batch = replace(batch, labels_T=None, loss_mask_T=None, sources_T=None)
    return batch


def _share(tiles_N3HW: torch.Tensor | None, topology: Topology, image_size: int) -> torch.Tensor:
    if tiles_N3HW is None:
        tiles_N3HW = torch.zeros(0, 3, image_size, image_size)
    size = topology.tile_ranks if topology.encoder_shares_tiles else 1
    rank = topology.tile_rank if topology.encoder_shares_tiles else 0
    share = tile_share(tiles_N3HW.shape[0], rank=rank, size=size)
    mine = tiles_N3HW[share.start : share.stop]
    dummies = mine.new_zeros(share.padded - mine.shape[0], *mine.shape[1:])
    return torch.cat((mine, dummies))
