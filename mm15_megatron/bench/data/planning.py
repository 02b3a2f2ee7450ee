"""The case ``plan``: the rows of an epoch of many documents, and a resumption far into it.

The dataset has real index files and empty contents: its ``.bin`` files are holes of the right size.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from mm15_megatron.bench.data.child import call
from mm15_megatron.bench.data.documents import KINDS, Drawn, draw
from mm15_megatron.bench.data.outcome import CaseResult, Figure, Request
from mm15_megatron.bench.data.turns import Spread
from mm15_megatron.data.indexed.format import (
    HEADER,
    INDEX_VERSION,
    MAGIC,
    RENDERINGS,
    FileRecord,
    Manifest,
    dtype_code,
    file_digest,
    pair_dtype,
    suffixes,
    with_suffix,
)
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.open_order import epoch_sizes
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.source_order import OrderedSource, OrderOptions
from mm15_megatron.presets import resolve

_PROFILE: Final = "captions"
_BLOCK: Final = 1 << 20  # documents that are drawn once and repeated
_BLOCKS: Final = 4
_IMAGE_BYTES: Final = 16_000  # of a hole: 600 million of them stay below 16 TB, where many file systems end
_ROW: Final = 10_000_000
_STEP: Final = 512
_SECONDS, _GIB, _RESUMED = 120.0, 4.0, 2.0


def planning(request: Request) -> CaseResult:
    """Pack an epoch, then find a row in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="plan-", dir=request.folder) as name:
        folder = Path(name)
        prefix = write_index(folder / "many", documents=request.plan_documents)
        planned = call(f"{__name__}:plan", prefix=str(prefix), tables=str(folder / "tables"))
        row = max(0, min(_ROW, int(planned["rows"]) - _STEP))
        resumed = [
            call(f"{__name__}:resume", prefix=str(prefix), tables=str(folder / "tables"), row=row)
            for _ in range(request.rounds)
        ]
        shutil.rmtree(folder / "tables")
    seconds = sorted(turn["seconds"] for turn in resumed)
    middle = Spread(seconds[len(seconds) // 2], seconds[0], seconds[-1])
    at_scale = request.plan_documents == 100_000_000
    return CaseResult(
        work=(
            f"An epoch of {request.plan_documents:,} documents of one image each ({_PROFILE}, drawn from published "
            f"figures, index files of {planned['index_gb']:.1f} GB) is shuffled, cut and packed to "
            f"{planned['rows']:,.0f} rows by as many processes as there are cores, from open to the last table.",
            f"Resumed: a new process opens the dataset, finds {_STEP} rows from row {row:,} on by the tables and packs "
            "the chunk that holds them.",
            "Memory is what processes own (anonymous), all of them together at the peak; mapped index pages, which the "
            "system may take back, are not counted.",
        ),
        figures=(
            _figure("plan of an epoch", "s", planned["seconds"], _SECONDS if at_scale else None),
            _figure("memory at its peak", "GiB", planned["gib"], _GIB if at_scale else None),
            Figure(f"resumed at row {row:,}", "s (median, least, most)", middle, _RESUMED),
        ),
        details={"planned": planned, "resumed": resumed},
    )


def _figure(what: str, unit: str, value: float, at_most: float | None) -> Figure:
    return Figure(what, unit, Spread(value, value, value), at_most)


def _ordered(prefix: str, tables: str, *, writes: bool) -> OrderedSource:
    rules = PackingRules.from_config(resolve("mm1_3b"), image_sentinel_id=0)
    return OrderedSource(IndexedSource(prefix), 0, rules, OrderOptions(seed=1, tables=Path(tables), writes=writes))


def plan(prefix: str, tables: str) -> dict[str, float]:
    """Pack an epoch; return what it took."""
    from mm15_megatron.bench.data.memory import OwnMemory

    with OwnMemory() as memory:
        began = time.perf_counter()
        source = _ordered(prefix, tables, writes=True)
        (size,) = epoch_sizes([source], tell=lambda done, total, name: None)
        seconds = time.perf_counter() - began
    index = sum(path.stat().st_size for path in Path(prefix).parent.glob("*") if path.suffix in (".idx", ".npy"))
    return {"seconds": seconds, "gib": memory.peak / 2**30, "rows": size.rows, "index_gb": index / 1e9}


def resume(prefix: str, tables: str, row: int) -> dict[str, float]:
    """Find rows by the tables; return what it took."""
    began = time.perf_counter()
    samples, _ = _ordered(prefix, tables, writes=False).rows(row, row + _STEP)
    return {"seconds": time.perf_counter() - began, "samples": sum(map(len, samples))}


def _blocks(documents: int) -> Iterator[Drawn]:
    cfg = resolve("mm1_3b")
    drawn = [draw(_PROFILE, min(_BLOCK, documents), cfg=cfg, seed=seed) for seed in range(_BLOCKS)]
    for number in range(-(-documents // _BLOCK)):
        yield drawn[number % _BLOCKS]


def write_index(prefix: Path, *, documents: int) -> Path:
    """Write a dataset of drawn captions whose contents are holes; return its prefix."""
    kind = KINDS[_PROFILE]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = _Pair(prefix, "tokens", documents)
    images = _Pair(prefix, "images", documents)
    done = 0
    for block in _blocks(documents):
        count = min(block.num_documents, documents - done)
        tokens.put(done, block.token_lengths[:count])
        images.put(done, np.full(count, _IMAGE_BYTES, np.int32))
        done += count
    sizes = np.lib.format.open_memmap(
        with_suffix(prefix, "_image_sizes.npy"), mode="w+", dtype=np.uint32, shape=(documents, 2)
    )
    sizes[:] = 480
    sizes.flush()
    np.save(with_suffix(prefix, "_image_positions.npy"), np.zeros(documents, np.int32))
    total = tokens.close()
    images.close()
    files = {
        suffix: FileRecord(with_suffix(prefix, suffix).stat().st_size, file_digest(with_suffix(prefix, suffix)))
        for suffix in suffixes(kind)
    }
    manifest = Manifest(
        kind=kind,
        documents=documents,
        tokens=total,
        images=documents,
        tokenizer_digest="0" * 64,
        image_sentinel_id=0,
        rendering=RENDERINGS[kind],
        files=files,
        dropped={},
        meta={},
    )
    with_suffix(prefix, ".json").write_bytes(manifest.to_json().encode())
    return prefix


class _Pair:
    """An index of one sequence a document, written block by block, and a hole of the size it describes."""

    def __init__(self, prefix: Path, name: str, documents: int) -> None:
        dtype = np.dtype(pair_dtype(name))
        self._itemsize, self._bytes = dtype.itemsize, 0
        self._bin = with_suffix(prefix, f"_{name}.bin")
        path = with_suffix(prefix, f"_{name}.idx")
        with path.open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, INDEX_VERSION, dtype_code(dtype.name), documents, documents + 1))
            stream.truncate(HEADER.size + 12 * documents + 8 * (documents + 1))
        at = HEADER.size
        self._map: dict[str, Any] = {}
        for part, kind, count in (
            ("lengths", np.int32, documents),
            ("pointers", np.int64, documents),
            ("documents", np.int64, documents + 1),
        ):
            self._map[part] = np.memmap(path, dtype=np.uint8, mode="r+", offset=at, shape=(count * kind().itemsize,))
            self._map[part] = self._map[part].view(kind)
            at += count * kind().itemsize
        self._map["documents"][:] = np.arange(documents + 1)

    def put(self, first: int, lengths: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Write the sequences of some documents."""
        at = slice(first, first + len(lengths))
        sizes = lengths.astype(np.int64) * self._itemsize
        self._map["lengths"][at] = lengths
        self._map["pointers"][at] = self._bytes + np.cumsum(sizes) - sizes
        self._bytes += int(sizes.sum())

    def close(self) -> int:
        """Make the hole; return the values that it stands for."""
        for part in self._map.values():
            part.flush()
        with self._bin.open("wb") as stream:
            stream.truncate(self._bytes)
        return self._bytes // self._itemsize
