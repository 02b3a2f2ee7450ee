"""What a run leaves for a reader: a JSON report and a picture grid of questions, answers and truth."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image, ImageDraw

from mm15_megatron.errors import DataError

LIBRARIES = ("torch", "megatron-core", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy", "pillow", "tokenizers")
_PICTURE, _PADDING, _LINE = 112, 12, 14
_WIDTH = 260
_RIGHT, _WRONG, _INK = (20, 120, 40), (180, 30, 30), (30, 30, 30)


@dataclass(frozen=True)
class Shown:
    """One cell of the picture grid: uint8 pixels [H, W] or [H, W, 3], and three texts."""

    pixels: npt.NDArray[np.uint8]
    question: str
    answer: str
    truth: str
    right: bool


def write_report(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a report as JSON; a reader sees the former file or the whole new one.

    Raises:
        DataError: if a value is not a number, text, list or mapping, or is NaN or infinite.
    """
    target = Path(path)
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the report {target} cannot be written as JSON: {error}", fix="give it plain, finite values"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, target)


def write_grid(path: str | Path, cells: Sequence[Shown], *, columns: int = 4) -> None:
    """Draw pictures with their question, the answer (green or red) and the truth beneath, row by row, as a PNG.

    Raises:
        DataError: if there is no cell.
    """
    if not cells:
        raise DataError("a picture grid of no pictures", fix="show at least one question")
    height = _PICTURE + 3 * _LINE + 2 * _PADDING
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (min(columns, len(cells)) * _WIDTH, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        left, top = number % columns * _WIDTH + _PADDING, number // columns * height + _PADDING
        picture = Image.fromarray(cell.pixels).convert("RGB").resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        lines = (
            (cell.question, _INK),
            (f"answer: {cell.answer}", _RIGHT if cell.right else _WRONG),
            (f"truth:  {cell.truth}", _INK),
        )
        for line, (text, colour) in enumerate(lines):
            draw.text((left, top + _PICTURE + 2 + line * _LINE), _printable(text), fill=colour)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, target)


def _printable(text: str) -> str:
    """What the built-in font can draw."""
    return " ".join(text.split()).encode("ascii", errors="replace").decode("ascii")


def machine_facts() -> dict[str, str | int | float]:
    """Describe the machine for a report."""
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count() or 0,
        "cores_available": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of those of the distributions that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str | None:
    """Return the commit of the checkout that this package lies in, or None outside one."""
    git, root = shutil.which("git"), Path(__file__).resolve().parents[2]
    if git is None or not (root / ".git").exists():
        return None
    asked = subprocess.run([git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
