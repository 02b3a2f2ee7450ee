"""Many processes make one dataset of a format's units: the same bytes whatever their number, resumable after a kill.

Every unit becomes a small dataset of its own in ``<prefix>.parts``; a part counts once its account lies beside it, so a
killed job goes on with the units that have none. When all are there, they are put together in the order of the units,
and the folder goes. ``workers.py`` says what becomes of documents that end or stall the process that reads them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from mm15_megatron.data.build import DEFAULT_OPTIONS, BuildOptions, account, checked_images
from mm15_megatron.data.formats.base import Format, Found, Item, Record, Skipped, Unit, opened_items
from mm15_megatron.data.indexed.format import Manifest, with_suffix
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter
from mm15_megatron.data.preprocess.deaths import BETWEEN, Limits
from mm15_megatron.data.preprocess.encode import encode_record
from mm15_megatron.data.preprocess.json_files import write_json
from mm15_megatron.data.preprocess.ranks import Alone, Ranks
from mm15_megatron.data.preprocess.transcode import transcoded
from mm15_megatron.data.preprocess.workers import Journal, run_units
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import DataError

_LOGGER = logging.getLogger(__name__)
BAD_IMAGE: Final = "bad image"
VALIDATION: Final = "-validation"
DEFAULT_LIMITS: Final = Limits()
_EXAMPLES: Final = 3


class Filter(Protocol):
    """Decides whether a record is kept; a frozen dataclass, so that a job can be told from another."""

    def refuse(self, record: Record) -> str | None:
        """Return a short constant reason to leave a record out, or None."""
        ...


@dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        format: reads the input.
        prefix: path prefix of the dataset.
        tokenizer: path of the tokenizer.
        options: checks of images, and whether an existing dataset is replaced.
        filters: in order; the first that refuses a record is counted.
        validation_share: share of the documents, chosen by their content, that becomes ``<prefix>-validation``.
    """

    format: Format
    prefix: Path
    tokenizer: Path
    options: BuildOptions = DEFAULT_OPTIONS
    filters: tuple[Filter, ...] = ()
    validation_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the share.

        Raises:
            DataError: it is not in [0, 1).
        """
        if not 0 <= self.validation_share < 1:
            raise DataError(f"validation_share is {self.validation_share}", fix="give a share from 0 to 1, without 1")

    @property
    def parts(self) -> Path:
        """Folder of the unfinished dataset."""
        return with_suffix(self.prefix, ".parts")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Endings of the prefixes that are written."""
        return ("", VALIDATION) if self.validation_share else ("",)


@dataclass(frozen=True)
class Account:
    """What became of the documents that were read.

    Attributes:
        read: documents.
        kept: those that were written, by ending of the prefix.
        skipped: those that were left out, by reason.
        repaired: things that were left out of documents that were kept, by reason.
        examples: where the first few of each reason stand.
    """

    read: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def sum(cls, accounts: Sequence[Account]) -> Account:
        """Add accounts up, in the order of their units."""
        examples: dict[str, list[str]] = {}
        for one in accounts:
            for reason, places in one.examples.items():
                examples[reason] = [*examples.get(reason, []), *places][:_EXAMPLES]
        counts = {
            name: dict(sum((Counter(vars(one)[name]) for one in accounts), Counter[str]()))
            for name in ("kept", "skipped", "repaired")
        }
        return cls(sum(one.read for one in accounts), examples=examples, **counts)

    def __str__(self) -> str:
        """Say it in lines for people."""
        kept = sum(self.kept.values())
        lines = [f"{self.read} documents read, {kept} kept"]
        if VALIDATION in self.kept:
            lines[0] += f", {self.kept[VALIDATION]} of them for validation"
        for title, counts in (("left out", self.skipped), ("left out of documents that were kept", self.repaired)):
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
                places = ", ".join(self.examples.get(reason, []))
                lines.append(f"  {title}: {count} x {reason}" + (f" (first at {places})" if places else ""))
        return "\n".join(lines)


Tell = Callable[[int, int, Account], None]
"""Takes units done, units in all, and the account so far."""


def run_job(
    job: Job, *, workers: int, tell: Tell, ranks: Ranks | None = None, limits: Limits = DEFAULT_LIMITS
) -> Account:
    """Make the dataset of ``job``, or finish the one that an earlier run of the same job began.

    Args:
        job: what.
        workers: processes of this rank that read; 0 = this one, which a document that kills its reader then ends.
        tell: called on rank 0 whenever a unit of that rank is done.
        ranks: the processes of an MPI job; None = this one.
        limits: what is borne of documents that end or stall their reader.

    Returns:
        The account of the whole job, on every rank.

    Raises:
        DataError: the input is no such format, a document is malformed, the prefix is taken, the folder of parts
            belongs to another job, or workers died too often. Finished parts stay for the next run.
    """
    ranks = ranks or Alone()
    tokenizer = Tokenizer(job.tokenizer)
    units = job.format.units()
    first = ranks.rank == 0
    _together(ranks, lambda: _open_parts(job, units, tokenizer) if first else None)
    mine = list(range(len(units)))[ranks.rank :: ranks.size]
    _together(ranks, lambda: _work(job, units, mine, workers=workers, tell=tell if first else _silent, limits=limits))
    whole = Account.sum([_read_account(job, number) or Account() for number in range(len(units))])
    ranks.gather(None)  # every rank has read the parts before the first one removes them
    _together(ranks, lambda: _finish(job, len(units), whole, tokenizer) if first else None)
    return whole


def _together(ranks: Ranks, action: Callable[[], None]) -> None:
    """Run ``action`` on every rank; if it raises an error about the input on one, raise it on all."""
    failure: DataError | None = None
    try:
        action()
    except DataError as error:
        failure = error
    for one in ranks.gather(failure):
        if one is not None:
            raise one


def _silent(done: int, total: int, account: Account) -> None:
    """Say nothing."""


# --- The folder of parts


def fingerprint(job: Job, units: Sequence[Unit], tokenizer: Tokenizer) -> str:
    """Return a digest of everything that decides the bytes of the dataset, the state of the input files included."""
    options = replace(job.options, overwrite=False)
    files = {str(u.path): (u.path.stat().st_size, u.path.stat().st_mtime_ns) for u in units}
    text = repr((job.format, options, job.filters, job.validation_share, tuple(units), sorted(files.items())))
    return hashlib.sha256(f"{text} {tokenizer.digest}".encode()).hexdigest()


def _open_parts(job: Job, units: Sequence[Unit], tokenizer: Tokenizer) -> None:
    found, path = fingerprint(job, units, tokenizer), job.parts / "job.json"
    if not path.is_file() and not job.options.overwrite:
        for ending in job.outputs:
            if with_suffix(job.prefix, f"{ending}.json").exists():
                raise DataError(
                    f"{job.prefix}{ending} already holds a dataset", fix="choose another prefix, or overwrite it"
                )
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8")).get("fingerprint")
        if earlier != found:
            raise DataError(
                f"{job.parts} holds the parts of another job: other options, tokenizer or input files",
                fix=f"run that job again to finish it, or remove {job.parts}",
            )
        return
    job.parts.mkdir(parents=True, exist_ok=True)
    write_json(path, {"fingerprint": found, "units": len(units)})


def _part(job: Job, number: int) -> Path:
    return job.parts / f"{number:06d}"


def _read_account(job: Job, number: int) -> Account | None:
    """The account of a finished part; None = not finished."""
    path = with_suffix(_part(job, number), ".account.json")
    return Account(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


# --- The work


def _work(
    job: Job, units: Sequence[Unit], mine: Sequence[int], *, workers: int, tell: Tell, limits: Limits = DEFAULT_LIMITS
) -> None:
    done = [one for number in mine if (one := _read_account(job, number)) is not None]
    left = [(number, units[number]) for number in mine if _read_account(job, number) is None]
    if done:
        tell(len(done), len(mine), Account.sum(done))
    for one in run_units(partial(process_unit, job), left, workers=workers, folder=job.parts, limits=limits):
        done.append(one)
        tell(len(done), len(mine), Account.sum(done))


def process_unit(job: Job, number: int, unit: Unit, journal: Journal, lost: Mapping[int, str]) -> Account:
    """Make the part of one unit.

    Args:
        job: what it belongs to.
        number: of the unit.
        unit: what is read.
        journal: told of every document before it is touched.
        lost: reasons of documents that are passed over, by their place in the unit.

    Raises:
        DataError: naming the unit or the document.
    """
    tokenizer, tally = Tokenizer(job.tokenizer), _Tally()
    with ExitStack() as stack:
        writers = {
            ending: stack.enter_context(_writer(job, _part(job, number), ending, tokenizer)) for ending in job.outputs
        }
        for found in _documents(job.format.read(unit), journal, lost):
            tally.read += 1
            if isinstance(found, Skipped):
                tally.leave_out(found.reason, found.where)
            else:
                _write(job, found, writers, tokenizer, tally)
    whole = tally.account()
    write_json(with_suffix(_part(job, number), ".account.json"), asdict(whole))
    return whole


def _documents(items: Iterator[Item], journal: Journal, lost: Mapping[int, str]) -> Iterator[Found | Skipped]:
    """Go through what a reader gives; the journal stays at a document until the next one is asked for."""
    for place in itertools.count():
        journal.write(place, BETWEEN)
        item = next(items, None)
        if item is None:
            return
        journal.write(place, item.where)
        if place in lost:
            yield Skipped(lost[place], item.where)
        else:
            yield from opened_items((item,))


class _Tally:
    """An account while it grows."""

    def __init__(self) -> None:
        self.read = 0
        self.kept: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def leave_out(self, reason: str, where: str) -> None:
        self.skipped[reason] += 1
        self._example(reason, where)

    def repair(self, reason: str, where: str) -> None:
        self.repaired[reason] += 1
        self._example(reason, where)

    def _example(self, reason: str, where: str) -> None:
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES and where not in places:
            places.append(where)

    def account(self) -> Account:
        return Account(self.read, dict(self.kept), dict(self.skipped), dict(self.repaired), self.examples)


def _writer(
    job: Job, prefix: Path, ending: str, tokenizer: Tokenizer, *, meta: dict[str, Any] | None = None
) -> DatasetWriter:
    return DatasetWriter(
        with_suffix(prefix, ending),
        kind=job.format.kind,
        tokenizer_digest=tokenizer.digest,
        image_sentinel_id=tokenizer.image_id,
        overwrite=True,  # a part of a killed run, or a dataset that the job may replace
        meta=meta,
    )


def _write(job: Job, found: Found, writers: dict[str, DatasetWriter], tokenizer: Tokenizer, tally: _Tally) -> None:
    for one in job.filters:
        if (reason := one.refuse(found.record)) is not None:
            tally.leave_out(reason, found.where)
            return
    encoded = encode_record(found.record, tokenizer, where=found.where)
    stored = _storable(job, encoded.images, where=found.where)
    images = stored if stored is None else checked_images(stored, where=found.where, options=job.options)
    if images is None:
        tally.leave_out(BAD_IMAGE, found.where)
        return
    for reason in found.repaired:
        tally.repair(reason, found.where)
    ending = VALIDATION if encoded.share() < job.validation_share else ""
    writers[ending].add_document(encoded.tokens, images=images, loss_mask=encoded.loss_mask)
    tally.kept[ending] += 1


def _storable(job: Job, images: Sequence[bytes], *, where: str) -> list[bytes] | None:
    """Rewrite images of formats that no loader reads; None = leave the document out."""
    try:
        return [transcoded(data, max_pixels=job.options.max_image_pixels)[0] for data in images]
    except DataError as error:
        if job.options.on_bad_image == "raise":
            raise DataError(f"{where}: {error.problem}", fix=error.fix) from error
        _LOGGER.warning("%s is left out: %s", where, error.problem)
        return None


# --- The end


def _finish(job: Job, units: int, whole: Account, tokenizer: Tokenizer) -> None:
    """Put the parts together, in the order of the units, and remove their folder."""
    for ending in job.outputs:
        meta = account(job.options) | {"input": repr(job.format), "account": asdict(whole)}
        with _writer(job, job.prefix, ending, tokenizer, meta=meta) as writer:
            for number in range(units):
                writer.add_dataset(IndexedSource(with_suffix(_part(job, number), ending)))
            if not ending:
                writer.count_dropped(whole.skipped)
    shutil.rmtree(job.parts)


def manifests(job: Job) -> dict[str, Manifest]:
    """Return the manifests of a finished job, by ending of the prefix."""
    return {ending: IndexedSource(with_suffix(job.prefix, ending)).manifest for ending in job.outputs}
