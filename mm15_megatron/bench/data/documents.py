"""Documents drawn from published figures: how long they are, and how many images of which size they hold.

What is published and what is modelled on top of it is said in ``PUBLISHED`` and ``MODELLED``. The streams of random
numbers are stable: the same seed gives the same documents on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.image.geometry import tile_counts

Floats = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

OBELICS_IMAGES, OBELICS_DOCUMENTS, OBELICS_TOKENS, OBELICS_MOST_IMAGES = 353e6, 141_047_697, 115e9, 30
OBELICS_MEDIAN_TOKENS: Final = 677
COYO_WIDTH, COYO_HEIGHT, COYO_SMALLEST_SIDE, COYO_LARGEST_ASPECT = 621.78, 540.99, 200, 3.0
MM15_TILES_PER_IMAGE: Final = 5.39
SFT_KINDS: Final = (0.8, 0.1, 0.1)
SFT_MEDIAN_TOKENS, SFT_TOKENS_SIGMA = 150, 1.0
CAPTION_MEDIAN_TOKENS, CAPTION_SIGMA, CAPTION_MOST_TOKENS = 18, 0.7, 256
TEXT_MEDIAN_TOKENS, TEXT_SIGMA = 450, 1.1
SIDE_SIGMA: Final = 0.5
MULTI_IMAGES: Final = ((1, 0.4), (2, 0.4), (3, 0.2))

PUBLISHED: Final = {
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
MODELLED: Final = {
    "captions": "one image of one tile; text: log-normal, median 18 tokens, sigma 0.7, at most 256",
    "text": "text a document: log-normal, median 450 tokens, sigma 1.1; longer than a row: cut",
    "interleaved": "images a document: P(n) ~ n^-a on 1..30 with the a that gives OBELICS' mean (its median follows); "
    "text a document: log-normal with OBELICS' median and mean, independent of the images, which stand anywhere in it; "
    "longer than a row, or of more than 16 images: cut",
    "sft": "side of an image: log-normal around COYO's means, sigma 0.5; aspect ratio: log-normal with the sigma that "
    "gives MM1.5's 5.39 tiles an image; text a sample: log-normal, median 150, sigma 1; a multi-image sample has 1, 2 "
    "or 3 images (0.4, 0.4, 0.2); longer than a row: truncated",
}
KINDS: Final = {"captions": "captions", "text": "text", "interleaved": "interleaved", "sft": "conversations"}
"""Kind of dataset of each profile."""


@dataclass(frozen=True)
class Drawn:
    """The index of a dataset that was never written: what packing needs to know of D documents and their M images.

    Attributes:
        kind: kind of dataset.
        token_lengths: int32 [D], stored tokens, one for each image.
        image_index: int64 [D + 1], first image of each document, then their number.
        image_sizes: uint32 [M, 2], height and width.
        image_positions: int32 [M], index of each image's sentinel among the tokens of its document.
    """

    kind: str
    token_lengths: npt.NDArray[np.int32]
    image_index: Int64
    image_sizes: npt.NDArray[np.uint32]
    image_positions: npt.NDArray[np.int32]

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.token_lengths)

    def has_target(self, document: int, stop: int) -> bool:
        """Every token is one."""
        return stop > 1


def draw(profile: str, count: int, *, cfg: RunConfig, seed: int = 1) -> Drawn:
    """Draw ``count`` documents of one of :data:`KINDS`.

    Args:
        profile: captions | text | interleaved | sft.
        count: how many.
        cfg: a run; its tiling decides which sizes give MM1.5's tiles an image (sft).
        seed: of the stream.
    """
    rng = np.random.default_rng(seed)
    text, images = _TEXTS[profile](rng, count)
    sizes = _sizes(rng, images, cfg) if profile == "sft" else np.full((int(images.sum()), 2), 480, np.uint32)
    stored = text + images
    starts = np.concatenate(([0], np.cumsum(images)))
    return Drawn(KINDS[profile], stored.astype(np.int32), starts, sizes, _positions(rng, profile, stored, images))


def _captions(rng: np.random.Generator, count: int) -> tuple[Int64, Int64]:
    text = np.exp(np.log(CAPTION_MEDIAN_TOKENS) + CAPTION_SIGMA * normal(rng, count))
    return text.clip(3, CAPTION_MOST_TOKENS).astype(np.int64), np.ones(count, np.int64)


def _texts(rng: np.random.Generator, count: int) -> tuple[Int64, Int64]:
    text = np.exp(np.log(TEXT_MEDIAN_TOKENS) + TEXT_SIGMA * normal(rng, count))
    return text.clip(2).astype(np.int64), np.zeros(count, np.int64)


def _interleaved(rng: np.random.Generator, count: int) -> tuple[Int64, Int64]:
    images = 1 + np.searchsorted(np.cumsum(image_count_shares()), rng.random(count)).clip(max=OBELICS_MOST_IMAGES - 1)
    mean = OBELICS_TOKENS / OBELICS_DOCUMENTS
    sigma = (2 * np.log(mean / OBELICS_MEDIAN_TOKENS)) ** 0.5  # of a log-normal with this mean and median
    text = np.exp(np.log(OBELICS_MEDIAN_TOKENS) + sigma * normal(rng, count))
    return text.clip(2).astype(np.int64), images


def _conversations(rng: np.random.Generator, count: int) -> tuple[Int64, Int64]:
    kind = np.searchsorted(np.cumsum(SFT_KINDS), rng.random(count))
    counts, shares = zip(*MULTI_IMAGES, strict=True)
    several = np.array(counts)[np.searchsorted(np.cumsum(shares), rng.random(count)).clip(max=len(counts) - 1)]
    text = np.exp(np.log(SFT_MEDIAN_TOKENS) + SFT_TOKENS_SIGMA * normal(rng, count)).astype(np.int64) + 2
    return text, np.select([kind == 0, kind == 1], [1, several], 0)


_TEXTS: Final[dict[str, Callable[[np.random.Generator, int], tuple[Int64, Int64]]]] = {
    "captions": _captions,
    "text": _texts,
    "interleaved": _interleaved,
    "sft": _conversations,
}


def _positions(rng: np.random.Generator, profile: str, stored: Int64, images: Int64) -> npt.NDArray[np.int32]:
    """Anywhere in an interleaved document, at the beginning of the others."""
    owner = np.repeat(np.arange(len(images)), images)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(images) - images, images)
    if profile != "interleaved":
        return within.astype(np.int32)
    text = (stored - images)[owner]
    place = np.floor(rng.random(len(owner)) * (text + 1))
    order = np.lexsort((place, owner))
    return (place[order].astype(np.int64) + within).astype(np.int32)


def _sizes(rng: np.random.Generator, images: Int64, cfg: RunConfig) -> npt.NDArray[np.uint32]:
    in_sample = np.repeat(images, images)
    size, aspect = normal(rng, len(in_sample)), normal(rng, len(in_sample))
    few = slice(200_000)  # enough to find the sigma

    def sizes(sigma: float, part: slice) -> npt.NDArray[np.uint32]:
        ratio = np.exp(np.log(COYO_WIDTH / COYO_HEIGHT) + sigma * aspect[part])
        ratio = ratio.clip(1 / COYO_LARGEST_ASPECT, COYO_LARGEST_ASPECT)
        side = (COYO_WIDTH * COYO_HEIGHT) ** 0.5 * np.exp(SIDE_SIGMA * size[part])
        return np.stack([side / ratio**0.5, side * ratio**0.5], axis=1).clip(COYO_SMALLEST_SIDE).astype(np.uint32)

    def mean_tiles(sigma: float) -> float:
        found = sizes(sigma, few)
        alone = np.ones(len(found), np.int64)
        return float(tile_counts(found, alone, tile_size=cfg.vision.image_size, tiling=cfg.tiling).mean())

    return sizes(solve(mean_tiles, MM15_TILES_PER_IMAGE, low=0.0, high=1.5), slice(None))


def image_count_shares() -> Floats:
    """Return P(1), ..., P(30) images of an interleaved document."""
    counts = np.arange(1, OBELICS_MOST_IMAGES + 1, dtype=np.float64)

    def mean(a: float) -> float:
        return float((counts ** (1 - a)).sum() / (counts**-a).sum())

    shares: Floats = counts ** -solve(mean, OBELICS_IMAGES / OBELICS_DOCUMENTS, low=0.5, high=4.0)
    return shares / shares.sum()


def solve(value_at: Callable[[float], float], target: float, *, low: float, high: float) -> float:
    """Return where a monotone function takes the value ``target``, by bisection."""
    rising = value_at(high) > value_at(low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (value_at(middle) < target) == rising else (low, middle)
    return (low + high) / 2


_TABLE: Final = 4096


def normal(rng: np.random.Generator, size: int) -> Floats:
    """Draw from a standard normal by a table of its inverse distribution: the stream of uniform numbers is stable."""
    inverse = NormalDist().inv_cdf
    table = np.array([inverse((n + 0.5) / _TABLE) for n in range(_TABLE)])
    return np.interp(rng.random(size) * _TABLE - 0.5, np.arange(_TABLE), table)
