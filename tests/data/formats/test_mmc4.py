"""MMC4 in the published structure, and with what may be wrong in it."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm15_megatron.data.formats.base import Found, Skipped
from mm15_megatron.data.formats.image_store import ImageFolder
from mm15_megatron.data.formats.interleaved_filters import InterleavedFilters
from mm15_megatron.data.formats.mmc4 import Mmc4
from mm15_megatron.errors import DataError
from tests.data.formats.interleaved import Shelf, everything, pictures, shown, url

IMAGES = pictures(4)
NAME = "docs_no_face_shard_7_v3"
S = ("First.", "Second.", "Third.")


def image(number: object, sentence: Any, *, similarity: Any = 0.25, faces: object = None) -> dict[str, Any]:
    return {
        "face_detections": faces,
        "image_name": f"{number}abc.jpg",
        "matched_sim": similarity,
        "matched_text_index": sentence,
        "raw_url": url(number),
    }


def document(*images: dict[str, Any], **changes: object) -> dict[str, Any]:
    matrix = [[0.1, 0.3, 0.3], [0.9, 0.2, 0.2], [0.0, 0.0, 0.1]][: len(images)]
    return {
        "image_info": list(images),
        "similarity_matrix": matrix,
        "text_list": list(S),
        "url": "http://example.com/page.html",
        "could_have_url_duplicate": 0,
    } | changes


DOCUMENTS = [
    document(image(0, 2, similarity=0.27), image(1, 1, similarity=0.32)),
    document(image(2, 0), image(3, 0), could_have_url_duplicate=1),
    document(image("gone", 1)),
    document(image(0, 0, faces=[[0.1, 0.2]]), image("gone", 1, similarity=0.1), image(1, 2)),
    document(),
]


def write(folder: Path, documents: list[dict[str, Any]] = DOCUMENTS, *, zipped: bool = False) -> Path:
    """A shard as it is published."""
    lines = "".join(json.dumps(row) + "\n" for row in documents)
    path = folder / f"{NAME}.jsonl{'.zip' if zipped else ''}"
    if zipped:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{NAME}.jsonl", lines)
            archive.writestr(f"__MACOSX/._{NAME}.jsonl", b"junk")
    else:
        path.write_text(lines)
    return path


def read(path: Path, **options: Any) -> list[object]:
    return shown(everything(Mmc4((path,), Shelf(IMAGES), **options)), IMAGES)


def test_images_stand_before_their_sentences(tmp_path: Path) -> None:
    path = write(tmp_path)
    reader = pickle.loads(pickle.dumps(Mmc4((path,), Shelf(IMAGES))))
    assert reader.kind == "interleaved"
    assert shown(everything(reader), IMAGES) == [
        [["First.", (url(1),), "Second.", (url(0),), "Third."], []],
        [[(url(2),), (url(3),), "First. Second. Third."], []],
        "every image missing",
        [[(url(0),), "First. Second.", (url(1),), "Third."], ["image missing"]],
        [["First. Second. Third."], []],
    ]


def test_after_and_random(tmp_path: Path) -> None:
    path = write(tmp_path)
    after = read(path, placement="after")
    assert after[0] == [["First. Second.", (url(1),), "Third.", (url(0),)], []]
    assert after[1] == [["First.", (url(2),), (url(3),), "Second. Third."], []]
    random = [read(path, placement="random", seed=seed) for seed in range(12)]
    assert random[3] == read(path, placement="random", seed=3)
    assert {str(result[0]) for result in random} == {
        str([parts, []])
        for parts in (
            ["First.", (url(1),), "Second.", (url(0),), "Third."],
            ["First.", (url(1),), "Second. Third.", (url(0),)],
            ["First. Second.", (url(1),), (url(0),), "Third."],
            ["First. Second.", (url(1),), "Third.", (url(0),)],
        )
    }


def test_zip_and_units_change_nothing(tmp_path: Path) -> None:
    plain = write(tmp_path)
    zipped = write(tmp_path, zipped=True)
    reader = Mmc4((plain,), Shelf(IMAGES), placement="random", seed=1)
    whole = everything(reader)
    assert len(reader.units()) == 1
    for other in (replace(reader, paths=(zipped,)), replace(reader, unit_bytes=100), replace(reader, unit_bytes=701)):
        assert everything(other) == whole
    assert len(replace(reader, unit_bytes=100).units()) > 10
    assert [item.where for item in whole][:1] == [f"{NAME}.jsonl:0"]


def test_options_that_leave_things_out(tmp_path: Path) -> None:
    path = write(tmp_path)
    similar = read(path, min_similarity=0.26)
    assert similar[0] == [["First.", (url(1),), "Second.", (url(0),), "Third."], []]
    assert similar[1] == [["First. Second. Third."], ["image less similar than min_similarity"] * 2]
    assert read(path, faces="drop-image")[3] == [
        ["First. Second.", (url(1),), "Third."],
        ["image with faces", "image missing"],
    ]
    assert read(path, url_duplicates="drop-document")[1] == "could have a URL duplicate"
    assert read(path, on_missing="drop-document")[2:4] == ["image missing", "image missing"]
    assert read(path, filters=InterleavedFilters(url_words=("/1.jpg",)))[0] == [
        ["First. Second.", (url(0),), "Third."],
        ["image URL contains a word of url_words"],
    ]


def test_the_most_similar_sentence(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert read(path, assignment="most-similar")[0] == [[(url(1),), "First.", (url(0),), "Second. Third."], []]
    found = read(path, assignment="most-similar", min_similarity=0.5)
    assert found[0] == [[(url(1),), "First. Second. Third."], ["image less similar than min_similarity"]]


@pytest.mark.parametrize("key", ["name", "shard/name"])
def test_images_by_name(tmp_path: Path, key: str) -> None:
    path = write(tmp_path)
    folder = tmp_path / f"{NAME}_images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}abc.jpg").write_bytes(IMAGES[url(number)])
    store = ImageFolder(folder if key == "name" else tmp_path)
    assert shown(everything(Mmc4((path,), store, image_key=key)), IMAGES) == read(path)


@pytest.mark.parametrize(
    ("row", "options", "match"),
    [
        ({"text": "x"}, {}, "text_list is not a list of texts"),
        (document(text_list=["a", None]), {}, "text_list is not a list of texts"),
        (document(image_info=None), {}, "image_info is not a list of objects"),
        (document(image(0, 3)), {}, "image 0 is matched to sentence 3 of 3"),
        (document(image(0, -1)), {}, "matched to sentence -1"),
        (document(image(0, True)), {}, "matched to sentence True"),
        (document(image(0, 0) | {"raw_url": None}), {}, "image 0 has raw_url None"),
        (document(image(0, 0) | {"image_name": 1}), {"image_key": "name"}, "image 0 has image_name 1"),
        (document(image(0, 0, similarity="x")), {"min_similarity": 0.1}, "matched_sim 'x'"),
        (document(image(0, 0), similarity_matrix=[]), {"assignment": "most-similar"}, "not 1 images x 3 sentences"),
        (document(image(0, 0), similarity_matrix=[[1]]), {"assignment": "most-similar"}, "not 1 images x 3"),
        (document(image(0, 0), similarity_matrix=[[1, "a", 2]]), {"assignment": "most-similar"}, "more than numbers"),
        ({"text_list": [], "image_info": [{"raw_url": url(0), "matched_text_index": 0}]}, {}, "sentence 0 of 0"),
    ],
)
def test_malformed_documents(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], match: str) -> None:
    path = write(tmp_path, [DOCUMENTS[0], row])
    with pytest.raises(DataError, match=match):
        read(path, **options)


def test_faces_need_their_field(tmp_path: Path) -> None:
    bare = image(0, 0)
    del bare["face_detections"]
    path = write(tmp_path, [document(bare)])
    assert isinstance(everything(Mmc4((path,), Shelf(IMAGES)))[0], Found)
    with pytest.raises(DataError, match="has no face_detections"):
        read(path, faces="drop-image")


def test_damaged_shards(tmp_path: Path) -> None:
    path = write(tmp_path, zipped=True)
    whole = path.read_bytes()
    for bad in (whole[:-40], b"no zip", whole[:80] + b"????" + whole[84:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="not a sound zip file"):
            read(path)
    for content, match in ((b"[1]\n", "holds a list"), (b"{\n", f"{NAME}.jsonl:0"), (b"\xff\n", "utf-8")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{NAME}.jsonl", content)
        with pytest.raises(DataError, match=match):
            read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(DataError, match="holds no .jsonl"):
        read(path)


@pytest.mark.parametrize(
    "options",
    [
        {"placement": "between"},
        {"assignment": "given"},
        {"image_key": "raw_url"},
        {"faces": "drop"},
        {"url_duplicates": "drop"},
        {"on_missing": "raise"},
        {"min_similarity": 24.0},
        {"min_similarity": float("nan")},
        {"unit_bytes": 0},
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        Mmc4((tmp_path,), Shelf({}), **options)


def test_documents_without_anything_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, [document(text_list=[])])
    assert everything(Mmc4((path,), Shelf({}))) == [Skipped("empty document", f"{NAME}.jsonl:0")]
