"""Small JSON files that are either there and whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a file under its name once its bytes are on the disk."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
