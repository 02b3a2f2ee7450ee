"""What each token id adds to a text, and where boxes and points stand in it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final

from mm15_megatron.data.tokenizer import Tokenizer

_INCOMPLETE: Final = "\ufffd"  # what decoders give for bytes that are no character yet
_LONGEST: Final = 4  # bytes of a character
# Harmless and needed inside words and emoji: joiners, non-joiners.
_JOINERS: Final = "\u200c\u200d"
_SHOWN: Final = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t"}


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str | None]:
    """Return what each id adds to the text of those before it.

    The text of an id depends on its neighbours (spaces, characters of several bytes), so ids are decoded behind the
    ones before them, as text is when it is generated.

    Args:
        ids: of one text; special ids and foreign ones may stand among them.
        tokenizer: decodes them.

    Returns:
        One text an id: empty where the tokenizer has none for it, None where it is a part of a character that a later
        id ends.
    """
    texts: list[str | None] = [None] * len(ids)
    start = done = 0  # ids[start:done] are decoded again for their influence on what follows
    for at in range(len(ids)):
        before, whole = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start : at + 1])
        if whole.endswith(_INCOMPLETE) and len(whole) > len(before) and at + 1 - done < _LONGEST:
            continue
        # a decoder that rewrites what stands before leaves nothing to compare with
        texts[at] = whole[len(before) :] if whole.startswith(before) else tokenizer.decode([ids[at]])
        start, done = (done if texts[at] else start), at + 1
    for at in range(done, len(ids)):  # the text ends inside a character
        texts[at] = tokenizer.decode([ids[at]])
    return texts


def visible(text: str) -> str:
    """Return a text whose line breaks and tabs can be seen, and whose other control characters are written out.

    Characters that turn the direction of a text, or have no shape, become such as ``‹U+202E›``: they cannot disguise
    what stands there.
    """
    return "".join(_SHOWN[c] if c in _SHOWN else c if _has_shape(c) else f"‹U+{ord(c):04X}›" for c in text)


def _has_shape(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
