"""Files and folders that are named as input, what lies behind links, and how files are cut into units."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm15_megatron.data.formats.base import UNIT_BYTES, folders_below, input_files, line_units
from mm15_megatron.errors import DataError


def test_files_behind_links_are_found_in_order(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "in" / "b").mkdir(parents=True)
    for path in ("in/c.txt", "in/b/2.txt", "in/b/x.md", "disk/1.txt"):
        (tmp_path / path).touch()
    (tmp_path / "in" / "a").symlink_to(tmp_path / "disk")
    root = tmp_path / "in"
    assert input_files((root,), endings=(".txt",)) == (root / "a" / "1.txt", root / "b" / "2.txt", root / "c.txt")
    assert list(folders_below(root)) == [(root, ["c.txt"]), (root / "a", ["1.txt"]), (root / "b", ["2.txt", "x.md"])]
    assert input_files((root / "c.txt", tmp_path / "disk"), endings=(".txt",))[1] == tmp_path / "disk" / "1.txt"


def test_input_that_cannot_be_read_once_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="holds no file that ends in .txt"):
        input_files((tmp_path / "in",), endings=(".txt",))
    with pytest.raises(DataError, match="none does not exist"):
        input_files((tmp_path / "none",), endings=(".txt",))
    (tmp_path / "in" / "a.txt").touch()
    (tmp_path / "in" / "b").symlink_to(tmp_path / "in" / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt is named twice"):
        input_files((tmp_path / "in", tmp_path / "in" / "b"), endings=(".txt",))
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"in/up/in leads back to .*/in, which holds it\n.*remove the link"):
        input_files((tmp_path / "in",), endings=(".txt",))


def test_a_file_of_few_units_is_cut_into_more(tmp_path: Path) -> None:
    """So that many processes share it: by its size alone, and never into units larger than was asked for."""
    path, mebi = tmp_path / "large", 2**20
    for size, asked, found in (
        (3 * mebi, UNIT_BYTES, [3]),
        (20 * mebi, UNIT_BYTES, [8, 8, 4]),
        (20 * mebi, 16 * mebi, [8, 8, 4]),
        (20 * mebi, 5 * mebi, [5, 5, 5, 5]),
        (2**40, UNIT_BYTES, [256] * 4096),
    ):
        with path.open("wb") as stream:
            stream.truncate(size)
        units = line_units((path,), size=asked)
        assert [((unit.stop or 0) - unit.first) // mebi for unit in units] == found
        assert [unit.first for unit in units[1:]] == [unit.stop for unit in units[:-1]]
