"""The case ``preprocess``: JSON lines to an indexed dataset, beside Megatron-LM's own tool."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np

from mm15_megatron.bench.data.outcome import CaseResult, Comparison, Request
from mm15_megatron.bench.data.texts import SOURCE, VOCABULARY, train_tokenizer, write_jsonl
from mm15_megatron.bench.data.turns import Seconds, times_as_fast
from mm15_megatron.data.indexed.reader import PairReader
from mm15_megatron.errors import BackendError, ConfigError, DataError

OURS, PEER, FAST_PEER = "ours", "Megatron-LM preprocess_data.py", "Megatron-LM preprocess_data_fast.py"
_ROOT: Final = Path(__file__).resolve().parents[3]
_TOOL: Final = "tools/preprocess_data.py"
_FAST_TOOL: Final = "tools/preprocess_data_fast.py"
_LAST_LINES: Final = 12


@dataclass(frozen=True)
class Tool:
    """A command that makes a dataset of a JSON lines file.

    Attributes:
        words: the command, with ``{input}`` and ``{output}`` for the two paths.
        python_path: where its modules are.
        tokens: what is appended to the output prefix of the pair that holds the tokens.
    """

    words: tuple[str, ...]
    python_path: Path
    tokens: str

    def run(self, *, source: Path, output: Path) -> Seconds:
        """Run the command to its end.

        Raises:
            BackendError: it failed; with its last lines.
        """
        words = [word.format(input=source, output=output) for word in self.words]
        environment = os.environ | {"PYTHONPATH": f"{self.python_path}", "CUDA_VISIBLE_DEVICES": ""}
        before, began = _children(), time.perf_counter()
        done = subprocess.run(
            words, env=environment, cwd=output.parent, capture_output=True, text=True, errors="replace", check=False
        )
        seconds = Seconds(time.perf_counter() - began, _children() - before)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
            raise BackendError(f"`{' '.join(words)}` ended with {done.returncode}:\n{last}", fix="make it run by hand")
        return seconds


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tools(request: Request, *, tokenizer: Path, checkout: Path) -> tuple[dict[str, Tool], dict[str, str]]:
    """Return the contenders, and why one of them does not take part."""
    shared = ("--input", "{input}", "--output-prefix", "{output}", "--json-keys", "text", "--append-eod")
    theirs = (*shared, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer.parent))
    workers = ("--workers", str(request.workers))
    ours = (sys.executable, str(_ROOT / "tools/preprocess_text.py"), "jsonl", "{input}", "--output", "{output}")
    found = {
        OURS: Tool((*ours, "--tokenizer", str(tokenizer), *workers), _ROOT, "_tokens"),
        PEER: Tool((sys.executable, str(checkout / _TOOL), *theirs, *workers), checkout, "_text_document"),
    }
    if not (checkout / _FAST_TOOL).is_file():
        return found, {FAST_PEER: f"{_FAST_TOOL} is not in the checkout"}
    if find_spec("gigatoken") is None:
        return found, {FAST_PEER: "gigatoken, which it tokenises with, is not installed"}
    words = (sys.executable, str(checkout / _FAST_TOOL), *theirs, "--use-gigatoken")
    return found | {FAST_PEER: Tool(words, checkout, "_text_document")}, {}


def preprocess(request: Request) -> CaseResult:
    """Text to token ids on disk.

    Raises:
        ConfigError: ``megatron_lm`` is no checkout.
        BackendError: a tool failed.
        DataError: the datasets differ.
    """
    if request.megatron_lm is None:
        return CaseResult(not_run="Megatron-LM's tool is not shipped here: name a checkout with --megatron-lm PATH")
    checkout = request.megatron_lm.resolve()
    if not (checkout / _TOOL).is_file():
        raise ConfigError(f"{checkout} holds no {_TOOL}", fix="name the root of a checkout of Megatron-LM")
    with tempfile.TemporaryDirectory(prefix="preprocess-", dir=request.folder) as name:
        folder = Path(name)
        tokenizer = train_tokenizer(folder / "tokenizer")
        whole, single = folder / "text.jsonl", folder / "single.jsonl"
        count = write_jsonl(whole, characters=int(request.text_mib * 2**20))
        write_jsonl(single, characters=1)
        found, skipped = tools(request, tokenizer=tokenizer, checkout=checkout)
        timings = _measure(found, folder, inputs={"whole": whole, "start": single}, rounds=request.rounds)
        tokens = _check_equal(found, folder)
        size = whole.stat().st_size
    peers = [who for who in found if who != OURS]
    comparisons = [
        _comparison(what, timings, peer, megabytes=size / 1e6, at_least=1.0 if peer == PEER else None, **kind)
        for peer in peers
        for what, kind in (
            ("whole command", {"part": "whole", "clock": "wall"}),
            ("without its start", {"part": "rest", "clock": "wall"}),
            ("without its start, by cores", {"part": "rest", "clock": "core"}),
        )
    ]
    return CaseResult(
        work=_work(request, documents=count, megabytes=size / 1e6, tokens=tokens),
        comparisons=tuple(comparisons),
        skipped=skipped,
        versions=_versions(checkout),
        details={
            "seconds": {
                part: {who: [vars(one) for one in turns] for who, turns in by.items()} for part, by in timings.items()
            }
        },
    )


def _work(request: Request, *, documents: int, megabytes: float, tokens: int) -> tuple[str, ...]:
    return (
        "Every contender makes token ids with an end-of-text id behind each document from one JSON lines file: "
        f"{documents} documents, {megabytes:.1f} MB, {tokens} tokens ({SOURCE}), with one byte-level BPE tokenizer of "
        f"{VOCABULARY} ids trained on that reference; {request.workers} worker processes (Megatron-LM's fast tool has "
        "threads of its own instead).",
        "The ids were compared and are equal. Ours writes int32 and a manifest with digests, Megatron-LM's tools write "
        "uint16 here.",
        "Each turn is a command of its own; the start is the same command on one document, and is taken off in the "
        "lines that say so.",
    )


def _versions(checkout: Path) -> dict[str, str]:
    """The commit of the checkout, or what its package says of itself."""
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        return {"Megatron-LM": asked.stdout.strip()}
    info = checkout / "megatron" / "core" / "package_info.py"
    numbers: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else ():
        name, found, value = line.partition(" = ")
        if found and name in ("MAJOR", "MINOR", "PATCH"):
            numbers[name] = value.strip()
    return {"Megatron-LM": "megatron-core " + ".".join(numbers.values()) if numbers else "unknown"}


def _measure(
    found: Mapping[str, Tool], folder: Path, *, inputs: Mapping[str, Path], rounds: int
) -> dict[str, dict[str, list[Seconds]]]:
    """Run every tool on every input, in turn; the outputs of the last whole turn stay."""
    timings: dict[str, dict[str, list[Seconds]]] = {part: {who: [] for who in found} for part in inputs}
    for number in range(rounds + 1):
        for part, source in inputs.items():
            for who in list(found) if number % 2 else reversed(list(found)):
                place = folder / part / who.replace(" ", "-")
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                seconds = found[who].run(source=source, output=place / "out")
                if number:
                    timings[part][who].append(seconds)
    return timings


def _check_equal(found: Mapping[str, Tool], folder: Path) -> int:
    """Compare the ids and the documents of all outputs; return the number of tokens."""
    pairs = {
        who: PairReader(folder / "whole" / who.replace(" ", "-") / f"out{tool.tokens}") for who, tool in found.items()
    }
    ours = pairs[OURS]
    for who, pair in pairs.items():
        same = np.array_equal(ours.lengths, pair.lengths) and all(
            np.array_equal(ours[i], pair[i]) for i in range(len(ours))
        )
        if not same:
            raise DataError(f"{who} wrote other ids than ours", fix="compare the two tokenizers")
    return int(ours.lengths.sum(dtype=np.int64))


def _comparison(
    what: str,
    timings: Mapping[str, Mapping[str, Sequence[Seconds]]],
    peer: str,
    *,
    megabytes: float,
    part: str,
    clock: str,
    at_least: float | None,
) -> Comparison:
    ours, theirs = (_seconds(timings, who, part=part, clock=clock) for who in (OURS, peer))
    return Comparison(
        what=what,
        unit="MB a second" if clock == "wall" else "MB a second of a core",
        peer=peer,
        ours=megabytes / statistics.median(ours),
        theirs=megabytes / statistics.median(theirs),
        ratio=times_as_fast(ours, theirs),
        at_least=at_least,
    )


def _seconds(timings: Mapping[str, Mapping[str, Sequence[Seconds]]], who: str, *, part: str, clock: str) -> list[float]:
    whole = [vars(one)[clock] for one in timings["whole"][who]]
    if part == "whole":
        return whole
    start = statistics.median(vars(one)[clock] for one in timings["start"][who])
    return [max(one - start, 1e-9) for one in whole]
