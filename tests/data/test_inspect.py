"""A dataset is described by its index, and every way a document can be wrong is found and named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.inspect import Histogram, check_documents, histograms
from mm15_megatron.data.tokenizer import Tokenizer, train_character_tokenizer

from ..helpers.tools import load_tool
from .images import photo


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_character_tokenizer([*map(chr, range(32, 127)), "\n"], tmp_path / "tokenizer.json")


@pytest.fixture
def captions(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    pairs = [(photo(30 + n, 40, seed=n), "word " * n) for n in range(1, 6)]
    build_captions(tmp_path / "pairs", pairs, tokenizer)
    return tmp_path / "pairs"


def silent(done: int, total: int) -> None:
    """Say nothing."""


def checked(prefix: Path, *, workers: int = 0, decode: bool = False, limit: int = 10**6) -> dict[str, int]:
    found = check_documents(prefix, workers=workers, decode=decode, max_image_pixels=limit, tell=silent)
    assert found.documents == IndexedSource(prefix).num_documents
    return dict(found.problems)


def test_histograms_count_between_powers_of_two() -> None:
    found = Histogram.of("values", np.array([0, 1, 1, 2, 3, 4, 7, 8]))
    assert (found.edges, found.counts) == ((0, 1, 2, 4, 8, 16), (1, 2, 2, 2, 1))
    assert found.mean == 26 / 8
    lines = list(Histogram.of("sides", np.array([5, 6, 40])).lines(width=4))
    assert [line.split() for line in lines[1:]] == [
        ["4", "to", "7", "2", "####"],
        ["8", "to", "15", "0"],
        ["16", "to", "31", "0"],
        ["32", "to", "63", "1", "##"],
    ]
    assert list(Histogram.of("nothing", np.zeros(0, np.int64)).lines()) == ["nothing: 0.0 on average"]


def test_a_dataset_without_images_has_empty_histograms(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "text", kind="text", tokenizer_digest="t" * 64, image_sentinel_id=3) as writer:
        writer.add_document([5, 6])
    assert [sum(h.counts) for h in histograms(IndexedSource(tmp_path / "text"))] == [1, 1, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_dataset_has_no_problem(captions: Path, workers: int) -> None:
    assert checked(captions, workers=workers, decode=True) == {}


def test_every_problem_is_named(tmp_path: Path) -> None:
    good, other = photo(30, 40, seed=1), photo(31, 40, seed=2)
    with DatasetWriter(
        tmp_path / "bad", kind="conversations", tokenizer_digest="t" * 64, image_sentinel_id=3
    ) as writer:
        writer.add_document([3, 5], images=[EncodedImage(good, 30, 40)], loss_mask=[0, 1])
        writer.add_document([3, 5], images=[EncodedImage(other, 30, 40)], loss_mask=[0, 1])
        writer.add_document([3, 5], images=[EncodedImage(b"no picture", 30, 40)], loss_mask=[0, 1])
        writer.add_document([3, 5], images=[EncodedImage(good[:200], 30, 40)], loss_mask=[0, 0])
        writer.add_document([], loss_mask=[])
    names = {
        "an image has another size than was stored": 1,
        "an image cannot be used": 1,
        "no target": 2,
        "no token": 1,
    }
    assert checked(tmp_path / "bad") == names
    assert checked(tmp_path / "bad", decode=True) == names | {"an image cannot be used": 2}
    assert checked(tmp_path / "bad", limit=100)["an image cannot be used"] == 4


def test_the_tool_says_what_is_there_and_what_is_wrong(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("inspect_dataset")
    assert tool.main([str(captions), "--check", "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert "5 documents, 85 tokens, 5 images" in text
    assert "5 documents checked, 0 problems" in text
    assert tool.main([str(captions), "--show", "1", "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    assert "[<image>word word </s>]\nimage 1: 32 x 40" in capsys.readouterr().out
    with DatasetWriter(tmp_path / "bad", kind="text", tokenizer_digest="t" * 64, image_sentinel_id=3) as writer:
        writer.add_document([])
    assert tool.main([str(tmp_path / "bad"), "--check", "--workers", "0"]) == 1
    assert "1 x no token\n    document 0: no token" in capsys.readouterr().out
    assert tool.main([str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("words", [["--show", "9", "--tokenizer", "x"], ["--show", "1"]])
def test_the_tool_refuses_wrong_arguments(captions: Path, tmp_path: Path, words: list[str]) -> None:
    words = [str(tmp_path / "tokenizer.json") if word == "x" else word for word in words]
    with pytest.raises(SystemExit):
        load_tool("inspect_dataset").main([str(captions), *words])
