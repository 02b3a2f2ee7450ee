"""Which frames of a video are taken."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mm15_megatron.data.formats import video_frames
from mm15_megatron.data.formats.video_frames import FrameSampling, Unusable, evenly, sample_frames
from mm15_megatron.errors import DataError
from tests.data.formats.videos import HEIGHT, WIDTH, number_of, turn_mp4, write_video

OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:keyint=12"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=12"}
HEVC = {"x265-params": "open-gop=1:keyint=12:log-level=none"}


def numbers(path: Path, **options: Any) -> list[int]:
    frames, missing = sample_frames(path, sampling=FrameSampling(**options))
    assert missing == ()
    return [number_of(frame) for frame in frames]


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("a.mp4", {}),
        ("open.mp4", {"options": OPEN_GOP}),
        ("open.ts", {"options": OPEN_GOP}),
        ("refresh.mp4", {"options": REFRESH}),
        ("a.h264", {}),
        ("hevc.mp4", {"codec": "libx265", "options": HEVC}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.avi", {"codec": "mpeg4", "bframes": 2}),
        ("jpeg.avi", {"codec": "mjpeg"}),
        ("a.mpg", {"codec": "mpeg2video", "bframes": 2}),
    ],
)
def test_frames_lie_evenly_and_seeking_changes_nothing(tmp_path: Path, name: str, video: dict[str, Any]) -> None:
    path = write_video(tmp_path / name, **video)
    for count in (24, 7):
        assert numbers(path, count=count) == np.ceil(np.linspace(0, 59, count) - 0.5).astype(int).tolist()
        sought = sample_frames(path, sampling=FrameSampling(count=count))
        assert sought == sample_frames(path, sampling=FrameSampling(count=count, seek=False))
    assert numbers(path, count=1) == [29]
    assert numbers(path, count=200) == list(range(60))


def test_seeking_decodes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", frames=240)
    decoded = []
    real = video_frames._decoded

    def counted(packets: Any) -> Any:
        for frame in real(packets):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_frames, "_decoded", counted)
    assert numbers(path, count=3) == [0, 119, 239]
    assert len(decoded) < 40


def test_time_counts_where_the_frame_rate_varies(tmp_path: Path) -> None:
    times = [*range(0, 400, 10), *range(1000, 9001, 2000)]  # forty frames in 0.4 s, then one every two seconds
    for name in ("a.mkv", "a.mp4"):
        path = write_video(tmp_path / name, frames=len(times), times_ms=times)
        assert numbers(path, count=10) == [0, 40, 41, 42, 43, 44]
        assert numbers(path, count=2) == [0, 44]
        assert numbers(path, count=10, seek=False) == [0, 40, 41, 42, 43, 44]


@pytest.mark.parametrize(
    ("times", "count", "taken"),
    [
        ((0, 10, 20, 30, 200), 3, (0, 30, 200)),
        ((0, 10), 3, (0, 10)),
        ((0, 10, 20), 2, (0, 20)),
        ((0, 10, 20, 30), 1, (10,)),
        ((-5,), 24, (-5,)),
        ((), 24, ()),
        ((0, 1, 2), 9, (0, 1, 2)),
    ],
)
def test_even_times(times: tuple[int, ...], count: int, taken: tuple[int, ...]) -> None:
    assert evenly(times, count) == taken


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, clockwise: int) -> None:
    path = write_video(tmp_path / "a.mp4", frames=30)
    turn_mp4(path, clockwise=clockwise)
    frames, _ = sample_frames(path, sampling=FrameSampling(count=4))
    size = (HEIGHT, WIDTH) if clockwise % 180 else (WIDTH, HEIGHT)
    assert Image.open(io.BytesIO(frames[0])).size == size
    assert [number_of(frame, quarters=-clockwise // 90) for frame in frames] == [0, 10, 19, 29]


def test_larger_frames_are_made_smaller(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=3)
    small, _ = sample_frames(path, sampling=FrameSampling(max_side=64))
    assert [Image.open(io.BytesIO(frame)).size for frame in small] == [(64, 24)] * 3
    high, _ = sample_frames(path, sampling=FrameSampling(jpeg_quality=100))
    low, _ = sample_frames(path, sampling=FrameSampling(jpeg_quality=5))
    assert len(low[1]) < len(high[1])


def test_short_videos_give_fewer_frames(tmp_path: Path) -> None:
    assert numbers(write_video(tmp_path / "one.mp4", frames=1)) == [0]
    three = write_video(tmp_path / "three.webm", frames=3, codec="libvpx-vp9")
    assert numbers(three) == [0, 1, 2]
    with pytest.raises(Unusable, match="too few frames"):
        numbers(three, min_count=4)


def test_videos_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(Unusable, match="frames too large"):
        numbers(path, max_pixels=HEIGHT * WIDTH - 1)
    for name, data in (("empty.mp4", b""), ("text.mp4", b"hello"), ("cut.mp4", path.read_bytes()[:2000])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Unusable, match="broken video"):
            numbers(tmp_path / name)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(Unusable, match="no video stream"):
        numbers(sound)
    header = tmp_path / "header.avi"
    write_video(header, frames=0, codec="mjpeg")
    with pytest.raises(Unusable, match=r"no frames|broken video"):
        numbers(header)


def test_a_video_cut_off_behind_its_header_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / "fast.mp4"
    with av.open(str(write_video(tmp_path / "a.mp4"))) as source:
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    container.mux(packet)
    assert len(numbers(path)) == 24
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(Unusable, match="cut off"):
        numbers(path)


def test_a_damaged_frame_is_replaced_or_left_out(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", codec="mjpeg", frames=8)
    data = bytearray(path.read_bytes())
    at = [
        place
        for place in range(len(data))
        if data[place : place + 4] == b"00dc" and data.index(b"movi") < place < data.rindex(b"idx1")
    ]
    for number in (3, 7):
        size = int.from_bytes(data[at[number] + 4 : at[number] + 8], "little")
        data[at[number] + 8 : at[number] + 8 + size] = bytes(size)
    path.write_bytes(data)
    for seek in (True, False):
        frames, missing = sample_frames(path, sampling=FrameSampling(count=8, seek=seek))
        assert [number_of(frame) for frame in frames] == [0, 1, 2, 4, 5, 6]
        assert missing == ("frame cannot be decoded",) * 2
        frames, missing = sample_frames(path, sampling=FrameSampling(count=3, min_count=2, seek=seek))
        assert [number_of(frame) for frame in frames] == [0, 4]  # 3 is damaged, and so is 7, behind which is nothing
        assert missing == ("frame cannot be decoded",)


def test_a_playlist_does_not_lead_elsewhere(tmp_path: Path) -> None:
    shutil.copy(write_video(tmp_path / "secret.ts"), tmp_path / "x.ts")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(playlist)
    with pytest.raises(Unusable):
        numbers(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "options",
    [{"count": 0}, {"min_count": 25}, {"min_count": 0}, {"jpeg_quality": 0}, {"max_side": 0}, {"max_pixels": 0}],
)
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        FrameSampling(**options)
