"""Small annotation files of conversations, and their images."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mm15_megatron.data.formats.base import Found, Skipped, opened_items
from mm15_megatron.data.formats.turns import ConversationReader
from mm15_megatron.data.sft import Conversation
from tests.data.images import photo

Simple = tuple[tuple[tuple[str, str], ...], tuple[bytes, ...]]


def write_array(path: Path, records: Sequence[Any], *, indent: int | None = None) -> Path:
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records: Sequence[dict[str, Any]], *, group: int = 2) -> Path:
    pq.write_table(pa.Table.from_pylist(list(records)), path, row_group_size=group)
    return path


def write_images(folder: Path, *names: str) -> dict[str, bytes]:
    images = {name: photo(8 + n, 9, seed=n) for n, name in enumerate(names)}
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return images


def read_all(reader: ConversationReader) -> list[Found | Skipped]:
    """Everything a reader gives, checked to be the same after pickling, in any order and at any size of units."""
    whole = [item for unit in reader.units() for item in opened_items(reader.read(unit))]
    for size in (1, 150, 1000):
        other = pickle.loads(pickle.dumps(replace(reader, unit_bytes=size)))
        units = other.units()
        parts = {unit: list(opened_items(other.read(unit))) for unit in reversed(units)}
        assert [item for unit in units for item in parts[unit]] == whole
    return whole


def simple(item: Found | Skipped) -> Simple:
    """Turns and images of a record that was found."""
    assert isinstance(item, Found)
    assert isinstance(item.record, Conversation)
    return tuple((turn.role, turn.text) for turn in item.record.turns), item.record.images


def outcomes(items: Sequence[Found | Skipped]) -> list[str]:
    """For each record the reason why it was skipped, what was repaired, or nothing."""
    return [item.reason if isinstance(item, Skipped) else ", ".join(item.repaired) for item in items]
