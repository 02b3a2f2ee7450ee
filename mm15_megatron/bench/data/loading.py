"""The case ``loader``: packed rows out of our loader, beside WebDataset with Pillow and megatron-energon."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from mm15_megatron.batch import MMBatch, RankView
from mm15_megatron.bench.data.child import call
from mm15_megatron.bench.data.image_paths import TileRule
from mm15_megatron.bench.data.outcome import CaseResult, Comparison, Request
from mm15_megatron.bench.data.peer_loaders import (
    energon_batches,
    prepare_energon,
    webdataset_batches,
    write_shards,
)
from mm15_megatron.bench.data.pictures import PHOTO_QUALITY, PHOTO_SIZES, photo_set, photographs
from mm15_megatron.bench.data.texts import paragraphs, train_tokenizer
from mm15_megatron.bench.data.turns import spread, times_as_fast, tree_core_seconds
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.captions import build_captions, encode_caption
from mm15_megatron.data.loader import build_loader
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import BackendError
from mm15_megatron.evaluation.report import library_versions
from mm15_megatron.presets import resolve

OURS, WEBDATASET, ENERGON = "ours", "WebDataset + Pillow", "megatron-energon + Pillow"
_TARGET: Final = 1.3
_SIDE, _IMAGES, _TOKENS, _SLOTS = 378, 16, 4096, 144  # of MM1: a row of 4096 tokens with 16 images
_PREFETCH: Final = 2
_WARM_BATCHES_A_WORKER: Final = 4  # the first come out of queues that were filled while nobody waited
_VOCABULARY: Final = 4096


def loader(request: Request) -> CaseResult:
    """Batches a second, from the same samples, with as many workers."""
    with tempfile.TemporaryDirectory(prefix="loader-", dir=request.folder) as name:
        folder = Path(name)
        megabytes = _write(folder, samples=request.samples, pictures=request.pictures)
        contenders, skipped = _contenders(folder)
        shape = {"folder": str(folder), "workers": request.workers, "batches": request.batches}
        turns: dict[str, list[dict[str, float]]] = {who: [] for who in contenders}
        for number in range(request.rounds):
            for who in list(contenders) if number % 2 else reversed(list(contenders)):
                turns[who].append(call(contenders[who], **shape))
    means = {who: spread([turn["images"] / turn["rows"] for turn in found]).median for who, found in turns.items()}
    return CaseResult(
        work=_work(request, means, megabytes=megabytes),
        comparisons=tuple(_comparisons(turns)),
        skipped=skipped,
        versions=library_versions(("webdataset", "megatron-energon")),
        details={"turns": turns},
    )


def _work(request: Request, means: Mapping[str, float], *, megabytes: float) -> tuple[str, ...]:
    sizes = ", ".join(f"{width}x{height}" for width, height in PHOTO_SIZES)
    return (
        f"{request.samples} pairs of a photograph ({sizes} in equal numbers, JPEG quality {PHOTO_QUALITY}) and a "
        f"caption, {megabytes:.0f} MB of pictures, in the page cache; {request.workers} worker processes, {_PREFETCH} "
        f"batches prefetched by each. Every contender hands float32 tiles of {_SIDE} and token ids to the training "
        "process, which does nothing else with them.",
        f"Ours (`build_loader`): keyed order over all pairs, rows of {_TOKENS} tokens with at most {_IMAGES} images of "
        f"{_SLOTS} places packed and laid out with labels, masks and positions, every picture's size checked against "
        "the dataset; DALI decodes.",
        "The peers: samples in the order of their shards, ids read from the shard; pictures decoded, resized by the "
        f"same rule and normalised by Pillow and torch; {_IMAGES} stacked; no tokenising, no packing, no shuffling.",
        f"Each turn is a process of its own, timed over {request.batches} batches once the queues are empty; images in "
        f"a batch: {', '.join(f'{who} {mean:.2f}' for who, mean in means.items())}. Cores: the seconds that the "
        "process and its workers occupied.",
    )


def _write(folder: Path, *, samples: int, pictures: int) -> float:
    """Write the samples as our dataset and as shards; return megabytes of pictures."""
    tokenizer = Tokenizer(train_tokenizer(folder / "tokenizer", vocabulary=_VOCABULARY))
    sources, _ = photographs(pictures)
    photos = [one for group in zip(*photo_set(sources).values(), strict=True) for one in group]
    captions = [" ".join(part.split()[:20]) for part in paragraphs()]
    chosen = [(photos[i % len(photos)], captions[i % len(captions)]) for i in range(samples)]
    build_captions(folder / "pairs", ((one.encoded, caption) for one, caption in chosen), tokenizer)
    write_shards(folder / "shards", [(one, encode_caption(caption, tokenizer)) for one, caption in chosen])
    return sum(len(one.encoded) for one, _ in chosen) / 1e6


def _contenders(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the function of each contender, and why others take no part."""
    found, skipped = {OURS: f"{__name__}:run_ours"}, {}
    try:
        webdataset_batches([folder / "none.tar"], rule=_rule(), images=1, workers=1, prefetch=1)
        found[WEBDATASET] = f"{__name__}:run_webdataset"
    except BackendError as error:
        skipped[WEBDATASET] = error.problem
    try:
        prepare_energon(folder / "shards")
        found[ENERGON] = f"{__name__}:run_energon"
    except BackendError as error:
        skipped[ENERGON] = error.problem
    return found, skipped


def configuration(folder: Path, *, workers: int) -> RunConfig:
    """Return a run that reads the dataset in ``folder``, in rows of MM1's shape."""
    options = [
        f"data.sources=[{{prefix: {folder / 'pairs'}}}]",
        f"data.tokenizer={folder / 'tokenizer' / 'tokenizer.json'}",
        f"data.seq_length={_TOKENS}",
        f"data.max_images={_IMAGES}",
        f"data.num_workers={workers}",
        f"data.prefetch_factor={_PREFETCH}",
        "data.decoder=dali",
        f"vision.image_size={_SIDE}",
        f"connector.num_tokens={_SLOTS}",
        f"language.vocab_size={_VOCABULARY}",
        "train.global_batch_size=8",
        "train.micro_batch_size=1",
    ]
    return apply_overrides(resolve("debug_dense"), options)


def _rule() -> TileRule:
    cfg = configuration(Path("unused"), workers=1)
    return TileRule(cfg.vision, cfg.tiling)


def run_ours(folder: str, workers: int, batches: int) -> dict[str, float]:
    """Time our loader; called in a process of its own."""
    with build_loader(configuration(Path(folder), workers=workers), view=RankView()) as batches_of_rank:
        return _timed(batches_of_rank, _images_of_ours, workers=workers, batches=batches)


def _images_of_ours(batch: MMBatch) -> int:
    assert batch.tiles_N3HW is not None, "this rank reads images"
    return len(batch.tiles_N3HW)


def run_webdataset(folder: str, workers: int, batches: int) -> dict[str, float]:
    """Time WebDataset; called in a process of its own."""
    shards = sorted((Path(folder) / "shards").glob("*.tar"))
    found = webdataset_batches(shards, rule=_rule(), images=_IMAGES, workers=workers, prefetch=_PREFETCH)
    return _timed(found, _images_of_peer, workers=workers, batches=batches)


def run_energon(folder: str, workers: int, batches: int) -> dict[str, float]:
    """Time megatron-energon; called in a process of its own."""
    place = Path(folder) / "shards"
    found = energon_batches(place, rule=_rule(), images=_IMAGES, workers=workers, prefetch=_PREFETCH)
    return _timed(found, _images_of_peer, workers=workers, batches=batches)


def _images_of_peer(batch: Sequence[Any]) -> int:
    return len(batch[0])


def _timed(
    batches_of: Iterable[Any], images_of: Callable[[Any], int], *, workers: int, batches: int
) -> dict[str, float]:
    """Take batches, then time as many as asked for."""
    found = iter(batches_of)
    for _ in islice(found, _WARM_BATCHES_A_WORKER * max(1, workers)):
        pass
    core, wall = tree_core_seconds(), time.perf_counter()
    images = sum(images_of(batch) for batch in islice(found, batches))
    wall, core = time.perf_counter() - wall, tree_core_seconds() - core
    return {"images": images, "rows": batches, "wall": wall, "core": core}


def _comparisons(turns: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Comparison]:
    found = []
    for peer in turns:
        if peer == OURS:
            continue
        for what, unit, clock, target in (
            ("whole loader", "images a second", "wall", _TARGET),
            ("whole loader, by cores", "images a second of a core", "core", None),
        ):
            ours, theirs = ([turn[clock] / turn["images"] for turn in turns[who]] for who in (OURS, peer))
            found.append(
                Comparison(
                    what=what,
                    unit=unit,
                    peer=peer,
                    ours=1 / spread(ours).median,
                    theirs=1 / spread(theirs).median,
                    ratio=times_as_fast(ours, theirs),
                    at_least=target,
                )
            )
        ours, theirs = ([turn["wall"] / turn["rows"] for turn in turns[who]] for who in (OURS, peer))
        found.append(
            Comparison(
                what="whole loader",
                unit="rows a second (peers: batches)",
                peer=peer,
                ours=1 / spread(ours).median,
                theirs=1 / spread(theirs).median,
                ratio=times_as_fast(ours, theirs),
            )
        )
    return found
