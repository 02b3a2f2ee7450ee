"""Which samples share a row: the rules, and a best fit under every cap at once.

Legend: N samples, C = 4 caps of a row (tokens, images, tiles, samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.config.schema import RunConfig, TilingConfig
from mm15_megatron.data.image.geometry import TilePlan, tile_plan
from mm15_megatron.data.samples import ImageRef
from mm15_megatron.data.tile_text import TileTexts

Int64 = npt.NDArray[np.int64]

PACKING_VERSION: Final = 3  # part of the order's digest: raise it whenever the same documents would give other rows
MAX_SAMPLES_PER_ROW: Final = 256  # bounds the segments of a row, so that the bounds tensor has a constant length
_NO_TEXTS: Final = TileTexts()
_BATCHES: Final = 256  # of samples that are placed at once: more fill rows no better, and take longer
_ALSO_BINDS: Final = 0.8  # a cap that needs this share of the rows that the tightest one needs binds too
_MANY_SAMPLES: Final = 8  # samples of a row on average from which on they are small
_SHARE: Final = 1 << 20  # a full cap, in whole numbers
_ONE_BY_ONE: Final = 1 << 10  # samples up to which each is placed alone: exact, and slow only where there are many
_IMAGES: Final = 1  # column of the caps
_FEW_ROWS: Final = 1 << 15  # open rows up to which a second look at them is worth its time
_TRIES: Final = 8  # samples that do not fit, after which a spread row is full


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
        tile_texts: position indicators.
        normalisation: weight of a target: token | sample | sqrt (``train.loss_normalisation``).
    """

    seq_length: int
    slots_per_tile: int
    tile_size: int
    tiling: TilingConfig
    max_images: int
    max_tiles: int
    image_sentinel_id: int
    tile_texts: TileTexts = _NO_TEXTS
    normalisation: str = "token"

    @classmethod
    def from_config(cls, cfg: RunConfig, *, image_sentinel_id: int, tile_texts: TileTexts = _NO_TEXTS) -> PackingRules:
        """Collect the rules of a run."""
        return cls(
            seq_length=cfg.data.seq_length,
            slots_per_tile=cfg.connector.num_tokens,
            tile_size=cfg.vision.image_size,
            tiling=cfg.tiling,
            max_images=cfg.data.max_images,
            max_tiles=cfg.data.max_tiles,
            image_sentinel_id=image_sentinel_id,
            tile_texts=tile_texts,
            normalisation=cfg.train.loss_normalisation,
        )

    @property
    def max_samples(self) -> int:
        """Samples of a row at most."""
        return min(self.seq_length, MAX_SAMPLES_PER_ROW)

    @property
    def caps_C(self) -> Int64:
        """What a row holds at most: tokens, images, tiles, samples."""
        return np.array([self.seq_length, self.max_images, self.max_tiles, self.max_samples], dtype=np.int64)

    def num_bounds(self, rows: int) -> int:
        """G, the constant length of ``segment_bounds_G``: every sample and the pads of each row, and the leading 0."""
        return rows * (self.max_samples + 1) + 1

    def plans(self, images: Sequence[ImageRef], *, images_in_sample: int, first_image: int = 0) -> tuple[TilePlan, ...]:
        """Return the tile plan of each image of a sample, or of those from number ``first_image`` on."""
        return tuple(
            tile_plan(
                image.height,
                image.width,
                tile_size=self.tile_size,
                tiling=self.tiling,
                images_in_sample=images_in_sample,
                number=number,
            )
            for number, image in enumerate(images, start=first_image)
        )


@dataclass(frozen=True)
class Sizes:
    """What packing needs to know of N samples, each int64 [N]: tokens in the row, images, tiles."""

    tokens: Int64
    images: Int64
    tiles: Int64

    def __len__(self) -> int:
        """Samples."""
        return len(self.tokens)

    @property
    def matrix_NC(self) -> Int64:
        """All sizes in the order of ``PackingRules.caps_C``, int64 [N, 4]."""
        return np.stack((self.tokens, self.images, self.tiles, np.ones(len(self), np.int64)), axis=1)

    def of(self, chosen: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Sizes:
        """Return the sizes of some of the samples."""
        return Sizes(self.tokens[chosen], self.images[chosen], self.tiles[chosen])

    @classmethod
    def joined(cls, parts: Sequence[Sizes]) -> Sizes:
        """Put sizes behind one another."""
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.tiles for part in parts]),
        )


def least_rows(sizes: Sizes, rules: PackingRules) -> int:
    """Return a number of rows below which no packing can go: what the cap that binds most needs on average."""
    return int((-(-sizes.matrix_NC.sum(axis=0) // rules.caps_C)).max()) if len(sizes) else 0


def pack(sizes: Sizes, rules: PackingRules) -> Int64:
    """Put samples into rows, so that rows are nearly as few as the caps allow.

    Where rows hold few samples and one cap binds, best fit: the largest samples first, each into the fullest row that
    still takes it. Small samples are spread over rows instead, and so are samples for which two caps bind (captions of
    many words: images and tokens), where filling row after row would use up one cap and waste the other. Samples are
    placed many at a time, in a few hundred vectorised steps whatever their number. All arithmetic is on integers: the
    result is the same on every machine.

    Args:
        sizes: of N samples, each of which fits an empty row.
        rules: the caps.

    Returns:
        int64 [N], row of each sample; rows are numbered from 0 without gaps, in no meaningful order.
    """
    if not len(sizes):
        return np.zeros(0, np.int64)
    sizes_NC, caps_C = sizes.matrix_NC, rules.caps_C
    needed_C = sizes_NC.sum(axis=0) / caps_C
    binding = np.flatnonzero(needed_C >= _ALSO_BINDS * needed_C.max())
    if len(binding) > 1 or len(sizes) >= _MANY_SAMPLES * needed_C.max():
        return _spread(sizes_NC, caps_C, binding)
    return _best_fit(sizes_NC, caps_C, main=int(binding[0]))


def _spread(sizes_NC: Int64, caps_C: Int64, binding: Int64) -> Int64:
    """Deal samples to as many rows as the caps need on average, in rounds, the largest that fits to the emptiest row.

    What finds no room is dealt to rows of its own, in the same way. Size and room are sums of shares of the caps that
    bind; every cap is checked.
    """
    size_N = (sizes_NC[:, binding] * _SHARE // caps_C[binding]).sum(axis=1)
    row_N = np.full(len(sizes_NC), -1, np.int64)
    left = np.argsort(size_N, kind="stable")
    rows = 0
    while left.size:
        count = int((-(-sizes_NC[left].sum(axis=0) // caps_C)).max())
        free_RC = np.tile(caps_C, (count, 1))
        room_R = np.full(count, _SHARE * len(binding))
        failed_R = np.zeros(count, np.int64)
        open_rows = np.arange(count)
        while left.size and open_rows.size:
            open_rows = open_rows[np.argsort(-room_R[open_rows], kind="stable")]
            largest = np.searchsorted(size_N[left], room_R[open_rows], side="right") - 1
            step = np.arange(open_rows.size)
            at = np.minimum.accumulate(largest + step) - step  # each row another sample
            open_rows, at = open_rows[at >= 0], at[at >= 0]
            samples = left[at]
            fits = (sizes_NC[samples] <= free_RC[open_rows]).all(axis=1)
            into, put = open_rows[fits], samples[fits]
            row_N[put] = rows + into
            free_RC[into] -= sizes_NC[put]
            room_R[into] -= size_N[put]
            missed = open_rows[~fits]
            failed_R[missed] += 1
            room_R[missed] = np.minimum(room_R[missed], size_N[samples[~fits]] - 1)  # look for something smaller
            kept = np.ones(left.size, np.bool_)
            kept[at[fits]] = False
            left = left[kept]
            open_rows = open_rows[failed_R[open_rows] < _TRIES]
        rows += count
    return _numbered(row_N)


def _numbered(row_N: Int64) -> Int64:
    """Close the gaps in the numbers of rows."""
    return np.unique(row_N, return_inverse=True)[1].astype(np.int64)


def _best_fit(sizes_NC: Int64, caps_C: Int64, *, main: int) -> Int64:
    packer = _Packer(sizes_NC, caps_C, main=main)
    for batch in packer.batches():
        packer.place(batch)
    return packer.row_N


class _Packer:
    """Rows under construction; those that can still take a sample stay sorted by their room."""

    def __init__(self, sizes_NC: Int64, caps_C: Int64, *, main: int) -> None:
        self._sizes_NC, self._caps_C = sizes_NC, caps_C
        self._main = main
        self._size_N = sizes_NC[:, self._main]
        self._smallest = int(self._size_N.min())
        self.row_N = np.full(len(sizes_NC), -1, np.int64)
        self._rows = 0
        self._free_RC = np.empty((1024, len(caps_C)), np.int64)  # doubled when it is full
        self._open = np.zeros(0, np.int64)  # rows, ascending by room
        self._room = np.zeros(0, np.int64)  # of the open rows, along the main cap

    def batches(self) -> list[Int64]:
        """Samples in descending order of size, in groups; those that no second one can join come together."""
        order = np.argsort(-self._size_N, kind="stable")
        alone = int(np.count_nonzero(2 * self._size_N > self._caps_C[self._main]))
        few = len(order) <= _ONE_BY_ONE
        step = 1 if few else -(-(len(order) - alone) // _BATCHES)
        edges = [alone, *range(alone + step, len(order), step)]
        return [part for part in np.split(order, edges) if part.size]

    def place(self, batch: Int64) -> None:
        """Place samples, given in descending order of size, each into another row."""
        used = np.zeros(len(self._open), np.bool_)
        if batch.size == 1:
            self._place_one(batch, used)
            return
        waiting = self._match(batch[::-1], np.arange(used.size), used)
        # those left met rows whose other caps are used up: again, among rows that take so many images
        rest = [waiting[:0]]
        images_n = self._sizes_NC[waiting, _IMAGES]
        again = used.any() and len(self._open) <= _FEW_ROWS
        for images in np.unique(images_n)[::-1].tolist() if again else ():
            group = waiting[images_n == images]
            least_C = self._sizes_NC[group].max(axis=0)
            least_C[self._main] = 0
            takes = (self._free_RC[self._open] >= least_C).all(axis=1) & ~used
            rest.append(self._match(group, np.flatnonzero(takes), used))
        waiting = np.concatenate(rest) if again else waiting
        order = np.argsort(-self._size_N[waiting], kind="stable")
        self._keep_sorted(used, self._open_rows(waiting[order]))

    def _match(self, waiting: Int64, among: Int64, used: npt.NDArray[np.bool_]) -> Int64:
        """Put samples, in ascending order of size, each into the tightest of some open rows that no smaller one took.

        Returns:
            The samples that found none, in the same order.
        """
        if not waiting.size or not among.size:
            return waiting
        wanted = np.searchsorted(self._room[among], self._size_N[waiting], side="left")
        step = np.arange(waiting.size)
        found = np.maximum.accumulate(wanted - step) + step
        inside = np.flatnonzero(found < among.size)
        at = among[found[inside]]
        rows = self._open[at]
        fits = (self._sizes_NC[waiting[inside]] <= self._free_RC[rows]).all(axis=1)
        self._put(waiting[inside[fits]], rows[fits])
        used[at[fits]] = True
        left = np.ones(waiting.size, np.bool_)
        left[inside[fits]] = False
        return waiting[left]

    def _place_one(self, sample: Int64, used: npt.NDArray[np.bool_]) -> None:
        """Place one sample into the tightest row that takes it."""
        first = int(np.searchsorted(self._room, self._size_N[sample[0]], side="left"))
        rows = self._open[first:]
        fits = np.flatnonzero((self._sizes_NC[sample[0]] <= self._free_RC[rows]).all(axis=1))
        if fits.size:
            self._put(sample, rows[fits[:1]])
            used[first + fits[0]] = True
        self._keep_sorted(used, sample[:0] if fits.size else self._open_rows(sample))

    def _put(self, samples: Int64, rows: Int64) -> None:
        self.row_N[samples] = rows
        self._free_RC[rows] -= self._sizes_NC[samples]

    def _open_rows(self, samples: Int64) -> Int64:
        """Put samples, in descending order of size, into new rows, one to each in turn; return the rows."""
        first = self._rows
        while samples.size:
            count = int((-(-self._sizes_NC[samples].sum(axis=0) // self._caps_C)).max())
            rows = np.arange(self._rows, self._rows + count)
            self._rows += count
            while len(self._free_RC) < self._rows:
                self._free_RC = np.concatenate((self._free_RC, np.empty_like(self._free_RC)))
            self._free_RC[rows] = self._caps_C
            while True:
                turn = samples[:count]
                fits = (self._sizes_NC[turn] <= self._free_RC[rows[: len(turn)]]).all(axis=1)
                self._put(turn[fits], rows[: len(turn)][fits])
                samples = np.concatenate((turn[~fits], samples[count:]))
                if not samples.size or not fits.any():
                    break
        return np.arange(first, self._rows)

    def _keep_sorted(self, used: npt.NDArray[np.bool_], opened: Int64) -> None:
        """Put the rows that changed back in their place; those that can take nothing more are left out."""
        changed = np.concatenate((self._open[used], opened))
        changed = changed[(self._free_RC[changed] > 0)[:, [self._main, -1]].all(axis=1)]
        room = self._free_RC[changed, self._main]
        order = np.argsort(room, kind="stable")
        order = order[room[order] >= self._smallest]
        changed, room = changed[order], room[order]
        stay_open, stay_room = self._open[~used], self._room[~used]
        at = np.searchsorted(stay_room, room)
        self._open, self._room = np.insert(stay_open, at, changed), np.insert(stay_room, at, room)
