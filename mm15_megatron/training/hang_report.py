"""What ranks say of themselves when a job hangs, and one text made of it: who is odd, where, with which batch.

A rank that waits for others is not the cause; one that waits for nobody, or says nothing, is. Where all wait, their
collectives do not match, and those are odd whose collective of a group is another than most members'.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Final

import torch

_SHOWN: Final = 3
# The calls in which a rank waits for others without a collective that torch's flight recorder knows.
_WAITING: Final = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication",
    "mm15_megatron/utils/ranks",
)


@dataclass(frozen=True)
class Collective:
    """A collective that a rank entered.

    Attributes:
        group: name and purpose of its process group, and the backend.
        what: operation, its number in the group, and sizes.
        pending: whether it has not ended.
    """

    group: str
    what: str
    pending: bool


@dataclass(frozen=True)
class RankReport:
    """What a rank says of itself.

    Attributes:
        rank: its rank.
        step: the step it is in.
        phase: what it does there.
        seconds: for how long.
        batch: the rows it holds, and those it takes next.
        collectives: the newest of each group, newest last.
        stack: its main thread, innermost last.
        in_distributed: whether that thread is inside a call that waits for other ranks.
    """

    rank: int
    step: int
    phase: str
    seconds: float
    batch: str
    collectives: tuple[Collective, ...]
    stack: tuple[str, ...]
    in_distributed: bool

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        return self.in_distributed or any(one.pending for one in self.collectives)

    @property
    def newest(self) -> dict[str, Collective]:
        """The newest collective of each group."""
        return {one.group: one for one in self.collectives}

    @property
    def where(self) -> str:
        """Where it is, in a clause."""
        held = [one for one in self.collectives if one.pending] or list(self.newest.values())[-1:]
        last = "; ".join(f"{'waiting in' if one.pending else 'last was'} {one.what} of {one.group}" for one in held)
        return f"step {self.step}, {self.phase}, for {self.seconds:.0f} s" + (f" ({last})" if last else "")

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> RankReport:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        collectives = tuple(Collective(**one) for one in values.pop("collectives"))
        return RankReport(**{**values, "stack": tuple(values["stack"])}, collectives=collectives)


def stack_of(frame: FrameType) -> tuple[tuple[str, ...], bool]:
    """Return a thread's stack as lines, and whether its innermost call is one that waits for other ranks."""
    found = traceback.extract_stack(frame)
    lines = tuple(line for text in traceback.format_list(found) for line in text.rstrip().splitlines())
    return lines, any(part in found[-1].filename for part in _WAITING)


def recorded_collectives() -> list[dict[str, Any]]:
    """Return what torch's flight recorders hold, oldest first; nothing where they are off.

    NCCL keeps a recorder of its own; gloo's is the one of all other backends.
    """
    found = torch._C._distributed_c10d
    names = [name for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json") if hasattr(found, name)]
    entries = [entry for name in names for entry in json.loads(getattr(found, name)(True, False)).get("entries", [])]
    return sorted(entries, key=lambda entry: int(entry["time_created_ns"]))


def newest_collectives(entries: Sequence[Mapping[str, Any]]) -> tuple[Collective, ...]:
    """Return the newest collectives of each group, newest last.

    Args:
        entries: from :func:`recorded_collectives`.
    """
    ended = {}
    for entry in entries:  # operations with one number are one batch; NCCL tells its end to the last of them alone
        ended[_batch_of(entry)] = entry["retired"]
    by_group: dict[str, list[Collective]] = {}
    for entry in entries:
        group, _, number = _batch_of(entry)
        sizes = " and ".join("x".join(map(str, size)) or "a scalar" for size in entry["input_sizes"])
        what = f"{_operation(entry)[1]} number {number}" + (f" of {sizes}" if sizes else "")
        # the group that was used last comes last
        by_group[group] = [*by_group.pop(group, []), Collective(group, what, not ended[_batch_of(entry)])][-_SHOWN:]
    return tuple(one for held in by_group.values() for one in held)


def _batch_of(entry: Mapping[str, Any]) -> tuple[str, bool, int]:
    """Its group and backend (each counts by itself), whether it is a transfer between two, and its number there."""
    group = " ".join(part for part in entry["process_group"] if part) + f" ({_operation(entry)[0]})"
    return group, entry["is_p2p"], entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]


def _operation(entry: Mapping[str, Any]) -> tuple[str, str]:
    backend, _, name = entry["profiling_name"].partition(":")
    return backend, name


def odd_ranks(reports: Sequence[RankReport], *, places: Sequence[str]) -> dict[int, str]:
    """Name the ranks that hold up the others, and why.

    Args:
        reports: of the ranks that reported.
        places: machine and process of every rank.
    """
    spoke = {report.rank for report in reports}
    silent = {
        rank: f"({place}) says nothing: it is stopped or dead, or its machine is"
        for rank, place in enumerate(places)
        if rank not in spoke
    }
    if silent:
        return silent
    busy = {one.rank: f"({places[one.rank]}) waits for nobody: {one.where}" for one in reports if not one.waits}
    if len(busy) < len(reports):
        return busy or _mismatched(reports, places)
    return {}


def _mismatched(reports: Sequence[RankReport], places: Sequence[str]) -> dict[int, str]:
    """Compare the newest collective of each group among its members."""
    odd = {}
    for group in sorted({name for report in reports for name in report.newest}):
        members = [report for report in reports if group in report.newest]
        most, count = Counter(report.newest[group].what for report in members).most_common(1)[0]
        if count == len(members):
            continue
        for report in members:
            if (what := report.newest[group].what) != most:
                odd[report.rank] = f"({places[report.rank]}) is in {what} of {group}, most of its members in {most}"
    return odd


def merged_text(reports: Sequence[RankReport], *, places: Sequence[str]) -> str:
    """Return one report of all ranks for people: the odd ones first, with all they said, then a line for each rank.

    Where none is odd, one speaks for all.
    """
    odd = odd_ranks(reports, places=places)
    by_rank: Mapping[int, RankReport] = {report.rank: report for report in reports}
    lines = [f"the job hangs: {len(reports)} of {len(places)} ranks reported"]
    lines += [f"rank {rank} {why}" for rank, why in odd.items()]
    if not odd:
        lines.append("no rank differs from the others: all wait, or none does")
    for rank in odd or [reports[0].rank]:
        if rank in by_rank:
            lines += _details(by_rank[rank])
    lines += [f"rank {one.rank} ({places[one.rank]}): {one.where}" for one in sorted(reports, key=lambda r: r.rank)]
    return "\n".join(lines) + "\n"


def _details(report: RankReport) -> list[str]:
    return [
        f"  batch of rank {report.rank}: {report.batch}",
        *(f"  {one.group}: {one.what}{' (pending)' if one.pending else ''}" for one in report.collectives),
        *(f"  {line}" for line in report.stack),
    ]
