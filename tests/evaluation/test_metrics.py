"""Accuracy and its interval."""

from __future__ import annotations

import pytest

from mm15_megatron.errors import DataError
from mm15_megatron.evaluation.metrics import Score, exact_match, scores_by_kind, wilson_interval

# The textbook's figures are given to four digits.
PRINTED = 5e-5


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval_of_the_literature(hits: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(hits, total) == pytest.approx((low, high), abs=PRINTED)


@pytest.mark.parametrize("total", [1, 3, 360])
def test_the_interval_holds_the_share_and_stays_inside_the_unit(total: int) -> None:
    for hits in range(total + 1):
        low, high = wilson_interval(hits, total)
        assert 0.0 <= low <= hits / total <= high <= 1.0


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_counts_are_refused(hits: int, total: int) -> None:
    with pytest.raises(DataError, match=f"{hits} hits of {total}"):
        wilson_interval(hits, total)


def test_exact_match_ignores_only_white_space() -> None:
    assert exact_match(" 3  8\n", "3 8")
    assert not exact_match("38", "3 8")
    assert not exact_match("8 3", "3 8")
    assert not exact_match("", "3")


def test_scores_are_counted_by_kind_in_order_of_appearance() -> None:
    scores = scores_by_kind([("pair", True), ("single", False), ("pair", False), ("pair", True)])
    assert list(scores.items()) == [("pair", Score(2, 3)), ("single", Score(0, 1))]
    assert scores["pair"].as_dict() == {"accuracy": 0.6667, "n": 3, "hits": 2, "interval95": [0.2077, 0.9385]}
