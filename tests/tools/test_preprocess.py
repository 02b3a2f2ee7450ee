"""Each tool makes a dataset that the trainer's reader opens, out of a small input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.preprocess.cli import parser_of, run_tool
from mm15_megatron.data.tokenizer import Tokenizer, train_character_tokenizer

from ..data.images import photo
from ..helpers.tools import load_tool

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("captions", "text", "interleaved", "sft", "ocr", "video")

CAPTION = {"file_name": "a.jpg", "text": "a photo"}
TALK = {
    "id": "1",
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}],
}
PARTS = {
    "parts": [{"type": "text", "text": "one"}, {"type": "image", "path": "a.jpg"}, {"type": "text", "text": "two"}]
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_character_tokenizer([*map(chr, range(32, 127)), "\n"], tmp_path / "tokenizer.json")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(photo(120, 160, seed=1))
    return tmp_path


def rows(folder: Path, row: dict[str, object], *, count: int = 1) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)), encoding="utf-8")
    return path


def words_of(folder: Path, source: Path, *options: str) -> list[str]:
    images = str(folder / "images")
    shared = ["--output", str(folder / "out"), "--tokenizer", str(folder / "tokenizer.json"), "--workers", "0"]
    return [str(source), *(option.replace("IMAGES", images) for option in options), *shared]


@pytest.mark.parametrize(
    ("tool", "name", "row", "options", "text", "images"),
    [
        ("captions", "jsonl", CAPTION, ["--root", "IMAGES"], "a photo", 1),
        ("text", "jsonl", {"text": "some words"}, [], "some words", 0),
        ("interleaved", "positioned", PARTS, ["--image-folder", "IMAGES"], "one\ntwo", 1),
        ("sft", "llava", TALK, ["--image-root", "IMAGES"], "USER: \nWhat? ASSISTANT: This.", 1),
    ],
)
def test_one_document(
    folder: Path, tool: str, name: str, row: dict[str, object], options: list[str], text: str, images: int
) -> None:
    readers = load_tool(f"preprocess_{tool}").READERS
    assert run_tool("", readers, [name, *words_of(folder, rows(folder, row), *options)]) == 0
    tokenizer = Tokenizer(folder / "tokenizer.json")
    source = IndexedSource(folder / "out", tokenizer_digest=tokenizer.digest)
    assert (source.num_documents, source.manifest.images) == (1, images)
    kept = [token for token in source.tokens(0).tolist() if token not in (tokenizer.image_id, tokenizer.eos_id)]
    assert tokenizer.decode(kept) == text
    if images:
        assert source.image_sizes.tolist() == [[120, 160]]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_format_has_a_command_line(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    readers = load_tool(f"preprocess_{tool}").READERS
    for name in readers:
        with pytest.raises(SystemExit) as ended:
            parser_of("", readers).parse_args([name, "--help"])
        assert ended.value.code == 0
        assert "--validation-share" in capsys.readouterr().out


def test_the_command_as_it_is_written(folder: Path) -> None:
    """In a process of its own, with workers and a validation split."""
    source = rows(folder, {"text": "some words"}, count=20)
    source.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(20)), encoding="utf-8")
    words = words_of(folder, source)[:-2]
    command = [
        sys.executable,
        "tools/preprocess_text.py",
        "jsonl",
        *words,
        "--workers",
        "2",
        "--validation-share",
        "0.3",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "20 documents read, 20 kept" in done.stdout
    sizes = [IndexedSource(f"{folder / 'out'}{ending}").num_documents for ending in ("", "-validation")]
    assert sum(sizes) == 20
    assert min(sizes) > 0


def test_images_are_indexed_by_url(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As img2dataset leaves them in a folder; a document that holds the URL finds them."""
    (folder / "images" / "a.json").write_text(json.dumps({"url": "http://x/a", "key": "a", "status": "success"}))
    tool = load_tool("index_images")
    assert tool.main([str(folder / "urls.index"), "--folders", str(folder / "images"), "--workers", "1"]) == 0
    assert "urls=1" in capsys.readouterr().out
    assert tool.main([str(folder / "urls.index"), "--folders", str(folder / "images")]) == 2
    document = {
        "text_list": ["one"],
        "image_info": [{"image_name": "a.jpg", "raw_url": "http://x/a", "matched_text_index": 0, "matched_sim": 0.3}],
        "similarity_matrix": [[0.3]],
        "url": "http://x",
        "could_have_url_duplicate": 0,
    }
    words = words_of(folder, rows(folder, document), "--image-index", str(folder / "urls.index"))
    assert run_tool("", load_tool("preprocess_interleaved").READERS, ["mmc4", *words]) == 0
    assert IndexedSource(folder / "out").manifest.images == 1


def test_frequent_images_are_counted_and_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same picture in three documents, where two are fine."""
    (folder / "images" / "b.jpg").write_bytes(photo(120, 150, seed=2))
    often, once = PARTS, {"parts": [{"type": "image", "path": "b.jpg"}, {"type": "text", "text": "three"}]}
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in (often, often, once, often)), encoding="utf-8")
    frequent, tool = folder / "frequent.npy", load_tool("count_images")
    words = ["positioned", str(source), "--image-folder", str(folder / "images"), "--output", str(frequent)]
    assert tool.main([*words, "--more-than", "2", "--workers", "1"]) == 0
    assert "4 images, 2 different ones, 1 too frequent" in capsys.readouterr().out
    assert tool.main(words) == 2
    options = ["--image-folder", "IMAGES", "--filters-frequent-path", str(frequent)]
    made = ["positioned", *words_of(folder, source, *options)]
    assert run_tool("", load_tool("preprocess_interleaved").READERS, made) == 0
    found = IndexedSource(folder / "out").manifest
    assert (found.documents, found.images) == (1, 1)
