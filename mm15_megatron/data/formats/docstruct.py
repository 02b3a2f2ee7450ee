"""DocStruct4M: parsing of document structure and text localization, as mPLUG-DocOwl 1.5 was trained on it.

Read from: ``DocOwl1.5/README.md``, ``mplug_docowl/train/train_docowl.py``, ``mplug_docowl/processor.py`` and
``evaluation/benchmarks_eval.py`` of github.com/X-PLUG/mPLUG-DocOwl; figure 4 of its paper (arXiv 2403.12895); the list
of files of ``mPLUG/DocStruct4M``. A folder holds ``struct_aware_parse.jsonl``,
``multi_grained_text_localization.jsonl`` and the images they name; a line is::

    {"image": ["./imgs/a.png"], "task_name": "...", "dataset_name": "...", "messages": [
        {"role": "user", "content": "<|image|>Identify the text within the box <bbox>212, 52, 896, 418</bbox>"},
        {"role": "assistant", "content": "<ocr> text </ocr>"}]}

There are as many ``<|image|>`` as images. Answers wrap text in ``<ocr>``, ``<doc>`` or ``<md>``. The numbers of a box
are left, top, right, bottom in parts of 999 of the stored image (the evaluation divides by 999 and cuts to 0..1; the
images are opened there without regard to EXIF). Here a box becomes MM1.5's coordinate text, whatever the orientation.
Not confirmed on the files, which were not at hand: that no line has a box in a form other than that of the figure (an
error, or left out with ``on_bad``), and which image a box of a record with several is meant for (the same).

Continual pre-training puts the loss on all text, so records are interleaved documents (image, prompt, answer) by
default; MM1.5's own text format is unpublished.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Final

from PIL import Image

from mm15_megatron.data.boxes import Point, Scale, resized, turned, upright, written
from mm15_megatron.data.formats.base import Found, Interleaved
from mm15_megatron.data.formats.fields import check_choice
from mm15_megatron.data.formats.turns import (
    ConversationReader,
    Draft,
    LeftOut,
    Wrong,
    image_list,
    plain_turn,
    turn_list,
)
from mm15_megatron.data.sft import Conversation, Turn
from mm15_megatron.data.tokenizer import IMAGE_TOKEN

PLACEHOLDER: Final = "<|image|>"
PARTS: Final = 999

_NUMBER: Final = r"\s*(\d{1,9})\s*"
_BOX: Final = re.compile(rf"<bbox>{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}</bbox>")
_MARKUP: Final = re.compile(r"<(?:ocr|doc|md)> ?| ?</(?:ocr|doc|md)>")


@dataclass(frozen=True)
class DocStruct(ConversationReader):
    """Reader of DocStruct4M and of the sets of the same form (DocDownstream, DocReason25K).

    Attributes:
        form: ``interleaved`` = documents with the loss on prompts and answers alike; ``conversations`` = turns with the
            loss on answers alone.
        markup: ``keep`` leaves ``<ocr>``, ``<doc>`` and ``<md>`` in the text, ``strip`` takes them out; ``<bbox>`` is
            replaced in both.
        scale: the numbers of the coordinate text.
    """

    _: KW_ONLY
    form: str = "interleaved"
    markup: str = "keep"
    scale: Scale = Scale()

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is not a choice.
        """
        super().__post_init__()
        check_choice("form", self.form, ("interleaved", "conversations"))
        check_choice("markup", self.markup, ("keep", "strip"))

    @property
    def kind(self) -> str:
        """Kind of dataset that the records make."""
        return self.form

    def parse(self, record: Mapping[str, Any], *, place: str) -> Draft:
        """Take the turns and images out of a record; placeholders become the project's."""
        turns = []
        for number, turn in enumerate(turn_list(record, "messages", place=place)):
            said = plain_turn(turn, number=number, place=place)
            role, content = said.role, said.text
            if IMAGE_TOKEN in content:
                raise Wrong(
                    f"{IMAGE_TOKEN} in a text",
                    f"turn {number} holds {IMAGE_TOKEN}, which stands for an image here",
                    fix=f"mark images with {PLACEHOLDER}",
                )
            turns.append(Turn(role, content.replace(PLACEHOLDER, IMAGE_TOKEN)))
        return Draft(tuple(turns), image_list(record.get("image"), name="image", place=place))

    def conversation(self, record: Mapping[str, Any], *, where: str, place: str, folder: Path) -> Found:
        """Make the document of one record."""
        found = super().conversation(record, where=where, place=place, folder=folder)
        assert isinstance(found.record, Conversation)
        turns, images = self._texts(found.record), found.record.images
        if self.form == "conversations":
            return replace(found, record=Conversation(turns, images))
        return replace(found, record=interleaved(Conversation(turns, images)))

    def _texts(self, conversation: Conversation) -> tuple[Turn, ...]:
        """The turns with boxes as coordinate text, and without markup if that is asked for."""
        texts = [turn.text for turn in conversation.turns]
        if any("bbox>" in text for text in texts):
            if len(conversation.images) != 1:
                raise Wrong(
                    "box without one image",
                    f"a box and {len(conversation.images)} images",
                    fix="use records of one image",
                )
            texts = rescaled(texts, conversation.images[0], scale=self.scale)
        if self.markup == "strip":
            texts = [_MARKUP.sub("", text) for text in texts]
        return tuple(replace(turn, text=text) for turn, text in zip(conversation.turns, texts, strict=True))


def rescaled(texts: list[str], image: bytes, *, scale: Scale) -> list[str]:
    """Replace the boxes of an image by coordinate text.

    Example: in an image 999 wide and 333 high, ``<bbox>0, 333, 999, 999</bbox>`` is ``<0,75,671,224>`` by default.

    Raises:
        LeftOut: the image's header cannot be read.
        Wrong: a box has another form.
    """
    try:
        with Image.open(io.BytesIO(image)) as opened:
            (width, height), orientation = opened.size, opened.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LeftOut("image cannot be read") from error
    motion = resized(width=PARTS, height=PARTS, to_width=width, to_height=height).then(
        upright(orientation, width=width, height=height)
    )
    if turned(orientation):
        width, height = height, width

    def text(found: re.Match[str]) -> str:
        left, top, right, bottom = (min(int(number), PARTS) for number in found.groups())
        if left > right or top > bottom:
            raise Wrong("malformed box", f"the box {found[0]} ends before it begins", fix="correct the annotation")
        # a thin line of text may have no height on this scale, so corners and not boxes are moved
        corners = [
            scale.point(motion.point(Point(x, y)), width=width, height=height)
            for x, y in ((left, top), (right, bottom))
        ]
        (x1, x2), (y1, y2) = (sorted(axis) for axis in zip(*corners, strict=True))
        return written((x1, y1, x2, y2))

    replaced = [_BOX.sub(text, one) for one in texts]
    for one in replaced:
        if "<bbox>" in one or "</bbox>" in one:
            at = one.index("bbox>")
            raise Wrong(
                "malformed box",
                f"{one[max(at - 2, 0) : at + 60]!r} is no box",
                fix="write <bbox>left, top, right, bottom</bbox>",
            )
    return replaced


def interleaved(conversation: Conversation) -> Interleaved:
    """Return a conversation as a document: images where their placeholders stand, texts around them as paragraphs."""
    parts: list[str | bytes] = []
    images = iter(conversation.images)
    for turn in conversation.turns:
        for number, text in enumerate(turn.text.split(IMAGE_TOKEN)):
            if number:
                parts.append(next(images))
            if text.strip():
                parts.append(text.strip())
    return Interleaved(tuple(parts))
