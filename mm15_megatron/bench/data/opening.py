"""The case ``open``: a dataset of many documents, its files in memory or not, beside megatron-core's reader.

The dataset is made by the project's own writer, which copies finished datasets by their bytes: a few documents, put
together tenfold again and again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mm15_megatron.bench.data.child import call
from mm15_megatron.bench.data.outcome import CaseResult, Comparison, Figure, Request
from mm15_megatron.bench.data.turns import drop_from_page_cache, spread, times_as_fast
from mm15_megatron.data.indexed.format import with_suffix
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter

OURS, PEER = "ours", "megatron-core IndexedDataset"
_TARGET_SECONDS: Final = 0.5
_SEED_DOCUMENTS: Final = 1000
_TENFOLD: Final = 10
_SENTINEL: Final = 1
_CACHES: Final = ("cold", "warm")


def opening(request: Request) -> CaseResult:
    """Open a text dataset."""
    with tempfile.TemporaryDirectory(prefix="open-", dir=request.folder) as name:
        began = time.perf_counter()
        prefix = write_dataset(Path(name), documents=request.documents)
        written = time.perf_counter() - began
        files = sorted(path for path in prefix.parent.iterdir() if path.is_file())
        sizes = {path.name.removeprefix(prefix.name): path.stat().st_size for path in files}
        turns = _measure(prefix, files, rounds=request.rounds)
        tokens = IndexedSource(prefix).manifest.tokens
    figures = []
    for cache in _CACHES:
        ours = turns[cache][OURS]
        seconds = [turn["seconds"] for turn in ours]
        figures.append(Figure(f"open, {cache} page cache", "s", spread(seconds), at_most=_TARGET_SECONDS))
        figures.append(Figure(f"memory at its peak, {cache} page cache", "MiB more", spread([t["mib"] for t in ours])))
        figures.append(Figure(f"read from disk, {cache} page cache", "MiB", spread([t["read_mib"] for t in ours])))
    return CaseResult(
        work=_work(request.documents, tokens=tokens, sizes=sizes, written=written),
        comparisons=tuple(_comparison(cache, turns[cache]) for cache in _CACHES),
        figures=tuple(figures),
        details={"file_bytes": sizes, "seconds_to_write": round(written, 1), "turns": turns},
    )


def _work(documents: int, *, tokens: int, sizes: Mapping[str, int], written: float) -> tuple[str, ...]:
    return (
        f"A text dataset of {documents:,} documents and {tokens:,} tokens, {sum(sizes.values()) / 1e9:.2f} GB in "
        f"{len(sizes)} files, written by the project's writer in {written:.0f} s and removed afterwards.",
        "Each turn is a process of its own that has imported what it needs, then opens the dataset: ours with every "
        "check of `IndexedSource` (manifest, sizes, digests of samples of each file, counts), megatron-core's reader "
        "only the pair of tokens, without checks.",
        "Cold: the system was asked to drop the files' pages before the turn (posix_fadvise; what was then read from "
        "disk is listed). Warm: a turn on the same files came before. Memory counts mapped pages.",
    )


def write_dataset(folder: Path, *, documents: int) -> Path:
    """Write a text dataset of ``documents`` documents of one to eight tokens; return its prefix."""
    tokens = [list(range(2, 3 + number % 8)) for number in range(min(documents, _SEED_DOCUMENTS))]
    prefix, count = folder / "seed", len(tokens)
    with _writer(prefix) as writer:
        for ids in tokens:
            writer.add_document(ids)
    step = 0
    while count < documents:
        times = min(_TENFOLD, documents // count)
        source, step = IndexedSource(prefix), step + 1
        larger = folder / f"times{step}"
        with _writer(larger) as writer:
            for _ in range(times):
                writer.add_dataset(source)
            for number in range(documents - times * count if times < _TENFOLD else 0):
                writer.add_document(tokens[number % len(tokens)])
        del source
        for path in folder.glob(f"{prefix.name}*"):
            path.unlink()
        prefix, count = larger, IndexedSource(larger).num_documents
    return prefix


def _writer(prefix: Path) -> DatasetWriter:
    return DatasetWriter(prefix, kind="text", tokenizer_digest="0" * 64, image_sentinel_id=_SENTINEL)


def _measure(prefix: Path, files: Sequence[Path], *, rounds: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Open the dataset again and again, contenders in turn, cold before warm."""
    turns: dict[str, dict[str, list[dict[str, Any]]]] = {cache: {OURS: [], PEER: []} for cache in _CACHES}
    functions = {OURS: f"{__name__}:open_ours", PEER: f"{__name__}:open_peer"}
    for number in range(rounds):
        for who in (OURS, PEER) if number % 2 else (PEER, OURS):
            drop_from_page_cache(files)
            for cache in _CACHES:
                turns[cache][who].append(call(functions[who], prefix=str(prefix)))
    return turns


def open_ours(prefix: str) -> dict[str, float]:
    """Open by our reader; return what it took."""
    return _watched(lambda: IndexedSource(prefix))


def open_peer(prefix: str) -> dict[str, float]:
    """Open the pair of tokens by megatron-core's reader; return what it took."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return _watched(lambda: IndexedDataset(str(with_suffix(prefix, "_tokens")), mmap=True))


def _watched(action: Any) -> dict[str, float]:
    """Return seconds, MiB read from disk, and MiB by which the process grew at its peak, mapped pages included."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    before, read = _kernel_says("status", "VmRSS"), _kernel_says("io", "read_bytes")
    began = time.perf_counter()
    opened = action()
    seconds = time.perf_counter() - began
    more, read = _kernel_says("status", "VmHWM") - before, _kernel_says("io", "read_bytes") - read
    del opened
    return {"seconds": seconds, "mib": more / 1024, "read_mib": read / 2**20}


def _kernel_says(file: str, field: str) -> int:
    """One number about this process: bytes in ``io``, KiB in ``status``."""
    lines = Path(f"/proc/self/{file}").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1])


def _comparison(cache: str, turns: Mapping[str, Sequence[Mapping[str, float]]]) -> Comparison:
    ours, theirs = ([turn["seconds"] for turn in turns[who]] for who in (OURS, PEER))
    return Comparison(
        what=f"{cache} page cache",
        unit="openings a second",
        peer=PEER,
        ours=1 / spread(ours).median,
        theirs=1 / spread(theirs).median,
        ratio=times_as_fast(ours, theirs),
    )
