"""Turns, spreads, child processes and the record of the data path's benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm15_megatron.bench.data.cases import CASES, check_names, check_request
from mm15_megatron.bench.data.child import call
from mm15_megatron.bench.data.outcome import CaseResult, Comparison, Figure, Request
from mm15_megatron.bench.data.record import page, read, write
from mm15_megatron.bench.data.turns import (
    Spread,
    drop_from_page_cache,
    in_turn,
    others_at_work,
    others_watched,
    spread,
    times_as_fast,
    tree_core_seconds,
)
from mm15_megatron.errors import BackendError, ConfigError, DataError

CIRCUMSTANCES = {
    "command": "bench",
    "finished": "2026-01-01T00:00:00+00:00",
    "seconds": 1.0,
    "rounds": 3,
    "machine": {"processor": "a processor", "cores": 2, "memory_gib": 4.0, "python": "3.11"},
    "libraries": {"numpy": "2"},
    "cores_of_others": {"before": 0.0, "during": 0.5, "share_of_seconds": 0.75, "after": 0.0},
}


def request(folder: Path, **changes: object) -> Request:
    sizes = {"rounds": 1, "pictures": 1, "workers": 1, "megatron_lm": None, "text_mib": 0.05, "documents": 50}
    sizes |= {"chunk_documents": 3000, "plan_documents": 2500}
    return Request(folder=folder, **{**sizes, "samples": 8, "batches": 1, **changes})


def result() -> CaseResult:
    met = Comparison("a", "pieces a second", "them", 4.0, 2.0, Spread(2.0, 1.5, 2.5), at_least=1.6)
    missed = Comparison("b", "pieces a second", "them", 1.0, 2.0, Spread(0.5, 0.4, 0.6), at_least=1.0)
    figure = Figure("a wait", "s", Spread(0.2, 0.1, 0.3), at_most=0.5)
    return CaseResult(("Both do it.",), (met, missed), (figure,), skipped={"others": "not installed"})


def test_spread_is_median_and_quartiles() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_comes_from_pairs() -> None:
    assert times_as_fast([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="argument"):
        times_as_fast([1.0], [1.0, 2.0])


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    said: list[str] = []
    found = in_turn({"group": {"a": lambda: said.append("a"), "b": lambda: said.append("b")}}, rounds=2)
    assert "".join(said) == "baabba"
    assert {who: len(seconds) for who, seconds in found["group"].items()} == {"a": 2, "b": 2}


def test_children_are_counted_among_our_own_seconds() -> None:
    before = tree_core_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert tree_core_seconds() > before
    assert others_at_work(seconds=0.01) >= 0
    with others_watched(every=0.01) as found:
        time.sleep(0.1)
    assert found
    assert min(found) >= 0


def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    drop_from_page_cache([path])
    assert path.read_bytes() == b"content"


def test_a_function_is_called_in_a_process_of_its_own() -> None:
    found = call("tests.bench.test_data_turns:told", word="yes")
    assert found["word"] == "yes"
    assert found["process"] != os.getpid()
    with pytest.raises(BackendError, match="(?s)ended with 1:.*ValueError: it cannot"):
        call("tests.bench.test_data_turns:failing")


def told(word: str) -> dict[str, object]:
    return {"word": word, "process": os.getpid()}


def failing() -> None:
    raise ValueError("it cannot")


def test_a_record_keeps_other_cases(tmp_path: Path) -> None:
    path = tmp_path / "data.cpu"
    write(path, {"open": CIRCUMSTANCES | CaseResult(not_run="no disk").content()})
    write(path, {"images": CIRCUMSTANCES | result().content()})
    assert set(read(tmp_path / "data.cpu.json")) == {"images", "open"}
    text = (tmp_path / "data.cpu.md").read_text(encoding="utf-8")
    assert text.index("## images") < text.index("## open")
    assert "| a | them | pieces a second | 4 | 2 | 2 | 1.5 - 2.5 | 1.6: met |" in text
    assert "1: missed" in text
    assert "| a wait | s | 0.2 | 0.1 - 0.3 | 0.5: met |" in text
    assert "Not measured: others: not installed." in text
    assert "Not run: no disk." in text
    assert "0.50 cores in the median second, more than 0.1 in 75% of the seconds: the machine was not quiet" in text
    write(path, {"images": CIRCUMSTANCES | CaseResult(not_run="no disk").content()})
    assert read(tmp_path / "data.cpu.json")["images"]["not_run"] == ""


def test_a_foreign_record_is_refused(tmp_path: Path) -> None:
    for content in ("[]", "{}", '{"cases": 3}', "no json"):
        (tmp_path / "other.json").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="no record of this benchmark"):
            read(tmp_path / "other.json")


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    check_names(list(CASES))
    check_request(request(tmp_path))
    with pytest.raises(ConfigError, match="unknown case 'image'"):
        check_names(["image"])
    with pytest.raises(ConfigError, match="--rounds is 0"):
        check_request(request(tmp_path, rounds=0))
    with pytest.raises(ConfigError, match="is no folder"):
        check_request(request(tmp_path / "absent"))


def test_the_committed_record_is_whole() -> None:
    place = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    cases = json.loads((place / "data-cpu.json").read_text(encoding="utf-8"))["cases"]
    assert set(cases) == set(CASES)
    assert (place / "data-cpu.md").read_text(encoding="utf-8") == page(cases)
    for name, content in cases.items():
        assert content["not_run"] == "", name
        assert content["rounds"] >= 5, name
        assert content["machine"]["processor"], name
        assert all(one["ratio"]["low"] <= one["ratio"]["high"] for one in content["comparisons"]), name
