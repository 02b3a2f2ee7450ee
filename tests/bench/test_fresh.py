"""Calls in fresh processes: results, progress, errors, deaths and hangs reach the caller, and the next call works."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from mm15_megatron.bench.fresh import Failure, FreshProcesses, failure_of
from mm15_megatron.errors import BackendError, ConfigError

HERE = "tests.bench.test_fresh"


def doubled(*, value: int, say) -> tuple[int, int]:
    say("half way")
    return 2 * value, os.getpid()


def refuse(*, say) -> None:
    raise ConfigError("the value is 3", fix="make it 4")


def run_out_of_memory(*, say) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")


def die(*, say) -> None:
    os._exit(13)


def hang(*, say) -> None:
    say("hanging")
    while True:
        time.sleep(0.1)


@pytest.fixture(scope="module")
def processes() -> Iterator[FreshProcesses]:
    found = FreshProcesses(preload=())
    yield found
    found.close()


def call(processes: FreshProcesses, name: str, *, seconds: float = 120.0, **arguments):
    said: list[str] = []
    return processes.call(f"{HERE}:{name}", seconds=seconds, say=said.append, **arguments), said


def test_every_call_has_a_process_of_its_own(processes):
    (first, pid), said = call(processes, "doubled", value=3)
    (second, other), _ = call(processes, "doubled", value=4)
    assert (first, second, said) == (6, 8, ["half way"])
    assert len({pid, other, os.getpid()}) == 3


def test_an_error_arrives_with_its_traceback(processes):
    answer, _ = call(processes, "run_out_of_memory")
    assert (answer.kind, answer.message) == ("RuntimeError", "CUDA out of memory. Tried to allocate 2 GiB")
    assert "run_out_of_memory" in answer.traceback
    assert answer.bad_input is None


def test_bad_input_arrives_as_it_is(processes):
    answer, _ = call(processes, "refuse")
    assert isinstance(answer.bad_input, ConfigError)
    assert answer.bad_input.fix == "make it 4"


def test_a_process_that_dies_loses_its_own_call_alone(processes):
    answer, _ = call(processes, "die")
    assert answer == Failure("ProcessDied", "the process ended with code 13 and without a word")
    assert call(processes, "doubled", value=1)[0][0] == 2


def test_a_call_that_hangs_is_ended(processes):
    answer, _ = call(processes, "hang", seconds=1.0)
    assert answer.too_late
    assert "no result after 1 s" in answer.message
    assert call(processes, "doubled", value=1)[0][0] == 2


def test_a_module_that_does_not_import_is_an_answer_too():
    broken = FreshProcesses(preload=("no_such_module",))
    first = broken.call(f"{HERE}:doubled", seconds=60.0, say=print, value=1)
    broken._waiting[0].join(timeout=60.0)  # the next process fails before anything is asked of it
    second = broken.call(f"{HERE}:doubled", seconds=60.0, say=print, value=1)
    broken.close()
    assert (first.kind, second.kind) == ("ModuleNotFoundError", "ModuleNotFoundError")


def test_failure_of_an_error_without_text():
    assert failure_of(ValueError()).message == ""
    assert failure_of(BackendError("no device", fix="buy one")).bad_input is not None
