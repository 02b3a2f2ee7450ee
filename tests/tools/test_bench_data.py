"""The command of the data path's benchmark: what it prints, what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm15_megatron.bench.data.record import read

from ..helpers.tools import load_tool


def test_a_case_is_printed_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cases", "images,preprocess", "--rounds", "1", "--pictures", "1", "--folder", str(tmp_path)]
    assert load_tool("bench_data").main([*words, "--record", str(tmp_path / "data-cpu")]) == 0
    said = capsys.readouterr().out
    assert "## images" in said
    assert "Not run: Megatron-LM's tool is not shipped here" in said
    found = read(tmp_path / "data-cpu.json")
    assert found["images"]["command"].startswith("python tools/bench_data.py --cases images,preprocess")
    assert found["preprocess"]["not_run"]
    assert "| photos | Pillow |" in (tmp_path / "data-cpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"), [(["--cases", "pictures"], "unknown case 'pictures'"), (["--rounds", "-1"], "--rounds is -1")]
)
def test_what_is_impossible_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tool("bench_data").main(words) == 2
    assert message in capsys.readouterr().err
