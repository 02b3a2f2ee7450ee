"""Pieces: documents longer than a row are cut without losing a target or an image, others are truncated or left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.config.schema import TilingConfig
from mm15_megatron.data.image.geometry import tile_plan
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.packing import PackingRules
from mm15_megatron.data.pieces import COUNTED, Cut, cut_documents
from mm15_megatron.data.tile_text import TileTexts

IMAGE = 99
RULES = PackingRules(
    seq_length=8,
    slots_per_tile=2,
    tile_size=14,
    tiling=TilingConfig(mode="none"),
    max_images=4,
    max_tiles=8,
    image_sentinel_id=IMAGE,
)


def write(path: Path, documents: list[list[int]], *, kind: str = "interleaved", mask: bool = False) -> IndexedSource:
    rng = np.random.default_rng(len(documents))
    with DatasetWriter(path, kind=kind, tokenizer_digest="", image_sentinel_id=IMAGE) as writer:
        for tokens in documents:
            images = [EncodedImage(b"x", *rng.integers(10, 60, 2).tolist()) for _ in range(tokens.count(IMAGE))]
            writer.add_document(tokens, images=images, loss_mask=[1] * len(tokens) if mask else None)
    return IndexedSource(path)


def cut(source: IndexedSource, rules: PackingRules = RULES, documents: list[int] | None = None) -> Cut:
    chosen = list(range(source.num_documents)) if documents is None else documents
    return cut_documents(source, np.array(chosen, np.int64), rules)


def spans(found: Cut) -> list[tuple[int, int, int]]:
    pieces = found.pieces
    return list(zip(pieces.documents.tolist(), pieces.first.tolist(), pieces.stop.tolist(), strict=True))


def counted(found: Cut) -> dict[str, int]:
    return {name: int(value) for name, value in zip(COUNTED, found.counted, strict=True) if value}


def test_text_is_cut_so_that_every_token_is_predicted_once(tmp_path: Path) -> None:
    source = write(tmp_path / "t", [[1] * 22, [1] * 8, [1] * 9, [1]], kind="text")
    found = cut(source, documents=[2, 0, 3, 1])
    assert spans(found) == [(2, 0, 8), (2, 7, 9), (0, 0, 8), (0, 7, 15), (0, 14, 22), (1, 0, 8)]
    assert counted(found) == {"documents": 4, "kept": 3, "samples": 6, "tokens": 42, "nothing to predict": 1}


I = IMAGE  # noqa: E741


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, I, 4, 5], [(0, 6)]),
        ([1, 2, 3, 4, 5, 6, 7, I, 8, 9], [(0, 7), (7, 10)]),  # the image does not fit any more: it starts the next one
        ([1, 2, 3, 4, 5, 6, I, 8, 9], [(0, 6), (6, 9)]),  # it would fit, and stand at the end
        ([1, 2, 3, 4, I, I, 4, 5], [(0, 4), (4, 8)]),  # so does a run of images
        ([I, I, I, 1, 2, 3, 4], [(0, 5), (4, 7)]),
        ([I, I, I, I, I, 1], [(4, 6)]),  # four images fill a row: nothing to predict, left out
        ([1, I, I, I, I, I, 2, 3], [(5, 8)]),
        ([1] * 7 + [2, I, I, I, I, 3], [(0, 8)]),  # nothing lies between the shared token and the run
        ([1] * 9 + [I] * 3 + [2, 3, 4], [(0, 8), (7, 9), (9, 14), (13, 15)]),
    ],
)
def test_where_documents_are_cut(tmp_path: Path, tokens: list[int], expected: list[tuple[int, int]]) -> None:
    found = cut(write(tmp_path / "d", [tokens]))
    assert [(first, stop) for _, first, stop in spans(found)] == expected


def test_a_run_of_images_without_text_is_counted(tmp_path: Path) -> None:
    found = cut(write(tmp_path / "d", [[I, I, I, I, I, 1]]))
    assert counted(found) == {
        "documents": 1,
        "kept": 1,
        "samples": 1,
        "tokens": 3,
        "image_slots": 2,
        "images": 1,
        "tiles": 1,
        "untrained_pieces": 1,
        "untrained_images": 4,
    }
    assert counted(cut(write(tmp_path / "e", [[I] * 5]))) == {"documents": 1, "nothing to predict": 1}


def test_an_image_that_no_row_holds(tmp_path: Path) -> None:
    source = write(tmp_path / "d", [[1, 2, I, 3], [1, 2, 3]])
    large = replace(RULES, slots_per_tile=9)
    assert counted(cut(source, large)) | {"tokens": 3} == {
        "documents": 2, "kept": 1, "samples": 1, "tokens": 3, "an image that no row holds": 1,
    }  # fmt: skip
    tiled = replace(RULES, tiling=TilingConfig(mode="static"), max_tiles=4, seq_length=64)
    assert counted(cut(source, tiled))["an image that no row holds"] == 1


def lengths_of(source: IndexedSource, document: int, rules: PackingRules) -> tuple[list[int], list[int]]:
    """Tokens and tiles that each stored token becomes, one by one."""
    tokens = source.tokens(document)
    first, count = int(source.image_index[document]), int((tokens == IMAGE).sum())
    items = iter(range(first, first + count))
    lengths, tiles, number = [], [], 0
    for token in tokens:
        if token != IMAGE:
            lengths.append(1)
            tiles.append(0)
            continue
        height, width = source.image_sizes[next(items)].tolist()
        place = {"images_in_sample": count, "number": number}
        plan = tile_plan(height, width, tile_size=rules.tile_size, tiling=rules.tiling, **place)
        texts = sum(map(len, rules.tile_texts.before_tiles(number, plan)))
        lengths.append(plan.num_tiles * rules.slots_per_tile + texts)
        tiles.append(plan.num_tiles)
        number += 1
    return lengths, tiles


@pytest.mark.parametrize("indicator", ["none", "index", "seps"])
@pytest.mark.parametrize("mode", ["none", "static", "dynamic"])
@pytest.mark.parametrize("seed", range(6))
def test_random_documents_are_cut_within_the_caps(tmp_path: Path, mode: str, indicator: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [
        rng.choice([1, 2, 3, IMAGE], size=rng.integers(1, 90), p=[0.4, 0.3, 0.1, 0.2]).tolist() for _ in range(60)
    ] + [[1] * int(n) for n in rng.integers(1, 200, 20)]
    source = write(tmp_path / "d", documents)
    mixed = int(rng.integers(3)) if indicator != "index" else 0
    tiling = TilingConfig(mode=mode, indicator=indicator, max_split_images=3, mixed_resolution_images=mixed)
    texts = TileTexts.build(tiling, lambda text: [7] * len(text))
    rules = replace(
        RULES, seq_length=int(rng.integers(110, 130)), tiling=tiling, max_images=5, max_tiles=32, tile_texts=texts
    )
    found = cut(source, rules)
    totals = dict(zip(COUNTED, found.counted.tolist(), strict=True))
    by_document: dict[int, list[tuple[int, int]]] = {}
    for number, (document, first, stop) in enumerate(spans(found)):
        lengths, tiles = lengths_of(source, document, rules)
        sizes = found.pieces.sizes
        assert sizes.tokens[number] == sum(lengths[first:stop]) <= rules.seq_length
        assert sizes.tiles[number] == sum(tiles[first:stop]) <= rules.max_tiles
        assert sizes.images[number] == documents[document][first:stop].count(IMAGE) <= rules.max_images
        by_document.setdefault(document, []).append((first, stop))
    images_left_out = 0
    for document, tokens in enumerate(documents):
        pieces = by_document.get(document, [])
        targets = [place for first, stop in pieces for place in range(first + 1, stop) if tokens[place] != IMAGE]
        assert len(set(targets)) == len(targets), "no token is a target twice"
        shown = [place for first, stop in pieces for place in range(first, stop)]
        missing = [place for place in range(len(tokens)) if place not in set(shown)]
        images_left_out += sum(tokens[place] == IMAGE for place in missing) if pieces else 0
        assert all(tokens[place] == IMAGE or place == 0 or not pieces for place in missing)
        images_twice = [place for place in shown if tokens[place] == IMAGE]
        assert len(set(images_twice)) == len(images_twice), "no image is shown twice"
        if pieces:
            expected = [p for p in range(1, len(tokens)) if tokens[p] != IMAGE]
            lost = sorted(set(expected) - set(targets))
            # a text token loses its place as a target only behind a cut that a run of images forced
            assert all(tokens[place - 1] == IMAGE for place in lost)
    assert totals["untrained_images"] == images_left_out
    assert totals["documents"] == len(documents)
    reasons = COUNTED[COUNTED.index("untrained_images") + 1 :]
    assert totals["kept"] + sum(totals[reason] for reason in reasons) == len(documents)
    assert totals["samples"] == len(found.pieces.documents)
    shuffled = rng.permutation(len(documents))
    again = cut(source, rules, shuffled.tolist())
    assert sorted(spans(again)) == sorted(spans(found))
    assert again.counted.tolist() == found.counted.tolist()


def test_selection_counts_what_it_drops_and_cuts(tmp_path: Path) -> None:
    """Conversations and captions lose the end of their text, or are left out."""
    picture = EncodedImage(b"x", 20, 10)
    documents = [
        ([IMAGE, 1, 2], None),
        ([IMAGE, *range(1, 11)], None),  # 12 tokens: text is cut to 8
        ([1, 2, 3, 4, 5, 6, 7, IMAGE], None),  # the image would be cut
        ([1], None),  # nothing to predict
        ([IMAGE] * 5, None),  # more than max_images
        ([*range(1, 11)], [0] * 9 + [1]),  # no target before the cut
        ([5, 6], None),
    ]
    with DatasetWriter(tmp_path / "odd", kind="conversations", tokenizer_digest="", image_sentinel_id=IMAGE) as writer:
        for tokens, mask in documents:
            images = [picture] * tokens.count(IMAGE)
            writer.add_document(tokens, images=images, loss_mask=mask or [1] * len(tokens))
    source = IndexedSource(tmp_path / "odd")
    found = cut(source, documents=[6, 0, 1, 2, 3, 4, 5])
    assert spans(found) == [(6, 0, 2), (0, 0, 3), (1, 0, 7)]
    assert found.pieces.sizes.tokens.tolist() == [2, 4, 8]
    assert found.pieces.sizes.images.tolist() == [0, 1, 1]
    assert counted(found) == {
        "documents": 7,
        "kept": 3,
        "samples": 3,
        "tokens": 14,
        "image_slots": 4,
        "images": 2,
        "tiles": 2,
        "truncated": 1,
        "truncated_tokens": 4,
        "nothing to predict": 1,
        "more images than data.max_images": 1,
        "longer than a row, an image would be cut": 1,
        "longer than a row, no target would be left": 1,
    }
    tiled = replace(RULES, seq_length=64, tiling=TilingConfig(mode="dynamic"), max_tiles=100)
    sizes = cut(source, replace(tiled, max_images=5), [0, 6]).pieces.sizes
    assert (sizes.tokens.tolist(), sizes.tiles.tolist()) == ([2 + 18, 2], [9, 0])  # 20x10: 4x2 tiles and an overview
    assert counted(cut(source, replace(tiled, max_tiles=8), [0])) == {
        "documents": 1,
        "more tiles than data.max_tiles": 1,
    }


def test_no_document_at_all(tmp_path: Path) -> None:
    found = cut(write(tmp_path / "d", [[1, 2]]), documents=[])
    assert (len(found.pieces.documents), found.counted.sum()) == (0, 0)
