"""One dataset out of many units: equal bytes for any number of processes, after kills, and under MPI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mm15_megatron.data.build import BuildOptions
from mm15_megatron.data.formats.base import (
    Caption,
    Found,
    Interleaved,
    Record,
    Skipped,
    Text,
    Unit,
    json_lines,
    line_units,
)
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.preprocess.driver import BAD_IMAGE, Account, Job, manifests, run_job
from mm15_megatron.data.preprocess.encode import encode_record
from mm15_megatron.data.sft import Conversation, Turn
from mm15_megatron.data.tokenizer import Tokenizer, train_character_tokenizer
from mm15_megatron.errors import DataError

from ...helpers import mpi
from ..images import photo

ROOT = Path(__file__).resolve().parents[3]
LINES, UNIT = 60, 400


@dataclass(frozen=True)
class Lines:
    """A small format of the tests: JSON lines of text, cut after so many bytes."""

    path: Path
    unit_bytes: int = UNIT
    seconds_a_unit: float = 0.0

    @property
    def kind(self) -> str:
        return "text"

    def units(self) -> tuple[Unit, ...]:
        return line_units((self.path,), size=self.unit_bytes)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        time.sleep(self.seconds_a_unit)
        for where, line in json_lines(unit):
            text = line["text"]
            yield (
                Found(Text(text), where, repaired=("a word",) * line.get("words", 0))
                if text
                else Skipped("empty", where)
            )


@dataclass(frozen=True)
class NoDigits:
    """A filter of the tests."""

    digit: str

    def refuse(self, record: Record) -> str | None:
        assert isinstance(record, Text)
        return f"holds {self.digit}" if self.digit in record.text else None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_character_tokenizer([*map(chr, range(32, 127)), "\n"], path)
    return path


@pytest.fixture
def job(tmp_path: Path, tokenizer: Path) -> Job:
    rows = [{"text": f"document {n} " * (1 + n % 4), "words": int(n == 3)} for n in range(LINES)]
    rows[10]["text"] = rows[33]["text"] = ""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Job(Lines(path), tmp_path / "out" / "text", tokenizer, filters=(NoDigits("7"),), validation_share=0.25)


def silent(done: int, total: int, account: Account) -> None:
    """Say nothing."""


def files(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(job.prefix.parent.iterdir())}


def test_the_account_adds_up_and_names_places(job: Job) -> None:
    told: list[tuple[int, int]] = []
    whole = run_job(job, workers=0, tell=lambda done, total, account: told.append((done, total)))
    units = len(job.format.units())
    assert units > 8
    assert told == [(n + 1, units) for n in range(units)]
    sevens = sum("7" in str(n) for n in range(LINES))
    assert whole.read == LINES
    assert whole.skipped == {"empty": 2, "holds 7": sevens}
    assert whole.repaired == {"a word": 1}
    assert sum(whole.kept.values()) == LINES - 2 - sevens
    assert whole.examples["empty"] == [f"in.jsonl:{at}" for at in _starts(job, (10, 33))]
    found = manifests(job)
    assert {ending: one.documents for ending, one in found.items()} == whole.kept
    assert 0 < whole.kept["-validation"] < whole.kept[""]
    assert found[""].dropped == whole.skipped
    assert found[""].meta["account"]["read"] == LINES
    assert not job.parts.exists()
    assert "  left out: 2 x empty (first at in.jsonl:" in str(whole)


def _starts(job: Job, lines: tuple[int, ...]) -> list[int]:
    content = job.format.path.read_bytes().splitlines(keepends=True)
    return [sum(map(len, content[:line])) for line in lines]


@pytest.mark.parametrize(("workers", "unit_bytes"), [(2, UNIT), (0, 10**6), (0, 7)])
def test_bytes_do_not_depend_on_workers_or_units(job: Job, tmp_path: Path, workers: int, unit_bytes: int) -> None:
    run_job(job, workers=0, tell=silent)
    other = replace(job, prefix=tmp_path / "other" / "text", format=replace(job.format, unit_bytes=unit_bytes))
    run_job(other, workers=workers, tell=silent)
    ours, theirs = files(job), files(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith(".json"):
            assert ours[name] == theirs[name], name
    assert [one.digest for one in manifests(job).values()] == [one.digest for one in manifests(other).values()]


def test_a_killed_job_leaves_no_dataset_and_goes_on(job: Job, tmp_path: Path) -> None:
    """Killed from outside in the middle: nothing looks finished, the finished units are not read again."""
    slow = replace(job, format=replace(job.format, seconds_a_unit=0.3))
    script = f"import pickle; from mm15_megatron.data.preprocess.driver import run_job; from {__name__} import silent\n"
    (tmp_path / "job.pickle").write_bytes(__import__("pickle").dumps(slow))
    script += f"run_job(pickle.load(open({str(tmp_path / 'job.pickle')!r}, 'rb')), workers=0, tell=silent)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(job.parts.glob("[0-9]*.account.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = len(list(job.parts.glob("[0-9]*.account.json")))
    assert finished >= 3
    assert not job.prefix.with_suffix(".json").exists()
    told: list[int] = []
    run_job(slow, workers=2, tell=lambda done, total, account: told.append(done))
    assert told[0] == finished
    other = replace(job, prefix=tmp_path / "straight" / "text")
    run_job(other, workers=0, tell=silent)
    assert [one.digest for one in manifests(job).values()] == [one.digest for one in manifests(other).values()]


def test_a_job_killed_while_it_publishes_is_finished(job: Job) -> None:
    """The first dataset is there, the second is not, the parts are."""
    run_job(job, workers=0, tell=silent)
    expected = files(job)
    shutil.rmtree(job.prefix.parent)
    units = job.format.units()
    broken = replace(job)
    run_parts(broken)
    first = next(iter(sorted(name for name in expected if name.endswith("text.json"))))
    (job.prefix.parent / first).write_bytes(expected[first])
    run_job(job, workers=0, tell=silent)
    assert len(units) > 1
    assert files(job) == expected


def run_parts(job: Job) -> None:
    """Do everything but the end, as a job that is killed there."""
    from mm15_megatron.data.preprocess import driver

    units, tokenizer = job.format.units(), Tokenizer(job.tokenizer)
    driver._open_parts(job, units, tokenizer)
    driver._work(job, units, range(len(units)), workers=0, tell=silent)


def test_another_jobs_parts_are_not_mixed_in(job: Job) -> None:
    run_parts(job)
    with pytest.raises(DataError, match="holds the parts of another job"):
        run_job(replace(job, validation_share=0.5), workers=0, tell=silent)
    with job.format.path.open("a", encoding="utf-8") as stream:
        stream.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match="other options, tokenizer or input files"):
        run_job(job, workers=0, tell=silent)


def test_a_taken_prefix_is_refused_or_replaced(job: Job) -> None:
    run_job(job, workers=0, tell=silent)
    with pytest.raises(DataError, match="already holds a dataset"):
        run_job(job, workers=0, tell=silent)
    again = replace(job, options=BuildOptions(overwrite=True), filters=())
    assert run_job(again, workers=0, tell=silent).skipped == {"empty": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_malformed_line_is_an_error_and_loses_nothing(job: Job, workers: int) -> None:
    text = job.format.path.read_text(encoding="utf-8")
    job.format.path.write_text(text.replace('{"text": "document 40', '["text": "document 40'), encoding="utf-8")
    with pytest.raises(DataError, match=r"in\.jsonl:\d+"):
        run_job(job, workers=workers, tell=silent)
    assert list(job.parts.glob("[0-9]*.account.json"))
    assert not job.prefix.with_suffix(".json").exists()


def test_an_impossible_share_is_refused(job: Job) -> None:
    with pytest.raises(DataError, match="validation_share is 1"):
        replace(job, validation_share=1.0)


@dataclass(frozen=True)
class Pictures:
    """Two captions, one with bytes that are no picture."""

    path: Path

    @property
    def kind(self) -> str:
        return "captions"

    def units(self) -> tuple[Unit, ...]:
        return (Unit(self.path),)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        yield Found(Caption(photo(20, 30, seed=1), "a photo"), "first")
        yield Found(Caption(b"no picture", "nothing"), "second")
        yield Found(Caption(b"GIF89a and no more", "a moving nothing"), "third")


def test_bad_images_are_dropped_or_raised(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "x").touch()
    drop = Job(Pictures(tmp_path / "x"), tmp_path / "pairs", tokenizer, options=BuildOptions(on_bad_image="drop"))
    whole = run_job(drop, workers=0, tell=silent)
    assert (whole.kept, whole.skipped, whole.examples) == ({"": 1}, {BAD_IMAGE: 2}, {BAD_IMAGE: ["second", "third"]})
    with pytest.raises(DataError, match="second"):
        run_job(replace(drop, prefix=tmp_path / "other", options=BuildOptions()), workers=0, tell=silent)


def test_renderings(tokenizer: Path) -> None:
    words = Tokenizer(tokenizer)
    found = encode_record(Interleaved(("one", b"A", b"B", "two", "three")), words, where="here")
    expected = [*words.encode("one\n"), words.image_id, words.image_id, *words.encode("two\n"), *words.encode("three")]
    assert found.tokens == [*expected, words.eos_id]
    assert found.images == (b"A", b"B")
    assert encode_record(Text("one"), words, where="").tokens == [*words.encode("one"), words.eos_id]
    talk = Conversation((Turn("user", "<image>What?"), Turn("assistant", "This.")), (b"A",))
    spoken = encode_record(talk, words, where="")
    assert spoken.loss_mask is not None
    assert sum(spoken.loss_mask) == len(words.encode(" This.")) + 1
    with pytest.raises(DataError, match="there has 1 <image> placeholders and 0 images"):
        encode_record(replace(talk, images=()), words, where="there")


def test_equal_documents_fall_on_one_side(tokenizer: Path) -> None:
    words = Tokenizer(tokenizer)
    shares = [encode_record(Caption(b"A", text), words, where="").share() for text in ("x", "x", "y")]
    assert shares[0] == shares[1] != shares[2]
    assert encode_record(Caption(b"B", "x"), words, where="").share() != shares[0]
    many = [encode_record(Text(f"{n}"), words, where="").share() for n in range(400)]
    assert 0.4 < sum(many) / 400 < 0.6


@pytest.mark.skipif(mpi.why_not() is not None, reason=str(mpi.why_not()))
def test_mpi_ranks_make_the_same_bytes(job: Job, tmp_path: Path) -> None:
    run_job(job, workers=0, tell=silent)
    other = replace(job, prefix=tmp_path / "other" / "text")
    (tmp_path / "job.pickle").write_bytes(__import__("pickle").dumps(other))
    script = (
        f"import pickle; from {__name__} import silent; from mm15_megatron.data.preprocess.driver import run_job\n"
        "from mm15_megatron.data.preprocess.ranks import discover\n"
        f"ranks = discover(); assert ranks.size == 2\n"
        f"run_job(pickle.load(open({str(tmp_path / 'job.pickle')!r}, 'rb')), workers=0, tell=silent, ranks=ranks)"
    )
    command = [str(mpi.mpiexec()), "-n", "2", sys.executable, "-c", script]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **mpi.ENVIRONMENT}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [one.digest for one in manifests(job).values()] == [one.digest for one in manifests(other).values()]
    assert IndexedSource(other.prefix).num_documents == manifests(job)[""].documents
