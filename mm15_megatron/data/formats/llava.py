"""LLaVA's instruction data: one JSON array a file, or JSON lines.

A record::

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat colors has the bus?"}, {"from": "gpt", "value": "White and red."}]}

``image`` is a path, or a list of them (LLaVA-NeXT-Interleave's M4-Instruct), or absent (text). Image columns of parquet
(LLaVA-ReCap, LLaVA-OneVision-Data on Hugging Face) are objects with ``bytes`` and ``path``.

Sources read: ``docs/Finetune_Custom_Data.md`` of github.com/haotian-liu/LLaVA; ``llava/train/train.py`` of
github.com/LLaVA-VL/LLaVA-NeXT, which also drops a first turn of ``gpt``; that repository's issues 107 (M4-Instruct has
records with two placeholders and four images: ``on_bad``) and 459 (LLaVA-OneVision-Data has records with an image and
no placeholder: ``missing_placeholder``); cards of lmms-lab/LLaVA-ReCap-558K and -CC3M.

That trainer moves every placeholder to the beginning of its turn; here it stays where it is written. Not confirmed on
the files themselves, which were not at hand: that no other value of ``from`` occurs in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mm15_megatron.data.formats.turns import ConversationReader, Draft, LeftOut, Wrong, image_list, turn_list
from mm15_megatron.data.sft import Turn
from mm15_megatron.errors import DataError, did_you_mean

ROLES: Final = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Llava(ConversationReader):
    """Files of LLaVA's form."""

    def parse(self, record: Mapping[str, Any], *, place: str) -> Draft:
        """Take the turns and images out of a record."""
        if "image" not in record and record.get("images"):
            raise DataError(f"{place} has images under 'images'", fix="read it as sharegpt, LLaVA's field is 'image'")
        if record.get("video"):
            raise LeftOut("video")
        return Draft(llava_turns(record, place=place), image_list(record.get("image"), name="image", place=place))


def llava_turns(record: Mapping[str, Any], *, place: str) -> tuple[Turn, ...]:
    """Return the turns of ``conversations``.

    Raises:
        DataError: they are not of this form.
        Wrong: a turn has no text.
    """
    turns = []
    for number, turn in enumerate(turn_list(record, "conversations", place=place)):
        if "from" not in turn or "value" not in turn:
            raise DataError(
                f"{place}: turn {number} has the fields {sorted(turn)}", fix="give each turn 'from' and 'value'"
            )
        if turn["from"] not in ROLES:
            hint = did_you_mean(str(turn["from"]), ROLES)
            raise DataError(
                f"{place}: turn {number} is from {turn['from']!r}", fix=f"{hint}; sharegpt reads more roles"
            )
        if not isinstance(turn["value"], str):
            raise Wrong("turn without a text", f"turn {number} has the value {turn['value']!r}", fix="write a text")
        turns.append(Turn(ROLES[turn["from"]], turn["value"]))
    return tuple(turns)
