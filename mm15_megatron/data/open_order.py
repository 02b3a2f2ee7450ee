"""From the configuration of a run to the order of its rows: sources, rules, tables, mixture."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.data.blend import EpochSize, Share, build_mixture, needs_epoch_sizes, shares
from mm15_megatron.data.epoch_order import Shuffle
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.permutation import derive_key
from mm15_megatron.data.row_order import RowOrder
from mm15_megatron.data.source_order import OrderedSource, OrderOptions, SourceStream
from mm15_megatron.data.tile_text import TileTexts
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import ConfigError, DataError

Int64 = npt.NDArray[np.int64]

_LOGGER = logging.getLogger(__name__)
_WORTH_A_POOL: Final = 4  # chunks that are packed faster by several processes than by one

Tell = Callable[[int, int, str], None]
"""Takes chunks packed, all chunks, and what they are of."""


@dataclass(frozen=True)
class OpenOrder:
    """The order of a run, and what it was made from.

    Attributes:
        order: the order.
        readers: the sources.
        rules: how documents become rows.
    """

    order: RowOrder
    readers: tuple[IndexedSource, ...]
    rules: PackingRules


def open_order(
    cfg: RunConfig, *, validation: bool = False, writes: bool = False, chunks_of_epoch: Tell | None = None
) -> OpenOrder:
    """Open the sources of a run and say which rows they become.

    Args:
        cfg: the run.
        validation: read ``data.validation_sources``.
        writes: whether this process writes the tables of ``data.plan_dir``.
        chunks_of_epoch: pack the first epoch of every source even where the mixture does not need it, and tell how far
            that is.

    Raises:
        ConfigError: if there is no source, or the epochs asked for do not fit the length of the run.
        DataError: if a tokenizer or a dataset is missing, damaged, or does not belong to the run.
    """
    sources = cfg.data.validation_sources if validation else cfg.data.sources
    if not sources:
        field = "data.validation_sources" if validation else "data.sources"
        raise ConfigError(f"{field} is empty", fix="name at least one dataset prefix")
    tokenizer = Tokenizer(cfg.data.tokenizer)
    tokenizer.check_fits(cfg.language.vocab_size)
    readers = open_sources(sources, tokenizer=tokenizer)
    texts = TileTexts.build(cfg.tiling, tokenizer.encode)
    rules = PackingRules.from_config(cfg, image_sentinel_id=tokenizer.image_id, tile_texts=texts)
    options = _options(cfg, validation=validation, writes=writes)
    ordered = [OrderedSource(reader, index, rules, options) for index, reader in enumerate(readers)]
    sizes = None
    if chunks_of_epoch is not None or needs_epoch_sizes(cfg, sources=sources):
        sizes = epoch_sizes(ordered, tell=chunks_of_epoch or _log)
    mixture = build_mixture(cfg, sources=sources, sizes=sizes, seed=options.seed)
    return OpenOrder(RowOrder(ordered, mixture, rules, options), tuple(readers), rules)


def write_tables(cfg: RunConfig) -> None:
    """Pack what the mixture needs to know of whole epochs, once for all ranks; nothing in most runs.

    Raises:
        ConfigError: as :func:`open_order`.
        DataError: as :func:`open_order`.
    """
    if needs_epoch_sizes(cfg, sources=cfg.data.sources):
        open_order(cfg, writes=True)


def plan_folder(cfg: RunConfig) -> Path:
    """Return where the tables of rows of a run are kept."""
    return Path(cfg.data.plan_dir) if cfg.data.plan_dir else Path(cfg.train.run_dir) / "plan"


def _options(cfg: RunConfig, *, validation: bool, writes: bool) -> OrderOptions:
    data = cfg.data
    return OrderOptions(
        seed=derive_key(cfg.train.seed, "validation" if validation else "training"),
        unit=data.mixture_unit,
        batch_unit=data.batch_unit,
        shuffle=Shuffle(data.shuffle, block=data.shuffle_block, window=data.shuffle_window),
        tables=None if validation else plan_folder(cfg),
        writes=writes and not validation,
    )


def open_sources(sources: Sequence[SourceConfig], *, tokenizer: Tokenizer) -> list[IndexedSource]:
    """Open every source of a mixture and check it against the tokenizer and the others.

    Raises:
        DataError: if one is missing or damaged, was built with another tokenizer, or two have one name or the same
            documents.
    """
    readers = [IndexedSource(s.prefix, name=s.name, tokenizer_digest=tokenizer.digest) for s in sources]
    contents: dict[str, IndexedSource] = {}
    for reader in readers:
        same = contents.setdefault(reader.manifest.digest, reader)
        if same is not reader:
            raise DataError(
                f"{same.prefix} and {reader.prefix} hold the same documents",
                fix="name each dataset once and give it the sum of the weights: as two sources it would be shuffled "
                "twice, and its epochs counted apart",
            )
    names = [reader.name for reader in readers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"several sources are called {', '.join(twice)}", fix="give each source its own name")
    return readers


# --- What whole epochs hold


def epoch_sizes(sources: Sequence[OrderedSource], *, tell: Tell) -> list[EpochSize]:
    """Pack the first epoch of every source, as far as its table does not know it yet; the work of many processes.

    The tables know it afterwards.

    Raises:
        DataError: if no document of a source fits a row.
    """
    for source in sources:
        missing = range(len(source.table), source.chunks)
        if len(missing) < _WORTH_A_POOL:
            source.table.extend(source.chunks)
            source.table.write()
            continue
        for done, line in enumerate(_lines(source.stream, missing), start=1):
            source.table.add(line)  # a packing that is interrupted goes on from here
            tell(done, len(missing), source.name)
        source.check_usable()
    return [EpochSize.of(source.name, source.table.before(source.chunks)) for source in sources]


def _lines(stream: SourceStream, chunks: range) -> Iterator[Int64]:
    """Pack chunks in several processes and yield their lines of the table, in order."""
    workers = min(len(chunks), len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        yield from pool.map(stream.line, chunks)


def run_shares(cfg: RunConfig, order: RowOrder) -> list[Share]:
    """Return what each training source contributes; estimated from its first chunk where no epoch is packed."""
    sizes = [
        EpochSize.of(source.name, source.table.before(source.chunks))
        if len(source.table) >= source.chunks
        else EpochSize.of(source.name, source.table.line(0)).scaled(source.size)
        for source in order.sources
    ]
    return shares(cfg, order.mixture, sources=cfg.data.sources, sizes=sizes)


def _log(done: int, total: int, name: str) -> None:
    if done == total or done % max(1, total // 10) == 0:
        _LOGGER.warning("packing an epoch of source %s: %d of %d chunks", name, done, total)
