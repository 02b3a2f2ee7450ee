"""Rows to micro-batches: read the samples, lay them out, decode this rank's share of the tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from mm15_megatron.batch import MMBatch, RankView, StepCounts, Substitution, TileShare, tile_share
from mm15_megatron.config.schema import RunConfig, VisionConfig
from mm15_megatron.data.image.decoder import Decoded, ImageDecoder, build_decoder
from mm15_megatron.data.image.pillow import Bytes
from mm15_megatron.data.image.views import TileMaker
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.row_layout import Layout, PlacedImage, lay_out
from mm15_megatron.data.row_order import RowTask
from mm15_megatron.data.samples import ImageRef, Sample, read_sample
from mm15_megatron.errors import DataError

_DECODED_TOGETHER: Final = 8  # full-size images in memory at a time


@dataclass(frozen=True)
class ImageSettings:
    """How encoded images become tiles.

    Attributes:
        vision: side of a tile, mean and deviation.
        decoder: dali | pil.
        max_pixels: larger images are refused before they are decoded.
        on_bad_image: substitute (the mean colour, counted and named) | raise.
    """

    vision: VisionConfig
    decoder: str
    max_pixels: int
    on_bad_image: str

    @classmethod
    def from_config(cls, cfg: RunConfig) -> ImageSettings:
        """Collect the settings of a run."""
        data = cfg.data
        return cls(cfg.vision, data.decoder, data.max_image_pixels, data.on_bad_image)


class TileLoader:
    """Decode the images of a micro-batch into tiles; the decoding library is imported at the first image.

    Args:
        settings: decoder, limits and normalisation.
    """

    def __init__(self, settings: ImageSettings) -> None:
        self._settings = settings
        self._maker = TileMaker(settings.vision)
        self._decoder: ImageDecoder | None = None

    def load(
        self, images: Sequence[PlacedImage], fetch: Callable[[ImageRef], Bytes], *, share: TileShare
    ) -> tuple[torch.Tensor, list[tuple[PlacedImage, str]]]:
        """Decode the images that own a tile of ``share``.

        Args:
            images: every image of the micro-batch, in order.
            fetch: returns the encoded bytes of an image.
            share: the tiles to make.

        Returns:
            float32 [share.padded, 3, T, T], zeros where there is no tile or no decodable image; and the images that
            did not decode, with the reason.

        Raises:
            DataError: if an image does not decode and ``on_bad_image`` is ``raise``.
        """
        wanted = [i for i in images if i.first_tile < share.stop and i.first_tile + i.plan.num_tiles > share.start]
        tiles_N3TT = self._maker.blank(share.padded)
        problems = []
        for at in range(0, len(wanted), _DECODED_TOGETHER):
            group = wanted[at : at + _DECODED_TOGETHER]
            for image, decoded in zip(group, self._decode([fetch(i.ref) for i in group], group), strict=True):
                if decoded.pixels_HWC is None:
                    problems.append((image, decoded.problem))
                    continue
                made = self._maker.tiles(decoded.pixels_HWC, image.plan)
                first = max(image.first_tile, share.start)
                stop = min(image.first_tile + len(made), share.stop)
                inside = made[first - image.first_tile : stop - image.first_tile]
                tiles_N3TT[first - share.start : stop - share.start] = inside
        if problems and self._settings.on_bad_image == "raise":
            image, reason = problems[0]
            fix = "repair it, or set data.on_bad_image=substitute"
            raise DataError(f"{image.label} cannot be used: {reason}", fix=fix)
        return tiles_N3TT, problems

    def _decode(self, blobs: Sequence[Bytes], images: Sequence[PlacedImage]) -> list[Decoded]:
        if self._decoder is None:
            self._decoder = build_decoder(self._settings.decoder, max_pixels=self._settings.max_pixels)
        return self._decoder.decode(blobs, sizes=[(i.ref.height, i.ref.width) for i in images])


def collate(
    rows: Sequence[tuple[int, Sequence[Sample]]],
    rules: PackingRules,
    *,
    view: RankView,
    tiles: TileLoader,
    fetch: Callable[[ImageRef], Bytes],
) -> MMBatch:
    """Make the micro-batch of one rank.

    Args:
        rows: (global row index, samples) of each row.
        rules: the rules of the run.
        view: which tiles the rank needs; a rank that does not read images never calls ``fetch``.
        tiles: decodes images.
        fetch: returns the encoded bytes of an image.

    Raises:
        DataError: if placeholders and images disagree, samples do not fit, or a bad image is not to be substituted.
    """
    layout = lay_out(rows, rules)
    batch = MMBatch(
        segment_bounds_G=layout.segment_bounds_G,
        max_segment=rules.seq_length,
        position_ids_T=layout.position_ids_T,
        padding_mask_T=layout.padding_mask_T,
        tokens_T=layout.tokens_T,
        labels_T=layout.labels_T,
        loss_mask_T=layout.loss_mask_T,
        sources_T=layout.sources_T,
        rows=layout.records,
    )
    return _with_images(batch, layout, view=view, tiles=tiles, fetch=fetch) if view.reads_images else batch


def _with_images(
    batch: MMBatch, layout: Layout, *, view: RankView, tiles: TileLoader, fetch: Callable[[ImageRef], Bytes]
) -> MMBatch:
    total = len(layout.slots_NP)
    owned = tile_share(total, rank=view.tensor_rank, size=view.tensor_size)
    share = owned if view.shares_tiles else TileShare(start=0, stop=total, padded=max(1, total))
    tiles_N3TT, problems = tiles.load(layout.images, fetch, share=share)
    # Several ranks may decode the same image; the one that owns its first tile reports it, so that sums are exact.
    found: list[list[Substitution]] = [[] for _ in layout.records]
    for image, reason in problems:
        if owned.start <= image.first_tile < owned.stop:
            found[image.row].append(Substitution(image.ref.source, f"{image.label}: {reason}"))
    records = tuple(replace(r, substituted=tuple(s)) for r, s in zip(layout.records, found, strict=True))
    return replace(batch, tiles_N3HW=tiles_N3TT, slots_NP=layout.slots_NP, rows=records)


@dataclass(frozen=True)
class MicroBatchTask:
    """What a worker makes a micro-batch from.

    Attributes:
        rows: content of its rows.
        step_rows: on the first micro-batch of a step, the content of all rows the rank takes in the step, these
            included; empty on the others.
    """

    rows: tuple[RowTask, ...]
    step_rows: tuple[RowTask, ...] = ()


class Assembler:
    """From the content of rows to a micro-batch; picklable, so that a worker process can hold one.

    Args:
        readers: the sources of the mixture.
        rules: how documents become rows.
        view: the rank that is fed.
        settings: how images become tiles.
    """

    def __init__(
        self, readers: Sequence[IndexedSource], rules: PackingRules, *, view: RankView, settings: ImageSettings
    ) -> None:
        self._readers = tuple(readers)
        self._rules = rules
        self._view = view
        self._tiles = TileLoader(settings)

    def __call__(self, task: MicroBatchTask) -> MMBatch:
        """Return the micro-batch; the first one of a step carries the counts of the rank's step."""
        rows = [(row.row, self._read(row)) for row in task.rows]
        batch = collate(rows, self._rules, view=self._view, tiles=self._tiles, fetch=self._fetch)
        return replace(batch, step_counts=self._count(task.step_rows)) if task.step_rows else batch

    def _read(self, task: RowTask) -> list[Sample]:
        return [read_sample(self._readers[ref.source], ref) for ref in task.samples]

    def _count(self, tasks: Sequence[RowTask]) -> StepCounts:
        """Lay out the rank's rows of a step, one by one and without their images, and count."""
        targets, tokens = 0.0, 0
        for task in tasks:
            layout = lay_out([(task.row, self._read(task))], self._rules)
            targets += float(layout.loss_mask_T.sum(dtype=torch.float64))
            tokens += int((~layout.padding_mask_T).sum())
        return StepCounts(targets=targets, tokens=tokens)

    def _fetch(self, ref: ImageRef) -> Bytes:
        return self._readers[ref.source].image_bytes(ref.item)
