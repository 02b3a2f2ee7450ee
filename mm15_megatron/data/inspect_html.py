"""One page that shows documents of a dataset as the model sees them; a file of its own, without script or network.

Documents are foreign text. Everything is escaped (:mod:`.inspect_markup`), and the page forbids itself every script,
request and form by a content security policy, so that even a hole in the escaping would do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mm15_megatron import __version__
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.boxes import Scale
from mm15_megatron.data.image.geometry import grid_table
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.inspect import Histogram, histograms
from mm15_megatron.data.inspect_figures import PICTURES, piece_body
from mm15_megatron.data.inspect_markup import Markup, counted, element, markup
from mm15_megatron.data.inspect_samples import (
    CONTEXT,
    INDICATOR,
    ROLES,
    SHARED,
    SLOT,
    TARGET,
    DocumentViewer,
    ShownDocument,
    ShownPiece,
    ShowRules,
    spread,
)
from mm15_megatron.data.inspect_style import style
from mm15_megatron.data.inspect_tokens import visible
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import DataError

_RULES: Final = (
    "data.seq_length", "data.max_images", "data.max_tiles", "vision.image_size", "connector.num_tokens", "tiling.mode",
    "tiling.min_tiles", "tiling.max_tiles", "tiling.overview", "tiling.resize", "tiling.max_split_images",
    "tiling.indicator", "train.loss_normalisation", "data.decoder", "data.max_image_pixels",
)  # fmt: skip
_MEANINGS: Final = {
    TARGET: "the model is trained to predict it",
    CONTEXT: "read, not predicted",
    SHARED: "the last token of the piece before, which is predicted there",
    INDICATOR: "position indicator of a tile",
    SLOT: "image slots of a tile: its features stand there",
}


@dataclass(frozen=True)
class PageOptions:
    """What a page shows.

    Attributes:
        documents: which; None = ``count`` of them, spread over the dataset.
        count: how many.
        seed: of the spread.
        max_pieces: pieces of each document, the first ones.
        scale: of the coordinates of boxes and points.
        pictures: jpeg | png (exact, several times larger).
    """

    documents: tuple[int, ...] | None = None
    count: int = 24
    seed: int = 0
    max_pieces: int = 8
    scale: Scale = field(default_factory=Scale)
    pictures: str = "jpeg"

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            DataError: there is nothing to show, or no such form of pictures.
        """
        if self.documents == () or self.count < 1 or self.max_pieces < 1:
            raise DataError(
                f"nothing to show: {self.count} documents, {self.max_pieces} pieces each", fix="ask for 1 or more"
            )
        if self.pictures not in PICTURES:
            raise DataError(f"pictures as {self.pictures!r}", fix=f"use one of {', '.join(PICTURES)}")


@dataclass
class PageAccount:
    """What stands on a page: documents shown, those of them that are broken or left out, pieces, tokens by role."""

    documents: int = 0
    broken: int = 0
    left_out: int = 0
    pieces: int = 0
    images: int = 0
    roles: Counter[str] = field(default_factory=Counter)

    def add(self, shown: ShownDocument) -> None:
        """Count one document."""
        self.documents += 1
        self.broken += shown.broken
        self.left_out += not shown.all_pieces
        self.pieces += len(shown.pieces)
        self.images += sum(len(piece.images) for piece in shown.pieces)
        self.roles.update(shown.roles())


def parse_documents(text: str) -> int | tuple[int, ...]:
    """Read ``24`` as a number of documents, ``3,5``, ``7,`` and ``10-19`` as documents by name.

    Raises:
        DataError: it is neither.
    """
    try:
        if "," not in text and "-" not in text:
            return int(text)
        named: list[int] = []
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            named += range(int(first), int(last or first) + 1)
        return tuple(dict.fromkeys(named))
    except ValueError as error:
        raise DataError(
            f"documents {text!r} are neither a number nor a list", fix="write 24, or 3,5,10-19, or 7, for one"
        ) from error


def write_page(
    path: Path,
    prefix: Path,
    *,
    tokenizer: Tokenizer,
    cfg: RunConfig,
    origins: Mapping[str, str],
    options: PageOptions,
    tell: Callable[[int, int], None],
) -> PageAccount:
    """Write the page.

    Args:
        path: of the page; it appears when it is complete.
        prefix: of the dataset.
        tokenizer: that it was built with.
        cfg: the run whose rules decide what the model sees.
        origins: by path of an option, where its value comes from.
        options: what to show.
        tell: takes documents done, and all.

    Raises:
        DataError: the dataset cannot be opened or belongs to another tokenizer, or it has no such document.
        ConfigError: the rules of the run hold no grid of tiles.
        BackendError: the decoder of the run cannot be used here.
    """
    source = IndexedSource(prefix, tokenizer_digest=tokenizer.digest)
    chosen = _chosen(source, options)
    rules = ShowRules.from_config(cfg, tokenizer, scale=options.scale, max_pieces=options.max_pieces)
    viewer = DocumentViewer(source, tokenizer, rules)
    account, links = PageAccount(), []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as body:  # the head counts what follows it
        for done, number in enumerate(chosen, start=1):
            shown = viewer.document(number)
            account.add(shown)
            links.append(element("li", element("a", str(number), href=f"#d{number}", class_=_state(shown)[0] or None)))
            body.write(_article(shown, options, max_pieces=rules.max_pieces))
            tell(done, len(chosen))
        body.seek(0)
        # names of files may hold bytes that are no text
        with partial.open("w", encoding="utf-8", newline="", errors="backslashreplace") as page:
            page.write(_head(source, cfg))
            page.write(_top(source, cfg, origins=origins, options=options, account=account, links=links))
            page.write("<main id=samples>\n")
            while block := body.read(1 << 20):
                page.write(block)
            page.write(f"</main>\n{_foot(options)}</body>\n</html>\n")
    os.replace(partial, path)
    return account


def _chosen(source: IndexedSource, options: PageOptions) -> Sequence[int]:
    if options.documents is None:
        return spread(source.num_documents, options.count, seed=options.seed)
    foreign = [number for number in options.documents if not 0 <= number < source.num_documents]
    if foreign:
        raise DataError(
            f"{source.prefix} has no documents {foreign[:8]}", fix=f"they are 0 to {source.num_documents - 1}"
        )
    return options.documents


# --- The top of the page


def _head(source: IndexedSource, cfg: RunConfig) -> Markup:
    widest = max(columns for _, columns in grid_table(cfg.tiling))
    sheet = style(tile_size=cfg.vision.image_size, widest=widest)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{source.name}: samples as the model sees them"),
        element("style", Markup(sheet)),
    )
    return Markup(f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n')


def _top(
    source: IndexedSource,
    cfg: RunConfig,
    *,
    origins: Mapping[str, str],
    options: PageOptions,
    account: PageAccount,
    links: Sequence[Markup],
) -> Markup:
    shapes = [_histogram(histogram) for histogram in histograms(source) if any(histogram.counts)]
    hatch = Markup(
        '<svg width="0" height="0" aria-hidden="true"><defs><pattern id="hatch" width="10" height="10" '
        'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="1.5" height="10" fill="#fff" '
        'fill-opacity=".8"/></pattern></defs></svg>'
    )
    return element(
        "header",
        element("a", "Skip to the samples", href="#samples", class_="skip"),
        hatch,
        element("h1", source.name),
        element("p", "Samples as the model sees them: tokens, loss mask and tiles, each as the loader makes it."),
        element(
            "div",
            element("section", element("h2", "Dataset"), _manifest(source), class_="card"),
            element("section", element("h2", "Rules of the run"), _rules(cfg, origins), class_="card"),
            class_="cards block",
        ),
        element("div", *(element("section", shape, class_="card") for shape in shapes), class_="cards small block"),
        element("section", element("h2", "On this page"), _account(account, options, links), class_="card block"),
        element("section", element("h2", "Legend"), _legend(options), class_="card block"),
    )


def _pairs(pairs: Sequence[tuple[str, str | Markup]]) -> Markup:
    return element("dl", *(markup(element("dt", name), element("dd", value)) for name, value in pairs))


def _manifest(source: IndexedSource) -> Markup:
    found = source.manifest
    size = sum(record.bytes for record in found.files.values())
    pairs: list[tuple[str, str | Markup]] = [
        ("prefix", str(source.prefix)),
        ("kind", found.kind),
        ("rendering", found.rendering),
        ("tokenizer", element("code", found.tokenizer_digest[:16], title=found.tokenizer_digest)),
        ("content", element("code", found.digest[:16], title=found.digest)),
        ("documents", f"{found.documents:,}"),
        ("tokens", f"{found.tokens:,} stored, one for each image"),
        ("images", f"{found.images:,}"),
        ("on disk", f"{size / 2**20:,.1f} MiB"),
    ]
    lost = sorted(found.dropped.items(), key=lambda item: -item[1])
    pairs += [("left out when built", f"{count:,} × {visible(reason)}") for reason, count in lost]
    return _pairs(pairs)


def _rules(cfg: RunConfig, origins: Mapping[str, str]) -> Markup:
    values = {path: _option(cfg, path) for path in _RULES}
    return _pairs([(path, _with_origin(value, origins.get(path, "default"))) for path, value in values.items()])


def _option(cfg: RunConfig, path: str) -> str:
    section, name = path.split(".")
    return str(vars(vars(cfg)[section])[name])


def _with_origin(value: str, origin: str) -> Markup:
    return markup(value) if origin == "default" else markup(value, " ", element("span", origin, class_="soft"))


def _histogram(found: Histogram) -> Markup:
    filled = [number for number, count in enumerate(found.counts) if count]
    rows = []
    for number in range(filled[0], filled[-1] + 1):
        first, last = found.edges[number], found.edges[number + 1] - 1
        label = f"{first}" if first == last else f"{first} to {last}"
        rows.append(_bar(label, found.counts[number], max(found.counts)))
    return element("table", element("caption", f"{found.name}: {found.mean:,.1f} on average"), *rows)


def _bar(label: str | Markup, count: int, most: int) -> Markup:
    bar = element("rect", width=float(100 * count / max(most, 1)), height=10)
    picture = element("svg", bar, viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true")
    return element(
        "tr",
        element("th", label, scope="row"),
        element("td", f"{count:,}", class_="number"),
        element("td", picture, class_="bar"),
    )


def _account(account: PageAccount, options: PageOptions, links: Sequence[Markup]) -> Markup:
    chosen = "as named" if options.documents is not None else f"spread over the dataset, seed {options.seed}"
    text = (
        f"{counted(account.documents, 'document')} ({chosen}), {counted(account.pieces, 'piece')} of them with "
        f"{counted(account.images, 'image')}; "
        f"{account.broken} broken, {account.left_out} that give the model nothing."
    )
    most = max(account.roles.values(), default=0)
    rows = [_bar(element("span", role, class_=role), account.roles[role], most) for role in ROLES]
    return markup(
        element("p", text, id="account"),
        element("table", element("caption", "tokens shown"), *rows, class_="roles"),
        element("nav", element("ol", *links), aria_label="documents"),
    )


def _legend(options: PageOptions) -> Markup:
    items = [element("li", element("span", role, class_=role), f" {_MEANINGS[role]}") for role in ROLES]
    switches = (
        ("boxes", "boxes and points", True),
        ("labels", "numbers of tiles and hatched padding", True),
        ("edges", "edges of tokens", False),
        ("ids", "id @ position of tokens", False),
        ("full", "tiles pixel by pixel", False),
    )
    boxes = [
        element("label", element("input", type="checkbox", id=name, checked="" if on else None), f" {text}")
        for name, text, on in switches
    ]
    scale = options.scale
    sides = "each side is" if scale.each_side else "the longer side of the image is"
    exact = "exact (PNG)" if options.pictures == "png" else "JPEG copies of them; --pictures png keeps every pixel"
    notes = (
        "Point at a token for its id @ its position in the segment, images expanded. ↵ is a line break, ⇥ a tab, ◌ a "
        "part of a character that a later token ends, ⟨7⟩ token 7 without text, ‹U+202E› a character without shape.",
        f"Coordinates <x1,y1,x2,y2> and <x,y> are read on a scale where {sides} {scale.size} long.",
        f"Pictures are the model's tiles with the normalisation undone, {exact}. Padding is the mean colour.",
    )
    return markup(
        element("ul", *items, class_="legend"),
        *(element("p", note, class_="soft") for note in notes),
        element("fieldset", element("legend", "Show"), *boxes),
    )


def _foot(options: PageOptions) -> Markup:
    return element("footer", f"mm15_megatron {__version__}; pictures: {options.pictures}.")


# --- Documents


def _state(shown: ShownDocument) -> tuple[str, str]:
    """Return the class and the words of what is the matter with a document."""
    if shown.broken:
        return "broken", "broken"
    return ("left-out", "left out") if not shown.all_pieces else ("", "")


def _article(shown: ShownDocument, options: PageOptions, *, max_pieces: int) -> Markup:
    name, words = _state(shown)
    parts = [
        element(
            "header",
            element("h2", f"document {shown.number}", id=f"h{shown.number}"),
            *([element("span", words, class_=f"state {name}")] if words else []),
            element("span", f"{shown.stored:,} stored tokens, {counted(shown.images, 'image')}", class_="soft"),
            element("a", "top", href="#account"),
        )
    ]
    if shown.problems:
        parts.append(element("ul", *(element("li", visible(text)) for text in shown.problems), class_="problems"))
    if shown.notes:
        parts.append(element("ul", *(element("li", text) for text in shown.notes), class_="notes"))
    for number, piece in enumerate(shown.pieces, start=1):
        parts.append(_piece(piece, shown, number=number, options=options))
    if shown.all_pieces > len(shown.pieces) == max_pieces:
        text = f"{shown.all_pieces - len(shown.pieces)} more pieces are not shown (--pieces)"
        parts.append(element("p", text, class_="soft"))
    named = {"id": f"d{shown.number}", "aria_labelledby": f"h{shown.number}", "data_document": str(shown.number)}
    return markup(element("article", *parts, **named), Markup("\n"))


def _piece(piece: ShownPiece, shown: ShownDocument, *, number: int, options: PageOptions) -> Markup:
    title = f"piece {number} of {shown.all_pieces}" if shown.all_pieces > 1 else "one piece"
    weight = f" of weight {piece.weight:.4g}" if piece.weight not in (0.0, 1.0) else ""
    meta = (
        f"stored tokens {piece.first} to {piece.stop - 1} → positions 0 to {piece.tokens - 1} of a segment; "
        f"{counted(piece.targets, 'target')}{weight}, {counted(len(piece.images), 'image')}"
    )
    return element(
        "section",
        element("h3", title),
        element("p", meta, class_="meta"),
        piece_body(piece, form=options.pictures),
        class_="piece",
        data_tokens=piece.tokens,
    )
