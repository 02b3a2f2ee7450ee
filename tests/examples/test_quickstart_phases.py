"""The quickstart's phases: two stages, a real signal, a record of time and memory; the baselines of its evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart import digits
from examples.quickstart.answering import Asked, chance, nearest_neighbours, shuffled
from examples.quickstart.summarise import steps_of
from mm15_megatron.checkpoint.start import MAY_DIFFER
from mm15_megatron.checkpoint.store import model_differences
from mm15_megatron.config.parse import parse_run
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.validate import validate
from mm15_megatron.presets import REGISTRY

REPOSITORY = Path(__file__).parents[2]

# Takes a step every 50 ms and leaves with 75 at SIGTERM, as a rank does.
TRAINER = """
import signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
for step in range(1, 200):
    with open(sys.argv[1], "a") as stream:
        stream.write("{}\\n")
    time.sleep(0.05)
    if stopped:
        sys.exit(75)
"""


def _config(model: str, stage: str) -> RunConfig:
    folder = REPOSITORY / "examples" / "quickstart"
    arguments = ["--config", str(folder / f"{model}.yaml"), "--config", str(folder / f"{stage}.yaml")]
    return parse_run(arguments, presets=REGISTRY).config


@pytest.mark.parametrize(("model", "ranks"), [("dense", 2), ("moe", 4)])
def test_stages_are_those_of_the_papers(model: str, ranks: int) -> None:
    """Stage 1 mixes as MM1 does, by tokens; stage 2 takes its weights and steps by samples."""
    pretrain, sft = _config(model, "pretrain"), _config(model, "sft")
    for cfg in (pretrain, sft):
        validate(cfg, world_size=ranks)
    shares = {Path(source.prefix).name: source.weight for source in pretrain.data.sources}
    assert shares == {"captions": 0.45, "interleaved": 0.45, "text": 0.1}
    assert (pretrain.data.mixture_unit, pretrain.data.batch_unit) == ("token", "rows")
    assert [Path(source.prefix).name for source in sft.data.sources] == ["conversations"]
    assert (sft.data.mixture_unit, sft.data.batch_unit) == ("sample", "samples")
    assert (pretrain.checkpoint.init_from, sft.checkpoint.init_from) == ("", pretrain.train.run_dir)
    assert {change.path for change in model_differences(pretrain, sft)} <= MAY_DIFFER


def test_steps_of_a_stage(tmp_path: Path) -> None:
    """The last record counts them."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert steps_of(tmp_path) == 2


def _phase(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "examples.quickstart.run_phase",
        "--record",
        str(folder / "phases.jsonl"),
        *arguments,
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)


def _records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "phases.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_phase_is_stopped_by_a_signal_after_the_step_asked_for(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    stop = ("--terminate-at", "5", str(metrics))
    done = _phase(tmp_path, "--name", "train", *stop, "--", sys.executable, "-c", TRAINER, str(metrics))
    assert done.returncode == 0, done.stderr
    (record,) = _records(tmp_path)
    assert (record["name"], record["exit_code"], record["terminated"]) == ("train", 75, True)
    assert 5 <= len(metrics.read_text(encoding="utf-8").splitlines()) < 199
    assert record["peak_memory_mib"] > 0


def test_a_phase_that_ends_before_the_signal_fails(tmp_path: Path) -> None:
    stop = ("--terminate-at", "5", str(tmp_path / "metrics.jsonl"))
    assert _phase(tmp_path, "--name", "train", *stop, "--", sys.executable, "-c", "pass").returncode == 3
    assert _records(tmp_path)[0]["terminated"] is False


@pytest.mark.parametrize("code", [0, 2])
def test_a_phase_passes_the_exit_code_on(tmp_path: Path, code: int) -> None:
    assert _phase(tmp_path, "--name", "end", "--", sys.executable, "-c", f"exit({code})").returncode == code


def _asked(kind: str, answer: str, scan: int) -> Asked:
    return Asked(kind, "?", answer, (int(answer),), (), (scan,), b"")


def test_shuffling_gives_every_question_another_picture_of_its_kind() -> None:
    asked = [_asked("single" if i % 3 else "count", str(i % 10), i) for i in range(30)]
    given = shuffled(asked, seed=1)
    assert sorted(given) == list(range(30))
    assert all(i != there and asked[i].kind == asked[there].kind for i, there in enumerate(given))


def test_chance_is_luck_or_the_most_frequent_answer() -> None:
    asked = [_asked("count", answer, 0) for answer in "2223"]
    assert chance(asked, [1, 2, 3, 0]) == {"count": 0.75}
    asked = [_asked("single", answer, 0) for answer in "1122"]
    assert chance(asked, [1, 0, 3, 2]) == {"single": 1.0}


def test_nearest_neighbours_read_the_held_out_scans() -> None:
    _, held = digits.split_scans()
    scores = nearest_neighbours([_asked("single", str(digit), scan) for scan, digit in enumerate(held.digits)])
    assert scores["single"].n == 360
    assert scores["single"].accuracy == pytest.approx(0.967, abs=0.001)  # the figure of scikit-learn's own classifier
