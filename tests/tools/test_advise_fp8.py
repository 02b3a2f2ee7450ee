"""The FP8 advisor's command line: from recorded numbers anywhere, and a refusal with the reason without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ..helpers.tools import load_tool

RECORDED = Path(__file__).resolve().parents[1] / "bench" / "recorded"


def run(*argv: str) -> int:
    return int(load_tool("advise_fp8").main(argv))


def test_it_advises_from_a_file_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--recorded", str(RECORDED / "invented_clear_win.json")) == 0
    text = capsys.readouterr().out
    assert "FP8 pays: tensorwise" in text
    assert "precision.fp8_recipe=tensorwise" in text


def test_the_assumed_share_is_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = str(RECORDED / "invented_clear_win.json")
    assert run("--recorded", numbers, "--other-share", "0") == 0
    assert "about 1.41x of the step (at most 1.41x)" in capsys.readouterr().out


def test_the_files_configuration_is_compared_with_the_one_named(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = str(RECORDED / "invented_clear_win.json")
    assert run("--preset", "mm1_30b", "--recorded", numbers) == 0
    capsys.readouterr()
    assert run("--preset", "mm1_3b", "--recorded", numbers) == 2
    assert "the recorded numbers are of another configuration" in capsys.readouterr().err


def test_a_malformed_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--recorded", str(RECORDED / "invented_malformed.json")) == 2
    assert capsys.readouterr().err.startswith("DataError")


def test_a_sweep_that_ended_early_gives_no_advice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = json.loads((RECORDED / "invented_clear_win.json").read_text(encoding="utf-8"))
    lost = content["measured"].pop()["product"]["name"]
    problem = "AcceleratorError: an illegal memory access"
    content |= {
        "failed": [{"product": lost, "recipe": "bf16", "problem": problem}],
        "unmeasured": [lost],
        "stopped": "the device did not answer any more",
    }
    numbers = tmp_path / "numbers.json"
    numbers.write_text(json.dumps(content), encoding="utf-8")
    assert run("--recorded", str(numbers)) == 1
    text = capsys.readouterr().out
    assert f"no advice: {lost} has no time in bf16: the device did not answer any more" in text
    assert f"bf16 failed at {lost}: {problem}" in text


def test_a_misspelled_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--preset", "mm1_30b", "--recipes", "tensorwise,blockwize") == 2
    assert "'blockwize', no FP8 recipe" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the sweep would run")
def test_without_a_gpu_it_says_what_works_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("--preset", "mm1_30b", "--record", str(tmp_path / "numbers.json")) == 2
    text = capsys.readouterr().err
    assert text.startswith("BackendError: the sweep needs a GPU")
    assert "--recorded FILE (that works anywhere)" in text
    assert not (tmp_path / "numbers.json").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ("--record", "a.json", "--recorded", "b.json"),
        ("--recipes", "delayed", "--recorded", "b.json"),
        ("--other-share", "1.0"),
        ("--repeats", "0"),
        ("--micro-batches", "0"),
    ],
)
def test_contradictory_arguments_are_refused(argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert ended.value.code == 2


def test_a_misspelled_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--preset", "mm1_30") == 2
    assert "mm1_30b" in capsys.readouterr().err
