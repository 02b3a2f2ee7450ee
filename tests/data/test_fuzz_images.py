"""Thousands of hostile images never crash, wedge or bloat a decoding process, and harm no good image beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from .fuzz_process import MAX_PIXELS, TOGETHER, Report, fuzz
from .hostile import hostile

SAMPLED, ALL = 2_000, 10_000
GROWTH = TOGETHER * MAX_PIXELS * 16
"""Bytes: a batch of the largest pictures allowed, 8 bytes a pixel in the decoder (16-bit RGBA), 3 as a result, and as
much again as the allocator may waste."""
FILLS = ("17", "201")
"""With which bytes glibc fills memory that was never written: pixels must not depend on it."""


@pytest.mark.parametrize("library", ["dali", "pil"])
@pytest.mark.parametrize(
    "count", [pytest.param(SAMPLED, id="sampled"), pytest.param(ALL, id="all", marks=pytest.mark.soak)]
)
def test_hostile_images(
    library: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, list[str]]
) -> None:
    reports = []
    for fill in FILLS:
        monkeypatch.setenv("MALLOC_PERTURB_", fill)
        reports.append(fuzz(library, range(count), log=tmp_path / f"{fill}.log"))
    for report in reports:
        check(report, count)
    differing = [a for a, b in zip(reports[0].outcomes, reports[1].outcomes, strict=True) if a.digest != b.digest]
    assert not differing, f"pixels of memory that was never written: {differing}"
    table.setdefault("hostile images", []).append(summary(library, reports[0]))


def check(report: Report, count: int) -> None:
    assert not report.complaints
    assert [outcome.number for outcome in report.outcomes] == list(range(count))
    accepted = [outcome for outcome in report.outcomes if outcome.must_fail and not outcome.problem]
    assert not accepted, f"no picture, but accepted: {accepted}"
    late = sum(outcome.late for outcome in report.outcomes)
    assert 2 * late >= count, f"only {late} of {count} fail after the header check"
    assert report.grown <= GROWTH, f"{report.grown / 2**20:.0f} MiB more than with good pictures"


def summary(library: str, report: Report) -> str:
    late = sum(outcome.late for outcome in report.outcomes)
    early = sum(bool(outcome.problem) for outcome in report.outcomes) - late
    total, grown = len(report.outcomes), report.grown / 2**20
    return f"{library}: {total} images, {early} refused by the header, {late} after it; {grown:.0f} MiB above good ones"


def test_an_image_is_a_function_of_its_number() -> None:
    first = [hostile(number) for number in range(60)]
    assert [hostile(number) for number in reversed(range(60))] == first[::-1]
    assert len({one.data for one in first}) > 50


def test_a_process_that_dies_names_the_image(tmp_path: Path) -> None:
    """An unknown library ends the process before its first image; nothing waits for it."""
    with pytest.raises(AssertionError, match="cv2 died with exit code 1") as died:
        fuzz("cv2", [0], log=tmp_path / "log")
    assert "unknown image decoder 'cv2'" in str(died.value)
