"""The JSON report and the picture grid."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm15_megatron.errors import DataError
from mm15_megatron.evaluation.report import Shown, library_versions, machine_facts, write_grid, write_report


def test_a_report_is_read_back_and_replaces_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_report(path, {"accuracy": 0.5})
    content = {
        "accuracy": {"single": 0.925},
        "machine": machine_facts(),
        "versions": library_versions(["torch", "numpy"]),
    }
    write_report(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, np.float32(1.0)])
def test_a_value_that_is_not_json_is_refused_and_the_former_report_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "report.json"
    write_report(path, {"accuracy": 0.5})
    with pytest.raises(DataError, match="cannot be written as JSON"):
        write_report(path, {"accuracy": value})
    assert json.loads(path.read_text(encoding="utf-8")) == {"accuracy": 0.5}


def _cell(level: int, *, right: bool) -> Shown:
    return Shown(np.full((8, 8), level, np.uint8), "What digit is this?", "7\u00e9", "7", right)


def test_the_grid_shows_each_picture_and_the_answer_in_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    write_grid(path, [_cell(200, right=True), _cell(60, right=False), _cell(90, right=True)], columns=2)
    with Image.open(path) as image:
        pixels = np.asarray(image)
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    cells = [pixels[:height, :width], pixels[:height, width:], pixels[height:, :width], pixels[height:, width:]]
    for cell, level in zip(cells, (200, 60, 90), strict=False):
        assert (cell[60, 60] == level).all()
    coloured = [(cell[..., 1].astype(int) - cell[..., 0] > 60).any() for cell in cells]
    assert coloured == [True, False, True, False], "green marks a right answer"
    assert (cells[3] == 255).all()


def test_an_empty_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures"):
        write_grid(tmp_path / "grid.png", [])
    assert not list(tmp_path.iterdir())
