"""The owner of rows: which samples share a row, and every tensor that describes one.

Placeholders are expanded here: an image owns ``slots_per_tile`` positions a tile before the model sees the row. See
:mod:`mm15_megatron.batch` for the meaning of every tensor and a worked example.

Legend: R rows, S tokens of a row, T = R * S, G segment bounds, N tiles, P slots of a tile, L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from mm15_megatron.batch import RowRecord
from mm15_megatron.config.schema import RunConfig, TilingConfig
from mm15_megatron.data.image.geometry import TilePlan, tile_counts, tile_plan
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.samples import ImageRef, Sample
from mm15_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]

PACKING_VERSION: Final = 1  # part of the order's digest: raise it whenever the same documents would give other rows
MAX_SAMPLES_PER_ROW: Final = 256  # bounds the segments of a row, so that the bounds tensor has a constant length


@dataclass(frozen=True)
class PackingRules:
    """Everything that decides how documents become rows.

    Attributes:
        seq_length: tokens of a row.
        slots_per_tile: language tokens a tile becomes.
        tile_size: side of a tile, pixels.
        tiling: how an image splits.
        max_images: images of a row at most.
        max_tiles: tiles of a row at most.
        image_sentinel_id: id that stands where an image stands.
        normalisation: weight of a target: token | sample | sqrt (``train.loss_normalisation``).
    """

    seq_length: int
    slots_per_tile: int
    tile_size: int
    tiling: TilingConfig
    max_images: int
    max_tiles: int
    image_sentinel_id: int
    normalisation: str = "token"

    @classmethod
    def from_config(cls, cfg: RunConfig, *, image_sentinel_id: int) -> PackingRules:
        """Collect the rules of a run."""
        return cls(
            seq_length=cfg.data.seq_length,
            slots_per_tile=cfg.connector.num_tokens,
            tile_size=cfg.vision.image_size,
            tiling=cfg.tiling,
            max_images=cfg.data.max_images,
            max_tiles=cfg.data.max_tiles,
            image_sentinel_id=image_sentinel_id,
            normalisation=cfg.train.loss_normalisation,
        )

    @property
    def max_samples(self) -> int:
        """Samples of a row at most."""
        return min(self.seq_length, MAX_SAMPLES_PER_ROW)

    def num_bounds(self, rows: int) -> int:
        """G, the constant length of ``segment_bounds_G``: every sample and the pads of each row, and the leading 0."""
        return rows * (self.max_samples + 1) + 1

    def plans(self, images: Sequence[ImageRef]) -> tuple[TilePlan, ...]:
        """Return the tile plan of each image of one sample."""
        return tuple(
            tile_plan(i.height, i.width, tile_size=self.tile_size, tiling=self.tiling, images_in_sample=len(images))
            for i in images
        )


# --- Which documents share a row


@dataclass(frozen=True)
class Measured:
    """What packing needs to know of n documents, each int64 [n]: tokens in the row, images, tiles."""

    lengths: Int64
    images: Int64
    tiles: Int64


@dataclass(frozen=True)
class Selected:
    """The documents of a chunk that can be packed.

    Attributes:
        kept: int64, positions (in the order given) of the documents that fit a row.
        measured: their sizes, after truncation.
        dropped: documents left out, by reason.
        truncated: documents whose text was cut at the end.
        truncated_tokens: tokens cut.
    """

    kept: Int64
    measured: Measured
    dropped: dict[str, int]
    truncated: int
    truncated_tokens: int


def measure(source: IndexedSource, documents: Int64, rules: PackingRules) -> Measured:
    """Measure documents by the index alone: no token and no image is read."""
    first, stop = source.image_index[documents], source.image_index[documents + 1]
    images = stop - first
    owner = np.repeat(np.arange(len(documents)), images)
    within = np.arange(int(images.sum())) - np.repeat(np.cumsum(images) - images, images)
    sizes = np.asarray(source.image_sizes[np.repeat(first, images) + within])
    per_image = tile_counts(sizes, images[owner], tile_size=rules.tile_size, tiling=rules.tiling)
    tiles = np.bincount(owner, weights=per_image, minlength=len(documents)).astype(np.int64)
    lengths = source.token_lengths[documents].astype(np.int64) - images + tiles * rules.slots_per_tile
    return Measured(lengths, images, tiles)


def select(source: IndexedSource, documents: Int64, rules: PackingRules) -> Selected:
    """Leave out documents that no row can hold, and truncate text that is too long.

    A document longer than a row loses the end of its text; it is dropped instead when that would cut an image or leave
    no target.
    """
    found = measure(source, documents, rules)
    lengths = np.minimum(found.lengths, rules.seq_length)
    reasons = {
        "too short": found.lengths < 2,
        "more images than data.max_images": found.images > rules.max_images,
        "more tiles than data.max_tiles": found.tiles > rules.max_tiles,
    }
    bad = np.zeros(len(documents), np.bool_)
    dropped: dict[str, int] = {}
    for reason, mask in reasons.items():
        if count := int(np.count_nonzero(mask & ~bad)):
            dropped[reason] = count
        bad |= mask
    for position in np.flatnonzero((found.lengths > rules.seq_length) & ~bad):
        problem = _truncation_problem(source, int(documents[position]), rules)
        if problem:
            dropped[problem] = dropped.get(problem, 0) + 1
            bad[position] = True
    kept = np.flatnonzero(~bad)
    cut = (found.lengths - lengths)[kept]
    measured = Measured(lengths[kept], found.images[kept], found.tiles[kept])
    return Selected(kept, measured, dropped, int(np.count_nonzero(cut)), int(cut.sum()))


def _truncation_problem(source: IndexedSource, document: int, rules: PackingRules) -> str:
    """Say why a document that is too long cannot be truncated; empty = it can."""
    images = range(int(source.image_index[document]), int(source.image_index[document + 1]))
    refs = [ImageRef(0, i, int(source.image_sizes[i, 0]), int(source.image_sizes[i, 1])) for i in images]
    repeats, _ = _repeats(source.tokens(document), rules.plans(refs), rules)
    ends = np.cumsum(repeats)
    sentinels = source.tokens(document) == rules.image_sentinel_id
    if sentinels.any() and int(ends[sentinels][-1]) > rules.seq_length:
        return "longer than a row, an image would be cut"
    targets = source.loss_mask(document) & ~sentinels
    targets[0] = False
    return "" if targets[ends <= rules.seq_length].any() else "longer than a row, no target would be left"


def pack_rows(measured: Measured, rules: PackingRules) -> Int64:
    """Fill rows with documents in the order given, closing a row when the next document does not fit.

    Returns:
        int64 [rows + 1]: row i holds documents ``starts[i]`` to ``starts[i + 1]``.
    """
    caps = (
        (measured.lengths, rules.seq_length),
        (measured.images, rules.max_images),
        (measured.tiles, rules.max_tiles),
    )
    sums = [(np.concatenate(([0], np.cumsum(values))), cap) for values, cap in caps]
    total = len(measured.lengths)
    starts = [0]
    while starts[-1] < total:
        at = starts[-1]
        stops = [int(np.searchsorted(cumulative, cumulative[at] + cap, side="right")) - 1 for cumulative, cap in sums]
        starts.append(min(*stops, at + rules.max_samples))
    return np.array(starts, dtype=np.int64)


# --- What a row looks like


@dataclass(frozen=True)
class PlacedImage:
    """One image of a micro-batch: where its bytes are, its tiles, and whose it is (for messages).

    Attributes:
        ref: the image.
        plan: its tiles.
        first_tile: index of its first tile among the tiles of the micro-batch.
        row: index of its row inside the micro-batch.
        label: source, document and image number, for messages.
    """

    ref: ImageRef
    plan: TilePlan
    first_tile: int
    row: int
    label: str


@dataclass(frozen=True)
class Layout:
    """Every tensor of a micro-batch except the pixels, as in :class:`~mm15_megatron.batch.MMBatch`."""

    segment_bounds_G: torch.Tensor
    position_ids_T: torch.Tensor
    padding_mask_T: torch.Tensor
    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    loss_mask_T: torch.Tensor
    slots_NP: torch.Tensor
    images: tuple[PlacedImage, ...]
    records: tuple[RowRecord, ...]


@dataclass(frozen=True)
class _Segment:
    """One expanded sample: arrays [L], and the positions its tiles own, [tiles, P]."""

    tokens: Int64
    labels: Int64
    weights: npt.NDArray[np.float32]
    slots: Int64


def lay_out(rows: Sequence[tuple[int, Sequence[Sample]]], rules: PackingRules) -> Layout:
    """Lay rows end to end as one packed micro-batch.

    Args:
        rows: (global row index, samples) of each row.
        rules: the rules of the run.

    Raises:
        DataError: if a sample's sentinels and images disagree in number, or samples do not fit their row.
    """
    length = rules.seq_length
    size = len(rows) * length
    tokens, labels = np.zeros(size, np.int64), np.zeros(size, np.int64)
    weights, positions = np.zeros(size, np.float32), np.zeros(size, np.int64)
    padding = np.ones(size, np.bool_)
    bounds, slots = [0], [np.zeros((0, rules.slots_per_tile), np.int64)]
    images: list[PlacedImage] = []
    records: list[RowRecord] = []
    for number, (row, samples) in enumerate(rows):
        at, end = number * length, (number + 1) * length
        for sample in samples:
            plans = rules.plans(sample.images)
            segment = _expand(sample, plans, rules)
            stop = at + len(segment.tokens)
            if stop > end or len(samples) > rules.max_samples:
                raise DataError(
                    f"row {row}: document {sample.document} of source {sample.source!r} ends at token "
                    f"{stop - end + length} of {length}; {len(samples)} samples of at most {rules.max_samples}",
                    fix="the dataset changed under the run: start again with fresh rows",
                )
            tokens[at:stop], labels[at:stop], weights[at:stop] = segment.tokens, segment.labels, segment.weights
            positions[at:stop], padding[at:stop] = np.arange(stop - at), False
            _place_images(images, sample, plans, row=number)
            slots.append(segment.slots + at)
            bounds.append(stop)
            at = stop
        if at < end:
            positions[at:end] = np.arange(end - at)
            bounds.append(end)
        records.append(_record(row, samples, used=at - number * length, slots=slots[len(slots) - len(samples) :]))
    bounds += [size] * (rules.num_bounds(len(rows)) - len(bounds))
    return Layout(
        segment_bounds_G=torch.tensor(bounds, dtype=torch.int32),
        position_ids_T=torch.from_numpy(positions),
        padding_mask_T=torch.from_numpy(padding),
        tokens_T=torch.from_numpy(tokens),
        labels_T=torch.from_numpy(labels),
        loss_mask_T=torch.from_numpy(weights),
        slots_NP=torch.from_numpy(np.concatenate(slots)),
        images=tuple(images),
        records=tuple(records),
    )


def _expand(sample: Sample, plans: Sequence[TilePlan], rules: PackingRules) -> _Segment:
    """Give every tile its slots, make labels and weights, and cut the end of a text that is longer than a row."""
    repeats, sentinels = _repeats(sample.tokens, plans, rules, where=f"{sample.document} of source {sample.source!r}")
    tokens = np.repeat(sample.tokens, repeats)
    is_slot = np.repeat(sentinels, repeats)
    is_target = np.repeat(sample.loss_mask & ~sentinels, repeats)
    if is_slot[rules.seq_length :].any():
        raise DataError(
            f"document {sample.document} of source {sample.source!r} has {len(tokens)} tokens: "
            f"a row of {rules.seq_length} would cut an image",
            fix="raise data.seq_length, or leave the document out",
        )
    kept = slice(rules.seq_length)
    tokens, is_slot, is_target = tokens[kept], is_slot[kept], is_target[kept]
    weights = np.zeros(len(tokens), np.float32)
    weights[:-1] = is_target[1:]
    labels = np.zeros(len(tokens), np.int64)
    labels[:-1] = np.where(is_target[1:], tokens[1:], 0)
    weights *= _target_weight(int(np.count_nonzero(weights)), rules.normalisation)
    return _Segment(tokens, labels, weights, np.flatnonzero(is_slot).reshape(-1, rules.slots_per_tile))


def _repeats(
    tokens: Int64, plans: Sequence[TilePlan], rules: PackingRules, *, where: str = ""
) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Return how many positions each token takes in the row, and which tokens are sentinels."""
    sentinels = tokens == rules.image_sentinel_id
    found = int(np.count_nonzero(sentinels))
    if found != len(plans):
        raise DataError(
            f"document {where} has {found} image placeholders and {len(plans)} images",
            fix="build the dataset again: the token and image files do not belong together",
        )
    repeats = np.ones(len(tokens), np.int64)
    repeats[sentinels] = [plan.num_tiles * rules.slots_per_tile for plan in plans]
    return repeats, sentinels


def _target_weight(targets: int, normalisation: str) -> float:
    """Weight of each of a sample's targets."""
    if normalisation == "token" or targets == 0:
        return 1.0
    return float(1.0 / targets if normalisation == "sample" else targets**-0.5)


def _place_images(images: list[PlacedImage], sample: Sample, plans: Sequence[TilePlan], *, row: int) -> None:
    for number, (ref, plan) in enumerate(zip(sample.images, plans, strict=True)):
        first = images[-1].first_tile + images[-1].plan.num_tiles if images else 0
        label = f"image {number} of document {sample.document} of source {sample.source!r}"
        images.append(PlacedImage(ref, plan, first, row, label))


def _record(row: int, samples: Sequence[Sample], *, used: int, slots: Sequence[Int64]) -> RowRecord:
    image_slots = sum(positions.size for positions in slots)
    return RowRecord(
        row=row,
        sources=tuple(sample.source for sample in samples),
        documents=tuple(sample.document for sample in samples),
        text_tokens=used - image_slots,
        image_slots=image_slots,
    )
