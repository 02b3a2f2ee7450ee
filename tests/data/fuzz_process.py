"""Hostile images through a decoder in a process of its own: a crash or a hang ends that process, not the tests."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from mm15_megatron.data.image.decoder import Decoded, ImageDecoder, build_decoder
from mm15_megatron.data.image.pillow import check_image
from mm15_megatron.errors import DataError

from .hostile import Hostile, hostile
from .pictures import encoded_pictures, upright_size

MAX_PIXELS = 2**20
TOGETHER = 8
"""Images of a batch, as the loader decodes them; two of them are good."""
GOOD = 2
SILENT_S = 120
"""A process that says nothing for so long hangs: a batch takes milliseconds."""


@dataclass(frozen=True)
class Outcome:
    """What became of one hostile image: the reason why it was refused, or the digest of the pixels."""

    number: int
    kind: str
    must_fail: bool
    problem: str
    digest: str

    @property
    def late(self) -> bool:
        """Whether it was refused after the header check: by the decoder's body."""
        return self.problem.startswith(("body: ", "decoded to "))


@dataclass(frozen=True)
class Report:
    """What a process saw.

    Attributes:
        outcomes: one for each hostile image.
        complaints: good images that came out otherwise than alone, and disagreements with the check at build time.
        grown: bytes of memory that the process had at its peak beyond what it had after decoding every good picture.
    """

    outcomes: list[Outcome]
    complaints: list[str]
    grown: int


def fuzz(library: str, numbers: Sequence[int], *, log: Path) -> Report:
    """Decode hostile images in a fresh process.

    Args:
        library: what ``build_decoder`` takes.
        numbers: of the series.
        log: file for what the native libraries print.

    Raises:
        AssertionError: if the process dies or hangs, with the images that did it.
    """
    outcomes: list[Outcome] = []
    complaints: list[str] = []
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_decode_all, args=(theirs, library, list(numbers), str(log)))
    process.start()
    theirs.close()
    doing: list[int] = []
    try:
        while ours.poll(SILENT_S):
            match ours.recv():
                case ("begin", doing):
                    pass
                case ("end", found, wrong):
                    outcomes += found
                    complaints += wrong
                case ("done", grown):
                    return Report(outcomes, complaints, grown)
        end = f"was silent for {SILENT_S} s"
    except EOFError:
        process.join()
        end = f"died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    raise AssertionError(
        f"{library} {end}; {_culprits(library, doing, log)}\n{log.read_text(errors='replace')[-2000:]}"
    )


def _culprits(library: str, numbers: list[int], log: Path) -> str:
    """Which images of a deadly batch are deadly alone."""
    if len(numbers) < 2:
        return f"hostile image {numbers}: {[hostile(number).kind for number in numbers]}"
    alone = []
    for number in numbers:
        try:
            fuzz(library, [number], log=log)
        except AssertionError as error:
            alone.append(str(error).splitlines()[0])
    return f"in the batch {numbers}; alone: {alone or 'none of them'}"


def _decode_all(pipe: Connection, library: str, numbers: list[int], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    decoder = build_decoder(library, max_pixels=MAX_PIXELS)
    good = [(np.frombuffer(data, np.uint8), upright_size(name)) for name, data in encoded_pictures().items()]
    for _ in range(2):  # the second pass shows what the library keeps
        alone = [_copy(decoder.decode([data], sizes=[size])[0]) for data, size in good]
    before = _memory("VmRSS")
    for at in range(0, len(numbers), TOGETHER - GOOD):
        batch = numbers[at : at + TOGETHER - GOOD]
        pipe.send(("begin", batch))
        pipe.send(("end", *_decode_batch(decoder, [hostile(n) for n in batch], good, alone, library=library)))
    pipe.send(("done", _memory("VmHWM") - before))
    pipe.close()


def _decode_batch(
    decoder: ImageDecoder,
    bad: list[Hostile],
    good: list[tuple[np.ndarray, tuple[int, int]]],
    alone: list[torch.Tensor],
    *,
    library: str,
) -> tuple[list[Outcome], list[str]]:
    """Decode hostile images with good ones at random places between them."""
    rng = np.random.default_rng(bad[0].number)
    chosen = [int(i) for i in rng.integers(len(good), size=GOOD)]
    order = [int(i) for i in rng.permutation(len(bad) + GOOD)]
    every = [(np.frombuffer(one.data, np.uint8), one.size) for one in bad] + [good[i] for i in chosen]
    results = decoder.decode([every[i][0] for i in order], sizes=[every[i][1] for i in order])
    found = {place: result for place, result in zip(order, results, strict=True)}
    complaints = []
    for place, which in enumerate(chosen, len(bad)):
        pixels = found[place].pixels_HWC
        if pixels is None or not torch.equal(pixels, alone[which]):
            complaints.append(f"good picture {which} beside {[one.number for one in bad]}: {found[place].problem}")
    outcomes = [_outcome(one, found[place]) for place, one in enumerate(bad)]
    if library == "pil":
        complaints += _disagreements(bad, outcomes)
    return outcomes, complaints


def _outcome(one: Hostile, result: Decoded) -> Outcome:
    pixels = result.pixels_HWC
    assert (pixels is None) == bool(result.problem), one
    digest = "" if pixels is None else hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    return Outcome(one.number, one.kind, one.must_fail, result.problem, digest)


def _disagreements(bad: Iterable[Hostile], outcomes: Iterable[Outcome]) -> list[str]:
    """Images that the check at build time takes and the same library refuses later, or the other way round."""
    found = []
    for one, outcome in zip(bad, outcomes, strict=True):
        try:
            checked = check_image(one.data, max_pixels=MAX_PIXELS)
        except DataError:
            accepted = False
        else:
            accepted = (checked.height, checked.width) == one.size
        if accepted == bool(outcome.problem):
            found.append(
                f"image {one.number} ({one.kind}), accepted before storing: {accepted}; then {outcome.problem!r}"
            )
    return found


def _copy(result: Decoded) -> torch.Tensor:
    assert result.pixels_HWC is not None, result.problem
    return result.pixels_HWC.clone()


def _memory(field: str) -> int:
    """Bytes: VmRSS is what the process has now, VmHWM the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
