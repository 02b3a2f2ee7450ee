"""Documents that end or stall their reader: left out by name after the second time, whatever the number of workers."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from mm15_megatron.data.formats.base import Found, Item, Pending, Record, Skipped, Text, Unit, json_lines, line_units
from mm15_megatron.data.preprocess.deaths import BETWEEN, Death, Deaths, Limits
from mm15_megatron.data.preprocess.driver import Account, Job, manifests, run_job
from mm15_megatron.data.preprocess.workers import Journal
from mm15_megatron.data.tokenizer import train_character_tokenizer
from mm15_megatron.errors import DataError

from ...helpers import mpi

ROOT = Path(__file__).resolve().parents[3]
LINES, UNIT = 40, 400
KILLER, STALLER = 12, 30
# Long enough for a sound document on a machine that is busy with other tests.
STALL = 3.0


@dataclass(frozen=True)
class Hazards:
    """JSON lines of text; a line may say what its reading does to its process, ``flag`` says that it did it before."""

    path: Path
    flag: Path

    @property
    def kind(self) -> str:
        return "text"

    def units(self) -> tuple[Unit, ...]:
        return line_units((self.path,), size=UNIT)

    def read(self, unit: Unit) -> Iterator[Item]:
        for where, line in json_lines(unit):
            if line.get("way") == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            yield Pending(where, partial(self._document, line, where))

    def _document(self, line: dict[str, str], where: str) -> Iterator[Found | Skipped]:
        act = line.get("act", "")
        yield Found(Text(line["text"]), where)
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "stall":
            self.flag.touch()
            time.sleep(10_000)
        if act == "die once" and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "be ended":
            os.kill(os.getpid(), signal.SIGTERM)
        if act == "eat":
            raise MemoryError
        if act == "err":
            raise KeyError("a fault of the program")
        yield Found(Text("its second page"), where)


@dataclass(frozen=True)
class Fatal:
    """A filter that dies of a text, as a decoder of images may."""

    text: str

    def refuse(self, record: Record) -> str | None:
        assert isinstance(record, Text)
        if record.text == self.text:
            os.kill(os.getpid(), signal.SIGKILL)
        return None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_character_tokenizer([*map(chr, range(32, 127)), "\n"], path)
    return path


@dataclass(frozen=True)
class Bench:
    """Makes jobs of one input."""

    folder: Path
    tokenizer: Path

    def job(self, acts: dict[int, dict[str, str]], *, out: str = "out") -> Job:
        rows = [{"text": f"document {n}", **acts.get(n, {})} for n in range(LINES)]
        path = self.folder / f"{out}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        reader = Hazards(path, self.folder / f"{out}.flag")
        return Job(reader, self.folder / out / "text", self.tokenizer, validation_share=0.25)

    def place(self, job: Job, number: int) -> str:
        lines = job.format.path.read_bytes().splitlines(keepends=True)
        return f"{job.format.path.name}:{sum(map(len, lines[:number]))}"

    def deaths(self, job: Job) -> list[Path]:
        return sorted(job.parts.glob("*.deaths.json"))


@pytest.fixture
def bench(tmp_path: Path, tokenizer: Path) -> Bench:
    return Bench(tmp_path, tokenizer)


def silent(done: int, total: int, account: Account) -> None:
    """Say nothing."""


def content(job: Job) -> dict[str, bytes]:
    """The bytes of the dataset; its manifest tells also what was left out."""
    return {path.name: path.read_bytes() for path in job.prefix.parent.iterdir() if path.suffix != ".json"}


HAZARDS = {KILLER: {"act": "die"}, STALLER: {"act": "stall"}}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, bytes]:
    """The dataset of the sound documents alone."""
    bench = Bench(tmp_path_factory.mktemp("straight"), tokenizer)
    job = bench.job({})
    lines = job.format.path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for n, line in enumerate(lines) if n not in HAZARDS]
    job.format.path.write_text("".join(kept), encoding="utf-8")
    run_job(job, workers=0, tell=silent)
    return content(job)


@pytest.mark.parametrize("workers", [1, 2])
def test_killers_and_stallers_are_left_out_by_name(
    bench: Bench, straight: dict[str, bytes], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    job = bench.job(HAZARDS)
    with caplog.at_level(logging.WARNING):
        whole = run_job(job, workers=workers, tell=silent, limits=Limits(STALL))
    assert whole.skipped == {"reader died": 1, f"reader ran past {STALL:g} s": 1}
    assert whole.examples == {
        "reader died": [bench.place(job, KILLER)],
        f"reader ran past {STALL:g} s": [bench.place(job, STALLER)],
    }
    assert whole.read == 2 * (LINES - 2) + 2
    assert content(job) == straight
    assert f"(SIGKILL) at {bench.place(job, KILLER)}: the unit is read again" in caplog.text
    assert f"(SIGKILL) at {bench.place(job, KILLER)}: it is left out" in caplog.text
    assert not job.parts.exists()


def test_an_innocent_victim_is_not_lost(bench: Bench, tokenizer: Path) -> None:
    """Killed once, as the kernel does when memory is short; also Python's own MemoryError is a death."""
    job = bench.job({KILLER: {"act": "die once"}, STALLER: {"act": "eat"}})
    whole = run_job(job, workers=2, tell=silent)
    assert whole.skipped == {"reader died": 1}
    assert whole.examples == {"reader died": [bench.place(job, STALLER)]}
    assert sum(whole.kept.values()) == 2 * (LINES - 1)


def test_a_record_that_kills_its_writer_is_named(bench: Bench) -> None:
    """Images are decoded and texts tokenised behind the reader; the whole document goes, its first page too."""
    job = replace(bench.job({}), filters=(Fatal(f"document {KILLER}"),))
    whole = run_job(job, workers=1, tell=silent)
    assert whole.examples == {"reader died": [bench.place(job, KILLER)]}
    assert sum(whole.kept.values()) == 2 * (LINES - 1)


def test_too_many_end_the_job_and_more_may_be_allowed(bench: Bench) -> None:
    job = bench.job({n: {"act": "die"} for n in (0, 1)})
    with pytest.raises(DataError, match=r"its reader died or stalled 1 times, now at out\.jsonl:0 \(SIGKILL\)"):
        run_job(job, workers=1, tell=silent, limits=Limits(lost_documents=0))
    with pytest.raises(DataError) as caught:
        run_job(job, workers=1, tell=silent, limits=Limits(lost_documents=1))
    assert f"3 times, now at {bench.place(job, 1)} (SIGKILL)" in str(caught.value)
    assert f"all of them: at {bench.place(job, 0)}, at {bench.place(job, 1)}" in str(caught.value)
    (noted,) = bench.deaths(job)
    assert f"with {noted} removed they are tried again" in str(caught.value)
    whole = run_job(job, workers=1, tell=silent, limits=Limits(lost_documents=2))
    assert whole.examples == {"reader died": [bench.place(job, 0), bench.place(job, 1)]}


def test_deaths_that_no_document_is_named_for_end_the_job(bench: Bench) -> None:
    job = bench.job({KILLER: {"way": "die"}})
    with pytest.raises(DataError, match=r"out\.jsonl \[0, 400\).* twice on the way to document \d+ \(SIGKILL\)"):
        run_job(job, workers=2, tell=silent)
    assert not job.prefix.with_suffix(".json").exists()


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [("be ended", DataError, r"was told to end \(SIGTERM\)"), ("err", RuntimeError, "a fault of the program")],
)
def test_what_is_no_documents_fault_is_not_put_down_to_it(
    bench: Bench, act: str, error: type[Exception], match: str
) -> None:
    job = bench.job({KILLER: {"act": act}})
    with pytest.raises(error, match=match):
        run_job(job, workers=1, tell=silent)
    assert bench.deaths(job) == []


def command(job: Job, folder: Path, *, workers: int, ranks: bool = False) -> list[str]:
    """A process that runs a job."""
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    script = (
        f"import pickle; from {__name__} import silent; from mm15_megatron.data.preprocess.driver import run_job\n"
        "from mm15_megatron.data.preprocess.ranks import discover\n"
        f"job = pickle.load(open({str(folder / 'job.pickle')!r}, 'rb'))\n"
        f"run_job(job, workers={workers}, tell=silent{', ranks=discover()' if ranks else ''})"
    )
    path = folder / "job.py"
    path.write_text(f"if __name__ == '__main__':\n    {script.replace(chr(10), chr(10) + '    ')}\n")
    return [sys.executable, str(path)]


def test_a_killed_job_takes_its_workers_along_and_blames_nobody(bench: Bench, straight: dict[str, bytes]) -> None:
    """Killed while a worker stalls: the document has no death on its name until a job saw one."""
    job = bench.job(HAZARDS)
    process = subprocess.Popen(
        command(job, bench.folder, workers=1), env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while not job.format.flag.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    assert below
    process.kill()
    process.wait()
    assert psutil.wait_procs(below, timeout=60)[1] == []
    noted = [json.loads(path.read_text()) for path in bench.deaths(job)]
    assert [death["where"] for one in noted for death in one] in ([bench.place(job, KILLER)] * n for n in (0, 1, 2))
    whole = run_job(job, workers=2, tell=silent, limits=Limits(STALL))
    assert whole.skipped == {"reader died": 1, f"reader ran past {STALL:g} s": 1}
    assert content(job) == straight


@pytest.mark.skipif(mpi.why_not() is not None, reason=str(mpi.why_not()))
def test_ranks_lose_no_more_than_one_process(bench: Bench) -> None:
    job, other = bench.job({KILLER: {"act": "die"}}), bench.job({KILLER: {"act": "die"}}, out="ranks")
    run_job(job, workers=1, tell=silent)
    start = [str(mpi.mpiexec()), "-n", "2", *command(other, bench.folder, workers=1, ranks=True)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **mpi.ENVIRONMENT}
    done = subprocess.run(start, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(other) == content(job)
    assert manifests(other)[""].dropped == {"reader died": 1}


def test_a_journal_tells_what_was_written_last() -> None:
    journal = Journal()
    assert journal.read() == (0, BETWEEN)
    for place, where in enumerate(("a.tar:1", "", "ä" * 2000, "half \udc80")):
        turn = journal.turn
        journal.write(place, where)
        assert journal.turn == turn + 1
        assert journal.read()[0] == place
    assert journal.read() == (3, "half \\udc80")
    journal.write(2**40, "ä" * 2000)
    assert journal.read()[1][:500] == "ä" * 500


def test_a_higher_time_limit_gives_a_staller_another_chance(tmp_path: Path) -> None:
    path, unit = tmp_path / "000000.deaths.json", Unit(tmp_path / "x")
    deaths = Deaths(path, unit, limits=Limits(5))
    for _ in range(2):
        deaths.add(Death.by_time(3, "c", seconds=5), how="5 s at one document")
        deaths.add(Death(4, "d"), how="SIGSEGV")
    assert deaths.lost == {3: "reader ran past 5 s", 4: "reader died"}
    for seconds, places in ((5, {3, 4}), (1, {3, 4}), (6, {4}), (0, {4})):
        assert set(Deaths(path, unit, limits=Limits(seconds)).lost) == places


@pytest.mark.parametrize("limits", [(-1, 0), (float("nan"), 0), (1, -1)])
def test_impossible_limits_are_refused(limits: tuple[float, int]) -> None:
    with pytest.raises(DataError, match="use 0 or more"):
        Limits(*limits)
