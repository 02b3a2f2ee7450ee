"""What the tests of interleaved formats share: a store in memory, pictures that differ, reading by units."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from mm15_megatron.data.formats.base import Format, Found, Interleaved, Skipped
from tests.data.images import photo

ADDRESS = "https://pictures.example/{}.jpg"


@dataclass(frozen=True)
class Shelf:
    """Images by key; asks are noted, so that a test sees what was never looked up."""

    images: dict[str, bytes]
    asked: list[str] = field(default_factory=list, compare=False)

    def get(self, key: str) -> bytes | None:
        self.asked.append(key)
        return self.images.get(key)


def url(name: object) -> str:
    return ADDRESS.format(name)


def pictures(count: int, *, height: int = 120, width: int = 160) -> dict[str, bytes]:
    """Different JPEG files by URL."""
    return {url(i): photo(height, width, seed=i, form="JPEG") for i in range(count)}


def everything(reader: Format) -> list[Found | Skipped]:
    """What the units give one after the other, read in another order than theirs."""
    units = list(enumerate(reader.units()))
    random.Random(5).shuffle(units)
    pieces = {number: list(reader.read(unit)) for number, unit in units}
    return [found for number in sorted(pieces) for found in pieces[number]]


def shown(found: Iterable[Found | Skipped], images: dict[str, bytes]) -> list[object]:
    """Records with keys in place of bytes, ``[parts, repaired]``, and reasons of what was skipped."""
    names = {data: key for key, data in images.items()}
    result: list[object] = []
    for item in found:
        if isinstance(item, Skipped):
            result.append(item.reason)
            continue
        assert isinstance(item.record, Interleaved)
        parts = [part if isinstance(part, str) else (names[part],) for part in item.record.parts]
        result.append([parts, list(item.repaired)])
    return result
