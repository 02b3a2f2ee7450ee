"""MMBatch: the one contract between the data pipeline, the parallel scatter and the model.

Legend of shape suffixes used here and in the model files:

    R  rows of a micro-batch              S  tokens of a row (constant: ``data.seq_length``)
    T  = R * S, the micro-batch laid end to end as one packed (THD) sequence
    G  bounds of segments, padded to a constant length with T
    N  tiles (sub-images) of the micro-batch on this rank     P  slots an image tile owns in the row
    B, D, H, V: tiles in a vision batch, vision width, language width, vocabulary

A worked example. ``seq_length`` 8, one row, two slots a tile. Sample A is ``<img> a b`` (one tile) and sample B is
``c d``; one position of padding is left::

    tokens_T          <i> <i>  a   b   c   d   0   0       (<i> is the image sentinel id, never a target)
    labels_T           0   a   b   0   d   0   0   0       (the token that follows, inside the same segment)
    loss_mask_T        0   1   1   0   1   0   0   0       (1 where labels_T is a real target)
    position_ids_T     0   1   2   3   0   1   0   1       (restart in every segment; pads form their own segment)
    padding_mask_T     .   .   .   .   .   .   X   X       (True = padding)
    segment_bounds_G   0 4 6 8 8 8 ...                     (cumulative; the last real bound is T; padded with T)
    slots_NP           [[0, 1]]                            (where the tile's features are written)
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from mm15_megatron.errors import DataError


@dataclass(frozen=True)
class SampleRecord:
    """What one sample put into its row.

    Attributes:
        source: index of its source in the mixture.
        document: index of its document inside the source.
        text_tokens: tokens that are not image slots.
        image_slots: tokens owned by image tiles.
        images: images.
    """

    source: int = 0
    document: int = 0
    text_tokens: int = 0
    image_slots: int = 0
    images: int = 0


@dataclass(frozen=True)
class Substitution:
    """An image that did not decode and was replaced: the index of its source, and what happened to which image."""

    source: int
    message: str


@dataclass(frozen=True)
class RowRecord:
    """What a row of the micro-batch was made of, for the ledger and for error messages.

    Attributes:
        row: global index of the row in the training order.
        samples: its samples, in order.
        padding: tokens that belong to no sample.
        substituted: images that were replaced.
    """

    row: int
    samples: tuple[SampleRecord, ...] = ()
    padding: int = 0
    substituted: tuple[Substitution, ...] = ()

    @property
    def text_tokens(self) -> int:
        """Tokens that are neither image slots nor padding."""
        return sum(sample.text_tokens for sample in self.samples)

    @property
    def image_slots(self) -> int:
        """Tokens owned by image tiles."""
        return sum(sample.image_slots for sample in self.samples)


@dataclass(frozen=True)
class StepCounts:
    """What this data-parallel rank's rows of one whole step hold, known before the first of them is computed.

    The router losses are normalised by the tokens and the language loss by the targets of the global batch; their
    gradients meet in one backward pass, so the ratio is needed when it starts.

    Attributes:
        targets: sum of the target weights (``loss_mask_T``) of the rank's rows.
        tokens: tokens of the rank's rows that are not padding.
    """

    targets: float
    tokens: int


@dataclass(frozen=True)
class MMBatch:
    """One micro-batch for one rank.

    All tensors of a batch lie on one device. A stage that does not need a field may carry ``None`` there: image fields
    exist on pipeline stage 0 alone, ``tokens_T`` on the first stage; ``labels_T``, ``loss_mask_T`` and ``sources_T`` on
    the last.

    Attributes:
        segment_bounds_G: int32 [G], cumulative segment bounds of the packed row; first 0, last real bound T, padded
            with T to a constant length so that shapes never change.
        max_segment: upper bound of a segment's length, a Python int so that no kernel has to ask the device.
        position_ids_T: int64 [T], position of each token inside its segment.
        padding_mask_T: bool [T], True = padding. Routers and statistics leave these tokens out.
        tokens_T: int64 [T], token ids; image slots hold the image sentinel id.
        labels_T: int64 [T], next token inside the segment, 0 where there is no target.
        loss_mask_T: float32 [T], weight of each target, 0 where there is none.
        sources_T: int32 [T], index of the source that each token comes from, 0 in padding; None in streams that have no
            sources.
        tiles_N3HW: float tensor [N, 3, H, W], normalised pixels of this rank's share of the tiles (every tile with a
            tensor-parallel encoder). N is at least 1 wherever the encoder runs: a dummy tile of zeros stands in.
        slots_NP: int64 [N_all, P], positions in T that the tiles of the *whole tensor-parallel group* own, in tile
            order; the features of padding and dummy tiles come after the first N_all and are dropped by index.
        rows: one record for each row.
        step_counts: on the first micro-batch of a step, what all micro-batches of this rank's step hold together; None
            on the others, and everywhere in a run that has no use for it.
    """

    segment_bounds_G: torch.Tensor
    max_segment: int
    position_ids_T: torch.Tensor
    padding_mask_T: torch.Tensor
    tokens_T: torch.Tensor | None = None
    labels_T: torch.Tensor | None = None
    loss_mask_T: torch.Tensor | None = None
    sources_T: torch.Tensor | None = None
    tiles_N3HW: torch.Tensor | None = None
    slots_NP: torch.Tensor | None = None
    rows: tuple[RowRecord, ...] = field(default=())
    step_counts: StepCounts | None = None

    @property
    def num_tokens(self) -> int:
        """T, the length of the packed micro-batch, padding included."""
        return int(self.position_ids_T.shape[0])

    def pin_memory(self) -> MMBatch:
        """Return the same batch in page-locked memory, from which copies to a GPU need not wait."""
        pinned: dict[str, Any] = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **pinned)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> MMBatch:
        """Return the same batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class RankView:
    """What the data pipeline has to know about the rank it feeds.

    Attributes:
        data_rank: position inside the data-parallel group.
        data_size: ranks of the data-parallel group.
        tensor_rank: position inside the tensor- and context-parallel group.
        tensor_size: ranks of the tensor- and context-parallel group.
        reads_images: True on the ranks of pipeline stage 0; the others never touch image bytes.
        shares_tiles: True when the encoder is data-parallel inside the tensor-parallel group, so that each tensor rank
            decodes only its ``tile_share``; False: every tensor rank decodes every tile.
    """

    data_rank: int = 0
    data_size: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1
    reads_images: bool = True
    shares_tiles: bool = True


@dataclass(frozen=True)
class TileShare:
    """Which tiles one tensor-parallel rank encodes when the encoder is data-parallel inside the group.

    Attributes:
        start: first tile of the share, an index into the micro-batch's tiles.
        stop: one past the last real tile of the share (may equal ``start``).
        padded: tiles every rank of the group encodes, at least one; ``padded - (stop - start)`` of them are dummies.
    """

    start: int
    stop: int
    padded: int


def tile_share(num_tiles: int, *, rank: int, size: int) -> TileShare:
    """Split ``num_tiles`` into ``size`` equal contiguous shares, padded so that every rank encodes the same number.

    A pure function of its arguments: five tiles over two ranks give (0, 3) and (3, 5) with ``padded`` 3; no tile at
    all gives (0, 0) with ``padded`` 1, the dummy that keeps the encoder's collectives in step.

    Raises:
        DataError: if the arguments cannot describe a group.
    """
    if num_tiles < 0 or size < 1 or not 0 <= rank < size:
        raise DataError(
            f"cannot share {num_tiles} tiles: rank {rank} of a group of {size}",
            fix="pass 0 <= rank < size and a non-negative number of tiles",
        )
    padded = max(1, -(-num_tiles // size))
    start = min(rank * padded, num_tiles)
    return TileShare(start=start, stop=min(start + padded, num_tiles), padded=padded)
