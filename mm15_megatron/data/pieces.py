"""Pieces: what a document contributes to rows.

Most documents are one piece. Text and interleaved documents that are longer than a row, or have more images than one
takes, are cut into several; captions and conversations lose the end of their text instead, or are left out. Nothing but
the index of a dataset is read, except for conversations that are too long.

An image is never cut, and a piece never ends on an image that is followed by more of its document: the image goes to
the next piece, with the text behind it. Where text is cut, the next piece starts with the last token of the piece
before, so that every token but the first of a document is a target exactly once.

Legend: D documents, M images of them, N pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.image.geometry import grid_indices, grid_tiles
from mm15_megatron.data.packing import PackingRules, Sizes

Int64 = npt.NDArray[np.int64]

CUT_KINDS: Final = ("text", "interleaved")  # the others are truncated

NO_TARGET: Final = "nothing to predict"
MANY_IMAGES: Final = "more images than data.max_images"
MANY_TILES: Final = "more tiles than data.max_tiles"
LARGE_IMAGE: Final = "an image that no row holds"
IMAGE_LOST: Final = "longer than a row, an image would be cut"
TARGETS_LOST: Final = "longer than a row, no target would be left"
REASONS: Final = (NO_TARGET, MANY_IMAGES, MANY_TILES, LARGE_IMAGE, IMAGE_LOST, TARGETS_LOST)

COUNTED: Final = (
    "documents", "kept", "samples", "tokens", "image_slots", "images", "tiles", "truncated", "truncated_tokens",
    "untrained_pieces", "untrained_images", *REASONS,
)  # fmt: skip
"""What is counted of documents: looked at, kept; the samples they became with their tokens (all, and those that tiles
own), images and tiles; documents whose text was truncated and the tokens lost; pieces left out because nothing in them
can be predicted (a cut behind a long run of images) and their images; and documents left out, by reason."""


@dataclass(frozen=True)
class Pieces:
    """N pieces, each array [N].

    Attributes:
        documents: int64, document inside its source.
        first: int64, first stored token.
        stop: int64, one past the last stored token.
        sizes: what each takes of a row.
    """

    documents: Int64
    first: Int64
    stop: Int64
    sizes: Sizes

    def of(self, chosen: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Pieces:
        """Return some of the pieces."""
        return Pieces(self.documents[chosen], self.first[chosen], self.stop[chosen], self.sizes.of(chosen))

    @classmethod
    def joined(cls, parts: Sequence[Pieces]) -> Pieces:
        """Put pieces behind one another."""
        return cls(
            np.concatenate([part.documents for part in parts]),
            np.concatenate([part.first for part in parts]),
            np.concatenate([part.stop for part in parts]),
            Sizes.joined([part.sizes for part in parts]),
        )


@dataclass(frozen=True)
class Cut:
    """The pieces of some documents, and the account of what became of them.

    Attributes:
        pieces: in the order of the documents given, and of their text.
        counted: int64, one number for each name in :data:`COUNTED`.
    """

    pieces: Pieces
    counted: Int64


class DocumentIndex(Protocol):
    """What the index of a dataset says, as :class:`~mm15_megatron.data.indexed.reader.IndexedSource` does."""

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        ...

    @property
    def token_lengths(self) -> npt.NDArray[np.int32]:
        """int32 [documents], stored tokens, one for each image."""
        ...

    @property
    def image_index(self) -> Int64:
        """int64 [documents + 1], first image of each document, then the number of images."""
        ...

    @property
    def image_sizes(self) -> npt.NDArray[np.uint32]:
        """uint32 [images, 2], height and width."""
        ...

    @property
    def image_positions(self) -> npt.NDArray[np.int32]:
        """int32 [images], stored position of each image inside its document."""
        ...

    def has_target(self, document: int, stop: int) -> bool:
        """Tell whether one of the tokens 1 to ``stop`` - 1 of a document is a target; asked of documents too long."""
        ...


def cut_documents(source: DocumentIndex, documents: Int64, rules: PackingRules) -> Cut:
    """Turn documents into pieces that fit a row.

    Args:
        source: where they are.
        documents: int64 [D], each once.
        rules: the caps.
    """
    index = _Index.read(source, documents, rules)
    fits = (
        (index.tokens_D <= rules.seq_length) & (index.images_D <= rules.max_images) & (index.tiles_D <= rules.max_tiles)
    )
    found = [_whole(index, np.flatnonzero(fits))]
    long = np.flatnonzero(~fits)
    if long.size and source.kind in CUT_KINDS:
        found.append(_cut(index.of(long), rules, owner=long))
    elif long.size:
        found.append(_truncated(index.of(long), rules, owner=long, source=source, documents=documents[long]))
    return _account(index, documents, _joined(found), rules)


@dataclass(frozen=True)
class _Index:
    """What the index of a dataset says about D documents and their M images.

    Attributes:
        stored_D: stored tokens.
        tokens_D: tokens in a row, images expanded.
        images_D: images.
        tiles_D: tiles.
        starts_D: number of the first image of each document among the M.
        position_M: stored position of each image inside its document.
        length_M: tokens each image becomes.
        tiles_M: tiles of each image.
    """

    stored_D: Int64
    tokens_D: Int64
    images_D: Int64
    tiles_D: Int64
    starts_D: Int64
    position_M: Int64
    length_M: Int64
    tiles_M: Int64

    @classmethod
    def read(cls, source: DocumentIndex, documents: Int64, rules: PackingRules) -> _Index:
        stored = source.token_lengths[documents].astype(np.int64)
        first, stop = source.image_index[documents], source.image_index[documents + 1]
        images = stop - first
        starts = np.cumsum(images) - images
        if not images.any():
            none = np.zeros(0, np.int64)
            return cls(stored, stored, images, images, starts, none, none, none)
        items = np.repeat(first - starts, images) + np.arange(int(images.sum()))
        in_sample = np.repeat(images, images)
        tiling = rules.tiling
        number = np.arange(len(items)) - np.repeat(starts, images)
        grids = grid_indices(source.image_sizes[items], in_sample, number, tile_size=rules.tile_size, tiling=tiling)
        tiles = grid_tiles(tiling)[grids]
        texts_KG = rules.tile_texts.lengths(tiling)
        length = tiles * rules.slots_per_tile + texts_KG[np.minimum(number, len(texts_KG) - 1), grids]
        return cls(
            stored,
            stored + _sums(length - 1, starts, images),
            images,
            _sums(tiles, starts, images),
            starts,
            source.image_positions[items].astype(np.int64),
            length,
            tiles,
        )

    def of(self, chosen: Int64) -> _Index:
        """Return some of the documents with their images."""
        images = self.images_D[chosen]
        starts = np.cumsum(images) - images
        items = np.repeat(self.starts_D[chosen] - starts, images) + np.arange(int(images.sum()))
        return _Index(
            self.stored_D[chosen],
            self.tokens_D[chosen],
            images,
            self.tiles_D[chosen],
            starts,
            self.position_M[items],
            self.length_M[items],
            self.tiles_M[items],
        )


def _sums(values_M: Int64, starts_D: Int64, counts_D: Int64) -> Int64:
    """Add up the values of each document."""
    before = np.concatenate(([0], np.cumsum(values_M)))
    return before[starts_D + counts_D] - before[starts_D]


@dataclass(frozen=True)
class _Found:
    """Pieces of documents that are named by their place among those given, and the documents that gave none.

    Attributes:
        owner, first, stop: int64 [N].
        sizes: of the N pieces.
        left_out: (reason, places of documents) of those left out.
        truncated_tokens: tokens lost, of each document that was truncated.
    """

    owner: Int64
    first: Int64
    stop: Int64
    sizes: Sizes
    left_out: tuple[tuple[str, Int64], ...] = ()
    truncated_tokens: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))


def _joined(parts: list[_Found]) -> _Found:
    return _Found(
        np.concatenate([p.owner for p in parts]),
        np.concatenate([p.first for p in parts]),
        np.concatenate([p.stop for p in parts]),
        Sizes.joined([p.sizes for p in parts]),
        tuple(one for p in parts for one in p.left_out),
        np.concatenate([p.truncated_tokens for p in parts]),
    )


def _whole(index: _Index, at: Int64) -> _Found:
    sizes = Sizes(index.tokens_D[at], index.images_D[at], index.tiles_D[at])
    return _Found(at, np.zeros(len(at), np.int64), index.stored_D[at], sizes)


def _account(index: _Index, documents: Int64, found: _Found, rules: PackingRules) -> Cut:
    """Leave out pieces without a target, put the rest in the order of their documents, and count."""
    text = found.stop - found.first - found.sizes.images
    starts_on_image = np.zeros(len(text), np.bool_)
    with_images = np.flatnonzero(found.sizes.images)
    if with_images.size:
        owner = found.owner[with_images]
        # the first image at or behind the start of the piece: documents lie one behind the other
        ends_D = np.cumsum(index.stored_D)
        base_D = ends_D - index.stored_D
        place_M = np.repeat(base_D, index.images_D) + index.position_M
        begin = base_D[owner] + found.first[with_images]
        starts_on_image[with_images] = place_M[np.searchsorted(place_M, begin)] == begin
    targets = text - ~starts_on_image
    good = targets > 0
    order = np.flatnonzero(good)
    order = order[np.argsort(found.owner[order], kind="stable")]
    owner = found.owner[order]
    sizes = found.sizes.of(order)
    pieces = Pieces(documents[owner], found.first[order], found.stop[order], sizes)
    kept = np.zeros(len(documents), np.bool_)
    kept[owner] = True
    emitted = np.zeros(len(documents), np.bool_)
    emitted[found.owner] = True
    reasons = {reason: 0 for reason in REASONS} | {NO_TARGET: int(np.count_nonzero(emitted & ~kept))}
    for reason, places in found.left_out:
        reasons[reason] += len(places)
    cut_away = ~good & kept[found.owner]  # of documents that are kept
    counted = {
        "documents": len(documents),
        "kept": int(np.count_nonzero(kept)),
        "samples": len(order),
        "tokens": int(sizes.tokens.sum()),
        "image_slots": int(sizes.tiles.sum()) * rules.slots_per_tile,
        "images": int(sizes.images.sum()),
        "tiles": int(sizes.tiles.sum()),
        "truncated": len(found.truncated_tokens),
        "truncated_tokens": int(found.truncated_tokens.sum()),
        "untrained_pieces": int(np.count_nonzero(cut_away)),
        "untrained_images": int(found.sizes.images[cut_away].sum()),
        **reasons,
    }
    return Cut(pieces, np.array([counted[name] for name in COUNTED], dtype=np.int64))


# --- Documents that are truncated


def _truncated(index: _Index, rules: PackingRules, *, owner: Int64, source: DocumentIndex, documents: Int64) -> _Found:
    """Cut the end off the text of documents, or leave them out."""
    reasons = {
        MANY_IMAGES: index.images_D > rules.max_images,
        MANY_TILES: index.tiles_D > rules.max_tiles,
    }
    bad = np.zeros(len(owner), np.bool_)
    left_out = []
    for reason, mask in reasons.items():
        left_out.append((reason, owner[mask & ~bad]))
        bad |= mask
    at = np.flatnonzero(~bad)
    excess = index.tokens_D[at] - rules.seq_length
    stop = index.stored_D[at] - excess  # all that is cut is text, a token each, or the document is left out
    last = index.starts_D[at] + index.images_D[at] - 1
    behind = np.zeros(len(at), np.int64)  # one past the last image
    some = index.images_D[at] > 0
    behind[some] = index.position_M[last[some]] + 1
    loses_image = stop < behind
    left_out.append((IMAGE_LOST, owner[at[loses_image]]))
    at, stop, excess = at[~loses_image], stop[~loses_image], excess[~loses_image]
    pairs = zip(documents[at].tolist(), stop.tolist(), strict=True)
    learns = np.array([source.has_target(document, end) for document, end in pairs], np.bool_)
    left_out.append((TARGETS_LOST, owner[at[~learns]]))
    at, stop, excess = at[learns], stop[learns], excess[learns]
    sizes = Sizes(np.full(len(at), rules.seq_length), index.images_D[at], index.tiles_D[at])
    return _Found(owner[at], np.zeros(len(at), np.int64), stop, sizes, tuple(left_out), excess)


# --- Documents that are cut into several pieces


def _cut(index: _Index, rules: PackingRules, *, owner: Int64) -> _Found:
    """Cut every document, all of them at once, a piece of each in every round."""
    no_row_D = np.zeros(len(owner), np.bool_)
    document_M = np.repeat(np.arange(len(owner)), index.images_D)
    no_row_D[document_M[(index.length_M > rules.seq_length) | (index.tiles_M > rules.max_tiles)]] = True
    knife = _Knife(index, rules)
    at = np.flatnonzero(~no_row_D)
    start = np.zeros(len(at), np.int64)
    shared = np.zeros(len(at), np.bool_)  # whether the first token is the last one of the piece before
    parts: list[tuple[Int64, ...]] = []
    while at.size:
        stop, moved = knife.stops(at, start, shared)
        emitted = ~moved
        parts.append((at[emitted], start[emitted], stop[emitted]))
        more = stop < index.stored_D[at]
        at, stop = at[more], stop[more]
        # an image starts the next piece itself; a text token needs the one before it
        shared = ~knife.is_image(at, stop) & ~knife.is_image(at, stop - 1)
        start = stop - shared
    pieces = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0, np.int64)] * 3
    order = np.argsort(pieces[0], kind="stable")
    document, first, stop = (column[order] for column in pieces)
    return _Found(owner[document], first, stop, knife.sizes(document, first, stop), ((LARGE_IMAGE, owner[no_row_D]),))


class _Knife:
    """Where pieces end, for many documents at once.

    Documents lie one behind the other on two axes: of stored tokens, and of tokens in a row, where images are expanded.
    """

    def __init__(self, index: _Index, rules: PackingRules) -> None:
        self._index, self._rules = index, rules
        self._base_D = np.cumsum(index.stored_D) - index.stored_D
        owner_M = np.repeat(np.arange(len(index.stored_D)), index.images_D)
        self._place_M = self._base_D[owner_M] + index.position_M
        self._before_M = np.concatenate(([0], np.cumsum(index.length_M - 1)))  # added by the images before each
        self._tiles_before_M = np.concatenate(([0], np.cumsum(index.tiles_M)))
        self._end_M = self._place_M + 1 + self._before_M[1:]  # one past each image, expanded
        # first image of the unbroken run of images that each belongs to
        new_run = np.ones(len(self._place_M), np.bool_)
        new_run[1:] = (np.diff(self._place_M) > 1) | (np.diff(owner_M) > 0)
        run_M = np.cumsum(new_run) - 1
        self._run_start_M = index.position_M[np.flatnonzero(new_run)][run_M] if len(run_M) else run_M

    def is_image(self, at: Int64, position: Int64) -> npt.NDArray[np.bool_]:
        """Tell whether an image stands at a stored position of a document."""
        place = self._base_D[at] + position
        found = np.searchsorted(self._place_M, place)
        inside = found < len(self._place_M)
        result = np.zeros(len(at), np.bool_)
        result[inside] = self._place_M[found[inside]] == place[inside]
        return result

    def sizes(self, at: Int64, first: Int64, stop: Int64) -> Sizes:
        """Measure the stored tokens [first, stop) of documents."""
        one = np.searchsorted(self._place_M, self._base_D[at] + first)
        end = np.searchsorted(self._place_M, self._base_D[at] + stop)
        added = self._before_M[end] - self._before_M[one]
        return Sizes(stop - first + added, end - one, self._tiles_before_M[end] - self._tiles_before_M[one])

    def stops(self, at: Int64, start: Int64, shared: npt.NDArray[np.bool_]) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """Return where the pieces that start at ``start`` end, and which of them are no pieces but a step forward.

        A piece that would hold its shared token and a part of a run of images is dropped: the run starts the next one.
        """
        index, rules = self._index, self._rules
        first = np.searchsorted(self._place_M, self._base_D[at] + start)
        last = index.starts_D[at] + index.images_D[at]
        limit = self._base_D[at] + start + self._before_M[first] + rules.seq_length  # on the axis of expanded tokens
        taken = np.minimum(np.searchsorted(self._end_M, limit, side="right"), first + rules.max_images)
        budget = self._tiles_before_M[first] + rules.max_tiles
        taken = np.minimum(taken, np.searchsorted(self._tiles_before_M, budget, side="right") - 1)
        taken = np.clip(taken, first, last)
        stop = np.minimum(limit - self._before_M[taken] - self._base_D[at], index.stored_D[at])
        waits = taken < last  # another image, which starts behind this piece
        stop[waits] = np.minimum(stop[waits], index.position_M[taken[waits]])
        ends_on_image = (taken > first) & (stop < index.stored_D[at]) & self.is_image(at, stop - 1)
        back = np.where(ends_on_image, self._run_start_M[np.maximum(taken - 1, 0)] if len(self._place_M) else 0, stop)
        text_before = back - start > shared
        only_shared = ends_on_image & shared & (back - start == 1)
        stop = np.where(ends_on_image & (text_before | only_shared), back, stop)
        return stop, only_shared
