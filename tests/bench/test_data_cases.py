"""Every case of the data path's benchmark runs on tiny inputs, and a peer that is absent says why."""

from __future__ import annotations

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm15_megatron.bench.data import loading, preprocess
from mm15_megatron.bench.data.image_paths import OPENCV, PILLOW, TileRule, opencv_path, our_path, pillow_path
from mm15_megatron.bench.data.images import images, tiles
from mm15_megatron.bench.data.opening import opening, write_dataset
from mm15_megatron.bench.data.outcome import CaseResult
from mm15_megatron.bench.data.pictures import encode, photo, photo_set, photographs, screen, screen_set
from mm15_megatron.bench.data.texts import documents, train_tokenizer, write_jsonl
from mm15_megatron.config.schema import TilingConfig, VisionConfig
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import BackendError, ConfigError, DataError

from .test_data_turns import request

LEVELS = 24.0  # Pillow clamps 8-bit values between its two passes; at the sharp edges of a screenshot that shows

# What Megatron-LM's tool writes, in a few lines.
STAND_IN = """
import argparse, json, struct
import numpy as np
import tokenizers
parser = argparse.ArgumentParser()
for name in ("--input", "--output-prefix", "--json-keys", "--tokenizer-type", "--tokenizer-model", "--workers"):
    parser.add_argument(name)
parser.add_argument("--append-eod", action="store_true")
given = parser.parse_args()
tokenizer = tokenizers.Tokenizer.from_file(given.tokenizer_model + "/tokenizer.json")
texts = [json.loads(line)["text"] for line in open(given.input, encoding="utf-8")]
ids = [np.array([*tokenizer.encode(text).ids, tokenizer.token_to_id("</s>")], np.uint16) for text in texts]
lengths = np.array([len(one) for one in ids], np.int32)
prefix = given.output_prefix + "_text_document"
np.concatenate(ids).tofile(prefix + ".bin")
with open(prefix + ".idx", "wb") as stream:
    stream.write(struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, len(ids), len(ids) + 1))
    stream.write(lengths.tobytes())
    stream.write(np.cumsum([0, *lengths[:-1] * 2], dtype=np.int64).tobytes())
    stream.write(np.arange(len(ids) + 1, dtype=np.int64).tobytes())
"""


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make ``import module`` fail, as where it is not installed."""
    monkeypatch.setitem(sys.modules, module, None)


# --- Pictures


def test_a_photograph_is_continued_by_its_mirror_image() -> None:
    source = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    found = photo(source, width=12, height=8)
    assert found.size == (8, 12)
    with Image.open(io.BytesIO(found.encoded)) as image:
        assert (image.format, image.size) == ("JPEG", (12, 8))
        pixels = np.asarray(image).astype(int)
    assert np.abs(pixels - pixels[::-1, ::-1]).max() <= LEVELS


def test_pictures_are_the_same_in_every_run() -> None:
    assert np.array_equal(screen(width=320, height=200, seed=3), screen(width=320, height=200, seed=3))
    sources, names = photographs(2)
    assert len(sources) == 2
    assert names == ["sklearn/china.jpg", "sklearn/flower.jpg"]
    assert [len(group) for group in photo_set(sources).values()] == [2] * 4
    assert [name.split()[-1] for name in screen_set(1)] == ["PNG", "JPEG"] * 3


@pytest.mark.parametrize("mode", ["none", "static"])
@pytest.mark.parametrize("resize", ["stretch", "fit"])
def test_every_path_makes_the_same_tiles(mode: str, resize: str) -> None:
    rule = TileRule(VisionConfig(image_size=56), TilingConfig(mode=mode, resize=resize))
    pictures = [encode(screen(width=300, height=200, seed=1), form=form) for form in ("PNG", "JPEG")]
    found = {"ours": our_path(rule), "pil": our_path(rule, decoder="pil"), PILLOW: pillow_path(rule)}
    if find_spec("cv2") is not None:
        found[OPENCV] = opencv_path(rule)
    made = {who: list(run(pictures)) for who, run in found.items()}
    for who, mine in made.items():
        for reference, one in zip(made[PILLOW], mine, strict=True):
            assert one.shape == reference.shape == ((5 if mode == "static" else 1), 3, 56, 56)
            if who != OPENCV:
                assert rule.levels(one - reference) <= LEVELS, who


def test_a_picture_that_does_not_decode_is_an_error() -> None:
    broken = encode(screen(width=64, height=64, seed=1), form="PNG")
    rule = TileRule(VisionConfig(image_size=14), TilingConfig())
    with pytest.raises(DataError, match="does not decode"):
        next(our_path(rule)([type(broken)(broken.encoded[:-40], broken.size)]))


@pytest.mark.parametrize("case", [images, tiles])
def test_pictures_are_compared_without_opencv(case: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "cv2")
    threads = torch.get_num_threads()
    found = case(request(tmp_path))
    assert isinstance(found, CaseResult)
    assert "OpenCV cannot be imported" in found.skipped[OPENCV]
    assert [(one.what, one.peer) for one in found.comparisons[:2]] == [("photos", PILLOW), ("screenshots", PILLOW)]
    assert all(one.ours > 0 and one.verdict for one in found.comparisons[:2])
    assert torch.get_num_threads() == threads
    json.dumps(found.content())


# --- Text


def test_text_is_the_same_in_every_run(tmp_path: Path) -> None:
    assert list(documents(characters=5000)) == list(documents(characters=5000))
    count = write_jsonl(tmp_path / "text.jsonl", characters=5000)
    lines = (tmp_path / "text.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == count > 1
    tokenizer = Tokenizer(train_tokenizer(tmp_path / "tokenizer", vocabulary=400))
    text = json.loads(lines[0])["text"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_a_checkout_nothing_is_preprocessed(tmp_path: Path) -> None:
    assert "--megatron-lm" in preprocess.preprocess(request(tmp_path)).not_run
    with pytest.raises(ConfigError, match="holds no tools/preprocess_data.py"):
        preprocess.preprocess(request(tmp_path, megatron_lm=tmp_path))


def checkout(folder: Path, *, tool: str) -> Path:
    place = folder / "checkout"
    (place / "tools").mkdir(parents=True)
    (place / "tools" / "preprocess_data.py").write_text(tool, encoding="utf-8")
    return place


def test_both_tools_write_the_same_ids(tmp_path: Path) -> None:
    found = preprocess.preprocess(request(tmp_path, megatron_lm=checkout(tmp_path, tool=STAND_IN)))
    assert [one.what for one in found.comparisons] == [
        "whole command",
        "without its start",
        "without its start, by cores",
    ]
    assert found.skipped == {preprocess.FAST_PEER: "tools/preprocess_data_fast.py is not in the checkout"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]


def test_other_ids_and_a_failing_tool_are_errors(tmp_path: Path) -> None:
    other = STAND_IN.replace('tokenizer.token_to_id("</s>")', "0, 0")
    with pytest.raises(DataError, match="wrote other ids than ours"):
        preprocess.preprocess(request(tmp_path, megatron_lm=checkout(tmp_path, tool=other)))
    failing = checkout(tmp_path / "b", tool="raise SystemExit('it has no such option')")
    with pytest.raises(BackendError, match="it has no such option"):
        preprocess.preprocess(request(tmp_path, megatron_lm=failing))


# --- Opening


@pytest.mark.parametrize("count", [1, 999, 1000, 12345])
def test_a_dataset_of_any_number_of_documents_is_written(count: int, tmp_path: Path) -> None:
    source = IndexedSource(write_dataset(tmp_path, documents=count))
    assert source.num_documents == count
    assert source.token_lengths[:9].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1][:count]
    assert {path.name.split("_")[0].split(".")[0] for path in tmp_path.iterdir()} == {source.prefix.name}


def test_a_dataset_is_opened(tmp_path: Path) -> None:
    found = opening(request(tmp_path))
    assert [one.what for one in found.comparisons] == ["cold page cache", "warm page cache"]
    assert found.figures[0].value.median > 0
    assert list(tmp_path.iterdir()) == []


# --- Loaders


def test_our_loader_is_timed_without_its_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "webdataset")
    if find_spec("megatron.energon") is not None:
        pytest.skip("megatron-energon is installed: it would take part")
    found = loading.loader(request(tmp_path))
    assert "webdataset cannot be imported" in found.skipped[loading.WEBDATASET]
    assert "megatron-energon cannot prepare the shards" in found.skipped[loading.ENERGON]
    (turn,) = found.details["turns"][loading.OURS]
    assert turn["images"] >= turn["rows"] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("webdataset") is None, reason="webdataset is not installed")
def test_webdataset_gives_the_same_tiles(tmp_path: Path) -> None:
    loading._write(tmp_path, samples=4, pictures=1)
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    rule = TileRule(VisionConfig(image_size=28), TilingConfig())
    batches = loading.webdataset_batches(shards, rule=rule, images=2, workers=1, prefetch=1)
    tiles_N3TT, ids_BT = next(iter(batches))
    sources, _ = photographs(1)
    first = next(iter(photo_set(sources).values()))
    assert torch.equal(tiles_N3TT[:1], next(pillow_path(rule)(first)))
    source = IndexedSource(tmp_path / "pairs")
    assert ids_BT[0][ids_BT[0] >= 0].tolist() == source.tokens(0).tolist()
