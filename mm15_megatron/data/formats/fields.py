"""Small checks that readers share: options, the texts of rows, and files that rows name."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mm15_megatron.errors import DataError, did_you_mean

RAISE: Final = "raise"
SKIP: Final = "skip"
MISSING_IMAGE: Final = "image file is missing"
_SUCCESS: Final = "success"
_STATUSES: Final = ("failed_to_download", "failed_to_resize")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check an option.

    Raises:
        DataError: it is none of ``choices``.
    """
    if value not in choices:
        raise DataError(f"{name} is {value!r}", fix=did_you_mean(str(value), choices))


def check_named(**options: str) -> None:
    """Check options that name a field or a column.

    Raises:
        DataError: one is empty.
    """
    for name, value in options.items():
        if not value:
            raise DataError(f"{name} is empty", fix="name a field of the files")


def text_field(row: Mapping[str, Any], field: str, *, place: str) -> str | None:
    """Return the text that a row holds in a field, None for null.

    Args:
        row: a JSON object.
        field: its name.
        place: file and place, for errors.

    Raises:
        DataError: the row has no such field, or it holds something else.
    """
    if field not in row:
        raise DataError(f"{place} has no field {field!r}", fix=f"name the right field: {did_you_mean(field, row)}")
    value = row[field]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: {field!r} is a {type(value).__name__}, not a text", fix="name a field of texts")
    return value


def fault_of(text: str | None, *, noun: str) -> str | None:
    """Return the reason why a text cannot be used (``no caption``, ``empty caption``, ...), or None."""
    if text is None:
        return f"no {noun}"
    if not text or text.isspace():
        return f"empty {noun}"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return f"{noun} is not Unicode"
    return None


def status_fault(status: object) -> str | None:
    """Return the reason to leave out what img2dataset gave this status, or None; null counts as success."""
    if status in (None, _SUCCESS):
        return None
    return f"status {status}" if status in _STATUSES else "status is not success"


def path_inside(root: Path, name: str | None, *, place: str = "a record", noun: str = "image") -> Path:
    """Return the path of a file below ``root``, whether it exists or not.

    What counts is the path as it is written: it may not be absolute, nor climb out of the root by ``..``. Links below
    the root are followed wherever they lead: whoever made the folder put them there, as the usual folder of LLaVA's
    images does with ``coco -> /data/coco``. Steps back are taken off the text, so ``link/../b.jpg`` is ``b.jpg``.

    Raises:
        DataError: the path is empty, absolute, the root itself, or leads out of it.
    """
    inner = os.path.normpath(name) if name and "\0" not in name else "."
    if inner == "." or os.path.isabs(inner) or inner.split(os.sep, 1)[0] == os.pardir:
        raise DataError(
            f"{place} names the {noun} {name!r}, which is no file below {root}",
            fix="write paths relative to that folder, without '..' out of it; links that lie in it are followed",
        )
    return root / inner


def read_inside(root: Path, name: str, *, place: str, missing: str) -> bytes | None:
    """Return the bytes of a file below ``root``, or None if it does not exist and ``missing`` is ``skip``.

    Args:
        root: the folder that may not be left.
        name: path relative to it, as a row gives it.
        place: the row, for errors.
        missing: ``raise`` or ``skip``.

    Raises:
        DataError: the path is absolute, leads out of the root by ``..``, does not name a regular file, or names a
            missing one with ``missing="raise"``.
    """
    path = path_inside(root, name, place=place)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise DataError(f"{place}: {name!r} in {root} is not a file", fix="name image files")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if missing == SKIP:
            return None
        hint = "download it first" if "://" in name else f"name the right root, or let missing be {SKIP!r}"
        raise DataError(f"{place}: {name!r} is not in {root}", fix=hint) from error
    except OSError as error:
        raise DataError(f"{place}: {name!r} in {root} cannot be read: {error}", fix="repair the file") from error
