"""The mixture: exact shares over any stretch, counts in closed form, weights on a schedule."""

from __future__ import annotations

import numpy as np
import pytest

from mm15_megatron.data.mixture import Mixture, Weights
from mm15_megatron.errors import DataError

SHARE_TOLERANCE = 3  # how far a golden-ratio sequence strays from its share over any stretch


def constant(*weights: float, seed: int = 3) -> Mixture:
    return Mixture([Weights(0, weights)], seed=seed)


def test_it_keeps_its_shares_over_any_stretch() -> None:
    mixture = constant(4.5, 4.5, 1.0)
    for first, stop in ((0, 20), (1000, 1100), (65_000, 67_000), (10**12, 10**12 + 500)):
        counts = np.bincount(mixture.choose(first, stop), minlength=3)
        assert np.abs(counts - (stop - first) * np.array([0.45, 0.45, 0.1])).max() <= SHARE_TOLERANCE


def test_counts_are_what_was_chosen() -> None:
    mixture = constant(1, 2, 3, seed=9)
    everything = mixture.choose(0, 140_000)
    before = np.concatenate(([[0, 0, 0]], np.cumsum(np.eye(3, dtype=np.int64)[everything], axis=0)))
    for index in (0, 1, 2, 7, 65_535, 65_536, 139_999, 140_000, 3):
        assert mixture.count_before(index).tolist() == before[index].tolist()
    far = 10**15
    found = mixture.count_before(far + 1000) - mixture.count_before(far)
    assert found.tolist() == np.bincount(mixture.choose(far, far + 1000), minlength=3).tolist()
    assert mixture.count_before(far).sum() == far


def test_weights_change_on_schedule() -> None:
    parts = [Weights(0, (0.5, 0.3, 0.2)), Weights(1000, (0, 1, 1)), Weights(5000, (1, 0, 0)), Weights(5003, (1, 1, 2))]
    mixture = Mixture(parts, seed=3)
    everything = mixture.choose(0, 9000)
    before = np.concatenate(([[0, 0, 0]], np.cumsum(np.eye(3, dtype=np.int64)[everything], axis=0)))
    for index in (0, 1, 999, 1000, 1001, 4999, 5000, 5001, 5003, 5004, 9000):
        assert mixture.count_before(index).tolist() == before[index].tolist()
    assert mixture.choose(998, 5004).tolist() == everything[998:5004].tolist()
    assert set(everything[1000:5000].tolist()) == {1, 2}
    assert set(everything[5000:5003].tolist()) == {0}
    counts = np.bincount(everything[5003:], minlength=3)
    assert np.abs(counts - 3997 * np.array([0.25, 0.25, 0.5])).max() <= SHARE_TOLERANCE


def test_rounding_leaves_nothing_to_a_source_that_rests() -> None:
    mixture = constant(*[0.1] * 10, 0.0)
    assert mixture.count_before(10**18)[-1] == 0
    assert Mixture([Weights(0, (1, 0, 0))], seed=0).choose(0, 1000).max() == 0


def test_one_source() -> None:
    assert constant(7).choose(0, 5).tolist() == [0] * 5
    assert constant(7).count_before(10).tolist() == [10]
    assert constant(7).choose(5, 5).tolist() == []


@pytest.mark.parametrize("weights", [(), (0.0,), (1, -1), (float("nan"),), (0, 0)])
def test_impossible_weights(weights: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="mixture weights"):
        constant(*weights)


@pytest.mark.parametrize("firsts", [[], [1], [0, 0], [0, 5, 3]])
def test_impossible_schedules(firsts: list[int]) -> None:
    with pytest.raises(DataError, match="the mixture's schedule starts at"):
        Mixture([Weights(first, (1.0,)) for first in firsts], seed=0)
