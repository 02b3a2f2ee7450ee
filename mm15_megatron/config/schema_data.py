"""Options of the data: sources, rows, loader, and how images become tiles."""

from __future__ import annotations

from dataclasses import dataclass

from mm15_megatron.config.fields import option


@dataclass(frozen=True)
class WeightChange:
    """A weight that holds from one row (or sample, as ``mixture_unit`` counts) of the run on."""

    first: int = option(0, "number of the first row or sample of the run that it holds for")
    weight: float = option(1.0, "the weight; 0 = the source rests")


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of the mixture."""

    prefix: str = option("", "path prefix of the indexed dataset: <prefix>.json, <prefix>_tokens.bin, ...")
    weight: float | None = option(
        None, "share of what epochs leave, normalised over the sources with a weight; None = 1, unless epochs are given"
    )
    changes: tuple[WeightChange, ...] = option((), "later weights, a list of {first, weight}")
    epochs: float | None = option(
        None,
        "how often the run sees each document, within a few rows, instead of a weight; a shorter run shares them",
    )
    name: str = option("", "name in logs and in the ledger; empty = the last part of the prefix")


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes rows."""

    sources: tuple[SourceConfig, ...] = option(
        (),
        "the training mixture, a list of {prefix, weight or epochs, name}; --list-presets shows the papers' weights",
        flag="",
    )
    validation_sources: tuple[SourceConfig, ...] = option((), "held-out mixture; empty = no validation", flag="")
    tokenizer: str = option("", "path of a tokenizer.json (tokenizers) or a .model (SentencePiece)")
    seq_length: int = option(4096, "tokens of a row (MM1: 4096)")
    max_images: int = option(16, "images of a row at most (MM1: 16)")
    max_tiles: int = option(160, "tiles of a row at most, a memory cap")
    mixture_unit: str = option(
        "row",
        "what weights count: row = rows, each of one source (MM1); token = tokens, in rows of one source; sample = "
        "samples, which mix inside a row",
        choices=("row", "sample", "token"),
    )
    batch_unit: str = option(
        "rows",
        "what global_batch_size counts: rows (pre-training), or samples, packed into as many rows as they need",
        choices=("rows", "samples"),
    )
    shuffle: str = option(
        "full",
        "order of an epoch's documents: full = keyed pseudo-random over all of them; blocks = of blocks of neighbours, "
        "mixed inside windows, for file systems that hate small reads; none = as stored",
        choices=("full", "blocks", "none"),
    )
    shuffle_block: int = option(1024, "documents of a block (shuffle: blocks)")
    shuffle_window: int = option(64, "blocks of a window, which are also packed together (shuffle: blocks)")
    plan_dir: str = option("", "folder of the tables that say which rows a dataset becomes; empty = <run_dir>/plan")
    row_dealing: str = option(
        "balanced",
        "which data-parallel rank takes which row of a step: balanced = so that tiles even out, round_robin = in turn",
        choices=("balanced", "round_robin"),
    )
    num_workers: int = option(
        1, "processes that decode images for each rank that reads them; 0 = in the training process"
    )
    prefetch_factor: int = option(2, "micro-batches each worker prepares ahead")
    decoder: str = option(
        "dali",
        "image decoder: dali = on the CPU; dali_gpu = decoded and resized on the rank's GPU (not measured); pil = the "
        "reference",
        choices=("dali", "dali_gpu", "pil"),
        flag="image-decoder",
    )
    max_image_pixels: int = option(64_000_000, "larger images are refused before they are decoded")
    on_bad_image: str = option(
        "substitute",
        "an image that does not decode: substitute (mean colour, counted, named) or raise",
        choices=("substitute", "raise"),
    )


@dataclass(frozen=True)
class TilingConfig:
    """How an image becomes tiles (MM1.5 section 4)."""

    mode: str = option(
        "none",
        "none = one tile; static = 2x2 tiles and an overview; dynamic = best grid and an overview",
        choices=("none", "static", "dynamic"),
        flag="tiling",
    )
    min_tiles: int = option(4, "n_min of dynamic image splitting (MM1.5: 4)")
    max_tiles: int = option(9, "n_max of dynamic image splitting (MM1.5: 9)", flag="tiling-max-tiles")
    overview: str = option("after", "where the overview stands (MM1.5: after)", choices=("before", "after"))
    resize: str = option(
        "stretch",
        "how an image meets one tile: stretch to the square, or fit and pad bottom/right; dynamic always fits",
        choices=("stretch", "fit"),
    )
    max_split_images: int = option(2, "samples with more images than this are never split (MM1.5: 2)")
    mixed_resolution_images: int = option(
        0, "but the last so many images of a sample are always split (MM1's few-shot prompts: 3, recollected)"
    )
    indicator: str = option(
        "none",
        "how a tile says where it stands: none, index = its position as text, seps = separators (MM1.5: index)",
        choices=("none", "index", "seps"),
    )
