"""Small archives in the structure of the published OCR datasets."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm15_megatron.data.formats.base import Format, Found, Skipped, opened_items


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def pdfa_page(*lines: str) -> dict[str, Any]:
    words = [word for line in lines for word in line.split()]
    return {
        "images_bbox": [],
        "images_bbox_no_text_overlap": [],
        "lines": {
            "bbox": [[0.1, 0.1, 0.5, 0.02]] * len(lines),
            "score": [1.0] * len(lines),
            "text": list(lines),
            "word_slice": [[0, 1]] * len(lines),
        },
        "words": {
            "bbox": [[0.1, 0.1, 0.1, 0.02]] * len(words),
            "line_pos": [[0, 0]] * len(words),
            "score": [1.0] * len(words),
            "text": words,
        },
    }


def read_all(reader: Format, *, backwards: bool = False) -> list[Found | Skipped]:
    units = list(reader.units())
    found = [list(opened_items(reader.read(unit))) for unit in (reversed(units) if backwards else units)]
    return [record for unit in (reversed(found) if backwards else found) for record in unit]


def outcome(record: Found | Skipped) -> tuple[str, str]:
    """(where, reason or "found")."""
    return record.where, record.reason if isinstance(record, Skipped) else "found"
