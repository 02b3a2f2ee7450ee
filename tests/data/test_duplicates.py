"""A benchmark's picture is found in a dataset, also scaled and recompressed; others are not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from mm15_megatron.data.duplicates import CHUNK_IMAGES, Match, find_duplicates, look_hash
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.errors import DataError

from ..helpers.tools import load_tool


def jpeg(pixels: np.ndarray, *, scale: float = 1.0, quality: int = 90) -> bytes:
    image = Image.fromarray(pixels).convert("RGB")
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=quality)
    return stream.getvalue()


FLOWER, TEMPLE = load_sample_image("flower.jpg"), load_sample_image("china.jpg")
DETAIL = TEMPLE[150:, :300]
BLANK = np.full((40, 50), 255, np.uint8)


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmark"
    (folder / "inner").mkdir(parents=True)
    (folder / "flower.jpg").write_bytes(jpeg(FLOWER))
    (folder / "inner" / "temple.JPG").write_bytes(jpeg(TEMPLE))
    (folder / "blank.jpg").write_bytes(jpeg(BLANK))
    (folder / "notes.txt").write_text("no picture")
    return folder


def dataset(prefix: Path, *documents: list[bytes]) -> Path:
    with DatasetWriter(prefix, kind="interleaved", tokenizer_digest="t" * 64, image_sentinel_id=3) as writer:
        for images in documents:
            writer.add_document([3] * len(images) + [5], images=[EncodedImage(one, 1, 1) for one in images])
    return prefix


def found(prefix: Path, benchmark: Path, *, distance: int = 4, workers: int = 0) -> list[Match]:
    return list(
        find_duplicates(prefix, (benchmark,), max_distance=distance, workers=workers, tell=lambda done, total: None)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_equal_bytes_and_equal_looks(benchmark: Path, tmp_path: Path, workers: int) -> None:
    smaller = jpeg(TEMPLE, scale=0.5, quality=60)
    prefix = dataset(tmp_path / "set", [], [jpeg(DETAIL), jpeg(FLOWER)], [smaller], [jpeg(np.fliplr(FLOWER))])
    first, second = found(prefix, benchmark, workers=workers)
    assert first == Match(1, 1, str(benchmark / "flower.jpg"), None)
    assert (second.document, second.image, second.file) == (2, 0, str(benchmark / "inner" / "temple.JPG"))
    assert second.distance is not None
    assert second.distance <= 4


def test_pictures_without_structure_are_compared_by_bytes(benchmark: Path, tmp_path: Path) -> None:
    prefix = dataset(tmp_path / "set", [jpeg(np.zeros((30, 30), np.uint8))], [jpeg(BLANK)], [b"no picture"])
    assert found(prefix, benchmark) == [Match(1, 0, str(benchmark / "blank.jpg"), None)]


def test_the_hash_follows_the_pixels_as_they_are_shown() -> None:
    """EXIF orientation counts; a turned picture is another one."""
    upright = Image.fromarray(DETAIL)
    turned, stream = upright.transpose(Image.Transpose.ROTATE_90), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(stream, format="JPEG", quality=95, exif=exif)
    same, plain = look_hash(stream.getvalue()), look_hash(jpeg(DETAIL, quality=95))
    other = look_hash(jpeg(np.asarray(turned), quality=95))
    assert (same ^ plain).bit_count() <= 2
    assert (other ^ plain).bit_count() > 10


def test_chunks_do_not_change_what_is_found(benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [jpeg(picture) for picture in (DETAIL, FLOWER, TEMPLE)] * 3
    prefix = dataset(tmp_path / "set", *([one] for one in images))
    whole = found(prefix, benchmark)
    assert len(whole) == 6
    monkeypatch.setattr("mm15_megatron.data.duplicates.CHUNK_IMAGES", 2)
    monkeypatch.setattr("mm15_megatron.data.duplicates._COMPARED", 4)
    assert CHUNK_IMAGES > 2
    assert found(prefix, benchmark) == whole


def test_impossible_questions_are_refused(benchmark: Path, tmp_path: Path) -> None:
    prefix = dataset(tmp_path / "set", [jpeg(FLOWER)])
    with pytest.raises(DataError, match="max_distance is 65"):
        found(prefix, benchmark, distance=65)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        found(prefix, tmp_path / "empty")


def test_the_tool_writes_a_report(benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = dataset(tmp_path / "set", [jpeg(DETAIL)], [jpeg(FLOWER)])
    tool, report = load_tool("find_duplicates"), tmp_path / "report.jsonl"
    words = [str(prefix), "--against", str(benchmark), "--output", str(report), "--workers", "0"]
    assert tool.main(words) == 1
    assert "1 images are in the benchmarks: 1 byte for byte, 0 by their looks" in capsys.readouterr().out
    (line,) = map(json.loads, report.read_text().splitlines())
    assert line == {"document": 1, "image": 0, "file": str(benchmark / "flower.jpg"), "distance": None}
    clean = dataset(tmp_path / "clean", [jpeg(DETAIL)])
    assert tool.main([str(clean), *words[1:]]) == 0
    assert tool.main([str(tmp_path / "nowhere"), *words[1:]]) == 2
