"""The case ``packing``: rows against the fewest that the caps allow, documents a second, and simple packings beside it.

Documents are drawn from published figures (``documents.py``); one chunk of them is cut into pieces and packed, as every
chunk of an epoch is, on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from mm15_megatron.bench.data.documents import KINDS, MODELLED, Drawn, draw
from mm15_megatron.bench.data.outcome import CaseResult, Comparison, Request
from mm15_megatron.bench.data.turns import Spread, in_turn, spread
from mm15_megatron.data.packing import PackingRules, Sizes, least_rows, pack
from mm15_megatron.data.pieces import cut_documents
from mm15_megatron.presets import resolve

PRESETS: Final = {"captions": "mm1_3b", "text": "mm1_3b", "interleaved": "mm1_3b", "sft": "mm15_3b_sft"}
_LEAST_SHARE: Final = 0.98
_LEAST_RATE: Final = 1e6
_LOOKED_AT: Final = 20_000  # documents that the simple packings, which place one after the other, take


def packing(request: Request) -> CaseResult:
    """Cut and pack a chunk of each kind of document."""
    comparisons, details = [], {}
    for profile, preset in PRESETS.items():
        cfg = resolve(preset)
        rules = PackingRules.from_config(cfg, image_sentinel_id=0)
        drawn = draw(profile, request.chunk_documents, cfg=cfg)
        comparisons += _fill(profile, drawn, rules)
        turns = in_turn({"": {"ours": _work(drawn, rules)}}, rounds=request.rounds)[""]["ours"]
        rates = [drawn.num_documents / turn.core for turn in turns]
        comparisons.append(_against(f"{profile}: documents cut and packed", "documents/s a core", rates, _LEAST_RATE))
        details[profile] = _facts(drawn, rules)
    return CaseResult(
        work=(
            f"{request.chunk_documents:,} documents of each kind (a chunk of an epoch), drawn from published figures: "
            + "; ".join(f"{profile}: {MODELLED[profile]}" for profile in KINDS)
            + ".",
            "Each turn cuts every document into pieces and packs them, by the rules of "
            + ", ".join(f"{preset} ({profile})" for profile, preset in PRESETS.items())
            + ". The bound is the number of rows that the cap that binds most needs on average.",
            f"Next fit and first fit decreasing (written here, in Python) pack the first {_LOOKED_AT:,} documents.",
        ),
        comparisons=tuple(comparisons),
        details=details,
    )


def _work(drawn: Drawn, rules: PackingRules) -> Callable[[], object]:
    return lambda: pack(_sizes(drawn, rules, drawn.num_documents), rules)


def _sizes(drawn: Drawn, rules: PackingRules, count: int) -> Sizes:
    return cut_documents(drawn, np.arange(min(count, drawn.num_documents)), rules).pieces.sizes


def _fill(profile: str, drawn: Drawn, rules: PackingRules) -> list[Comparison]:
    whole = _sizes(drawn, rules, drawn.num_documents)
    bound, rows = least_rows(whole, rules), int(pack(whole, rules).max()) + 1
    found = [_rows(f"{profile}: rows of a chunk", "the bound of the caps", rows, bound, at_least=_LEAST_SHARE)]
    few = _sizes(drawn, rules, _LOOKED_AT)
    ours = int(pack(few, rules).max()) + 1
    for name, simple in (("next fit", next_fit), ("first fit decreasing", first_fit_decreasing)):
        found.append(_rows(f"{profile}: rows of {_LOOKED_AT:,} documents", name, ours, simple(few, rules)))
    return found


def _rows(what: str, peer: str, ours: int, theirs: int, *, at_least: float | None = None) -> Comparison:
    """Fewer rows are better: the ratio is theirs to ours."""
    ratio = theirs / ours
    return Comparison(what, "rows (fewer is better)", peer, ours, theirs, Spread(ratio, ratio, ratio), at_least)


def _against(what: str, unit: str, values: list[float], target: float) -> Comparison:
    ratio = spread([value / target for value in values])
    return Comparison(what, unit, "the target", spread(values).median, target, ratio, at_least=1.0)


def _facts(drawn: Drawn, rules: PackingRules) -> dict[str, float]:
    sizes = _sizes(drawn, rules, drawn.num_documents)
    rows = int(pack(sizes, rules).max()) + 1
    return {
        "pieces": len(sizes),
        "rows": rows,
        "samples a row": len(sizes) / rows,
        "fill of seq_length": float(sizes.tokens.sum()) / (rows * rules.seq_length),
        "fill of max_images": float(sizes.images.sum()) / (rows * rules.max_images),
    }


def next_fit(sizes: Sizes, rules: PackingRules) -> int:
    """Return the rows of the simplest packing: in the order given, a row is closed when the next does not fit."""
    rows, free = 1, rules.caps_C.copy()
    for size in sizes.matrix_NC:
        if (size > free).any():
            rows, free = rows + 1, rules.caps_C.copy()
        free -= size
    return rows


def first_fit_decreasing(sizes: Sizes, rules: PackingRules) -> int:
    """Return the rows of the textbook packing: the longest first, each into the first row that takes it."""
    matrix_NC = sizes.matrix_NC[np.argsort(-sizes.tokens, kind="stable")]
    free_RC = np.zeros((len(matrix_NC), len(rules.caps_C)), np.int64)
    rows = 0
    for size in matrix_NC:
        fits = (free_RC[:rows] >= size).all(axis=1)
        at = int(fits.argmax()) if fits.any() else rows
        if at == rows:
            free_RC[rows], rows = rules.caps_C, rows + 1
        free_RC[at] -= size
    return rows
