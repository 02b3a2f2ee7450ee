"""Samples as the model sees them: the pieces of a document, every token with its part in the loss, and the tiles.

Nothing is computed anew: pieces come from :mod:`.pieces`, tokens, weights and slots from :func:`.row_layout.lay_out`,
pixels from :class:`.collate.TileLoader`, each as the trainer's loader calls it.

Legend: T side of a tile.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.batch import TileShare
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.boxes import Point, Scale, find_written
from mm15_megatron.data.collate import ImageSettings, TileLoader
from mm15_megatron.data.image.geometry import TilePlan, View
from mm15_megatron.data.image.views import TileMaker
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.inspect import document_problems
from mm15_megatron.data.inspect_tokens import token_texts, visible
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.pieces import COUNTED, CUT_KINDS, REASONS, Pieces, cut_documents
from mm15_megatron.data.row_layout import Layout, PlacedImage, lay_out
from mm15_megatron.data.samples import Sample, SampleRef, read_sample
from mm15_megatron.data.tile_text import TileTexts
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import DataError

TARGET: Final = "target"
CONTEXT: Final = "context"
SHARED: Final = "shared"
INDICATOR: Final = "indicator"
SLOT: Final = "slot"
ROLES: Final = (TARGET, CONTEXT, SHARED, INDICATOR, SLOT)
"""What a token is for: predicted; read alone; read alone here and predicted in the piece before; the text that says
where a tile stands; a place of an image's features."""

_DAMAGED: Final = (IndexError, ValueError, OverflowError)  # what a damaged index leads numpy to


@dataclass(frozen=True)
class ShownToken:
    """One token of a piece that is no image slot.

    Attributes:
        id: token id.
        text: what it adds to the text, see :func:`~mm15_megatron.data.inspect_tokens.visible`.
        position: inside the segment, images expanded.
        role: one of :data:`ROLES`.
        special: ``text`` is the name of a mark, not text of the document.
        region: number of the box or point of the piece that it is a part of; 0 = none.
    """

    id: int
    text: str
    position: int
    role: str
    special: bool = False
    region: int = 0


@dataclass(frozen=True)
class ShownTile:
    """One tile in the sequence: its place in the view (from 1), the text before it, and the positions it owns."""

    number: int
    row: int
    column: int
    indicator: tuple[ShownToken, ...]
    first_slot: int
    slots: int


@dataclass(frozen=True)
class ShownView:
    """One resized copy of an image.

    Attributes:
        view: its tiles and the size of the picture on their canvas.
        overview: the whole image beside the grid.
        tiles: row by row.
        pixels: uint8 [tiles, T, T, 3], the colours that the model is given.
    """

    view: View
    overview: bool
    tiles: tuple[ShownTile, ...]
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ShownImage:
    """One image of a piece: its number in the document, its size in pixels, its views, and why it did not decode."""

    number: int
    height: int
    width: int
    stored_bytes: int
    views: tuple[ShownView, ...]
    problem: str = ""


@dataclass(frozen=True)
class ShownRegion:
    """A box (four coordinates) or point (two) of the text of a piece.

    Attributes:
        number: in the piece, from 1.
        text: as it is written.
        image: number of the image that it is drawn on; None = no image stands before it in the piece.
        certain: the document has no other image.
        pixels: coordinates in pixels of the image, x before y; empty without an image.
    """

    number: int
    text: str
    image: int | None
    certain: bool
    pixels: tuple[float, ...] = ()


@dataclass(frozen=True)
class ShownPiece:
    """A segment of a row.

    Attributes:
        first: first stored token.
        stop: one past the last stored token.
        tokens: tokens in the row.
        targets: of them, those that are predicted.
        weight: of each target, as ``train.loss_normalisation`` says.
        parts: tokens and images, in order.
        regions: boxes and points of its text.
    """

    first: int
    stop: int
    tokens: int
    targets: int
    weight: float
    parts: tuple[ShownToken | ShownImage, ...]
    regions: tuple[ShownRegion, ...]

    @property
    def images(self) -> tuple[ShownImage, ...]:
        """Its images, in order."""
        return tuple(part for part in self.parts if isinstance(part, ShownImage))


@dataclass(frozen=True)
class ShownDocument:
    """One document.

    Attributes:
        number: inside the source.
        stored: stored tokens.
        images: images.
        problems: what is wrong with it; a document can be wrong and still be shown.
        notes: what the rules of the run do to it.
        pieces: those that are shown.
        all_pieces: how many it has.
    """

    number: int
    stored: int
    images: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pieces: tuple[ShownPiece, ...] = ()
    all_pieces: int = 0

    @property
    def broken(self) -> bool:
        """Whether something is wrong with it or one of its images."""
        return bool(self.problems) or any(image.problem for piece in self.pieces for image in piece.images)

    def roles(self) -> dict[str, int]:
        """Return how many tokens of the shown pieces have each role."""
        found = dict.fromkeys(ROLES, 0)
        for part in (part for piece in self.pieces for part in piece.parts):
            if isinstance(part, ShownToken):
                found[part.role] += 1
                continue
            for tile in (tile for view in part.views for tile in view.tiles):
                found[INDICATOR] += len(tile.indicator)
                found[SLOT] += tile.slots
        return found


def spread(documents: int, count: int, *, seed: int) -> list[int]:
    """Choose documents over all of a dataset: one at random out of each of ``count`` equal stretches, ascending."""
    count = min(count, documents)
    edges = [documents * n // count for n in range(count + 1)] if count else []
    draw = random.Random(seed)
    return [draw.randrange(first, stop) for first, stop in zip(edges[:-1], edges[1:], strict=True)]


@dataclass(frozen=True)
class ShowRules:
    """How documents are shown.

    Attributes:
        packing: the rules of the run.
        images: how the run decodes images; a bad one is always substituted here, and named.
        scale: of the coordinates in the text.
        max_pieces: pieces of a document that are shown, the first ones.
    """

    packing: PackingRules
    images: ImageSettings
    scale: Scale = field(default_factory=Scale)
    max_pieces: int = 8

    @classmethod
    def from_config(cls, cfg: RunConfig, tokenizer: Tokenizer, *, scale: Scale, max_pieces: int) -> ShowRules:
        """Collect the rules of a run as the loader does."""
        texts = TileTexts.build(cfg.tiling, tokenizer.encode)
        packing = PackingRules.from_config(cfg, image_sentinel_id=tokenizer.image_id, tile_texts=texts)
        return cls(packing, ImageSettings.from_config(cfg), scale, max_pieces)


class DocumentViewer:
    """Look at documents of one source as the model would.

    Args:
        source: the dataset.
        tokenizer: that it was built with.
        rules: of the run, and of what is shown.
    """

    def __init__(self, source: IndexedSource, tokenizer: Tokenizer, rules: ShowRules) -> None:
        self._source, self._tokenizer, self._rules = source, tokenizer, rules
        self._loader = TileLoader(replace(rules.images, on_bad_image="substitute"))
        self._maker = TileMaker(rules.images.vision)

    def document(self, number: int) -> ShownDocument:
        """Return one document; whatever is wrong with it is said in it.

        Raises:
            BackendError: the decoder of the run cannot be used here.
        """
        source = self._source
        images = int(source.image_index[number + 1] - source.image_index[number])
        shown = ShownDocument(number, int(source.token_lengths[number]), images)
        try:
            shown = replace(shown, problems=tuple(self._problems(number)))
            return self._with_pieces(shown)
        except DataError as error:
            return replace(shown, problems=(*shown.problems, error.problem))
        except _DAMAGED as error:
            return replace(shown, problems=(*shown.problems, f"the index is damaged ({type(error).__name__}: {error})"))

    def _problems(self, number: int) -> list[str]:
        limit = self._rules.images.max_pixels
        found = document_problems(self._source, number, decode=False, max_image_pixels=limit)
        problems = [f"{problem}: {detail}" if detail else problem for problem, detail in found]
        foreign = self._source.tokens(number)
        foreign = foreign[(foreign >= self._tokenizer.vocab_size) & (foreign != self._tokenizer.image_id)]
        if foreign.size:
            size = self._tokenizer.vocab_size
            problems.append(f"ids that the tokenizer does not have: {foreign[:8].tolist()}, it has {size}")
        return problems

    def _with_pieces(self, shown: ShownDocument) -> ShownDocument:
        cut = cut_documents(self._source, np.array([shown.number], np.int64), self._rules.packing)
        counted = dict(zip(COUNTED, cut.counted.tolist(), strict=True))
        pieces = cut.pieces
        notes = [f"left out: {reason}" for reason in REASONS if counted[reason]]
        if counted["truncated"]:
            notes.append(f"truncated: its last {counted['truncated_tokens']} tokens fit no row and are left out")
        if counted["untrained_pieces"]:
            notes.append(f"{counted['untrained_images']} images are left out: nothing behind them can be predicted")
        count = len(pieces.documents)
        shown = replace(shown, notes=tuple(notes), all_pieces=count)
        for at in range(min(count, self._rules.max_pieces)):
            shown = replace(shown, pieces=(*shown.pieces, self._piece(pieces, at)))
        return shown

    def _piece(self, pieces: Pieces, at: int) -> ShownPiece:
        first, stop = int(pieces.first[at]), int(pieces.stop[at])
        sample = read_sample(self._source, SampleRef(0, int(pieces.documents[at]), first, stop))
        layout = lay_out([(0, [sample])], self._rules.packing)
        # a document that is truncated has one piece; in one that is cut, neighbours share a token of text
        shared = at > 0 and self._source.kind in CUT_KINDS and int(pieces.stop[at - 1]) == first + 1
        view = _PieceView(sample, layout, self._rules, self._tokenizer, shared=shared)
        tiles = len(layout.slots_NP)
        tiles_N3TT, problems = self._loader.load(
            layout.images,
            lambda ref: self._source.image_bytes(ref.item),
            share=TileShare(start=0, stop=tiles, padded=max(1, tiles)),
        )
        reasons = {image.first_tile: reason for image, reason in problems}
        pixels_NTTC = self._maker.pixels(tiles_N3TT).numpy()
        images = [
            ShownImage(
                number=sample.first_image + place,
                height=image.ref.height,
                width=image.ref.width,
                stored_bytes=len(self._source.image_bytes(image.ref.item)),
                views=view.views(place, image, pixels_NTTC),
                problem=reasons.get(image.first_tile, ""),
            )
            for place, image in enumerate(layout.images)
        ]
        parts, regions = view.parts(images)
        weights = layout.loss_mask_T[layout.loss_mask_T > 0]
        return ShownPiece(
            first=first,
            stop=stop,
            tokens=int((~layout.padding_mask_T).sum()),
            targets=len(weights),
            weight=float(weights[0]) if len(weights) else 0.0,
            parts=tuple(parts),
            regions=tuple(regions),
        )


class _PieceView:
    """One piece, laid out as a row of its own."""

    def __init__(self, sample: Sample, layout: Layout, rules: ShowRules, tokenizer: Tokenizer, *, shared: bool) -> None:
        self._sample, self._rules, self._tokenizer = sample, rules, tokenizer
        self._shared = shared
        self._ids = layout.tokens_T.tolist()
        self._positions = layout.position_ids_T.tolist()
        self._is_target = [False, *(layout.loss_mask_T > 0).tolist()]  # the weight stands one before the target
        self._slots = layout.slots_NP.tolist()
        self._texts_of: dict[tuple[int, ...], list[str | None]] = {}

    def views(self, place: int, image: PlacedImage, pixels_NTTC: npt.NDArray[np.uint8]) -> tuple[ShownView, ...]:
        """Return the views of an image with their share of all pixels."""
        plan: TilePlan = image.plan
        texts = self._rules.packing.tile_texts.before_tiles(self._sample.first_image + place, plan)
        found = []
        number = 0
        for view in plan.views:
            tiles = []
            for within in range(view.num_tiles):
                slots = self._slots[image.first_tile + number]
                indicator = self._indicator(texts[number], stop=slots[0])
                row, column = divmod(within, view.columns)
                tiles.append(ShownTile(number + 1, row + 1, column + 1, indicator, slots[0], len(slots)))
                number += 1
            stop = image.first_tile + number
            pixels = pixels_NTTC[stop - view.num_tiles : stop]
            found.append(ShownView(view, plan.overview and view.num_tiles == 1, tuple(tiles), pixels))
        return tuple(found)

    def _indicator(self, ids: tuple[int, ...], *, stop: int) -> tuple[ShownToken, ...]:
        if ids not in self._texts_of:
            self._texts_of[ids] = token_texts(ids, self._tokenizer)
        first = stop - len(ids)
        pairs = zip(ids, self._texts_of[ids], strict=True)
        return tuple(self._token(id_, text, at, role=INDICATOR) for at, (id_, text) in enumerate(pairs, start=first))

    def parts(self, images: Sequence[ShownImage]) -> tuple[list[ShownToken | ShownImage], list[ShownRegion]]:
        """Return tokens and images in the order of the row, and the boxes and points of the text.

        Raises:
            DataError: the tokens of the row are not those of the sample: a fault of this program.
        """
        stored = self._sample.tokens.tolist()
        texts = token_texts(stored, self._tokenizer)
        parts: list[ShownToken | ShownImage] = []
        regions: list[ShownRegion] = []
        at = shown_images = 0
        run = 0  # where the text since the last image begins
        for id_, text in zip(stored, texts, strict=True):
            if id_ != self._rules.packing.image_sentinel_id:
                if self._ids[at] != id_:
                    raise DataError(f"position {at} of the row holds {self._ids[at]}, not {id_}", fix="report this")
                parts.append(self._token(id_, text, at, role=self._role(at)))
                at += 1
                continue
            self._mark(parts, texts, run, regions, images[:shown_images])
            parts.append(images[shown_images])
            last = images[shown_images].views[-1].tiles[-1]
            at = last.first_slot + last.slots
            shown_images += 1
            run = len(parts)
        self._mark(parts, texts, run, regions, images)
        return parts, regions

    def _role(self, at: int) -> str:
        if self._is_target[at]:
            return TARGET
        return SHARED if at == 0 and self._shared else CONTEXT

    def _token(self, id_: int, text: str | None, at: int, *, role: str) -> ShownToken:
        marks = {self._tokenizer.pad_id: "<pad>", self._tokenizer.eos_id: "</s>"}
        if id_ in marks or not text:
            mark = marks.get(id_, "◌" if text is None else f"⟨{id_}⟩")
            return ShownToken(id_, mark, self._positions[at], role, special=True)
        return ShownToken(id_, visible(text), self._positions[at], role)

    def _mark(
        self,
        parts: list[ShownToken | ShownImage],
        texts: Sequence[str | None],
        run: int,
        regions: list[ShownRegion],
        images: Sequence[ShownImage],
    ) -> None:
        """Number the boxes and points of the tokens from ``run`` on, and place them on the image before them."""
        pieces = [text or "" for text in texts[run : len(parts)]]
        ends = np.cumsum([len(text) for text in pieces])
        for found in find_written("".join(pieces)):
            number = len(regions) + 1
            first = int(np.searchsorted(ends, found.start, side="right"))
            last = int(np.searchsorted(ends, found.stop, side="left"))
            for at in range(run + first, run + last + 1):
                part = parts[at]
                assert isinstance(part, ShownToken), "a run of text holds tokens"
                parts[at] = replace(part, region=number)
            image = images[-1] if images else None
            text = "".join(pieces)[found.start : found.stop]
            certain = self._sample.images_in_document == 1
            pixels = () if image is None else self._pixels(found.numbers, image)
            regions.append(ShownRegion(number, text, None if image is None else image.number, certain, pixels))

    def _pixels(self, numbers: tuple[int, ...], image: ShownImage) -> tuple[float, ...]:
        found: list[float] = []
        for pair in ((numbers[at], numbers[at + 1]) for at in range(0, len(numbers), 2)):
            point: Point = self._rules.scale.pixels(pair, width=image.width, height=image.height)
            found += [point.x, point.y]
        return tuple(found)
