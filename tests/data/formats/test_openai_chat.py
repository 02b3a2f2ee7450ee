"""OpenAI's chat form."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mm15_megatron.data.formats.image_store import UrlStore
from mm15_megatron.data.formats.openai_chat import OpenAIChat
from mm15_megatron.data.formats.url_sources import UrlMap, build_url_index
from mm15_megatron.errors import DataError
from tests.data.formats.conversation_files import outcomes, read_all, simple, write_images, write_lines
from tests.data.images import photo

URL = "https://example.com/photo.jpg"


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def talk(*contents: Any) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]}


def read(folder: Path, *records: Any, **options: Any) -> list[Any]:
    return read_all(OpenAIChat((write_lines(folder / "a.jsonl", records),), **options))


def test_texts_and_parts_and_images(tmp_path: Path) -> None:
    images = write_images(tmp_path, "pictures/a b.png", "c.png")
    inline = photo(5, 6, seed=9)
    found = read(
        tmp_path,
        talk("What is a cheese?", "Milk."),
        talk([text("What is this?"), image(data_url(inline))], [text("Danbo"), text("cheese")]),
        talk(
            [image("pictures/a b.png"), image("c.png"), text("Same?")],
            "No.",
            [text("And"), image("file://" + quote(str(tmp_path / "pictures/a b.png"))), text("?")],
            [{"type": "output_text", "text": "Yes."}],
        ),
        talk([{"type": "input_image", "image_url": data_url(inline)}, {"type": "input_text", "text": "Q"}], "A"),
        talk([image("data:image/png," + quote(inline))], "A"),
    )
    first, second = images.values()
    assert [simple(item) for item in found] == [
        ((("user", "What is a cheese?"), ("assistant", "Milk.")), ()),
        ((("user", "What is this?\n<image>"), ("assistant", "Danbo\ncheese")), (inline,)),
        (
            (
                ("user", "<image>\n<image>\nSame?"), ("assistant", "No."),
                ("user", "And\n<image>\n?"), ("assistant", "Yes."),
            ),
            (first, second, first),
        ),
        ((("user", "<image>\nQ"), ("assistant", "A")), (inline,)),
        ((("user", "<image>"), ("assistant", "A")), (inline,)),
    ]  # fmt: skip


def test_the_example_of_the_guide(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(data := photo(7, 8))
    (tmp_path / "map.jsonl").write_text(json.dumps({"url": URL, "path": "photo.jpg"}))
    build_url_index(tmp_path / "urls", maps=(UrlMap(tmp_path / "map.jsonl", root=tmp_path),))
    messages = [
        {"role": "system", "content": "You are an assistant that identifies uncommon cheeses."},
        {"role": "user", "content": "What is this cheese?"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]},
        {"role": "assistant", "content": "Danbo", "weight": 1},
    ]
    other = talk([image("HTTP://example.com/gone.jpg")], "A")
    urls = UrlStore(tmp_path / "urls")
    found = read(tmp_path, {"messages": messages}, other, system="drop", urls=urls)
    assert outcomes(found) == ["system turn", "image file is missing"]
    assert simple(found[0]) == ((("user", "What is this cheese?\n<image>"), ("assistant", "Danbo")), (data,))
    with pytest.raises(DataError, match="gone.jpg' is not in the index"):
        read(tmp_path, other, urls=urls, missing_image="error")
    with pytest.raises(DataError, match=f"image '{URL}', and nothing is downloaded") as error:
        read(tmp_path, {"messages": messages}, system="drop", on_bad="skip")
    assert "index" in error.value.fix
    messages[0]["role"] = "developer"
    (found_one,) = read(tmp_path, {"messages": messages}, system="prepend-to-first-user", urls=urls)
    assert simple(found_one)[0][0][1].startswith("You are an assistant that identifies uncommon cheeses.\nWhat")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk([image("data:image/png;base64,@@")], "A"), "malformed data: URL"),
        (talk([image("data:image/png;base64")], "A"), "malformed data: URL"),
        (talk("Q", [image("a.png")]), "image outside a user turn"),
        (talk("What is <image>?", "A"), "placeholder in a text"),
        (talk("Q", "<image>"), "placeholder in a text"),
    ],
)
def test_bad_conversations_are_errors_or_counted(tmp_path: Path, record: Any, reason: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl at a\.jsonl:0"):
        read(tmp_path, record)
    assert outcomes(read(tmp_path, record, talk("Q", "A"), on_bad="skip")) == [reason, ""]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "tool"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "tool"),
        ([{"role": "assistant", "content": "x", "weight": 0}], "answer of weight 0"),
        ([{"role": "assistant", "content": None, "refusal": "no"}], "refusal"),
        ([{"role": "assistant", "content": None, "audio": {"id": "1"}}], "audio"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "audio"),
        ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "file"),
        (
            [{"role": "user", "content": [image("gone.png")]}, {"role": "assistant", "content": "A"}],
            "image file is missing",
        ),
    ],
)
def test_what_is_not_read_is_counted(tmp_path: Path, messages: list[Any], reason: str) -> None:
    record = {"messages": [*talk("Q", "A")["messages"], *messages]}
    assert outcomes(read(tmp_path, talk("Q", "A"), record)) == ["", reason]


def test_images_stay_below_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    for url in ("../secret.png", f"file://{tmp_path}/secret.png", "file:///etc/passwd", "file://%2e%2e/x"):
        with pytest.raises(DataError, match="names the image"):
            read(tmp_path, talk([image(url)], "A"), image_root=tmp_path / "in", on_bad="skip")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": []}, r"the fields are \['conversations'\]"),
        ({"messages": [{"role": "human", "content": "x"}]}, "message 0 has the role 'human'"),
        ({"messages": [{"role": "user"}]}, "message 0 has the content 'None'"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "message 0 has the content"),
        (talk([{"type": "picture"}]), "part of type 'picture'"),
        (talk(["text"]), "part of type None"),
        (talk([{"type": "text"}]), r"a part of fields \['type'\]"),
        (talk([{"type": "input_image", "file_id": "f-1"}]), r"an image part of fields \['file_id', 'type'\]"),
    ],
)
def test_what_is_not_openai_chat_is_refused(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, record, on_bad="skip")
    assert error.value.fix
