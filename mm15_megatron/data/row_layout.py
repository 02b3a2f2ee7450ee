"""What a row looks like: every tensor that describes one.

Placeholders are expanded here: an image owns ``slots_per_tile`` positions a tile before the model sees the row, behind
the text that says where the tile stands. See :mod:`mm15_megatron.batch` for the meaning of every tensor and a worked
example.

Legend: R rows, S tokens of a row, T = R * S, G segment bounds, N tiles, P slots of a tile, L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mm15_megatron.batch import RowRecord, SampleRecord
from mm15_megatron.data.image.geometry import TilePlan
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.samples import ImageRef, Sample
from mm15_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]


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
    sources_T: torch.Tensor
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
    padding, sources = np.ones(size, np.bool_), np.zeros(size, np.int32)
    bounds, slots = [0], [np.zeros((0, rules.slots_per_tile), np.int64)]
    images: list[PlacedImage] = []
    records: list[RowRecord] = []
    for number, (row, samples) in enumerate(rows):
        at, end = number * length, (number + 1) * length
        held = []
        for sample in samples:
            plans = _plans(sample, rules)
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
            sources[at:stop] = sample.source_index
            _place_images(images, sample, plans, row=number)
            slots.append(segment.slots + at)
            bounds.append(stop)
            held.append(_record(sample, segment))
            at = stop
        if at < end:
            positions[at:end] = np.arange(end - at)
            bounds.append(end)
        records.append(RowRecord(row, tuple(held), padding=end - at))
    bounds += [size] * (rules.num_bounds(len(rows)) - len(bounds))
    return Layout(
        segment_bounds_G=torch.tensor(bounds, dtype=torch.int32),
        position_ids_T=torch.from_numpy(positions),
        padding_mask_T=torch.from_numpy(padding),
        tokens_T=torch.from_numpy(tokens),
        labels_T=torch.from_numpy(labels),
        loss_mask_T=torch.from_numpy(weights),
        sources_T=torch.from_numpy(sources),
        slots_NP=torch.from_numpy(np.concatenate(slots)),
        images=tuple(images),
        records=tuple(records),
    )


def _plans(sample: Sample, rules: PackingRules) -> tuple[TilePlan, ...]:
    return rules.plans(sample.images, images_in_sample=sample.images_in_document, first_image=sample.first_image)


def tokens_in_row(sample: Sample, rules: PackingRules) -> int:
    """Return the tokens a sample takes in a row, its images expanded."""
    plans = _plans(sample, rules)
    images = (_image_tokens(sample, number, plan, rules) for number, plan in enumerate(plans))
    return len(sample.tokens) - len(plans) + sum(map(len, images))


def _expand(sample: Sample, plans: Sequence[TilePlan], rules: PackingRules) -> _Segment:
    """Give every tile its text and its slots, make labels and weights."""
    sentinels = np.flatnonzero(sample.tokens == rules.image_sentinel_id)
    if len(sentinels) != len(plans):
        raise DataError(
            f"document {sample.document} of source {sample.source!r} has {len(sentinels)} image placeholders and "
            f"{len(plans)} images",
            fix="build the dataset again: the token and image files do not belong together",
        )
    images = [_image_tokens(sample, number, plan, rules) for number, plan in enumerate(plans)]
    repeats = np.ones(len(sample.tokens), np.int64)
    repeats[sentinels] = [len(image) for image in images]
    ends = np.cumsum(repeats)
    tokens = np.repeat(sample.tokens, repeats)
    is_target = np.repeat(sample.loss_mask, repeats)
    is_slot = np.zeros(len(tokens), np.bool_)
    for end, image in zip(ends[sentinels].tolist(), images, strict=True):
        inside = slice(end - len(image), end)
        tokens[inside] = image
        is_slot[inside] = image == rules.image_sentinel_id
        is_target[inside] = False
    weights = np.zeros(len(tokens), np.float32)
    weights[:-1] = is_target[1:]
    labels = np.zeros(len(tokens), np.int64)
    labels[:-1] = np.where(is_target[1:], tokens[1:], 0)
    weights *= _target_weight(int(np.count_nonzero(weights)), rules.normalisation)
    return _Segment(tokens, labels, weights, np.flatnonzero(is_slot).reshape(-1, rules.slots_per_tile))


def _image_tokens(sample: Sample, number: int, plan: TilePlan, rules: PackingRules) -> Int64:
    """Return the tokens of one image in the row, int64: before each tile its text, and a sentinel for each slot."""
    slots = np.full(rules.slots_per_tile, rules.image_sentinel_id, np.int64)
    texts = rules.tile_texts.before_tiles(sample.first_image + number, plan)
    return np.concatenate([part for text in texts for part in (np.array(text, np.int64), slots)])


def _record(sample: Sample, segment: _Segment) -> SampleRecord:
    return SampleRecord(
        source=sample.source_index,
        document=sample.document,
        text_tokens=len(segment.tokens) - segment.slots.size,
        image_slots=segment.slots.size,
        images=len(sample.images),
    )


def _target_weight(targets: int, normalisation: str) -> float:
    """Weight of each of a sample's targets."""
    if normalisation == "token" or targets == 0:
        return 1.0
    return float(1.0 / targets if normalisation == "sample" else targets**-0.5)


def _place_images(images: list[PlacedImage], sample: Sample, plans: Sequence[TilePlan], *, row: int) -> None:
    for number, (ref, plan) in enumerate(zip(sample.images, plans, strict=True)):
        first = images[-1].first_tile + images[-1].plan.num_tiles if images else 0
        label = f"image {sample.first_image + number} of document {sample.document} of source {sample.source!r}"
        images.append(PlacedImage(ref, plan, first, row, label))
