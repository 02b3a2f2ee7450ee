"""Packing rules and sources that need no tokenizer and no image, for tests of the order of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mm15_megatron.config.schema import TilingConfig
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.mixture import Mixture, Weights
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.row_order import RowOrder
from mm15_megatron.data.source_order import OrderedSource, OrderOptions

RULES = PackingRules(
    seq_length=32,
    slots_per_tile=4,
    tile_size=14,
    tiling=TilingConfig(mode="none"),
    max_images=4,
    max_tiles=8,
    image_sentinel_id=3,
)


def text_source(path: Path, lengths: Sequence[int]) -> IndexedSource:
    """A source of one text document for each length."""
    with DatasetWriter(path, kind="text", tokenizer_digest="", image_sentinel_id=3) as writer:
        for length in lengths:
            writer.add_document([9] * length)
    return IndexedSource(path)


def image_source(path: Path, images: Sequence[int]) -> IndexedSource:
    """A source of one interleaved document for each number of images; their bytes are no images."""
    with DatasetWriter(path, kind="interleaved", tokenizer_digest="", image_sentinel_id=3) as writer:
        for count in images:
            writer.add_document([9, 8] + [3] * count + [7], images=[EncodedImage(b"x", 20, 30)] * count)
    return IndexedSource(path)


def row_order(
    readers: Sequence[IndexedSource],
    weights: Sequence[float],
    rules: PackingRules = RULES,
    *,
    options: OrderOptions = OrderOptions(seed=1),  # noqa: B008
    changes: Sequence[Weights] = (),
    unit: str | None = None,
) -> RowOrder:
    """The order of sources mixed by weight."""
    options = replace(options, unit=unit) if unit else options
    sources = [OrderedSource(reader, index, rules, options) for index, reader in enumerate(readers)]
    mixture = Mixture([Weights(0, tuple(weights)), *changes], seed=options.seed)
    return RowOrder(sources, mixture, rules, options)
