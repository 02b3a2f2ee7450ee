"""Ranks that hang: who is named, where, with which batch; what the others do; what a run is spared."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mm15_megatron.batch import MMBatch
from mm15_megatron.checkpoint import exchange
from mm15_megatron.data.loader import Loader
from mm15_megatron.parity.ranks import RankFailure
from mm15_megatron.training.hang_report import Collective, RankReport, merged_text, newest_collectives, odd_ranks
from mm15_megatron.training.run import Run
from mm15_megatron.training.watchdog import hang_seconds

from ..helpers.layouts import change, debug_config
from ..helpers.tables import FaultMatrix
from .runs import records, run_arguments

LIMIT = 10.0  # seconds: many times a step of the small model
SHORT = f"faults.hang_timeout_minutes={LIMIT / 60}"
ONE_STEP = ["train.steps=1", "schedule.warmup_steps=0"]
Arguments = Callable[..., list[str]]


def _report(rank: int, *collectives: Collective, in_distributed: bool = False, phase: str = "data") -> RankReport:
    return RankReport(rank, 7, phase, 60.0, "took row 3", collectives, ("innermost",), in_distributed)


def _in(group: str, what: str, *, pending: bool = True) -> Collective:
    return Collective(group, what, pending)


# --- Who is odd


def test_the_silent_ones() -> None:
    waiting = [_report(rank, _in("dp", "sum 4")) for rank in (0, 2)]
    odd = odd_ranks(waiting, places=["host0", "host1, process 5", "host2"])
    assert odd == {1: "(host1, process 5) says nothing: it is stopped or dead, or its machine is"}


def test_the_one_that_waits_for_nobody() -> None:
    """Others wait in a collective, or in a transfer that only their stack shows."""
    reports = [
        _report(0, _in("tp", "gather 9", pending=False), _in("dp", "sum 4")),
        _report(1, _in("tp", "gather 9", pending=False)),
        _report(2, in_distributed=True),
    ]
    odd = odd_ranks(reports, places=["a", "b", "c"])
    assert odd == {1: "(b) waits for nobody: step 7, data, for 60 s (last was gather 9 of tp)"}
    text = merged_text(reports, places=["a", "b", "c"])
    assert text.startswith("the job hangs: 3 of 3 ranks reported\nrank 1 (b) waits for nobody")
    assert "\n  batch of rank 1: took row 3\n  tp: gather 9\n  innermost\n" in text
    assert "\nrank 0 (a): step 7, data, for 60 s (waiting in sum 4 of dp)\n" in text


def test_collectives_that_do_not_match() -> None:
    """All wait: the minority of a group is named; groups are compared among their members alone."""
    reports = [
        _report(0, _in("tp a", "gather 9 of 4"), _in("dp", "sum 4", pending=False)),
        _report(1, _in("tp a", "gather 9 of 4"), _in("dp", "sum 4", pending=False)),
        _report(2, _in("tp b", "sum 8 of 2"), _in("dp", "sum 3", pending=False)),
    ]
    odd = odd_ranks(reports, places=["a", "b", "c"])
    assert odd == {2: "(c) is in sum 3 of dp, most of its members in sum 4"}
    alike = [_report(rank, _in("dp", "sum 4")) for rank in (0, 1)]
    assert odd_ranks(alike, places=["a", "b"]) == {}
    text = merged_text(alike, places=["a", "b"])
    assert "\nno rank differs from the others: all wait, or none does\n  batch of rank 0: took row 3\n" in text


def _recorded(name: str, number: int, *, retired: bool, p2p: bool = False) -> dict[str, object]:
    """An entry as torch's flight recorders write it."""
    numbers = {"p2p_seq_id": number if p2p else 9, "collective_seq_id": 9 if p2p else number}
    group = {"process_group": ["3", "pp"], "input_sizes": [[4, 2]]}
    return {"profiling_name": name, "is_p2p": p2p, "retired": retired, **numbers, **group}


def test_what_the_recorders_say() -> None:
    """Backends count apart; of a batch of transfers only the last entry hears of its end."""
    batch = [
        _recorded("nccl:send 0->1", 7, retired=False, p2p=True),
        _recorded("nccl:recv 0<-1", 7, retired=False, p2p=True),
    ]
    entries = [
        _recorded("gloo:barrier", 5, retired=True),
        *batch,
        _recorded("nccl:coalesced", 7, retired=True, p2p=True),
        _recorded("nccl:all_reduce", 5, retired=False),
    ]
    found = newest_collectives(entries)
    assert found == (
        Collective("3 pp (gloo)", "barrier number 5 of 4x2", False),
        Collective("3 pp (nccl)", "recv 0<-1 number 7 of 4x2", False),
        Collective("3 pp (nccl)", "coalesced number 7 of 4x2", False),
        Collective("3 pp (nccl)", "all_reduce number 5 of 4x2", True),
    )
    assert all(one.pending for one in newest_collectives(batch))


def test_a_report_survives_its_file() -> None:
    report = _report(3, _in("dp", "sum 4"), in_distributed=True)
    assert RankReport.from_json(report.to_json()) == report


def test_limit() -> None:
    """It follows the time after which collectives give up, unless it is set."""
    cfg = change(debug_config(), parallel={"distributed_timeout_minutes": 20})
    assert hang_seconds(cfg) == pytest.approx(0.8 * 20 * 60)
    assert hang_seconds(change(cfg, faults={"hang_timeout_minutes": 2.0})) == 120.0
    assert hang_seconds(change(cfg, faults={"hang_timeout_minutes": 0.0})) == 0.0


# --- Real ranks


def _sleep() -> None:
    time.sleep(1000)


def _stop() -> None:
    """Stop the whole process, its watchdog with it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _stuck_in_data(run: Run, *, rank: int, step: int, how: Callable[[], None]) -> None:
    """Have one rank get stuck when it asks for the first micro-batch of a step."""
    if run.topology.place.rank != rank:
        return
    take = Loader.__next__

    def stuck(loader: Loader) -> MMBatch:
        if run.state.step + 1 == step:
            how()
        return take(loader)

    Loader.__next__ = stuck


def _report_of(run_dir: Path) -> str:
    (report,) = (run_dir / "hangs").glob("*/report.txt")
    return report.read_text()


@pytest.mark.parametrize("layout", [["dp"], ["tp", "pp"]], ids="-".join)
def test_rank_that_hangs_in_its_data(
    layout: list[str], arguments: Arguments, tmp_path: Path, fault_matrix: FaultMatrix
) -> None:
    """It is named with its phase, its last collective and the documents it waits for; nobody stays."""
    sizes = {"tp": "parallel.tensor_model_parallel_size=2", "pp": "parallel.pipeline_model_parallel_size=2"}
    argv = arguments(SHORT, "train.steps=9", *(sizes[name] for name in layout if name in sizes))
    hang = functools.partial(_stuck_in_data, rank=1, step=3, how=_sleep)
    with pytest.raises(RankFailure, match="died without a word"):
        run_arguments(argv, world_size=4 if "pp" in layout else 2, prepare=hang)
    text = _report_of(tmp_path / "run")
    first, second, *rest = text.splitlines()
    world = 4 if "pp" in layout else 2
    assert first == f"the job hangs: {world} of {world} ranks reported"
    assert second.startswith("rank 1 (")
    assert "waits for nobody: step 3, data, for " in second
    assert re.search(r"\(last was \w+ number \d+.* \(gloo\)\)$", second), second
    assert any(line.startswith("  batch of rank 1: took nothing; next row ") for line in rest)
    assert any("in _sleep" in line for line in rest), "the stack of the rank that hangs"
    assert sum(line.startswith("rank ") for line in rest) == world
    assert not any("waits for nobody" in line for line in rest), "one rank alone is odd"
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    fault_matrix(f"rank 1 of {world} sleeps", "step 3, data", f"all leave: {second.partition(' (last')[0][:60]}")


def test_rank_that_stands_still(arguments: Arguments, tmp_path: Path, fault_matrix: FaultMatrix) -> None:
    """A stopped process says nothing; the other names its machine and process, and leaves."""
    stop = functools.partial(_stuck_in_data, rank=0, step=2, how=_stop)
    with pytest.raises(RankFailure):
        run_arguments(arguments(SHORT, "train.steps=9"), world_size=2, prepare=stop)
    first, second, *_ = _report_of(tmp_path / "run").splitlines()
    assert first == "the job hangs: 1 of 2 ranks reported"
    assert second.startswith("rank 0 (")
    assert second.endswith("says nothing: it is stopped or dead, or its machine is")
    fault_matrix("SIGSTOP of rank 0 of 2", "step 2, data", f"rank 1 leaves: {second[:60]}")


def _sleep_when_sending(run: Run) -> None:
    """Have rank 1 sleep while rank 0 waits for its part of the optimizer's state."""
    if run.topology.place.rank == 1:
        exchange._sent = lambda *_: _sleep()


def test_rank_that_hangs_in_a_save(arguments: Arguments, tmp_path: Path, fault_matrix: FaultMatrix) -> None:
    """Transfers between two ranks are in no recorder: the one that waits in them is not taken for the culprit."""
    distributed = "parallel.use_distributed_optimizer=true"
    argv = arguments(SHORT, "train.steps=1", "schedule.warmup_steps=0", distributed)
    with pytest.raises(RankFailure, match="died without a word"):
        run_arguments(argv, world_size=2, prepare=_sleep_when_sending)
    first, second, *rest = _report_of(tmp_path / "run").splitlines()
    assert first == "the job hangs: 2 of 2 ranks reported"
    assert second.startswith("rank 1 (")
    assert "waits for nobody: step 1, save: exchange, for " in second
    assert not any("waits for nobody" in line for line in rest), "one rank alone is odd"
    fault_matrix("rank 1 of 2 sleeps", "step 1, save: exchange", f"all leave: {second.partition(' (last')[0][:60]}")


def _stop_the_writer(run: Run) -> None:
    """Stop the process that writes beside the training; whoever waits for it waits for ever."""
    assert run.saver._background is not None
    os.kill(run.saver._background._process.pid, signal.SIGSTOP)


def test_writer_that_stands_still(arguments: Arguments, tmp_path: Path, fault_matrix: FaultMatrix) -> None:
    """A file system that never answers: the run does not wait for it for ever."""
    argv = arguments(SHORT, "train.steps=1", "schedule.warmup_steps=0", "checkpoint.async_save=true")
    with pytest.raises(RankFailure, match="died without a word"):
        run_arguments(argv, prepare=_stop_the_writer)
    text = _report_of(tmp_path / "run")
    assert "step 1, save: wait for the writer, for " in text
    fault_matrix("SIGSTOP of the writer", "asynchronous save of step 1", "all leave: save: wait for the writer")


def _slow(run: Run) -> None:
    """Each micro-batch takes a third of the limit, a step more than the limit."""
    take = Loader.__next__

    def slow(loader: Loader) -> MMBatch:
        time.sleep(LIMIT / 3)
        return take(loader)

    Loader.__next__ = slow


def test_slow_steps_are_no_hang(arguments: Arguments, tmp_path: Path) -> None:
    argv = arguments(
        SHORT, "train.steps=1", "schedule.warmup_steps=0", "train.micro_batch_size=2", "train.global_batch_size=8"
    )
    assert run_arguments(argv, prepare=_slow)[0] == 0
    assert not (tmp_path / "run" / "hangs").exists()


_WATCHED = """
import sys, time
from pathlib import Path
from mm15_megatron.training.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), rank=0, places=["here"], seconds=4.0) as watchdog:
    watchdog.step(1, batch=lambda: "none")
    print("watched", flush=True)
    time.sleep(2.0)
"""


def test_a_process_that_was_suspended_goes_on(tmp_path: Path) -> None:
    """The clock ran while nobody looked: that is no hang."""
    command = [sys.executable, "-c", _WATCHED, str(tmp_path / "hangs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watched\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(6.0)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 0
    assert not (tmp_path / "hangs").exists()


def test_nobody_watches(arguments: Arguments, tmp_path: Path) -> None:
    """With a limit of 0 a long phase is left alone."""
    argv = arguments(
        "faults.hang_timeout_minutes=0", "train.steps=1", "schedule.warmup_steps=0", "train.global_batch_size=2"
    )
    assert run_arguments(argv, prepare=_slow)[0] == 0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["step"] == 1
