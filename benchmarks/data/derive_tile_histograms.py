"""Derive ``tile_histograms.json``, the tiles of packed rows, from published figures; the packing is the project's own.

Run ``python benchmarks/data/derive_tile_histograms.py`` from the root of the repository to write the file again. What
is published and what is modelled on top of it is said in ``PUBLISHED`` and ``MODELLED``, which the file repeats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.image.geometry import tile_counts
from mm15_megatron.data.packing import Measured, PackingRules, pack_rows
from mm15_megatron.presets import resolve

Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

FILE = Path(__file__).with_name("tile_histograms.json")
DOCUMENTS = 200_000
OBELICS_IMAGES, OBELICS_DOCUMENTS, OBELICS_TOKENS, OBELICS_MOST_IMAGES = 353e6, 141_047_697, 115e9, 30
OBELICS_MEDIAN_TOKENS = 677
COYO_WIDTH, COYO_HEIGHT, COYO_SMALLEST_SIDE, COYO_LARGEST_ASPECT = 621.78, 540.99, 200, 3.0
MM15_TILES_PER_IMAGE = 5.39
SFT_KINDS = (0.8, 0.1, 0.1)
SFT_MEDIAN_TOKENS, SFT_TOKENS_SIGMA = 150, 1.0
SIDE_SIGMA = 0.5
MULTI_IMAGES = ((1, 0.4), (2, 0.4), (3, 0.2))

PUBLISHED = {
    "MM1 (arXiv 2403.09611, section 4)": "rows of 4096 tokens, at most 16 images a row, 144 tokens an image; rows of "
    "captions, interleaved documents and text 45 : 45 : 10; 512 rows a step",
    "MM1.5 (arXiv 2409.20566, section 4)": "pre-training rows 50 : 10 : 40; in instruction tuning single-image, "
    "multi-image and text samples 80 : 10 : 10, 1.8 images a multi-image sample; dynamic splitting into 4 to 9 tiles "
    "of 672 pixels and an overview encodes 539k images for 100k training samples (static 2x2: 500k)",
    "OBELICS (arXiv 2306.16527, table 1 and section 4.1; dataset card)": "353M images and 115B tokens in 141,047,697 "
    "documents; median 1 image and 677 tokens a document, at most 30 images",
    "COYO-700M (dataset card)": "mean width 621.78 and mean height 540.99 pixels, smaller side at least 200, aspect "
    "ratio at most 3",
}
MODELLED = {
    "captions": "16 images and at most 111 tokens a caption fill a row to the image cap: always 16 tiles",
    "text": "no tile",
    "interleaved": "images a document: P(n) ~ n^-a on 1..30 with the a that gives OBELICS' mean (its median follows); "
    "text a document: log-normal with OBELICS' median and mean, independent of the images; packed in random order by "
    "the project's packing, which drops documents of more than 16 images",
    "sft": "side of an image: log-normal around COYO's means, sigma 0.5; aspect ratio: log-normal with the sigma that "
    "gives MM1.5's 5.39 tiles an image; text a sample: log-normal, median 150, sigma 1; a multi-image sample has 1, 2 "
    "or 3 images (0.4, 0.4, 0.2); packed in random order by the project's packing",
}
MM1_ROWS = {"captions": 0.45, "interleaved": 0.45, "text": 0.1}
PROFILES = {
    "mm1": {"preset": "mm1_3b", "options": [], "rows": MM1_ROWS},
    "mm1, 4 stages": {
        "preset": "mm1_3b",
        "options": ["parallel.pipeline_model_parallel_size=4"],
        "rows": MM1_ROWS,
    },
    "mm15": {"preset": "mm15_3b", "options": [], "rows": {"captions": 0.5, "interleaved": 0.1, "text": 0.4}},
    "mm15 sft": {"preset": "mm15_3b_sft", "options": [], "rows": {"sft": 1.0}},
}


def solve(value_at: Callable[[float], float], target: float, *, low: float, high: float) -> float:
    """Return where a monotone function takes the value ``target``, by bisection."""
    rising = value_at(high) > value_at(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (value_at(middle) < target) == rising else (low, middle)
    return (low + high) / 2


def image_count_shares() -> Floats:
    """Return P(1), ..., P(30) images of an interleaved document."""
    counts = np.arange(1, OBELICS_MOST_IMAGES + 1, dtype=np.float64)

    def mean(a: float) -> float:
        return float((counts ** (1 - a)).sum() / (counts**-a).sum())

    shares: Floats = counts ** -solve(mean, OBELICS_IMAGES / OBELICS_DOCUMENTS, low=0.5, high=4.0)
    return shares / shares.sum()


def normal(rng: np.random.Generator, size: int) -> Floats:
    """Draw from a standard normal by its inverse distribution: the stream of uniform numbers is stable."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse(u) for u in 1 - rng.random(size)])


def packed_tiles(text: Int64, images: Int64, tiles: Int64, cfg: RunConfig) -> dict[str, float]:
    """Pack documents in the order given and return the share of rows with each number of tiles."""
    rules = PackingRules.from_config(cfg, image_sentinel_id=0)
    fits = images <= rules.max_images
    lengths = np.minimum(text + tiles * rules.slots_per_tile, rules.seq_length)
    starts = pack_rows(Measured(lengths[fits], images[fits], tiles[fits]), rules)
    rows = np.add.reduceat(tiles[fits], starts[:-1])
    return {str(n): round(c / len(rows), 6) for n, c in enumerate(np.bincount(rows).tolist()) if c}


def interleaved_rows(cfg: RunConfig) -> dict[str, float]:
    """Return the tiles of rows of interleaved documents."""
    rng = np.random.default_rng(1)
    images = 1 + np.searchsorted(np.cumsum(image_count_shares()), rng.random(DOCUMENTS))
    mean = OBELICS_TOKENS / OBELICS_DOCUMENTS
    sigma = (2 * np.log(mean / OBELICS_MEDIAN_TOKENS)) ** 0.5  # of a log-normal with this mean and median
    text = np.exp(np.log(OBELICS_MEDIAN_TOKENS) + sigma * normal(rng, DOCUMENTS)).astype(np.int64)
    return packed_tiles(text, images, images, cfg)


def sft_rows(cfg: RunConfig) -> dict[str, float]:
    """Return the tiles of rows of instruction-tuning samples with dynamically split images."""
    rng = np.random.default_rng(2)
    kind = np.searchsorted(np.cumsum(SFT_KINDS), rng.random(DOCUMENTS))
    counts, shares = zip(*MULTI_IMAGES, strict=True)
    several = np.array(counts)[np.searchsorted(np.cumsum(shares), rng.random(DOCUMENTS))]
    images = np.select([kind == 0, kind == 1], [1, several], 0)
    owner = np.repeat(np.arange(DOCUMENTS), images)
    size, aspect = normal(rng, len(owner)), normal(rng, len(owner))

    def tiles_of_images(sigma: float, images_in_sample: Int64) -> Int64:
        ratio = np.exp(np.log(COYO_WIDTH / COYO_HEIGHT) + sigma * aspect)
        ratio = ratio.clip(1 / COYO_LARGEST_ASPECT, COYO_LARGEST_ASPECT)
        side = (COYO_WIDTH * COYO_HEIGHT) ** 0.5 * np.exp(SIDE_SIGMA * size)
        sizes = np.stack([side / ratio**0.5, side * ratio**0.5], axis=1).clip(COYO_SMALLEST_SIDE).astype(np.int64)
        return tile_counts(sizes, images_in_sample, tile_size=cfg.vision.image_size, tiling=cfg.tiling)

    alone = np.ones(len(owner), np.int64)
    sigma = solve(lambda s: float(tiles_of_images(s, alone).mean()), MM15_TILES_PER_IMAGE, low=0.0, high=1.5)
    tiles = np.bincount(owner, weights=tiles_of_images(sigma, images[owner]), minlength=DOCUMENTS).astype(np.int64)
    text = np.exp(np.log(SFT_MEDIAN_TOKENS) + SFT_TOKENS_SIGMA * normal(rng, DOCUMENTS)).astype(np.int64)
    return packed_tiles(text + 2, images, tiles, cfg)


def main() -> None:
    """Write the file."""
    content = {
        "about": "share of rows with each number of tiles, by kind of row; written by derive_tile_histograms.py",
        "published": PUBLISHED,
        "modelled (ours)": MODELLED,
        "profiles": PROFILES,
        "tiles_of_rows": {
            "captions": {"16": 1.0},
            "interleaved": interleaved_rows(resolve("mm1_3b")),
            "text": {"0": 1.0},
            "sft": sft_rows(resolve("mm15_3b_sft")),
        },
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
