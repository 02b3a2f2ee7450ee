"""Frames of a video that lie evenly over its time, as JPEG.

The timestamps of all frames come from the packets, without decoding. N times lie evenly from the first frame to the
last one, both included (N = 1: the middle), and of each the nearest frame is taken (the earlier of two as near), once;
so a video of fewer frames gives fewer. For a constant frame rate these are the frames ``linspace(0, n - 1, N)``,
rounded; where frames are shown for different times, time counts and not the number. Which frames MM1.5 takes is
unpublished beyond "uniformly sampled".

Decoding begins anew at the last keyframe at or before a wanted frame where that saves work. A frame is the one that
decoding from the beginning gives: where a seek does not lead to the keyframe that was asked for, or the decoder does
not give exactly the wanted frame behind it, everything from there on is decoded from the beginning. A frame that cannot
be decoded is replaced by the next one that can, unless that is taken too.

Files are opened as local files alone: a playlist that names other places is refused. Mirrored display matrices and
pixels that are not square are kept as they are; rotations are applied in quarter turns.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import av
from PIL import Image

from mm15_megatron.errors import DataError

NOT_DECODED: Final = "frame cannot be decoded"
_QUARTERS: Final = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
# A file is taken for cut off if both fall short: the frames its header counts and the time it claims.
_COUNT_SHARE: Final = 0.95
_TIME_SHARE: Final = 0.9
_FAULTS: Final = (av.FFmpegError, ValueError, OSError)


class Unusable(Exception):  # noqa: N818 - a reason to leave a video out; it never leaves a reader
    """A video is left out; the message is the reason by which it is counted."""


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are stored, and how.

    Attributes:
        count: frames, at most.
        min_count: a video of fewer is left out.
        max_side: larger frames are made smaller so that their longer side is this, in pixels; None = never.
        max_pixels: a video of larger frames is left out before it is decoded.
        jpeg_quality: 1 to 100.
        seek: decode from keyframes; False decodes all frames up to the last wanted one, with the same result.
    """

    count: int = 24
    min_count: int = 1
    max_side: int | None = None
    max_pixels: int = 64_000_000
    jpeg_quality: int = 90
    seek: bool = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: a number is impossible.
        """
        if not 1 <= self.min_count <= self.count:
            raise DataError(
                f"count {self.count}, min_count {self.min_count}", fix="ask for frames, and at least one at the least"
            )
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"jpeg_quality is {self.jpeg_quality}", fix="use 1 to 100")
        if self.max_pixels < 1 or (self.max_side is not None and self.max_side < 1):
            raise DataError(f"max_side {self.max_side}, max_pixels {self.max_pixels}", fix="use 1 or more")


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown, in the stream's time base.

    Attributes:
        times: ascending, each once; the numbers of the frames where the file gives no times.
        keys: those at which decoding can begin, ascending; empty = at the beginning alone.
        timed: whether these are times.
    """

    times: tuple[int, ...]
    keys: tuple[int, ...] = ()
    timed: bool = True


def sample_frames(path: Path, *, sampling: FrameSampling) -> tuple[tuple[bytes, ...], tuple[str, ...]]:
    """Return (JPEG bytes in order of time, a reason for each wanted frame that is missing).

    One decoded frame is held at a time.

    Raises:
        Unusable: the video is broken, cut off, has no video stream, too large or too few frames.
    """
    try:
        timeline = read_timeline(path, sampling=sampling)
        wanted = evenly(timeline.times, sampling.count)
        frames = tuple(_jpeg(frame, sampling) for frame in wanted_frames(path, timeline, wanted, sampling=sampling))
    except _FAULTS as error:
        raise Unusable("broken video") from error
    if len(frames) < sampling.min_count:
        raise Unusable("too few frames")
    return frames, (NOT_DECODED,) * (len(wanted) - len(frames))


def evenly(times: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the times nearest to ``count`` that lie evenly from the first to the last, each once, ascending.

    Example: times 0 10 20 30 200 and 3: 0, 100 and 200 are looked for, 0 30 200 are taken.
    """
    if not times:
        return ()
    steps = max(count - 1, 1)
    chosen: list[int] = []
    for number in range(count):
        # exact in whole numbers: everything is multiplied by 2 steps
        part = 2 * number if count > 1 else 1
        goal = 2 * steps * times[0] + part * (times[-1] - times[0])
        after = bisect_left(times, goal, key=lambda time: 2 * steps * time)
        before = max(after - 1, 0)
        after = min(after, len(times) - 1)
        nearer = before if goal - 2 * steps * times[before] <= 2 * steps * times[after] - goal else after
        if not chosen or times[nearer] > chosen[-1]:
            chosen.append(times[nearer])
    return tuple(chosen)


def read_timeline(path: Path, *, sampling: FrameSampling) -> Timeline:
    """Read when the frames of a video are shown.

    Raises:
        Unusable: it has no video stream or no frames, is cut off, or its frames are too large.
    """
    times: set[int] = set()
    keys: set[int] = set()
    packets, timed = 0, True
    with opened(path) as (container, stream):
        if stream.codec_context.width * stream.codec_context.height > sampling.max_pixels:
            raise Unusable("frames too large")
        for packet in container.demux(stream):
            if not packet.size:
                continue
            packets += 1
            if packet.pts is None:
                timed = False
                break
            if not packet.is_discard:
                times.add(packet.pts)
            if packet.is_keyframe:
                keys.add(packet.pts)
        if timed and times:
            span = (max(times) - min(times)) * stream.time_base
            claimed = (container.duration or 0) / av.time_base
            if packets < _COUNT_SHARE * stream.frames and span < _TIME_SHARE * claimed:
                raise Unusable("video is cut off")
    if not timed:
        with opened(path) as (container, stream):
            times = set(range(sum(1 for _ in _decoded(container.demux(stream)))))
            keys = set()
    if not times:
        raise Unusable("no frames")
    return Timeline(tuple(sorted(times)), tuple(sorted(keys)), timed)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open the best video stream of a local file.

    Raises:
        Unusable: it has none, or a picture beside sound alone.
    """
    with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise Unusable("no video stream")
        stream.codec_context.thread_count = 1  # units are read in parallel, not one video
        yield container, stream


def wanted_frames(path: Path, timeline: Timeline, wanted: Sequence[int], *, sampling: FrameSampling) -> Iterator[Any]:
    """Yield the decoded frames at ``wanted`` times, in order."""
    done = 0
    if sampling.seek and timeline.timed and len(timeline.keys) > 1:
        with opened(path) as (container, stream):
            for frame in _by_seeking(container, stream, timeline, wanted):
                if frame is None:
                    break
                done += 1
                yield frame
    if done < len(wanted):
        last = wanted[done - 1] if done else None
        yield from _from_the_beginning(path, timeline, wanted[done:], after=last)


def _by_seeking(container: Any, stream: Any, timeline: Timeline, wanted: Sequence[int]) -> Iterator[Any]:
    """Yield the frames at exactly the wanted times; None and the end where that fails."""
    frames = _decoded(container.demux(stream))
    at: int | None = None  # time of the newest decoded frame
    for goal in wanted:
        number = bisect_right(timeline.keys, goal) - 1
        if number > 0 and (at is None or timeline.keys[number] > at):
            container.seek(timeline.keys[number], stream=stream, backward=True)
            frames = _decoded(_from_key(container.demux(stream), timeline.keys[number]))
        found = None
        for frame in frames:
            at = frame.pts
            if at is None or at >= goal:
                found = frame if at == goal else None
                break
        yield found
        if found is None:
            return


def _from_key(packets: Iterator[Any], key: int) -> Iterator[Any]:
    """Pass over what comes before the packet of a keyframe; nothing if another keyframe behind it comes first."""
    begun = False
    for packet in packets:
        if not begun and packet.is_keyframe and packet.pts is not None:
            if packet.pts > key:
                return
            begun = packet.pts == key
        if begun:
            yield packet


def _from_the_beginning(path: Path, timeline: Timeline, wanted: Sequence[int], *, after: int | None) -> Iterator[Any]:
    """Decode everything; yield the first frame at or behind each wanted time that was not given, nor ``after``, yet."""
    waiting = list(wanted)
    with opened(path) as (container, stream):
        for number, frame in enumerate(_decoded(container.demux(stream))):
            time = frame.pts if timeline.timed else number
            if time is None or time < waiting[0] or (after is not None and time <= after):
                continue
            yield frame
            after = time
            waiting = [goal for goal in waiting[1:] if goal > time]
            if not waiting:
                return


def _decoded(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield sound frames in the order in which they are shown; packets that cannot be decoded are passed over."""
    for packet in packets:
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        for frame in frames:
            if not frame.is_corrupt:
                yield frame


def _jpeg(frame: Any, sampling: FrameSampling) -> bytes:
    if frame.width * frame.height > sampling.max_pixels:
        raise Unusable("frames too large")
    image = frame.to_image()
    quarters = round(frame.rotation / 90) % 4  # degrees, against the clock
    if quarters:
        image = image.transpose(_QUARTERS[quarters])
    if sampling.max_side is not None and max(image.size) > sampling.max_side:
        factor = sampling.max_side / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=sampling.jpeg_quality)
    return stream.getvalue()
