"""Conversations: the chat template, loss on answers alone, and the builder.

Rendering ``llava15-1``: the form of LLaVA-1.5's template, without a system prompt (MM1's is unpublished: our default)::

    USER: <image>
    What digit is this? ASSISTANT: 7</s>USER: And doubled? ASSISTANT: 14</s>

An answer and its end of text are targets, nothing else is. Pieces are encoded one by one, so a prompt given to the
model at generation time has exactly the ids it had in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mm15_megatron.data.build import DEFAULT_OPTIONS, BuildOptions, account, checked_images
from mm15_megatron.data.indexed.format import Manifest
from mm15_megatron.data.indexed.writer import DatasetWriter
from mm15_megatron.data.tokenizer import IMAGE_TOKEN, Tokenizer
from mm15_megatron.errors import DataError

ROLES: Final = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One turn: ``role`` user or assistant; ``text`` with ``<image>`` where an image stands (user turns alone)."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Alternating turns, user first, and the encoded bytes of the images in the order of their placeholders."""

    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation: ``target`` = the loss is on it; an answer is followed by end of text."""

    text: str
    target: bool = False


def parse_turns(turns: Iterable[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Turn dictionaries with ``role`` and ``text`` (or ``content``) into :class:`Turn`.

    Raises:
        DataError: if a turn lacks a role or a text.
    """
    parsed = []
    for number, turn in enumerate(turns):
        text = turn.get("text", turn.get("content"))
        if not isinstance(text, str) or not isinstance(turn.get("role"), str):
            raise DataError(
                f"turn {number} has the fields {sorted(turn)}", fix="give each turn a role (user, assistant) and a text"
            )
        parsed.append(Turn(turn["role"], text))
    return tuple(parsed)


def render(turns: Sequence[Turn]) -> tuple[Piece, ...]:
    """Render alternating turns into pieces: ``USER: ... ASSISTANT:`` without loss, `` answer`` with loss.

    Raises:
        DataError: if roles do not alternate from user on, or an answer holds an image placeholder.
    """
    pieces = []
    for number, turn in enumerate(turns):
        if turn.role != ROLES[number % 2]:
            raise DataError(
                f"turn {number} has role {turn.role!r}, expected {ROLES[number % 2]!r}",
                fix="start with a user turn and alternate user and assistant",
            )
        if turn.role == "user":
            pieces.append(Piece(f"USER: {turn.text} ASSISTANT:"))
        elif IMAGE_TOKEN in turn.text:
            raise DataError(f"turn {number}: an answer holds {IMAGE_TOKEN}", fix="put images into user turns")
        else:
            pieces.append(Piece(f" {turn.text}", target=True))
    return tuple(pieces)


def render_prompt(turns: Sequence[Turn]) -> tuple[Piece, ...]:
    """Render the prompt of a generation: turns that end with the user's, so that the answer comes next.

    Raises:
        DataError: if the last turn is not the user's.
    """
    if not turns or turns[-1].role != "user":
        raise DataError(f"a prompt of {len(turns)} turns does not end with a user turn", fix="leave the answer out")
    return render(turns)


def encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return (ids, loss mask) of rendered pieces, one image sentinel where each placeholder stands."""
    tokens: list[int] = []
    mask: list[int] = []
    for piece in pieces:
        if piece.target:
            ids = [*tokenizer.encode(piece.text), tokenizer.eos_id]
        else:
            ids = encode_placeholders(piece.text, tokenizer)
        tokens += ids
        mask += [int(piece.target)] * len(ids)
    return tokens, mask


def encode_placeholders(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text, with the image sentinel where ``<image>`` is written."""
    ids: list[int] = []
    for number, part in enumerate(text.split(IMAGE_TOKEN)):
        ids += [tokenizer.image_id] * (number > 0) + (tokenizer.encode(part) if part else [])
    return ids


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt (:func:`render_prompt`): exactly what training saw before the answer."""
    return encode(render_prompt(turns), tokenizer)[0]


def build_conversations(
    prefix: str | Path,
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    *,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> Manifest:
    """Write an indexed dataset of kind ``conversations``.

    Args:
        prefix: path prefix of the dataset.
        conversations: turns and image bytes.
        tokenizer: the tokenizer of the run.
        options: what to do with bad images and an existing dataset.

    Returns:
        The manifest; ``dropped`` counts the conversations left out, by reason.

    Raises:
        DataError: for a malformed conversation, placeholders and images that disagree in number, an image that cannot
            be used (unless dropped), or a prefix that is taken.
    """
    with DatasetWriter(
        prefix,
        kind="conversations",
        tokenizer_digest=tokenizer.digest,
        image_sentinel_id=tokenizer.image_id,
        overwrite=options.overwrite,
        meta=account(options),
    ) as writer:
        for number, conversation in enumerate(conversations):
            where = f"conversation {number} of {prefix}"
            tokens, mask = encode_conversation(conversation, tokenizer, where=where)
            images = checked_images(conversation.images, where=where, options=options)
            if images is None:
                writer.count_dropped({"bad image": 1})
            else:
                writer.add_document(tokens, images=images, loss_mask=mask)
    return writer.manifest


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, *, where: str) -> tuple[list[int], list[int]]:
    """Return (ids, loss mask) of a conversation.

    Raises:
        DataError: it is malformed, its placeholders and images disagree in number, or it has no answer; the message
            names ``where``.
    """
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in conversation.turns)
    if placeholders != len(conversation.images):
        raise DataError(
            f"{where} has {placeholders} {IMAGE_TOKEN} placeholders and {len(conversation.images)} images",
            fix="write one placeholder for each image, in order",
        )
    try:
        tokens, mask = encode(render(conversation.turns), tokenizer)
    except DataError as error:
        raise DataError(f"{where}: {error.problem}", fix=error.fix) from error
    if not any(mask):
        raise DataError(f"{where} has no answer to learn from", fix="end it with an assistant turn")
    return tokens, mask
