"""Videos listed in JSON: a path below a folder, and a conversation or a caption.

A record (a line of JSON lines, an element of an array, a row of parquet)::

    {"video": "activitynet/v_abc.mp4", "conversations": [
        {"from": "human", "value": "<video>\\nWhat happens?"}, {"from": "gpt", "value": "A goal is scored."}]}
    {"video": "a.mp4", "caption": "A goal is scored."}

The first form is LLaVA's with a video, as ``docs/dataset.md`` of github.com/zjysteven/lmms-finetune and
``VideoRefer/training.md`` of github.com/alibaba-damo-academy/PixelRefer document it. Turns under ``messages`` with
``role`` and ``content`` are read too, and ``<image>`` is taken for the video where there is no ``<video>``. Not
confirmed on the files, which were not at hand: that ShareGPTVideo and LLaVA-Video-178K have this form. Not read:
several videos a record, VideoChat2's ``QA`` lists, folders of frames that stand for a video.

MM1.5 feeds a video as a sample of 24 images: where the placeholder stands, one ``<image>`` is put for each frame.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Final

from mm15_megatron.data.formats.base import Found, Interleaved
from mm15_megatron.data.formats.fields import SKIP, check_choice, check_named, fault_of, path_inside, text_field
from mm15_megatron.data.formats.llava import llava_turns
from mm15_megatron.data.formats.turns import ConversationReader, Draft, LeftOut, Wrong, plain_turn, turn_list
from mm15_megatron.data.formats.video_frames import FrameSampling, Unusable, sample_frames
from mm15_megatron.data.sft import Conversation, Turn
from mm15_megatron.data.tokenizer import IMAGE_TOKEN
from mm15_megatron.errors import DataError

PLACEHOLDER: Final = "<video>"
MISSING_VIDEO: Final = "video file is missing"
UNIT_BYTES: Final = 256 * 2**10
"""A line costs the decoding of a video, so units are small."""


@dataclass(frozen=True)
class Video(ConversationReader):
    """Reader of lists of videos.

    ``image_root`` is the folder of the videos, ``missing_image`` says what becomes of one that does not exist,
    ``missing_placeholder="prepend"`` puts the frames before the first question where no turn names the video.

    Attributes:
        form: ``conversations`` = turns, with the loss on answers; ``captions`` = the frames, then a caption.
        video_field: field that holds the path.
        caption_field: field that holds the caption.
        sampling: which frames, and how they are stored.
        unit_bytes: size of a unit of JSON, bytes.
    """

    _: KW_ONLY
    form: str = "conversations"
    video_field: str = "video"
    caption_field: str = "caption"
    sampling: FrameSampling = FrameSampling()
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is impossible.
        """
        super().__post_init__()
        check_choice("form", self.form, ("conversations", "captions"))
        check_named(video_field=self.video_field, caption_field=self.caption_field)

    @property
    def kind(self) -> str:
        """Kind of dataset that the records make: frames and a caption are an interleaved document."""
        return "conversations" if self.form == "conversations" else "interleaved"

    def parse(self, record: Mapping[str, Any], *, place: str) -> Draft:
        """Take the turns out of a record; the placeholder of the video stays, the frames are not yet known."""
        if "conversations" in record:
            turns = llava_turns(record, place=place)
        else:
            turns = _role_turns(record, place=place)
        named = sum(turn.text.count(mark) for turn in turns for mark in (PLACEHOLDER, IMAGE_TOKEN))
        if named > 1 or (named == 0 and self.missing_placeholder != "prepend"):
            raise Wrong(
                "placeholders and videos differ",
                f"{named} placeholders {PLACEHOLDER} or {IMAGE_TOKEN} and one video",
                fix=f"write one {PLACEHOLDER} in a user turn",
            )
        return Draft(tuple(Turn(turn.role, turn.text.replace(PLACEHOLDER, IMAGE_TOKEN)) for turn in turns))

    def conversation(self, record: Mapping[str, Any], *, where: str, place: str, folder: Path) -> Found:
        """Make the document of one record.

        Raises:
            LeftOut: the video is missing, or gives no frames.
        """
        name = text_field(record, self.video_field, place=place)
        caption = None
        turns: tuple[Turn, ...] = ()
        if self.form == "captions":
            caption = text_field(record, self.caption_field, place=place)
            fault = fault_of(caption, noun="caption")
            if fault is not None:
                raise LeftOut(fault)
        else:
            turns = self.parse(record, place=place).turns
            self.arrange(
                turns, images=int(any(IMAGE_TOKEN in turn.text for turn in turns))
            )  # before frames are decoded
        path = self._path(name, place=place, folder=folder)
        try:
            frames, missing = sample_frames(path, sampling=self.sampling)
        except Unusable as error:
            raise LeftOut(str(error)) from error
        if caption is not None:
            return Found(Interleaved((*frames, caption)), where, missing)
        spread = [Turn(turn.role, turn.text.replace(IMAGE_TOKEN, IMAGE_TOKEN * len(frames))) for turn in turns]
        arranged = self.arrange(spread, images=len(frames))
        return Found(Conversation(arranged.turns, frames[: arranged.images]), where, arranged.repaired + missing)

    def _path(self, name: str | None, *, place: str, folder: Path) -> Path:
        root = self.image_root or folder
        path = path_inside(root, name, place=place, noun="video")
        if os.path.isfile(path):
            return path
        if self.missing_image != SKIP:
            raise DataError(f"{place}: {name!r} is no file in {root}", fix=f"let missing_image be {SKIP!r}")
        raise LeftOut(MISSING_VIDEO)


def _role_turns(record: Mapping[str, Any], *, place: str) -> tuple[Turn, ...]:
    turns = []
    for number, turn in enumerate(turn_list(record, "messages", place=place)):
        turns.append(plain_turn(turn, number=number, place=place))
    return tuple(turns)
