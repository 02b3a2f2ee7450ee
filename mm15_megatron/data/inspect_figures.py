"""Tokens and images of a sample as HTML: coloured text, tiles in their grid, boxes over them.

Legend: T side of a tile.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from mm15_megatron.data.inspect_markup import Markup, counted, element, markup
from mm15_megatron.data.inspect_samples import ShownImage, ShownPiece, ShownRegion, ShownTile, ShownToken, ShownView
from mm15_megatron.data.inspect_style import COLOURS
from mm15_megatron.data.inspect_tokens import visible

PICTURES: Final = ("jpeg", "png")
_QUALITY: Final = 90
_WIDEST, _HIGHEST, _SMALLEST = 620, 420, 112  # of a view on the page, in its pixels
_LABEL: Final = 12  # size of text over a picture, in pixels of the page
_DOT: Final = 5


def data_url(pixels_TTC: npt.NDArray[np.uint8], *, form: str) -> str:
    """Encode a picture, uint8 [T, T, 3], as a ``data:`` URL.

    Args:
        pixels_TTC: the picture.
        form: ``png`` keeps every pixel; ``jpeg`` is several times smaller.
    """
    stream = io.BytesIO()
    options = {"quality": _QUALITY, "subsampling": 0} if form == "jpeg" else {}
    Image.fromarray(pixels_TTC).save(stream, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def colour(region: int) -> int:
    """Return the colour, from 1, of a box or point."""
    return (region - 1) % len(COLOURS) + 1


def tokens(shown: Iterable[ShownToken]) -> Markup:
    """Write tokens one after the other; the first of a box carries its number."""
    parts = []
    before = 0
    for token in shown:
        names = [token.role, *(["mark"] if token.special else [])]
        if token.region:
            names += ["region", f"r{colour(token.region)}"]
        number = token.region if token.region != before else 0
        before = token.region
        title = f"{token.id} @ {token.position}"
        parts.append(element("span", token.text, class_=" ".join(names), data_n=number or None, title=title))
    return markup(*parts)


def piece_body(piece: ShownPiece, *, form: str) -> Markup:
    """Write the text of a piece with its images in place."""
    blocks: list[Markup] = []
    run: list[ShownToken] = []
    drawn = {image.number: [r for r in piece.regions if r.image == image.number] for image in piece.images}
    for part in (*piece.parts, None):
        if isinstance(part, ShownToken):
            run.append(part)
            continue
        if run:
            blocks.append(element("p", tokens(run), class_="text", dir="auto"))
            run = []
        if part is not None:
            blocks.append(figure(part, drawn[part.number], form=form))
    nowhere = [region for region in piece.regions if region.image is None]
    if nowhere:
        items = [element("li", _badge(r), element("code", r.text), ": no image stands before it") for r in nowhere]
        blocks.append(element("ul", *items, class_="regions"))
    return markup(*blocks)


def figure(image: ShownImage, regions: Sequence[ShownRegion], *, form: str) -> Markup:
    """Write one image: its views, its place in the sequence, and the boxes and points on it."""
    size = f"{image.width} × {image.height}"
    tiles = [tile for view in image.views for tile in view.tiles]
    slots, indicators = sum(tile.slots for tile in tiles), sum(len(tile.indicator) for tile in tiles)
    caption = f"image {image.number}: {size} pixels (width × height), {image.stored_bytes:,} bytes, {_split(image)}; "
    caption += counted(slots, "slot") + (f" and {counted(indicators, 'token')} of indicator text" if indicators else "")
    parts = [element("figcaption", caption)]
    if image.problem:
        text = f"This image did not decode and is replaced by the mean colour: {visible(image.problem)}"
        parts.append(element("p", text, class_="problem"))
    views = [_view(image, view, regions, form=form) for view in image.views]
    parts.append(element("div", *views, class_="views"))
    parts.append(element("p", element("span", "in the row", class_="lead"), *map(_in_row, tiles), class_="row-order"))
    if regions:
        parts.append(element("ul", *(_region_line(region, image) for region in regions), class_="regions"))
    return element("figure", *parts, class_="image")


def _split(image: ShownImage) -> str:
    grid = next(view.view for view in image.views if not view.overview)
    if len(image.views) == 1:
        return "not split: one tile" if grid.num_tiles == 1 else f"{grid.rows} × {grid.columns} tiles"
    where = "before" if image.views[0].overview else "after"
    return f"split into {grid.rows} rows × {grid.columns} columns of tiles, overview {where} them"


def _in_row(tile: ShownTile) -> Markup:
    stop = tile.first_slot + tile.slots - 1
    title = f"tile {tile.number}: {counted(tile.slots, 'slot')}, positions {tile.first_slot} to {stop}"
    text = f"▦{tile.number} ×{tile.slots} @{tile.first_slot}–{stop}"
    chip = element("span", text, class_="slot", data_slots=tile.slots, title=title)
    return markup(tokens(tile.indicator), chip, " ")


# --- Views


def _view(image: ShownImage, shown: ShownView, regions: Sequence[ShownRegion], *, form: str) -> Markup:
    view, side = shown.view, shown.pixels.shape[1]
    across, down = view.columns * side, view.rows * side
    zoom = min(_WIDEST / across, _HIGHEST / down, max(1.0, _SMALLEST / side))
    pictures = [
        element(
            "img",
            src=data_url(shown.pixels[tile.number - shown.tiles[0].number], form=form),
            width=side,
            height=side,
            alt=f"image {image.number}, {'overview' if shown.overview else f'row {tile.row}, column {tile.column}'}",
        )
        for tile in shown.tiles
    ]
    rows = [element("div", *pictures[at : at + view.columns]) for at in range(0, len(pictures), view.columns)]
    over = element(
        "svg",
        _padding(shown, across=across, down=down),
        *(_tile_label(tile, side=side, zoom=zoom) for tile in shown.tiles),
        *(_drawn(region, image, shown, zoom=zoom) for region in regions),
        viewBox=f"0 0 {across} {down}",
        width=across * zoom,
        height=down * zoom,
        aria_hidden="true",
    )
    name = "overview" if shown.overview else "tiles" if view.num_tiles > 1 else "tile"
    text = f"{name}: {image.width} × {image.height} → {view.width} × {view.height} on {across} × {down}"
    padding = [f"{down - view.height} rows below"] if down > view.height else []
    padding += [f"{across - view.width} columns right"] if across > view.width else []
    text += f", padding: {' and '.join(padding)}" if padding else ""
    small = "canvas pixelated" if zoom > 1 else "canvas"
    canvas = element("div", element("div", *rows, class_="tiles"), over, class_=f"{small} w{view.columns}")
    return element("div", canvas, element("p", text), class_="view")


def _padding(shown: ShownView, *, across: int, down: int) -> Markup:
    """Hatch what of the canvas is no picture."""
    view = shown.view
    stripes = [
        element("rect", x=0, y=view.height, width=across, height=down - view.height, class_="padding"),
        element("rect", x=view.width, y=0, width=across - view.width, height=view.height, class_="padding"),
    ]
    return markup(*(s for s, needed in zip(stripes, (down > view.height, across > view.width), strict=True) if needed))


def _tile_label(tile: ShownTile, *, side: int, zoom: float) -> Markup:
    left, top, size = (tile.column - 1) * side, (tile.row - 1) * side, _LABEL / zoom
    text = f"{tile.number}"
    return element(
        "g",
        element("rect", x=left, y=top, width=side, height=side, class_="edge"),
        element("rect", x=left, y=top, width=size * (0.6 + 0.6 * len(text)), height=size * 1.3, class_="plate"),
        element("text", text, x=left + size * 0.3, y=top + size, font_size=size),
        class_="label",
    )


def _drawn(region: ShownRegion, image: ShownImage, shown: ShownView, *, zoom: float) -> Markup:
    """Draw a box or a point in the pixels of a view."""
    across, down = shown.view.width / image.width, shown.view.height / image.height
    x = [value * across for value in region.pixels[::2]]
    y = [value * down for value in region.pixels[1::2]]
    size = _LABEL / zoom
    if len(x) == 1:
        shapes = [
            element("circle", cx=x[0], cy=y[0], r=_DOT / zoom, class_=name, data_region=region.number)
            for name in ("halo", "line")
        ]
    else:
        left, top = min(x), min(y)
        sides = {"x": left, "y": top, "width": max(x) - left, "height": max(y) - top}
        shapes = [element("rect", **sides, class_=name, data_region=region.number) for name in ("halo", "line")]
    label = f"{region.number}"
    left, top = min(x) + (_DOT / zoom if len(x) == 1 else 0), min(y)
    shapes += [
        element("rect", x=left, y=top, width=size * (0.6 + 0.6 * len(label)), height=size * 1.3, class_="badge-plate"),
        element("text", label, x=left + size * 0.3, y=top + size, font_size=size),
    ]
    doubt = "" if region.certain else " doubtful"
    return element("g", *shapes, class_=f"drawn r{colour(region.number)}{doubt}")


def _badge(region: ShownRegion) -> Markup:
    return element("span", str(region.number), class_=f"badge r{colour(region.number)}")


def _region_line(region: ShownRegion, image: ShownImage) -> Markup:
    points = [f"({x:.1f}, {y:.1f})" for x, y in zip(region.pixels[::2], region.pixels[1::2], strict=True)]
    text = f" {' to '.join(points)} in pixels of the image"
    x, y = region.pixels[::2], region.pixels[1::2]
    if max(x) > image.width + 1 or max(y) > image.height + 1:
        text += "; it reaches beyond the image"
    if len(x) == 2 and (x[0] >= x[1] or y[0] >= y[1]):
        text += "; it has no area"
    if not region.certain:
        text += "; the document has several images and the text does not say which: drawn on the last one before it"
    return element("li", _badge(region), element("code", region.text), text)
