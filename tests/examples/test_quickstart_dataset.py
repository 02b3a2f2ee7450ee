"""The quickstart's data: deterministic, in the final format, and without a trace of the held-out scans in training."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from examples.quickstart import digits
from examples.quickstart.build_dataset import SEED, Sizes, build, build_training, heldout, pictures
from mm15_megatron.data.image.pillow import sniff
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.tokenizer import Tokenizer

SMALL = Sizes(captions=40, conversations=60, heldout=10)
SOURCES = ("captions", "conversations", "heldout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart")
    build(path, SMALL)
    return path


def test_the_same_files_every_time(folder: Path, tmp_path: Path) -> None:
    build(tmp_path, SMALL)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if (folder / name).read_bytes() != (tmp_path / name).read_bytes()] == []


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
    names = [path.name for path in tmp_path.iterdir()]
    assert "captions_images.bin" in names
    assert [name for name in names if (folder / name).read_bytes() != (tmp_path / name).read_bytes()] == []


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
    build(tmp_path, Sizes(captions=1, conversations=1, heldout=SMALL.heldout))
    assert (folder / "heldout_images.bin").read_bytes() == (tmp_path / "heldout_images.bin").read_bytes()


@pytest.mark.parametrize("name", SOURCES)
def test_sources_open_with_both_image_formats_and_every_character(folder: Path, name: str) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    source = IndexedSource(folder / name, tokenizer_digest=tokenizer.digest)
    formats = {sniff(source.image_bytes(item)) for item in range(len(source.image_sizes))}
    assert formats == {"png", "jpeg"}
    assert (source.image_sizes == digits.SIDE).all()
    unknown = 0  # the tokenizer's <unk>
    assert not any((source.tokens(document) == unknown).any() for document in range(source.num_documents))


def test_answers_are_the_only_targets_of_conversations(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    source = IndexedSource(folder / "conversations")
    for document in range(source.num_documents):
        tokens, mask = source.tokens(document), source.loss_mask(document)
        text = tokenizer.decode(tokens[mask].tolist())
        assert set(text) <= set("0123456789 ")
        assert text.startswith(" ")


def test_questions_say_what_the_pictures_show(folder: Path) -> None:
    known = json.loads((folder / "heldout_questions.json").read_text(encoding="utf-8"))
    _, held = digits.split_scans()
    source = IndexedSource(folder / "heldout")
    tokenizer = Tokenizer(folder / "tokenizer.json")
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
