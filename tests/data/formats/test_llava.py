"""LLaVA's form, and the rules for turns, placeholders and images that all readers of conversations share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm15_megatron.data.formats.base import Format
from mm15_megatron.data.formats.llava import Llava
from mm15_megatron.data.sft import build_conversations
from mm15_megatron.data.tokenizer import Tokenizer
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

NAMES = ("coco/train2017/000000033471.jpg", "gqa/images/1.jpg", "gqa/images/2.jpg")


def talk(*values: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"id": "7", "conversations": turns, **more}


RECORDS = [
    talk("<image>\nWhat colors has the bus?", "White.", "And the road?", "Gray.", image=NAMES[0]),
    talk("What is it?\n<image>", "A bus.", image=NAMES[0]),
    talk("See <image> and then", "Fine.", "<image>, is it the same?", "No.", image=list(NAMES[1:])),
    talk("Write a poem.", "Röses are red"),
    talk("Write another one.", "No", image=""),
    talk("Where?", "Here", image=None),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", *NAMES)
    return tmp_path


def read(root: Path, *records: Any, **options: Any) -> list[Any]:
    path = write_array(root / "a.json", list(records))
    return read_all(Llava((path,), image_root=root / "images", **options))


def image(root: Path, name: str) -> bytes:
    return (root / "images" / name).read_bytes()


@pytest.mark.parametrize("form", ["array", "pretty", "lines"])
def test_records_are_read_as_they_are(root: Path, form: str) -> None:
    if form == "lines":
        path = write_lines(root / "mix665k.jsonl", RECORDS)
    else:
        path = write_array(root / "llava_v1_5_mix665k.json", RECORDS, indent=2 if form == "pretty" else None)
    reader: Format = Llava((path,), image_root=root / "images")
    assert reader.kind == "conversations"
    found = read_all(Llava((path,), image_root=root / "images"))
    first, second, third = (image(root, name) for name in NAMES)
    assert [simple(item) for item in found] == [
        (
            (
                ("user", "<image>\nWhat colors has the bus?"), ("assistant", "White."),
                ("user", "And the road?"), ("assistant", "Gray."),
            ),
            (first,),
        ),
        ((("user", "What is it?\n<image>"), ("assistant", "A bus.")), (first,)),
        (
            (
                ("user", "See <image> and then"), ("assistant", "Fine."),
                ("user", "<image>, is it the same?"), ("assistant", "No."),
            ),
            (second, third),
        ),
        ((("user", "Write a poem."), ("assistant", "Röses are red")), ()),
        ((("user", "Write another one."), ("assistant", "No")), ()),
        ((("user", "Where?"), ("assistant", "Here")), ()),
    ]  # fmt: skip
    assert outcomes(found) == [""] * 6


def test_every_record_makes_a_document(root: Path, tokenizer: Tokenizer) -> None:
    records = [record for record in RECORDS if record is not RECORDS[3]]  # its umlaut is not in the tokenizer
    found = read(root, *records)
    manifest = build_conversations(root / "out", [item.record for item in found], tokenizer)
    assert (manifest.documents, manifest.images) == (5, 4)


def test_images_inside_parquet_and_beside_the_file(tmp_path: Path) -> None:
    images = write_images(tmp_path, "x.jpg", "y.jpg")
    turns = talk("<image>\nWhat?", "A.")["conversations"]
    path = write_parquet(
        tmp_path / "train-00000.parquet",
        [
            {"id": "a", "image": {"bytes": images["x.jpg"], "path": "gone.jpg"}, "conversations": turns},
            {"id": "b", "image": {"bytes": None, "path": "y.jpg"}, "conversations": turns},
            {"id": "c", "image": None, "conversations": talk("Why?", "So.")["conversations"]},
        ],
    )
    found = read_all(Llava((path,)))
    assert [simple(item)[1] for item in found] == [(images["x.jpg"],), (images["y.jpg"],), ()]
    assert [item.where for item in found] == [f"train-00000.parquet:{n}" for n in range(3)]


def test_missing_placeholders_go_before_the_first_question(root: Path) -> None:
    record = talk("What differs?", "The sky.", "What else?", "Nothing.", image=list(NAMES[1:]))
    with pytest.raises(DataError, match=r"a\.json at a\.json:1: 0 <image> placeholders and 2 images") as error:
        read(root, record)
    assert "missing_placeholder='prepend'" in error.value.fix
    (found,) = read(root, record, missing_placeholder="prepend")
    turns, images = simple(found)
    assert turns[0] == ("user", "<image>\n<image>\nWhat differs?")
    assert turns[2] == ("user", "What else?")
    assert len(images) == 2


@pytest.mark.parametrize(
    ("record", "problem", "reason"),
    [
        (
            talk("<image><image>\nWhat?", "A", image=[*NAMES, NAMES[0]]),
            "2 <image> placeholders and 4 images",
            "placeholders and images differ",
        ),
        (talk("What is <image> in HTML?", "A tag"), "1 <image> placeholders and 0", "placeholders and images differ"),
        (talk("Draw", "<image>", image=NAMES[0]), "an answer, holds <image>", "placeholder in an answer"),
        (talk("<image>Hi", "\ud83d", image=NAMES[0]), "half of a surrogate pair", "text is not Unicode"),
        (talk("Hi", None), "turn 1 has the value None", "turn without a text"),  # type: ignore[arg-type]
        (
            {"conversations": [{"from": "human", "value": "a"}] * 2 + [{"from": "gpt", "value": "b"}]},
            "two user turns in a row, 'a' and 'a'",
            "two turns of one role",
        ),
    ],
)
def test_bad_conversations_are_errors_or_counted(root: Path, record: Any, problem: str, reason: str) -> None:
    path = write_lines(root / "a.jsonl", [record, talk("Hi", "Ho")])
    with pytest.raises(DataError, match=problem) as error:
        read_all(Llava((path,), image_root=root / "images", missing_placeholder="prepend"))
    assert str(path) in error.value.problem
    assert "a.jsonl:0" in error.value.problem
    assert "on_bad='skip'" in error.value.fix
    reader = Llava((path,), image_root=root / "images", missing_placeholder="prepend", on_bad="skip")
    assert outcomes(read_all(reader)) == [reason, ""]


def test_turns_without_a_partner_are_left_out_and_counted(root: Path) -> None:
    answer, question = {"from": "gpt", "value": "before"}, {"from": "human", "value": "<image>"}
    whole = talk("<image>Q", "A")["conversations"]
    found = read(
        root,
        {"conversations": [answer, *whole, question], "image": list(NAMES[:2])},
        {"conversations": [question], "image": NAMES[0]},
        {"conversations": [answer]},
        {"conversations": []},
        talk("Q", " \n"),
    )
    assert simple(found[0]) == ((("user", "<image>Q"), ("assistant", "A")), (image(root, NAMES[0]),))
    assert outcomes(found) == [
        "answer before the first question, question without an answer",
        "no question with an answer",
        "no question with an answer",
        "no question with an answer",
        "empty answer",
    ]


def test_system_turns(root: Path) -> None:
    record = talk("<image>\nQ", "A", image=NAMES[0])
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    with pytest.raises(DataError, match="begins with the system turn 'Be brief.'") as error:
        read(root, record)
    assert "'drop' or 'prepend-to-first-user'" in error.value.fix
    (found,) = read(root, record, system="drop")
    assert simple(found)[0][0] == ("user", "<image>\nQ")
    assert outcomes([found]) == ["system turn"]
    (found,) = read(root, record, system="prepend-to-first-user")
    assert simple(found)[0][0] == ("user", "Be brief.\n<image>\nQ")
    assert outcomes([found]) == [""]

    record["conversations"][0]["value"] = " "
    assert outcomes(read(root, record)) == [""]
    record["conversations"][0]["value"] = "<image>"
    assert outcomes(read(root, record, on_bad="skip", system="drop")) == ["placeholder in a system turn"]
    record["conversations"].append(record["conversations"].pop(0))
    assert outcomes(read(root, record, on_bad="skip", system="drop")) == ["placeholder in a system turn"]
    record["conversations"][-1]["value"] = "late"
    assert outcomes(read(root, record, on_bad="skip", system="drop")) == ["system turn in the middle"]


def test_turns_of_one_role_are_joined_if_asked(root: Path) -> None:
    turns = [("human", "one"), ("human", "<image>"), ("gpt", "a"), ("gpt", "b")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns], "image": NAMES[0]}
    (found,) = read(root, record, same_role="merge")
    assert simple(found)[0] == (("user", "one\n<image>"), ("assistant", "a\nb"))


def test_images_stay_below_their_folder(root: Path) -> None:
    (root / "secret.jpg").write_bytes(b"x")
    assert outcomes(read(root, talk("<image>", "A", image="coco/gone.jpg"))) == ["image file is missing"]
    with pytest.raises(DataError, match=r"'coco/gone.jpg' is not in"):
        read(root, talk("<image>", "A", image="coco/gone.jpg"), missing_image="error")
    for name in ("../secret.jpg", str(root / "secret.jpg"), "a\0b"):
        with pytest.raises(DataError, match=r"names the image .*, which is no file below"):
            read(root, talk("<image>", "A", image=name))
    (root / "images" / "vg").symlink_to(root)
    (found,) = read(root, talk("<image>", "A", image="vg/secret.jpg"))
    assert simple(found)[1] == (b"x",)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": 1, "url": "u"}, r"the fields are \['id', 'url'\]"),
        ({"conversations": "hello"}, "'conversations' is a str"),
        ({"conversations": ["hello"]}, "'conversations' is a list"),
        ({"conversations": [{"role": "user", "content": "x"}]}, r"turn 0 has the fields \['content', 'role'\]"),
        ({"conversations": [{"from": "gtp", "value": "x"}]}, "turn 0 is from 'gtp'"),
        (talk("<image>", "A", image=7), "'image' holds '7', a int"),
        (talk("<image>", "A", image=["a.jpg", None]), "'image' holds 'None', a NoneType"),
        (talk("<image>", "A", images=["a.jpg"]), "has images under 'images'"),
        ([1], "an object was expected"),
    ],
)
def test_what_is_not_llava_is_refused(root: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(root, record, on_bad="skip")
    assert error.value.fix
    assert "a.json" in error.value.problem


def test_videos_are_counted(root: Path) -> None:
    assert outcomes(read(root, talk("<image>", "A", video="a.mp4"))) == ["video"]


@pytest.mark.parametrize(
    "options",
    [
        {"system": "keep"},
        {"missing_placeholder": "append"},
        {"same_role": "skip"},
        {"on_bad": "drop"},
        {"missing_image": "drop"},
        {"unit_bytes": 0},
        {"image_root": Path("nowhere")},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=str(next(iter(options.values())))):
        Llava((Path("a.json"),), **options)
