"""What readers of conversations share: roles, system turns, placeholders, turns without a partner, and images.

A record of :class:`~mm15_megatron.data.sft.Conversation` begins with a user turn, alternates, ends with an answer, and
has one ``<image>`` in a user turn for every image, in order. Texts stay as they are written, placeholders where they
stand. What published sets do instead, and what becomes of it here, is an option or a stated rule:

- a system turn: ``system``;
- images without any placeholder: ``missing_placeholder``;
- two turns of one role in a row: ``same_role``;
- an answer before the first question, or a question after the last answer (long dialogues cut to pieces have them):
  left out of the record and counted, with the images of that question;
- an empty answer: the conversation is left out and counted;
- anything else: ``on_bad``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from mm15_megatron.data.formats.base import UNIT_BYTES, Found, Item, Pending, Skipped, Unit
from mm15_megatron.data.formats.fields import MISSING_IMAGE, RAISE, SKIP, check_choice, read_inside
from mm15_megatron.data.formats.json_records import record_units, records
from mm15_megatron.data.sft import Conversation, Turn
from mm15_megatron.data.tokenizer import IMAGE_TOKEN
from mm15_megatron.errors import DataError, did_you_mean

ERROR: Final = "error"
SYSTEM_CHOICES: Final = ("drop", "prepend-to-first-user", ERROR)
PLACEHOLDER_CHOICES: Final = ("prepend", ERROR)
ROLE_CHOICES: Final = ("merge", ERROR)
PLAIN_ROLES: Final = ("system", "user", "assistant")
BAD_CHOICES: Final = (SKIP, ERROR)

_SYSTEM_FIX: Final = " or ".join(map(repr, SYSTEM_CHOICES[:2]))

NO_EXCHANGE: Final = "no question with an answer"
SYSTEM_DROPPED: Final = "system turn"
LEADING_ANSWER: Final = "answer before the first question"
TRAILING_QUESTION: Final = "question without an answer"

ImageRef = str | bytes
"""An image: its path below the folder of images, or its encoded bytes."""


class LeftOut(Exception):
    """A conversation is passed over; the message is the reason by which it is counted. It never leaves a reader."""


class Wrong(Exception):
    """Something in one conversation is wrong; ``on_bad`` decides what becomes of it. It never leaves a reader.

    Args:
        reason: short, without values, to count by.
        problem: with the values found.
        fix: what to do.
    """

    def __init__(self, reason: str, problem: str, *, fix: str) -> None:
        self.reason, self.problem, self.fix = reason, problem, fix
        super().__init__(problem)


@dataclass(frozen=True)
class Draft:
    """A conversation as a file has it: turns of roles system, user and assistant, and references to its images."""

    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True)
class Arranged:
    """The turns that make the record, how many of the images they use (the first ones), and what was left out."""

    turns: tuple[Turn, ...]
    images: int
    repaired: tuple[str, ...]


@dataclass(frozen=True)
class ConversationReader(ABC):
    """Files of conversations; a format says how one record is parsed.

    Attributes:
        paths: annotation files (JSON array, JSON lines, parquet) and folders of them.
        image_root: folder that paths of images are relative to, which none may leave by ``..``; None = the folder of
            the file.
        system: a leading system turn is dropped and counted (``drop``), put before the text of the first user turn, on
            lines of its own (``prepend-to-first-user``), or an error (``error``).
        missing_placeholder: what to do with images when no turn has a placeholder: one line with ``<image>`` for each
            goes before the text of the first user turn (``prepend``), or it is an error (``error``).
        same_role: turns of one role in a row are joined by a line break (``merge``), or are an error (``error``).
        on_bad: a conversation that breaks the format's rules (numbers of placeholders and images that differ, a
            placeholder in an answer, roles out of order) is left out and counted (``skip``) or an error (``error``).
        missing_image: a conversation with an image that does not exist is left out and counted (``skip``), or an error
            (``error``).
        unit_bytes: size of a unit of JSON, bytes.
    """

    paths: tuple[Path, ...]
    _: KW_ONLY
    image_root: Path | None = None
    system: str = ERROR
    missing_placeholder: str = ERROR
    same_role: str = ERROR
    on_bad: str = ERROR
    missing_image: str = SKIP
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is not a choice.
        """
        check_choice("system", self.system, SYSTEM_CHOICES)
        check_choice("missing_placeholder", self.missing_placeholder, PLACEHOLDER_CHOICES)
        check_choice("same_role", self.same_role, ROLE_CHOICES)
        check_choice("on_bad", self.on_bad, BAD_CHOICES)
        check_choice("missing_image", self.missing_image, BAD_CHOICES)
        if self.unit_bytes < 1:
            raise DataError(f"unit_bytes is {self.unit_bytes}", fix="use a size above zero")
        if self.image_root is not None and not self.image_root.is_dir():
            raise DataError(f"{self.image_root} is not a folder", fix="name the folder of images")

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        return "conversations"

    def units(self) -> tuple[Unit, ...]:
        """Cut the files at records.

        Raises:
            DataError: there are none, or one is no JSON or parquet.
        """
        return record_units(self.paths, size=self.unit_bytes)

    def read(self, unit: Unit) -> Iterator[Item]:
        """Read the conversations of a unit, whose videos and images are opened when they are.

        Raises:
            DataError: for a file that is not the format, and for a bad conversation unless ``on_bad`` is ``skip``.
        """
        for where, record in records(unit):
            yield Pending(where, partial(self._record, record, where=where, unit=unit))

    def _record(self, record: Mapping[str, Any], *, where: str, unit: Unit) -> Iterator[Found | Skipped]:
        place = f"{unit.path} at {where}"
        try:
            yield self.conversation(record, where=where, place=place, folder=unit.path.parent)
        except LeftOut as left:
            yield Skipped(str(left), where)
        except Wrong as wrong:
            if self.on_bad != SKIP:
                raise DataError(
                    f"{place}: {wrong.problem}",
                    fix=f"{wrong.fix}, or leave such conversations out with on_bad={SKIP!r}",
                ) from wrong
            yield Skipped(wrong.reason, where)

    @abstractmethod
    def parse(self, record: Mapping[str, Any], *, place: str) -> Draft:
        """Take the turns and images out of a record.

        Raises:
            DataError: the record is not of this format.
            LeftOut: it is, but holds what is not read.
            Wrong: something in it is wrong.
        """

    def conversation(self, record: Mapping[str, Any], *, where: str, place: str, folder: Path) -> Found:
        """Make the conversation of one record; raises what :meth:`parse` does."""
        draft = self.parse(record, place=place)
        arranged = self.arrange(draft.turns, images=len(draft.images))
        images = tuple(self.load(image, place=place, folder=folder) for image in draft.images[: arranged.images])
        return Found(Conversation(arranged.turns, images), where, arranged.repaired)

    def load(self, image: ImageRef, *, place: str, folder: Path) -> bytes:
        """Return the encoded bytes of an image.

        Raises:
            LeftOut: it does not exist.
            DataError: its path leads out of the folder of images.
        """
        if isinstance(image, bytes):
            return image
        missing = SKIP if self.missing_image == SKIP else RAISE
        data = read_inside(self.image_root or folder, image, place=place, missing=missing)
        if data is None:
            raise LeftOut(MISSING_IMAGE)
        return data

    def arrange(self, turns: Sequence[Turn], *, images: int) -> Arranged:
        """Make turns that begin with the user, alternate and end with an answer, with a placeholder for every image."""
        for number, turn in enumerate(turns):
            _check_text(turn, number=number)
        system, spoken = _split_system(turns)
        placed = self._placed(spoken, images=images)
        repaired: tuple[str, ...] = ()
        if system and self.system == ERROR:
            raise Wrong(
                "system turn", f"it begins with the system turn {system[:60]!r}", fix=f"let system be {_SYSTEM_FIX}"
            )
        if system and self.system == "drop":
            repaired, system = (SYSTEM_DROPPED,), ""
        arranged = _trimmed(self._joined(placed), images=images)
        if system:
            first = replace(arranged.turns[0], text=f"{system}\n{arranged.turns[0].text}")
            arranged = replace(arranged, turns=(first, *arranged.turns[1:]))
        return replace(arranged, repaired=repaired + arranged.repaired)

    def _placed(self, turns: list[Turn], *, images: int) -> list[Turn]:
        """Check or add the placeholders."""
        found = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
        asked = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        if asked is None:
            raise LeftOut(NO_EXCHANGE)
        if found == 0 and images and self.missing_placeholder == "prepend":
            first = Turn("user", f"{IMAGE_TOKEN}\n" * images + turns[asked].text)
            return [*turns[:asked], first, *turns[asked + 1 :]]
        if found != images:
            fix = "write one placeholder for each image, in order"
            if not found:
                fix += ", or have them put before the first question with missing_placeholder='prepend'"
            raise Wrong(
                "placeholders and images differ", f"{found} {IMAGE_TOKEN} placeholders and {images} images", fix=fix
            )
        return turns

    def _joined(self, turns: list[Turn]) -> list[Turn]:
        """Join turns of one role in a row, or refuse them."""
        joined: list[Turn] = []
        for turn in turns:
            if not joined or joined[-1].role != turn.role:
                joined.append(turn)
            elif self.same_role == "merge":
                joined[-1] = Turn(turn.role, f"{joined[-1].text}\n{turn.text}")
            else:
                raise Wrong(
                    "two turns of one role",
                    f"two {turn.role} turns in a row, {joined[-1].text[:40]!r} and {turn.text[:40]!r}",
                    fix="join them with same_role='merge'",
                )
        return joined


def _check_text(turn: Turn, *, number: int) -> None:
    try:
        turn.text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise Wrong(
            "text is not Unicode", f"turn {number} holds half of a surrogate pair", fix="write whole characters"
        ) from error
    if turn.role != "user" and IMAGE_TOKEN in turn.text:
        noun = "an answer" if turn.role == "assistant" else "a system turn"
        raise Wrong(
            f"placeholder in {noun}", f"turn {number}, {noun}, holds {IMAGE_TOKEN}", fix="put images into user turns"
        )


def _split_system(turns: Sequence[Turn]) -> tuple[str, list[Turn]]:
    """Return the text of the leading system turns, and the turns after them."""
    first = next((n for n, turn in enumerate(turns) if turn.role != "system"), len(turns))
    spoken = list(turns[first:])
    if any(turn.role == "system" for turn in spoken):
        raise Wrong("system turn in the middle", "a system turn follows other turns", fix="put it first")
    return "\n".join(turn.text for turn in turns[:first] if turn.text.strip()), spoken


def _trimmed(turns: list[Turn], *, images: int) -> Arranged:
    """Leave out a first answer and a last question, with its images."""
    repaired: list[str] = []
    if turns and turns[0].role == "assistant":
        repaired.append(LEADING_ANSWER)
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        repaired.append(TRAILING_QUESTION)
        images -= turns[-1].text.count(IMAGE_TOKEN)
        turns = turns[:-1]
    if not turns:
        raise LeftOut(NO_EXCHANGE)
    if any(turn.role == "assistant" and not turn.text.strip() for turn in turns):
        raise LeftOut("empty answer")
    return Arranged(tuple(turns), images, tuple(repaired))


def turn_list(record: Mapping[str, Any], name: str, *, place: str) -> list[Mapping[str, Any]]:
    """Return the list of turns of a record.

    Raises:
        DataError: there is none, or it does not hold objects.
    """
    turns = record.get(name)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        found = f"{name!r} is a {type(turns).__name__}" if name in record else f"the fields are {sorted(record)}"
        raise DataError(f"{place}: {found}", fix=f"give each record a list of objects as {name!r}")
    return turns


def plain_turn(turn: Mapping[str, Any], *, number: int, place: str) -> Turn:
    """Return a turn of the form {role, content}, with one text.

    Raises:
        DataError: the role is unknown.
        Wrong: the content is no text.
    """
    role, content = turn.get("role"), turn.get("content")
    if role not in PLAIN_ROLES:
        raise DataError(f"{place}: turn {number} has the role {role!r}", fix=did_you_mean(str(role), PLAIN_ROLES))
    if not isinstance(content, str):
        raise Wrong("turn without a text", f"turn {number} has the content {content!r}", fix="write a text")
    return Turn(str(role), content)


def image_list(value: Any, *, name: str, place: str) -> tuple[ImageRef, ...]:
    """Return the images of a record: paths, or objects with ``bytes`` and ``path`` as image columns of parquet have.

    Raises:
        DataError: it is neither a text, nor an object, nor a list of them.
    """
    if value is None or value == "":
        return ()
    images: list[ImageRef] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, str | bytes) or not item:
            raise DataError(
                f"{place}: {name!r} holds {str(item)[:60]!r}, a {type(item).__name__}",
                fix="give the path of an image, or a list of paths",
            )
        images.append(item)
    return tuple(images)
