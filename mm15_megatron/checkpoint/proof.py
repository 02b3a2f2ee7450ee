"""Evidence that a checkpoint holds what the run held, and still does.

    step_00001234/proof.json     size and SHA-256 of every other file, and digests of a few tensors of the optimizer

Before a checkpoint is published some tensors of every rank are read back from its files and compared, bit by bit, with
copies that were taken of the live weights and moments; and it is refused if its optimizer stands where the previous
checkpoint's stood although updates were applied since. Before one is loaded, size and SHA-256 of its files are checked,
each file by one rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from mm15_megatron.checkpoint import publish
from mm15_megatron.checkpoint.optimizer_state import Piece, StateTensor, pieces
from mm15_megatron.checkpoint.schema import model_key, optimizer_key, unwrapped
from mm15_megatron.errors import CheckpointError
from mm15_megatron.models.fp8_state import plain
from mm15_megatron.models.global_parameters import GlobalParameter, global_parameters

PROOF: Final = "proof.json"
_READ_BACK: Final = 3  # parameters of each rank whose tensors are read back, others in every save
_BLOCK: Final = 1 << 22
_SHOWN: Final = 8

T = TypeVar("T")

ReadShard = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Reads the shard of a stored tensor that begins at an offset of the whole."""


@dataclass(frozen=True)
class StoredFile:
    """What a file must be.

    Attributes:
        size: bytes.
        sha256: of its content.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Proof:
    """What is known of a checkpoint's files and content.

    Attributes:
        files: by path inside the checkpoint.
        optimizer_step: updates applied.
        moments: SHA-256 of some tensors of the optimizer's state, by key and place.
    """

    files: Mapping[str, StoredFile]
    optimizer_step: int
    moments: Mapping[str, str]

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def read(checkpoint: Path) -> Proof:
        """Read a published checkpoint's.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            content = json.loads((checkpoint / PROOF).read_text(encoding="utf-8"))
            files = {name: StoredFile(**one) for name, one in content["files"].items()}
            return Proof(files, int(content["optimizer_step"]), dict(content["moments"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint / PROOF} cannot be read: {type(error).__name__}: {error}",
                fix=publish.offer_before(checkpoint),
            ) from error


# --- Before it is published


@dataclass(frozen=True)
class Sample:
    """A copy of a part of a live tensor.

    Attributes:
        key: key of the stored tensor.
        offset: where the shard that holds the part begins in the whole tensor.
        start: first element of the part in the flattened shard.
        values: the part, flat, on the CPU.
    """

    key: str
    offset: tuple[int, ...]
    start: int
    values: torch.Tensor

    @property
    def name(self) -> str:
        """Key and place."""
        return f"{self.key} {list(self.offset)} + {self.start}"

    @property
    def moved(self) -> bool:
        """Whether it is not one value throughout, as moments are that no gradient has ever reached."""
        return bool((self.values != self.values[:1]).any())

    @property
    def digest(self) -> str:
        """SHA-256 of the values."""
        return hashlib.sha256(self.values.contiguous().view(torch.uint8).numpy()).hexdigest()


@dataclass(frozen=True)
class Samples:
    """Copies of live tensors of one rank.

    Attributes:
        read_back: parts that are compared with what is on disk.
        moments: parts of the optimizer's state that move with every update: of the same parameter of each module in
            every save.
    """

    read_back: tuple[Sample, ...]
    moments: tuple[Sample, ...]


def take_samples(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, round_number: int
) -> Samples:
    """Copy some live weights and moments of this rank, straight from the model and the optimizer.

    Args:
        chunks: this rank's model chunks.
        optimizer: its optimizer.
        round_number: which parameters' turn it is.
    """
    items = {item.parameter: item for item in global_parameters(unwrapped(chunks))}
    names = sorted(items.values(), key=lambda item: item.name)
    held = sorted(pieces(optimizer), key=lambda piece: items[piece.parameter].name)
    found = [
        Sample(
            model_key(item.name),
            _offset(StateTensor(item.global_shape, item.split_dim), item),
            0,
            _copy(plain(item.parameter)),
        )
        for item in _turn(names, round_number)
    ]
    for piece in _turn(held, round_number):
        found += _of_piece(piece, items[piece.parameter])
    first = {_module_of(items[piece.parameter]): piece for piece in reversed(held)}
    moments = [sample for piece in first.values() for sample in _of_piece(piece, items[piece.parameter])]
    return Samples(tuple(found), tuple(s for s in moments if not s.key.endswith(".master") and s.moved))


def _module_of(item: GlobalParameter) -> str:
    return item.name.partition(".")[0]


def _turn(members: Sequence[T], round_number: int) -> list[T]:
    count = min(_READ_BACK, len(members))
    return [members[(round_number * count + i) % len(members)] for i in range(count)]


def _of_piece(piece: Piece, item: GlobalParameter) -> list[Sample]:
    like_parameter = StateTensor(item.global_shape, item.split_dim)
    return [
        Sample(
            optimizer_key(item.name, kind),
            _offset(piece.shapes.get(kind, like_parameter), item),
            0 if kind in piece.shapes else piece.start,
            _copy(live),
        )
        for kind, live in piece.tensors.items()
    ]


def _offset(whole: StateTensor, item: GlobalParameter) -> tuple[int, ...]:
    """Where this rank's slice of a whole tensor begins."""
    local = whole.local_shape(item.shards)
    return tuple(n * item.shard_index if dim == whole.split_dim else 0 for dim, n in enumerate(local))


def _copy(live: torch.Tensor) -> torch.Tensor:
    return live.detach().reshape(-1).to("cpu", copy=True)


def differing(samples: Sequence[Sample], read: ReadShard) -> list[str]:
    """Read samples back and say which are not what was live, one clause each.

    Args:
        samples: from :func:`take_samples`.
        read: reads shards; bytes that lie wrong on disk may have it raise anything.
    """
    problems = []
    for sample in samples:
        try:
            stored = read(sample.key, sample.offset).reshape(-1)
        except Exception as error:  # noqa: BLE001
            problems.append(f"{sample.name} cannot be read back: {type(error).__name__}: {error}")
            continue
        part = stored[sample.start : sample.start + sample.values.numel()]
        if part.dtype != sample.values.dtype or part.shape != sample.values.shape:
            problems.append(
                f"{sample.name} is {part.dtype} {list(part.shape)} on disk, {sample.values.dtype} in the run"
            )
        elif not torch.equal(_bits(part), _bits(sample.values)):
            apart = int((_bits(part) != _bits(sample.values)).sum())
            problems.append(f"{sample.name} differs from the live tensor in {apart} of {part.nbytes} bytes")
    return problems


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def is_stale(proof: Proof, previous: Proof) -> bool:
    """Whether the moments are the previous checkpoint's although updates were applied since."""
    common = proof.moments.keys() & previous.moments.keys()
    same = common and all(proof.moments[name] == previous.moments[name] for name in common)
    return bool(same) and proof.optimizer_step > previous.optimizer_step


# --- Before it is loaded


def digest_of_file(path: Path) -> StoredFile:
    """Read a file and return what it is."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return StoredFile(size, digest.hexdigest())


def damaged_files(checkpoint: Path, proof: Proof, *, names: Sequence[str]) -> list[str]:
    """Say which of the named files are not what they were, one clause each."""
    problems = []
    for name in names:
        path, expected = checkpoint / name, proof.files[name]
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != expected.size:
                problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected.size}")
            elif digest_of_file(path) != expected:
                problems.append(f"{name} has another SHA-256: its content changed")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


def listing(problems: Sequence[str]) -> str:
    """Return the first clauses on one line, and how many there are."""
    rest = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
