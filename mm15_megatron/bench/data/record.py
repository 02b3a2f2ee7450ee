"""What is printed and kept: one section a case, as markdown and as JSON.

A record keeps the cases of earlier runs: each has its own machine, versions and date.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm15_megatron.bench.data.cases import CASES, QUIET
from mm15_megatron.errors import DataError
from mm15_megatron.evaluation.report import write_report

TITLE = "# The data path beside its peers"
DISTURBED = 0.1
"""Share of the seconds in which other programs may be at work on a machine that counts as quiet."""
READING = (
    "A ratio is how many times as fast ours is: above 1, ours is faster. It is the median over pairs of turns that "
    "follow each other, with quartiles; contenders take turns at the same work, and who begins changes. Nothing here "
    "is asserted by a test."
)


def section(name: str, content: Mapping[str, Any]) -> str:
    """Return the markdown of one case."""
    lines = [f"## {name}", ""]
    if content["not_run"]:
        return "\n".join([*lines, f"Not run: {content['not_run']}.", ""])
    for sentence in content["work"]:
        lines += [sentence, ""]
    lines += _comparisons(content["comparisons"]) + _figures(content["figures"])
    for peer, reason in content["skipped"].items():
        lines += [f"Not measured: {peer}: {reason}.", ""]
    return "\n".join([*lines, _circumstances(content), ""])


def _comparisons(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = [
        f"| {one['what']} | {one['peer']} | {one['unit']} | {one['ours']:.4g} | {one['theirs']:.4g} "
        f"| {one['ratio']['median']:.3g} | {one['ratio']['low']:.3g} - {one['ratio']['high']:.3g} | {one['verdict']} |"
        for one in found
    ]
    head = "| work | peer | unit | ours | theirs | ours / theirs | quartiles | target |"
    return [head, "|---|---|---|---|---|---|---|---|", *rows, ""]


def _figures(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = [
        f"| {one['what']} | {one['unit']} | {one['value']['median']:.4g} "
        f"| {one['value']['low']:.4g} - {one['value']['high']:.4g} | {one['verdict']} |"
        for one in found
    ]
    return ["| ours alone | unit | median | quartiles | at most |", "|---|---|---|---|---|", *rows, ""]


def _circumstances(content: Mapping[str, Any]) -> str:
    machine, others = content["machine"], content["cores_of_others"]
    quiet = "was quiet" if others["share_of_seconds"] <= DISTURBED else "was not quiet"
    versions = ", ".join(f"{name} {number}" for name, number in (content["libraries"] | content["versions"]).items())
    return (
        f"`{content['command']}`, {content['rounds']} turns each, {content['seconds']:.0f} s, {content['finished']}; "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}; "
        f"{versions}. Other programs took {others['during']:.2f} cores in the median second, more than {QUIET:g} in "
        f"{others['share_of_seconds']:.0%} of the seconds: the machine {quiet}."
    )


def page(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the whole record as markdown, cases in the order of ``CASES``."""
    known = [name for name in CASES if name in cases]
    return "\n".join([TITLE, "", READING, "", *(section(name, cases[name]) for name in known)]).rstrip() + "\n"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the cases of the record at ``path``, none if there is no file.

    Raises:
        DataError: the file is no such record.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["cases"]
        return {str(name): dict(content) for name, content in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no record of this benchmark: {error!r}", fix="choose another --record") from error


def write(path: Path, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Put ``cases`` into the record at ``path``.json and ``path``.md.

    Others that it holds stay, and so does one that was measured earlier and was not run this time.

    Raises:
        DataError: there is a file that is no such record.
    """
    kept = read(path.with_name(f"{path.name}.json"))
    kept |= {name: dict(content) for name, content in cases.items() if name not in kept or not content["not_run"]}
    write_report(path.with_name(f"{path.name}.json"), {"cases": kept})
    path.with_name(f"{path.name}.md").write_text(page(kept), encoding="utf-8")
