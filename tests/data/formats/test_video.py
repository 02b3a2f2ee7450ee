"""The reader of lists of videos."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mm15_megatron.data.formats.base import Found, Interleaved, Pending, Skipped
from mm15_megatron.data.formats.video import Video
from mm15_megatron.data.formats.video_frames import FrameSampling
from mm15_megatron.data.sft import Conversation, Turn
from mm15_megatron.errors import DataError
from tests.data.formats.ocr_files import read_all
from tests.data.formats.videos import number_of, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    write_video(folder / "deep" / "a.mp4", frames=47)
    write_video(folder / "short.webm", frames=2, codec="libvpx-vp9")
    (folder / "broken.mp4").write_bytes(b"<html>404</html>")
    return folder


def talk(video: Any, ask: str = "<video>\nWhat happens?", answer: str = "It counts.", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    return {"id": "1", "video": video, "conversations": turns, **more}


def reader(tmp_path: Path, videos: Path, *records: dict[str, Any], **options: Any) -> Video:
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Video((path,), image_root=videos, **options)


def test_a_conversation_about_twenty_four_frames(tmp_path: Path, videos: Path) -> None:
    (found,) = read_all(reader(tmp_path, videos, talk("deep/a.mp4")))
    assert isinstance(found, Found)
    assert isinstance(found.record, Conversation)
    assert found.record.turns == (Turn("user", "<image>" * 24 + "\nWhat happens?"), Turn("assistant", "It counts."))
    assert [number_of(frame) for frame in found.record.images] == list(range(0, 47, 2))
    assert all(frame.startswith(b"\xff\xd8\xff") for frame in found.record.images)
    assert (found.where, found.repaired) == ("list.jsonl:0", ())


def test_placeholders_and_roles_of_other_lists(tmp_path: Path, videos: Path) -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Look: <image> Well?"},
        {"role": "assistant", "content": "No"},
    ]
    record = {"clip": "short.webm", "messages": messages}
    (found,) = read_all(reader(tmp_path, videos, record, video_field="clip"))
    assert isinstance(found, Found)
    assert isinstance(found.record, Conversation)
    assert [turn.text for turn in found.record.turns] == ["Hello", "Hi", "Look: <image><image> Well?", "No"]
    assert len(found.record.images) == 2


def test_frames_can_be_put_first(tmp_path: Path, videos: Path) -> None:
    record = talk("short.webm", ask="What happens?")
    with pytest.raises(DataError, match="0 placeholders <video> or <image> and one video"):
        read_all(reader(tmp_path, videos, record))
    (found,) = read_all(reader(tmp_path, videos, record, missing_placeholder="prepend"))
    assert isinstance(found, Found)
    assert isinstance(found.record, Conversation)
    assert found.record.turns[0].text == "<image>\n<image>\nWhat happens?"


def test_captions(tmp_path: Path, videos: Path) -> None:
    records = [{"video": "short.webm", "caption": "0 and 1"}, {"video": "short.webm", "caption": " "}]
    lists = reader(tmp_path, videos, *records, form="captions", sampling=FrameSampling(count=2))
    assert lists.kind == "interleaved"
    found, skipped = read_all(lists)
    assert isinstance(found, Found)
    assert isinstance(found.record, Interleaved)
    assert [part if isinstance(part, str) else number_of(part) for part in found.record.parts] == [0, 1, "0 and 1"]
    assert isinstance(skipped, Skipped)
    assert skipped.reason == "empty caption"
    with pytest.raises(DataError, match="has no field 'caption'"):
        read_all(reader(tmp_path, videos, talk("short.webm"), form="captions"))


def test_videos_that_cannot_be_used_are_left_out(tmp_path: Path, videos: Path) -> None:
    records = [talk("none.mp4"), talk("broken.mp4"), talk("short.webm"), talk("deep"), talk("deep/a.mp4")]
    found = read_all(reader(tmp_path, videos, *records, sampling=FrameSampling(min_count=3)))
    assert [record.reason if isinstance(record, Skipped) else "found" for record in found] == [
        "video file is missing",
        "broken video",
        "too few frames",
        "video file is missing",
        "found",
    ]
    with pytest.raises(DataError, match="'none.mp4' is no file in"):
        read_all(reader(tmp_path, videos, records[0], missing_image="error"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (talk("../secret.mp4"), "no file below"),
        (talk("/etc/passwd"), "names the video '/etc/passwd'"),
        (talk(None), "names the video None"),
        (talk(5), "'video' is a int, not a text"),
        ({"conversations": talk("a")["conversations"]}, "has no field 'video'"),
        ({"video": "short.webm"}, "the fields are"),
        ({"video": "short.webm", "messages": [{"role": "bot", "content": "x"}]}, "turn 0 has the role 'bot'"),
        (talk("short.webm", ask="<video><video>"), "2 placeholders"),
        (talk("short.webm", answer="<video>", ask="x"), "an answer, holds <image>"),
    ],
)
def test_wrong_records_are_errors(tmp_path: Path, videos: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_all(reader(tmp_path, videos, record))


def test_videos_are_named_before_they_are_opened(tmp_path: Path, videos: Path) -> None:
    made = reader(tmp_path, videos, talk("short.webm"), talk("none.mp4"))
    items = [item for unit in made.units() for item in made.read(unit)]
    assert [type(item) for item in items] == [Pending, Pending]
    assert len({item.where for item in items}) == 2


def test_wrong_conversations_can_be_left_out(tmp_path: Path, videos: Path) -> None:
    records = [talk("short.webm", ask="<video><video>"), {"video": "x", "messages": [{"role": "user", "content": 3}]}]
    found = read_all(reader(tmp_path, videos, *records, on_bad="skip"))
    assert [record.reason for record in found if isinstance(record, Skipped)] == [
        "placeholders and videos differ",
        "turn without a text",
    ]


@pytest.mark.parametrize("option", [{"form": "text"}, {"video_field": ""}, {"caption_field": ""}])
def test_impossible_options_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(DataError, match=next(iter(option))):
        Video((Path("."),), **option)  # type: ignore[arg-type]


def test_units_are_independent_and_the_reader_travels(tmp_path: Path, videos: Path) -> None:
    records = [talk("short.webm", answer=f"{n}") for n in range(9)]
    whole = read_all(reader(tmp_path, videos, *records))
    small = reader(tmp_path, videos, *records, unit_bytes=200)
    assert small.kind == "conversations"
    assert len(small.units()) > 3
    assert read_all(pickle.loads(pickle.dumps(small)), backwards=True) == whole
