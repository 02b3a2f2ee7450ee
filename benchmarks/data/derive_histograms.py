"""Derive ``length_histograms.json`` and ``tile_histograms.json`` from published figures, by the project's own packing.

Run ``python benchmarks/data/derive_histograms.py`` from the root of the repository to write the files again. What is
published and what is modelled on top of it is said in ``mm15_megatron/bench/data/documents.py``; the files repeat it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mm15_megatron.bench.data.documents import MODELLED, PUBLISHED, Drawn, draw
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.packing import PackingRules, pack
from mm15_megatron.data.pieces import cut_documents
from mm15_megatron.presets import resolve

Int64 = npt.NDArray[np.int64]

FOLDER = Path(__file__).parent
DOCUMENTS = 200_000
PRESETS = {"captions": "mm1_3b", "text": "mm1_3b", "interleaved": "mm1_3b", "sft": "mm15_3b_sft"}
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


def tiles_of_rows(drawn: Drawn, cfg: RunConfig) -> dict[str, float]:
    """Cut and pack documents and return the share of rows with each number of tiles."""
    rules = PackingRules.from_config(cfg, image_sentinel_id=0)
    sizes = cut_documents(drawn, np.arange(drawn.num_documents), rules).pieces.sizes
    rows = np.bincount(pack(sizes, rules), weights=sizes.tiles).astype(np.int64)
    return {str(n): round(c / len(rows), 6) for n, c in enumerate(np.bincount(rows).tolist()) if c}


def powers_of_two(values: Int64) -> dict[str, float]:
    """Return the share of values from each power of two up to the next; "0" holds the zeros."""
    edges = np.where(values > 0, 2 ** np.floor(np.log2(np.maximum(values, 1))), 0).astype(np.int64)
    found, counts = np.unique(edges, return_counts=True)
    return {
        str(edge): round(count / len(values), 6) for edge, count in zip(found.tolist(), counts.tolist(), strict=True)
    }


def main() -> None:
    """Write both files."""
    drawn = {kind: draw(kind, DOCUMENTS, cfg=resolve(preset)) for kind, preset in PRESETS.items()}
    told = {"published": PUBLISHED, "modelled (ours)": MODELLED}
    tiles = {
        "about": "share of rows with each number of tiles, by kind of row; written by derive_histograms.py",
        **told,
        "profiles": PROFILES,
        "tiles_of_rows": {kind: tiles_of_rows(found, resolve(PRESETS[kind])) for kind, found in drawn.items()},
    }
    lengths = {
        "about": "share of documents by text tokens (from each power of two up to the next) and by images, by kind; "
        "written by derive_histograms.py",
        **told,
        "documents": DOCUMENTS,
        "text_tokens": {
            kind: powers_of_two(found.token_lengths.astype(np.int64) - np.diff(found.image_index))
            for kind, found in drawn.items()
        },
        "images": {
            kind: {str(n): round(c / DOCUMENTS, 6) for n, c in enumerate(np.bincount(np.diff(found.image_index))) if c}
            for kind, found in drawn.items()
        },
    }
    for name, content in (("tile", tiles), ("length", lengths)):
        path = FOLDER / f"{name}_histograms.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
