"""ShareGPT's form and its relatives: turns with who speaks and what, images beside them.

Records::

    {"conversations": [{"from": "human", "value": "<image>Who are they?"}, {"from": "gpt", "value": "..."}],
     "system": "...", "images": ["mllm_demo_data/1.jpg"]}
    {"messages": [{"role": "user", "content": "<image>Who are they?"}, {"role": "assistant", "content": "..."}],
     "images": ["mllm_demo_data/1.jpg"]}
    {"conversation": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}],
     "images": [{"bytes": null, "path": "nlvr2/train-1-img0.png"}]}

The list of turns is ``conversations``, ``messages`` or ``conversation``, the speaker ``from`` or ``role``, the text
``value`` or ``content`` (``text`` too), whichever stands there. A ``system`` field is a leading system turn. Records
with tools, videos or audio are left out and counted; preference pairs are refused.

Sources read: ``data/README.md`` and ``data/mllm_demo.json`` of github.com/hiyouga/LLaMA-Factory (its default roles are
human, gpt, observation, function_call, system; "images" must be as many as ``<image>``; early versions of the demo had
no placeholder: ``missing_placeholder``); the card of TIGER-Lab/llava-data for the columns of TIGER-Lab's parquet files
(``conversation``, ``role``, ``content``, ``images`` of bytes and path). Other names of roles (user, assistant, chatgpt,
bard, bing, model, bot) are those seen in dumps of ShareGPT. Not confirmed: that Mantis-Instruct's columns are the same
as those of TIGER-Lab/llava-data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mm15_megatron.data.formats.turns import ConversationReader, Draft, LeftOut, Wrong, image_list, turn_list
from mm15_megatron.data.sft import Turn
from mm15_megatron.errors import DataError, did_you_mean

LISTS: Final = ("conversations", "messages", "conversation")
SPEAKERS: Final = ("from", "role")
TEXTS: Final = ("value", "content", "text")
IMAGES: Final = ("images", "image")
ROLES: Final = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), "assistant"),
    "system": "system",
}
TOOL_ROLES: Final = ("tool", "tools", "function", "function_call", "observation", "tool_call", "tool_response")
_PREFERENCE: Final = ("chosen", "rejected", "kto_tag")


@dataclass(frozen=True)
class ShareGPT(ConversationReader):
    """Files of ShareGPT's form or LLaMA-Factory's."""

    def parse(self, record: Mapping[str, Any], *, place: str) -> Draft:
        """Take the turns and images out of a record."""
        if pairs := [name for name in _PREFERENCE if name in record]:
            raise DataError(f"{place} has the fields {pairs}: preference data", fix="use data of answers to learn from")
        for name in ("tools", "videos", "video", "audios", "audio"):
            if record.get(name):
                raise LeftOut(name.rstrip("s"))
        turns = _turns(turn_list(record, _only(record, LISTS, what="turns", place=place), place=place), place=place)
        if isinstance(system := record.get("system"), str) and system.strip():
            if turns and turns[0].role == "system":
                raise Wrong("two system turns", "a system field and a system turn", fix="keep one of them")
            turns = (Turn("system", system), *turns)
        images: tuple[Any, ...] = ()
        if present := [name for name in IMAGES if record.get(name)]:
            name = _only(record, tuple(present), what="images", place=place)
            images = image_list(record[name], name=name, place=place)
        return Draft(turns, images)


def _only(record: Mapping[str, Any], names: tuple[str, ...], *, what: str, place: str) -> str:
    """Return the one name of ``names`` that a mapping has."""
    present = [name for name in names if name in record]
    if len(present) != 1:
        raise DataError(
            f"{place} has {' and '.join(map(repr, present)) or 'no field'} for {what}; its fields are {sorted(record)}",
            fix=f"give it one of {', '.join(map(repr, names))}",
        )
    return present[0]


def _turns(items: list[Mapping[str, Any]], *, place: str) -> tuple[Turn, ...]:
    turns = []
    for number, item in enumerate(items):
        here = f"{place}: turn {number}"
        speaker = item[_only(item, SPEAKERS, what="the speaker", place=here)]
        if speaker in TOOL_ROLES:
            raise LeftOut("tool")
        if speaker not in ROLES:
            raise DataError(f"{here} is from {speaker!r}", fix=did_you_mean(str(speaker), ROLES))
        text = item[_only(item, TEXTS, what="the text", place=here)]
        if isinstance(text, list):
            raise DataError(f"{here} has a list of parts", fix="read it as OpenAI chat")
        if not isinstance(text, str):
            raise Wrong("turn without a text", f"turn {number} has the text {text!r}", fix="write a text")
        turns.append(Turn(ROLES[speaker], text))
    return tuple(turns)
