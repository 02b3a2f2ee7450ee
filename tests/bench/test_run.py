"""What the benchmark does with the answers of its processes: failures, short memory, spent time, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm15_megatron.bench.cases import Device, choose_cases
from mm15_megatron.bench.fresh import Failure
from mm15_megatron.bench.run import MEASURE, SURVEY, Request, exit_code, run_bench
from mm15_megatron.errors import BackendError, ConfigError

from .outcomes import figures

H200 = Device("cuda", "NVIDIA H200", 139 * 2**30, fp8_problems={"mxfp8": "capability 10.0"})
PRODUCTS = [{"name": "8192 cubed", "m": 8192, "n": 8192, "k": 8192, "tflops": 800.0, "runs": 9}]
OUT_OF_MEMORY = Failure("OutOfMemoryError", "CUDA out of memory.", traceback="OutOfMemoryError: CUDA out of memory.")
CRASH = Failure("ProcessDied", "the process ended with code -11 and without a word")


class Recorded:
    """Answers calls from a list, as processes on a GPU would."""

    def __init__(self, *answers: Any, survey: Any = (H200, PRODUCTS)) -> None:
        self.survey, self.answers = survey, list(answers)
        self.layers: list[int] = []
        self.closed = False

    def call(self, function: str, *, seconds: float, say: Callable[[str], None], **arguments: Any) -> Any:
        if function == SURVEY:
            return self.survey
        assert function == MEASURE
        self.layers.append(arguments["cfg"].language.num_layers)
        return self.answers.pop(0)

    def close(self) -> None:
        self.closed = True


def request(cases: str | None = "dense-bf16,dense-fp8-tensorwise", **changes: Any) -> Request:
    given: dict[str, Any] = {
        "command": "bench",
        "device": "cuda",
        "presets": {"dense": "mm1_30b", "moe": "mm1_3b_moe"},
        "cases": choose_cases(cases),
        "options": (),
        "budget_seconds": 450.0,
        "margin": 0.12,
        "micro_batches": 4,
        "steps": 5,
        "environment": {},
        "output": None,
    }
    return Request(**(given | changes))


def run(processes: Recorded, asked: Request) -> tuple[list[tuple[str, str]], list[str]]:
    lines: list[str] = []
    report = run_bench(asked, write=lines.append, processes=processes)
    assert processes.closed
    return [(outcome.status, outcome.reason) for outcome in report.outcomes], lines


def test_a_failing_case_does_not_lose_the_others(tmp_path: Path):
    processes = Recorded(CRASH, figures(tflops=600.0))
    outcomes, _ = run(processes, request(output=tmp_path / "gpu-{device}"))
    assert [status for status, _ in outcomes] == ["failed", "ran"]
    assert "code -11" in outcomes[0][1]
    found = json.loads((tmp_path / "gpu-h200.json").read_text(encoding="utf-8"))
    assert found["complete"]
    assert [case["status"] for case in found["cases"]] == ["failed", "ran"]
    assert found["cases"][1]["settings"]["precision.fp8"] == "hybrid"


def test_the_results_are_written_after_every_case(tmp_path: Path):
    class Interrupted(Recorded):
        def call(self, function: str, **arguments: Any) -> Any:
            if self.layers:
                raise KeyboardInterrupt
            return super().call(function, **arguments)

    processes = Interrupted(figures(tflops=480.0))
    with pytest.raises(KeyboardInterrupt):
        run_bench(request(output=tmp_path / "gpu"), write=lambda line: None, processes=processes)
    assert processes.closed
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert not found["complete"]
    assert [case["name"] for case in found["cases"]] == ["dense-bf16"]


def test_the_first_case_that_runs_out_of_memory_makes_the_slice_smaller_for_all():
    processes = Recorded(OUT_OF_MEMORY, figures(tflops=480.0), figures(tflops=600.0))
    outcomes, lines = run(processes, request())
    assert [status for status, _ in outcomes] == ["ran", "ran"]
    first, *others = processes.layers
    assert others == [first - 1, first - 1]
    assert any("a smaller slice" in line for line in lines)


def test_a_later_case_that_runs_out_of_memory_fails():
    processes = Recorded(figures(tflops=480.0), OUT_OF_MEMORY)
    outcomes, _ = run(processes, request())
    assert outcomes[1] == ("failed", "OutOfMemoryError: CUDA out of memory.")
    assert len(set(processes.layers)) == 1


def test_a_slice_shrinks_by_whole_sparse_periods_and_not_for_ever():
    processes = Recorded(OUT_OF_MEMORY, OUT_OF_MEMORY, OUT_OF_MEMORY)
    outcomes, _ = run(processes, request("moe-bf16"))
    assert [status for status, _ in outcomes] == ["failed"]
    first = processes.layers[0]
    assert processes.layers == [first, first - 2, first - 4]


def test_a_loss_that_does_not_fall_is_a_failure_that_keeps_its_figures():
    outcomes, _ = run(Recorded(figures(tflops=480.0) | {"problem": "the loss did not fall"}), request("dense-bf16"))
    assert outcomes == [("failed", "the loss did not fall")]


def test_cases_that_do_not_fit_into_the_time_are_named():
    outcomes, _ = run(Recorded(), request(budget_seconds=25.0))
    assert [status for status, _ in outcomes] == ["not run", "not run"]
    assert all(reason.startswith("out of time: about") for _, reason in outcomes)


def test_a_case_that_is_ended_by_the_budget_was_not_run():
    late = Failure("TimeoutError", "no result after 60 s", too_late=True)
    outcomes, _ = run(Recorded(late), request("dense-bf16", budget_seconds=100.0))
    assert outcomes[0][0] == "not run"
    assert "out of time" in outcomes[0][1]


def test_a_case_that_hangs_with_time_left_failed():
    late = Failure("TimeoutError", "no result after 180 s", too_late=True)
    outcomes, _ = run(Recorded(late), request("dense-bf16"))
    assert outcomes == [("failed", "TimeoutError: no result after 180 s")]


def test_what_the_device_lacks_is_not_run():
    outcomes, _ = run(Recorded(figures(tflops=480.0)), request("dense-bf16,dense-fp8-mxfp8"))
    assert outcomes[1] == ("not run", "needs Blackwell: capability 10.0")


def test_a_model_that_does_not_fit_is_not_run_and_leaves_the_other_alone():
    small = Device("cuda", "small", 40 * 2**30)
    asked = request("dense-bf16,moe-bf16", presets={"dense": "mm1_30b", "moe": "debug_moe"})
    outcomes, _ = run(Recorded(figures(tflops=300.0), survey=(small, PRODUCTS)), asked)
    assert [status for status, _ in outcomes] == ["not run", "ran"]
    assert "GiB are allowed" in outcomes[0][1]


def test_an_option_that_one_case_cannot_have_fails_that_case_alone():
    asked = request("dense-fp8-tensorwise,dense-fp8-delayed", options=("precision.first_last_layers_bf16=true",))
    outcomes, _ = run(Recorded(figures(tflops=600.0)), asked)
    assert [status for status, _ in outcomes] == ["ran", "failed"]
    assert "first_last_layers_bf16" in outcomes[1][1]


def test_a_device_that_is_not_usable_is_bad_input():
    absent = BackendError("--device cuda, but there is none", fix="give --device cpu")
    failure = Failure("BackendError", "...", bad_input=absent)
    with pytest.raises(BackendError, match="there is none"):
        run(Recorded(survey=failure), request())
    with pytest.raises(BackendError, match="cannot be surveyed: RuntimeError: no kernel image"):
        run(Recorded(survey=Failure("RuntimeError", "no kernel image")), request())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0 is too little"),
        ({"micro_batches": 0}, "--micro-batches 0 is too little"),
        ({"budget_seconds": 0.0}, "--budget-minutes 0 is too little"),
        ({"margin": 1.0}, "--margin 1 is no share"),
        ({"options": ("language.num_layer=2",)}, "has no field 'num_layer'"),
        ({"presets": {"dense": "mm1_31b", "moe": "mm1_3b_moe"}}, "unknown preset"),
        ({"presets": {"dense": "mm1_3b_moe", "moe": "mm1_3b_moe"}}, "that preset has experts"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_bench(request(**changes), write=lambda line: None, processes=Recorded())


def test_exit_codes():
    processes = Recorded(figures(tflops=480.0), CRASH)
    good = run_bench(request("dense-bf16,dense-fp8-mxfp8"), write=lambda line: None, processes=processes).outcomes
    assert exit_code(good) == 0
    bad = run_bench(request("dense-bf16"), write=lambda line: None, processes=processes).outcomes
    assert exit_code([*good, *bad]) == 1
    assert exit_code([outcome for outcome in good if outcome.status == "not run"]) == 1
