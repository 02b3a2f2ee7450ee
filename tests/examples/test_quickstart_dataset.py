"""The quickstart's data: deterministic, made by the tools, and without a trace of the held-out scans in training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from examples.quickstart import digits
from examples.quickstart.build_dataset import PICTURES, SEED, Sizes, build, build_training, heldout, pictures
from mm15_megatron.data.image.pillow import sniff
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.tokenizer import IMAGE_TOKEN, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SMALL = Sizes(captions=40, interleaved=20, text=12, conversations=60, heldout=10)
KINDS = {
    "captions": "captions",
    "interleaved": "interleaved",
    "text": "text",
    "conversations": "conversations",
    "heldout": "conversations",
}
ILLUSTRATED = ("captions", "interleaved", "conversations", "heldout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files, and the datasets that the tools make of them, by the quickstart's own script."""
    path = tmp_path_factory.mktemp("quickstart")
    build(path, SMALL)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = ["bash", "examples/quickstart/preprocess.sh", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return path


def _files(folder: Path) -> dict[str, bytes]:
    """Every written file but the datasets, by its path."""
    paths = [*folder.glob("files/**/*.*"), *folder.glob("data/*.json")]
    known = {f"{name}.json" for name in KINDS}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name not in known or "files" in path.parts
    }


def test_the_same_files_every_time(folder: Path, tmp_path: Path) -> None:
    build(tmp_path, SMALL)
    assert _files(folder) == _files(tmp_path)


def test_the_tools_keep_every_document(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "data" / "tokenizer.json")
    assert tokenizer.vocab_size <= 128, "the models of the quickstart have 128 ids"
    counts = {}
    for name, kind in KINDS.items():
        source = IndexedSource(folder / "data" / name, tokenizer_digest=tokenizer.digest)
        assert source.kind == kind
        counts[name] = source.num_documents
    assert counts == {**{name: getattr(SMALL, name) for name in KINDS}, "heldout": 360 + 5 * SMALL.heldout}


def test_the_last_360_scans_are_held_out() -> None:
    train, held = digits.split_scans()
    assert (len(train.digits), len(held.digits)) == (1437, 360)
    training = {scan.tobytes() for scan in train.pixels}
    assert not [scan for scan in held.pixels if scan.tobytes() in training]


def _drawn_scans(picture: digits.Picture) -> list[bytes]:
    """Recover the scans drawn in a picture from its pixels: at every offset where enlarging gives the cell again."""
    single = picture.kind == "single"
    side = digits.SIDE if single else digits.SIDE // 2
    places = [(0, 0)] if single else [(cell // 2 * side, cell % 2 * side) for cell in picture.cells]
    factor = (side - 2 * digits.JITTER) // 8
    offsets = range(side - 8 * factor + 1)
    found = []
    for top, left in places:
        cell = picture.pixels[top : top + side, left : left + side]
        for down, right in product(offsets, offsets):
            window = slice(down, down + 8 * factor), slice(right, right + 8 * factor)
            scan = cell[window][::factor, ::factor]
            again = np.zeros_like(cell)
            again[window] = np.kron(scan, np.ones((factor, factor), np.uint8))
            if (again == cell).all():
                found.append(scan.tobytes())
    return found


def test_training_files_follow_from_the_training_scans_alone(folder: Path, tmp_path: Path) -> None:
    train, _ = digits.split_scans()
    build_training(tmp_path, train, SMALL)
    found, whole = _files(tmp_path), _files(folder)
    assert found == {name: whole[name] for name in found}
    left = {name for name in whole if name not in found and not name.startswith("files/images/heldout/")}
    assert left == {"files/heldout.json", "data/heldout_questions.json"}


def test_held_out_pictures_show_held_out_scans_alone() -> None:
    train, held = digits.split_scans()
    training, unseen = ({scan.tobytes() for scan in scans.pixels} for scans in (train, held))
    for picture, _ in heldout(held, 20):
        drawn = _drawn_scans(picture)
        assert sum(scan in unseen for scan in drawn) >= len(picture.digits)
        assert not training.intersection(drawn)


def test_training_pictures_are_distorted_and_stay_in_their_cells() -> None:
    train, _ = digits.split_scans()
    half = digits.SIDE // 2
    for picture in pictures(train, 200, np.random.default_rng(SEED)):
        plain = digits.compose(train, picture.scans, np.random.default_rng(0), distort=False)
        assert not np.array_equal(picture.pixels, plain.pixels)
        if picture.cells:
            quarters = picture.pixels.reshape(2, half, 2, half).any(axis=(1, 3)).ravel()
            assert tuple(np.flatnonzero(quarters)) == picture.cells


def test_every_held_out_scan_is_asked_once_as_a_single() -> None:
    _, held = digits.split_scans()
    singles = [picture.scans for picture, question in heldout(held, 5) if question.kind == "single"]
    assert sorted(singles) == [(scan,) for scan in range(360)]


def test_held_out_questions_do_not_depend_on_how_much_is_trained_on(folder: Path, tmp_path: Path) -> None:
    build(tmp_path, Sizes(captions=1, interleaved=1, text=1, conversations=1, heldout=SMALL.heldout))
    held = {name: data for name, data in _files(tmp_path).items() if "heldout" in name}
    assert len(held) == 2 + 360 + 5 * SMALL.heldout
    assert held == {name: data for name, data in _files(folder).items() if "heldout" in name}


@pytest.mark.parametrize("name", ILLUSTRATED)
def test_pictures_have_both_formats(folder: Path, name: str) -> None:
    source = IndexedSource(folder / "data" / name)
    formats = {sniff(source.image_bytes(item)) for item in range(len(source.image_sizes))}
    assert formats == {"png", "jpeg"}
    assert (source.image_sizes == digits.SIDE).all()


@pytest.mark.parametrize("name", KINDS)
def test_every_character_is_known(folder: Path, name: str) -> None:
    source = IndexedSource(folder / "data" / name)
    unknown = 0  # the tokenizer's <unk>
    assert not any((source.tokens(document) == unknown).any() for document in range(source.num_documents))


def test_interleaved_pictures_are_followed_by_their_paragraphs(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "data" / "tokenizer.json")
    source = IndexedSource(folder / "data" / "interleaved")
    lines = (folder / "files" / "interleaved.jsonl").read_text(encoding="utf-8").splitlines()
    for document, line in enumerate(map(json.loads, lines)):
        tokens = source.tokens(document).tolist()
        assert tokens[0] == tokenizer.image_id
        starts = [at for at, token in enumerate(tokens) if token == tokenizer.image_id]
        paragraphs = [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
        assert len(paragraphs) in PICTURES
        assert [paragraph.rstrip("\n") for paragraph in paragraphs] == line["text"].split(IMAGE_TOKEN)[1:]
        assert all(re.fullmatch(r"the digits?( \d)+\n?", paragraph) for paragraph in paragraphs)
        first = source.image_index[document]
        stored = [source.image_bytes(first + at).tobytes() for at in range(len(paragraphs))]
        assert stored == [(folder / "files" / name).read_bytes() for name in line["images"]]


def test_texts_are_sums_that_are_right(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "data" / "tokenizer.json")
    source = IndexedSource(folder / "data" / "text")
    for document in range(source.num_documents):
        for part in tokenizer.decode(source.tokens(document).tolist()).split(", "):
            found = re.fullmatch(r"(\d) and (\d) are (\d)", part)
            assert found is not None, part
            assert int(found[1]) + int(found[2]) == int(found[3])


def test_answers_are_the_only_targets_of_conversations(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "data" / "tokenizer.json")
    source = IndexedSource(folder / "data" / "conversations")
    for document in range(source.num_documents):
        tokens, mask = source.tokens(document), source.loss_mask(document)
        text = tokenizer.decode(tokens[mask].tolist())
        assert set(text) <= set("0123456789 ")
        assert text.startswith(" ")


def test_questions_say_what_the_pictures_show(folder: Path) -> None:
    known = json.loads((folder / "data" / "heldout_questions.json").read_text(encoding="utf-8"))
    _, held = digits.split_scans()
    source = IndexedSource(folder / "data" / "heldout")
    tokenizer = Tokenizer(folder / "data" / "tokenizer.json")
    assert len(known) == source.num_documents == 360 + 5 * SMALL.heldout
    for document, entry in enumerate(known):
        shown = [int(held.digits[scan]) for scan in entry["scans"]]
        by_cell = {digits.CELLS[cell]: str(digit) for cell, digit in zip(entry["cells"], shown, strict=False)}
        asked = entry["question"].removeprefix("Which digit is ").removesuffix("?")
        expected = {"count": str(len(shown)), "cell": by_cell.get(asked, "")}.get(
            entry["kind"], " ".join(map(str, shown))
        )
        assert entry["answer"] == expected
        mask = source.loss_mask(document)
        assert tokenizer.decode(source.tokens(document)[mask].tolist()).strip() == expected
