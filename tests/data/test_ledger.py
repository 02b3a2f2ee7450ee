"""The ledger adds up: every row has one owner, every sample one source, every token one place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mm15_megatron.batch import RowRecord, SampleRecord, Substitution
from mm15_megatron.data.ledger import COUNTS, Ledger, Seen, count_rows, ledger_text
from mm15_megatron.errors import CheckpointError

NAMES, KINDS, CONTENTS = ("pairs", "books", "pages"), ("captions", "text", "captions"), ("c0", "c1", "c2")
ROWS = (
    RowRecord(0, (SampleRecord(0, 7, 5, 8, 2), SampleRecord(0, 8, 3, 0, 0)), padding=4),
    RowRecord(1, (SampleRecord(1, 0, 20),), padding=0, substituted=()),
    RowRecord(2, (SampleRecord(0, 9, 1, 4, 1), SampleRecord(1, 3, 6)), padding=9, substituted=(Substitution(0, "x"),)),
    RowRecord(3, (), padding=20),
)
LOSS = np.array([[2.0, 4.0], [3.0, 1.0], [0.0, 0.0]])


def ledger() -> Ledger:
    return Ledger.empty(NAMES, KINDS, CONTENTS).after(count_rows(ROWS, sources=3), loss=LOSS)


def line(found: Ledger, name: str) -> dict[str, int]:
    return dict(zip(COUNTS, found.counts[found.names.index(name)].tolist(), strict=True))


def test_lines() -> None:
    found = ledger()
    assert line(found, "pairs") == {
        "rows": 1, "padding": 4, "samples": 3, "image_samples": 2, "text_tokens": 9, "image_slots": 12, "images": 3,
        "substituted": 1,
    }  # fmt: skip
    assert line(found, "books") | {"padding": 0} == {
        "rows": 1, "padding": 0, "samples": 2, "image_samples": 0, "text_tokens": 26, "image_slots": 0, "images": 0,
        "substituted": 0,
    }  # fmt: skip
    assert line(found, "several sources")["rows"] == line(found, "no source")["rows"] == 1
    assert (line(found, "several sources")["padding"], line(found, "no source")["padding"]) == (9, 20)
    assert not found.counts[2].any()
    assert (found.rows, found.tokens) == (4, 4 * 20)
    assert found.mean_losses() == [0.5, 3.0, None]
    assert {kind: int(counts[0]) for kind, counts in found.by_kind().items()} == {"captions": 1, "text": 1}


def test_steps_add_up_and_a_step_without_a_loss_is_counted_all_the_same() -> None:
    twice = ledger().after(count_rows(ROWS, sources=3), loss=LOSS)
    assert twice.counts.tolist() == (2 * ledger().counts).tolist()
    assert twice.sums.tolist() == (2 * ledger().sums).tolist()
    broken = ledger().after(count_rows(ROWS, sources=3), loss=LOSS * np.nan)
    assert broken.counts.tolist() == twice.counts.tolist()
    assert broken.sums.tolist() == ledger().sums.tolist()


def test_another_rank_of_the_same_rows_reports_its_bad_images_alone() -> None:
    found = count_rows(ROWS, sources=3, tokens=False)
    assert found.sum() == found[0, COUNTS.index("substituted")] == 1


def test_it_survives_a_checkpoint() -> None:
    found = ledger()
    again = Ledger.from_dict(found.as_dict())
    assert (again.names, again.kinds, again.contents) == (found.names, found.kinds, found.contents)
    assert again.counts.tolist() == found.counts.tolist()
    assert again.sums.tolist() == found.sums.tolist()
    assert again.renamed(("a", "b", "c")).names == ("a", "b", "c", "several sources", "no source")


@pytest.mark.parametrize(
    "change",
    [
        {"counts": ["rows"]},
        {"sums": []},
        {"lines": []},
        {"lines": [{"name": "a"}]},
        {"lines": [{"name": n, "kind": "", "content": "", "counts": [-1] * 8, "sums": [0, 0]} for n in "ab"]},
    ],
)
def test_a_damaged_ledger(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint's ledger cannot be read"):
        Ledger.from_dict(ledger().as_dict() | change)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Ledger.from_dict({})


def test_text() -> None:
    seen = [Seen(1.5, {"nothing to predict": 2}, 30), Seen(0.25, {}, 0), Seen(0.0, {}, 0)]
    shown = ledger_text(ledger(), seen, seq_length=20).splitlines()
    assert [row.split() for row in shown[1:4]] == [
        "source rows samples text tokens image tokens padding images epochs loss".split(),
        "pairs 1 3 9 12 4 3 1.500 0.5000".split(),
        "books 1 2 26 0 0 0 0.250 3.0000".split(),
    ]
    assert shown[5:7] == [shown[5], shown[6]]
    assert [row.split()[:3] for row in shown[5:8]] == [
        ["several", "sources", "1"],
        ["no", "source", "1"],
        ["all", "4", "5"],
    ]
    assert "  left out of pairs: 30 tokens of truncated documents, 2 x nothing to predict" in shown
    assert "  1 images did not decode and were replaced" in shown
    assert shown[-1] == "  4 rows x 20 = 80 tokens, padding included"
