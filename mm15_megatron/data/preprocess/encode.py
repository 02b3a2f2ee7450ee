"""From a record to what is stored: token ids with a sentinel for each image, a loss mask, image bytes."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from mm15_megatron.data.captions import encode_caption
from mm15_megatron.data.formats.base import Caption, Interleaved, Record, Text
from mm15_megatron.data.sft import encode_conversation
from mm15_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """A document as it is stored.

    Attributes:
        tokens: ids, one sentinel for each image.
        images: encoded bytes in the order of their sentinels.
        loss_mask: 1 where the token is a target; None where every token is.
    """

    tokens: list[int]
    images: tuple[bytes, ...] = ()
    loss_mask: list[int] | None = None

    def share(self) -> float:
        """Return a number in [0, 1) that depends on the content alone: equal documents fall on the same side of it."""
        digest = hashlib.sha256(np.asarray(self.tokens, dtype="<i8").tobytes())
        for image in self.images:
            digest.update(hashlib.sha256(image).digest())
        (number,) = struct.unpack("<Q", digest.digest()[:8])
        return float(number / 2**64)


def encode_record(record: Record, tokenizer: Tokenizer, *, where: str) -> Encoded:
    """Tokenise one record.

    Renderings: ``captions-1`` image, caption, end of text; ``text-1`` text, end of text; ``interleaved-1`` the parts in
    their order, a line break behind every paragraph but the last part, end of text (unpublished: our defaults);
    conversations as ``data/sft.py`` says.

    Raises:
        DataError: a conversation is malformed; the message names ``where``.
    """
    if isinstance(record, Caption):
        return Encoded(encode_caption(record.text, tokenizer), (record.image,))
    if isinstance(record, Text):
        return Encoded([*tokenizer.encode(record.text), tokenizer.eos_id])
    if isinstance(record, Interleaved):
        return _encode_interleaved(record, tokenizer)
    tokens, mask = encode_conversation(record, tokenizer, where=where)
    return Encoded(tokens, record.images, mask)


def _encode_interleaved(record: Interleaved, tokenizer: Tokenizer) -> Encoded:
    tokens: list[int] = []
    images: list[bytes] = []
    for number, part in enumerate(record.parts, start=1):
        if isinstance(part, bytes):
            tokens.append(tokenizer.image_id)
            images.append(part)
        else:
            tokens += tokenizer.encode(part if number == len(record.parts) else f"{part}\n")
    return Encoded([*tokens, tokenizer.eos_id], tuple(images))
