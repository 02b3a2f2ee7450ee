"""One tokenizer class over a ``tokenizer.json`` (tokenizers) or a SentencePiece ``.model``.

Text is always plain text: ``</s>`` or ``<image>`` written in a caption become ordinary characters, never special ids.
Special ids are placed by the code that builds a sample (``eos_id``, ``image_id``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mm15_megatron.errors import DataError

IMAGE_TOKEN: Final = "<image>"
EOS_TOKENS: Final = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")
PAD_TOKENS: Final = ("<pad>", "[PAD]", "<|pad|>")


class _Backend(Protocol):
    """What a tokenizer library has to offer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def size(self) -> int: ...
    def find(self, token: str) -> int | None: ...
    def default_eos(self) -> int | None: ...
    def default_pad(self) -> int | None: ...


class _JsonBackend:
    """A ``tokenizer.json`` of the tokenizers library."""

    def __init__(self, content: bytes) -> None:
        self._inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self._inner.encode_special_tokens = True  # special tokens written in a text are plain text
        self._inner.no_truncation()
        self._inner.no_padding()
        self._size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        # of one text: what it leaves out against encode() is where each id stands in the text
        (found,) = self._inner.encode_batch_fast([text], add_special_tokens=False)
        return list(found.ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids, skip_special_tokens=True))

    def size(self) -> int:
        return self._size

    def find(self, token: str) -> int | None:
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    def default_eos(self) -> int | None:
        return next((found for name in EOS_TOKENS if (found := self.find(name)) is not None), None)

    def default_pad(self) -> int | None:
        return next((found for name in PAD_TOKENS if (found := self.find(name)) is not None), None)


class _SentencePieceBackend:
    """A SentencePiece ``.model``."""

    def __init__(self, content: bytes) -> None:
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=content)

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text))

    def decode(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids))

    def size(self) -> int:
        return int(self._inner.vocab_size())

    def find(self, token: str) -> int | None:
        found = int(self._inner.piece_to_id(token))
        return found if self._inner.id_to_piece(found) == token else None

    def default_eos(self) -> int | None:
        return int(self._inner.eos_id()) if self._inner.eos_id() >= 0 else None

    def default_pad(self) -> int | None:
        return int(self._inner.pad_id()) if self._inner.pad_id() >= 0 else None


class Tokenizer:
    """Text to ids and back, with the special ids of this project.

    Args:
        path: a ``tokenizer.json`` or a SentencePiece ``.model``; the ending decides.

    Attributes:
        path: where it was read from.
        vocab_size: ids of the tokenizer (its largest id + 1).
        eos_id: id that ends a document or an answer.
        pad_id: padding id; ``eos_id`` when the tokenizer has none (padding is masked in any case).
        image_id: the image sentinel: id of ``<image>``, or the id just past the vocabulary when there is none.
        digest: SHA-256 of the content; the layout of a JSON file does not matter.

    Raises:
        DataError: if the file is missing, unreadable, or has no end-of-text token.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = _read(self.path)
        backend = _open(self.path, content)
        eos = backend.default_eos()
        if eos is None:
            raise DataError(
                f"tokenizer {self.path} has no end-of-text token",
                fix="add one of " + ", ".join(EOS_TOKENS) + " (SentencePiece: train with eos_id >= 0)",
            )
        pad, image = backend.default_pad(), backend.find(IMAGE_TOKEN)
        self._backend = backend
        self.vocab_size = backend.size()
        self.eos_id = eos
        self.pad_id = eos if pad is None else pad
        self.image_id = self.vocab_size if image is None else image
        self.digest = hashlib.sha256(_canonical(self.path, content)).hexdigest()

    def __reduce__(self) -> tuple[object, ...]:
        """Open the file again in another process."""
        return (Tokenizer, (os.fspath(self.path),))

    @property
    def required_vocab_size(self) -> int:
        """Ids a model needs: the vocabulary, plus one when the image sentinel lies past it."""
        return max(self.vocab_size, self.image_id + 1)

    def check_fits(self, vocab_size: int) -> None:
        """Check that a model of ``vocab_size`` ids knows every id of this tokenizer and the image sentinel.

        Raises:
            DataError: if it does not.
        """
        if self.required_vocab_size > vocab_size:
            raise DataError(
                f"tokenizer {self.path} needs {self.required_vocab_size} ids (image sentinel {self.image_id} included),"
                f" the model has {vocab_size}",
                fix=f"set language.vocab_size={self.required_vocab_size} or larger, or use another tokenizer",
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; no special id is added or recognised.

        Raises:
            DataError: if the text yields the image sentinel (a SentencePiece model with a user-defined ``<image>``).
        """
        ids = self._backend.encode(text)
        if self.image_id in ids:
            raise DataError(
                f"the text {text[:60]!r} contains the image sentinel {IMAGE_TOKEN}",
                fix="pass images through the builder's placeholders and remove the token from plain text",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; end-of-text, padding and image ids are left out."""
        special = {self.eos_id, self.pad_id, self.image_id}
        return self._backend.decode([int(i) for i in ids if int(i) not in special and 0 <= int(i) < self.vocab_size])


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(
            f"tokenizer {path} does not exist", fix="set data.tokenizer to a tokenizer.json or a .model file"
        )
    return path.read_bytes()


def _open(path: Path, content: bytes) -> _Backend:
    if path.suffix == ".json":
        try:
            return _JsonBackend(content)
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a malformed file
            raise DataError(
                f"{path} is not a tokenizer.json: {error}", fix="save it with tokenizers' Tokenizer.save"
            ) from error
    if path.suffix == ".model":
        try:
            return _SentencePieceBackend(content)
        except RuntimeError as error:
            raise DataError(
                f"{path} is not a SentencePiece model: {error}", fix="train it with SentencePiece"
            ) from error
    raise DataError(
        f"tokenizer {path} ends in {path.suffix!r}", fix="use a tokenizer.json or a SentencePiece .model file"
    )


def _canonical(path: Path, content: bytes) -> bytes:
    return json.dumps(json.loads(content), sort_keys=True).encode() if path.suffix == ".json" else content


def train_character_tokenizer(texts: Iterable[str], path: str | Path) -> Tokenizer:
    """Write a ``tokenizer.json`` with one id for each character of ``texts``, and open it.

    Ids 0 to 3 are ``<unk>``, ``<pad>``, ``</s>`` and ``<image>``; characters follow in code-point order, so the file
    depends on the set of characters alone. Characters never seen become ``<unk>``.

    Args:
        texts: any texts; only their characters matter.
        path: where to write, ending in ``.json``; its folder is created.
    """
    special = ["<unk>", "<pad>", "</s>", IMAGE_TOKEN]
    characters = sorted({character for text in texts for character in text})
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(special)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    inner.save(str(temporary))
    os.replace(temporary, target)
    return Tokenizer(target)
