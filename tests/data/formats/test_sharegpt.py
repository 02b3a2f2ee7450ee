"""ShareGPT's form and LLaMA-Factory's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm15_megatron.data.formats.sharegpt import ShareGPT
from mm15_megatron.errors import DataError
from tests.data.formats.conversation_files import (
    outcomes,
    read_all,
    simple,
    write_array,
    write_images,
    write_lines,
    write_parquet,
)

NAMES = ("mllm_demo_data/1.jpg", "mllm_demo_data/2.jpg")


def read(folder: Path, *records: Any, **options: Any) -> list[Any]:
    return read_all(ShareGPT((write_array(folder / "a.json", list(records)),), **options))


def messages(*texts: str, who: str = "role", text: str = "content") -> list[dict[str, str]]:
    return [{text: value, who: ("user", "assistant")[n % 2]} for n, value in enumerate(texts)]


def test_the_forms_of_llama_factory(tmp_path: Path) -> None:
    one, two = write_images(tmp_path, *NAMES).values()
    found = read(
        tmp_path,
        {"messages": messages("<image>Who are they?", "Kane.", "And <image>?", "Gretzka."), "images": list(NAMES)},
        {
            "conversations": [{"from": "human", "value": "Hi<image>"}, {"from": "gpt", "value": "Ho"}],
            "images": [NAMES[1]],
            "tools": "",
        },
        {"conversation": messages("Why?", "So."), "images": None, "system": ""},
        {"conversations": messages("Why?", "So.", who="from", text="value"), "images": []},
    )
    assert [simple(item) for item in found] == [
        (
            (
                ("user", "<image>Who are they?"), ("assistant", "Kane."),
                ("user", "And <image>?"), ("assistant", "Gretzka."),
            ),
            (one, two),
        ),
        ((("user", "Hi<image>"), ("assistant", "Ho")), (two,)),
        ((("user", "Why?"), ("assistant", "So.")), ()),
        ((("user", "Why?"), ("assistant", "So.")), ()),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"])
def test_names_of_roles(tmp_path: Path, name: str) -> None:
    turns = [{"from": "user", "text": "Q"}, {"from": name, "text": "A"}]
    path = write_lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    (found,) = read_all(ShareGPT((path,)))
    assert simple(found)[0] == (("user", "Q"), ("assistant", "A"))


def test_rows_of_parquet(tmp_path: Path) -> None:
    images = write_images(tmp_path, "nlvr2/a.png", "nlvr2/b.png")
    turns = messages("<image> and <image> differ?", "Yes")
    row = {"id": "1", "conversation": turns, "source": "nlvr2"}
    parts = [{"bytes": images["nlvr2/a.png"], "path": None}, {"bytes": None, "path": "nlvr2/b.png"}]
    path = write_parquet(tmp_path / "a.parquet", [row | {"images": parts}] * 3)
    found = read_all(ShareGPT((path,)))
    assert [simple(item) for item in found] == [
        (tuple((t["role"], t["content"]) for t in turns), tuple(images.values()))
    ] * 3


def test_images_without_placeholders(tmp_path: Path) -> None:
    write_images(tmp_path, *NAMES)
    record = {"messages": messages("Who are they?", "Kane."), "images": [NAMES[0]]}
    with pytest.raises(DataError, match="0 <image> placeholders and 1 images"):
        read(tmp_path, record)
    (found,) = read(tmp_path, record, missing_placeholder="prepend")
    assert simple(found)[0][0] == ("user", "<image>\nWho are they?")


def test_the_system_field_is_a_system_turn(tmp_path: Path) -> None:
    record = {"conversations": messages("Q", "A"), "system": "Be brief."}
    with pytest.raises(DataError, match="system turn 'Be brief.'"):
        read(tmp_path, record)
    (found,) = read(tmp_path, record, system="prepend-to-first-user")
    assert simple(found)[0][0] == ("user", "Be brief.\nQ")
    record["conversations"].insert(0, {"role": "system", "content": "Be long."})  # type: ignore[attr-defined]
    assert outcomes(read(tmp_path, record, system="drop", on_bad="skip")) == ["two system turns"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": "[{}]"}, "tool"),
        ({"videos": ["a.mp4"]}, "video"),
        ({"audios": ["a.wav"]}, "audio"),
        ({"conversations": [*messages("Q"), {"role": "function_call", "content": "{}"}]}, "tool"),
        ({"conversations": [*messages("Q"), {"role": "assistant", "content": None}]}, "turn without a text"),
        ({"images": ["gone.jpg"], "conversations": messages("<image>", "A")}, "image file is missing"),
    ],
)
def test_what_is_not_read_is_counted(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    good = {"conversations": messages("Q", "A")}
    assert outcomes(read(tmp_path, good, good | change, good, on_bad="skip")) == ["", reason, ""]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"has no field for turns; its fields are \['text'\]"),
        ({"messages": [], "conversations": []}, "'conversations' and 'messages' for turns"),
        ({"messages": [{"content": "x"}]}, "turn 0 has no field for the speaker"),
        ({"messages": [{"role": "user"}]}, "turn 0 has no field for the text"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "turn 0 is from 'usr'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "list of parts"),
        ({"conversations": messages("Q"), "chosen": {}, "rejected": {}}, "preference data"),
        ({"messages": messages("Q", "A"), "images": ["a"], "image": "b"}, "'images' and 'image' for images"),
        ({"messages": messages("Q", "A"), "images": [1]}, "'images' holds '1', a int"),
    ],
)
def test_what_is_not_sharegpt_is_refused(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, record, on_bad="skip")
    assert "a.json at a.json:1" in error.value.problem
    assert error.value.fix
