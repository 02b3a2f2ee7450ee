"""OpenAI's chat form: messages whose content is a text, or a list of text and image parts; JSON lines or an array.

A record::

    {"messages": [
        {"role": "system", "content": "You identify cheeses."},
        {"role": "user", "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4AAQ...", "detail": "low"}}]},
        {"role": "assistant", "content": "Danbo"}]}

Parts of a message follow each other on lines of their own, an image as ``<image>``. An image is a ``data:`` URL, a path
or ``file:`` URL below the folder of images, or an ``http(s):`` URL that was downloaded and is looked up in an index
(:mod:`mm15_megatron.data.formats.url_index`); without an index such a URL is an error. ``detail`` has no meaning here.
The parts ``input_text``, ``output_text`` and ``input_image`` of the Responses API (``image_url`` is a text there) are
read too. Messages in a row of one role are joined: OpenAI's own example has two user messages, a text and an image.
Records with tool calls, audio, files or answers of weight 0 (not to be learned) are left out and counted.

Sources read: the guide "Vision fine-tuning" (developers.openai.com/api/docs/guides/vision-fine-tuning), excerpts of the
reference of "Create a model response", and a thread on the form of ``input_image`` at community.openai.com.
``weight`` and ``refusal`` are known from the reference of fine-tuning, not looked up again.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mm15_megatron.data.formats.fields import MISSING_IMAGE
from mm15_megatron.data.formats.image_store import ImageSource
from mm15_megatron.data.formats.turns import ERROR, ConversationReader, Draft, ImageRef, LeftOut, Wrong, turn_list
from mm15_megatron.data.sft import Turn
from mm15_megatron.data.tokenizer import IMAGE_TOKEN
from mm15_megatron.errors import DataError, did_you_mean

ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TOOL_ROLES: Final = ("tool", "function")
TEXT_PARTS: Final = ("text", "input_text", "output_text")
IMAGE_PARTS: Final = ("image_url", "input_image")
OTHER_PARTS: Final = {"input_audio": "audio", "file": "file", "input_file": "file", "refusal": "refusal"}
"""Parts that are not read, and the reason by which their records are counted."""


@dataclass(frozen=True)
class OpenAIChat(ConversationReader):
    """Files of OpenAI's chat form.

    Attributes:
        same_role: as for every reader of conversations, but ``merge`` unless told otherwise.
        urls: where images of ``http(s)`` URLs are; None = such a URL is an error.
    """

    same_role: str = field(default="merge", kw_only=True)
    urls: ImageSource | None = field(default=None, kw_only=True)

    def parse(self, record: Mapping[str, Any], *, place: str) -> Draft:
        """Take the messages and images out of a record."""
        turns: list[Turn] = []
        images: list[ImageRef] = []
        for number, message in enumerate(turn_list(record, "messages", place=place)):
            here = f"{place}: message {number}"
            role = _role(message, here=here)
            content = message.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, list):
                raise DataError(f"{here} has the content {str(content)[:60]!r}", fix="write a text, or a list of parts")
            lines = []
            for part in parts:
                line, image = _part(part, role=role, here=here)
                lines.append(line)
                images += [] if image is None else [image]
            turns.append(Turn(role, "\n".join(lines)))
        return Draft(tuple(turns), tuple(images))

    def load(self, image: ImageRef, *, place: str, folder: Path) -> bytes:
        """Return the encoded bytes of an image.

        Raises:
            LeftOut: it does not exist, or was not downloaded.
            Wrong: a ``data:`` URL is malformed.
            DataError: its path leads out of the folder of images, or there is nowhere to look for its URL.
        """
        if isinstance(image, bytes):
            return image
        scheme = image[:8].partition(":")[0].lower()
        if scheme == "data":
            return _data_url(image)
        if scheme in ("http", "https"):
            return self._downloaded(image, place=place)
        if scheme == "file":
            image = os.path.relpath(unquote(urlsplit(image).path), os.path.abspath(self.image_root or folder))
        return super().load(image, place=place, folder=folder)

    def _downloaded(self, url: str, *, place: str) -> bytes:
        if self.urls is None:
            raise DataError(
                f"{place} has the image {url[:120]!r}, and nothing is downloaded here",
                fix="download the images, and give the index of their URLs",
            )
        data = self.urls.get(url)
        if data is None and self.missing_image == ERROR:
            raise DataError(f"{place}: {url[:120]!r} is not in the index", fix="download it, or skip missing images")
        if data is None:
            raise LeftOut(MISSING_IMAGE)
        return data


def _role(message: Mapping[str, Any], *, here: str) -> str:
    """Return user, assistant or system, and refuse what is not a plain message."""
    role = message.get("role")
    if role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise LeftOut("tool")
    if role not in ROLES:
        raise DataError(f"{here} has the role {role!r}", fix=did_you_mean(str(role), ROLES))
    if message.get("audio"):
        raise LeftOut("audio")
    if message.get("refusal"):
        raise LeftOut("refusal")
    if message.get("weight") == 0:
        raise LeftOut("answer of weight 0")
    return ROLES[role]


def _part(part: Any, *, role: str, here: str) -> tuple[str, ImageRef | None]:
    """Return the text of a part, and the image of an image part."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in OTHER_PARTS:
        raise LeftOut(OTHER_PARTS[kind])
    if kind in TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"{here} has a part of fields {sorted(part)}", fix="give a text part its 'text'")
        if IMAGE_TOKEN in text:
            raise Wrong(
                "placeholder in a text", f"a text holds {IMAGE_TOKEN}, which stands for images", fix="remove it"
            )
        return text, None
    if kind in IMAGE_PARTS:
        if role != "user":
            raise Wrong("image outside a user turn", f"a message of role {role} holds an image", fix="move it")
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not url:
            raise DataError(f"{here} has an image part of fields {sorted(part)}", fix="give it an 'image_url'")
        return IMAGE_TOKEN, url
    known = (*TEXT_PARTS, *IMAGE_PARTS)
    raise DataError(f"{here} has a part of type {kind!r}", fix=did_you_mean(str(kind), known))


def _data_url(url: str) -> bytes:
    """Return the bytes of ``data:image/png;base64,...``."""
    head, comma, body = url.partition(",")
    try:
        if comma and head.lower().endswith(";base64"):
            return base64.b64decode("".join(unquote(body).split()), validate=True)
        if comma:
            return unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise Wrong("malformed data: URL", f"{url[:60]!r} is not base64: {error}", fix="encode it again") from error
    raise Wrong("malformed data: URL", f"{url[:60]!r} has no comma before its data", fix="encode it again")
