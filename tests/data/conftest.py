"""Fixtures of the data tests: real tokenizers, real images, small real datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.sft import Conversation, Turn, build_conversations
from mm15_megatron.data.tokenizer import Tokenizer, train_character_tokenizer
from tests.data.images import photo


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A character tokenizer over printable ASCII."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_character_tokenizer([*map(chr, range(32, 127)), "\n"], path)


@pytest.fixture(scope="session")
def captions_prefix(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Forty captions of lengths 3 to 22 with images of different sizes."""
    prefix = tmp_path_factory.mktemp("captions") / "cap.v1"
    pairs = [(photo(20 + i, 60 - i, seed=i, form="JPEG" if i % 2 else "PNG"), "x" * (3 + i % 20)) for i in range(40)]
    build_captions(prefix, pairs, tokenizer)
    return prefix


@pytest.fixture(scope="session")
def conversations_prefix(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Thirty conversations with 0, 1, 2 or 3 images and one or two answers."""
    prefix = tmp_path_factory.mktemp("conversations") / "talk"

    def talk(i: int) -> Conversation:
        images = tuple(photo(30 + i, 30, seed=100 + i + k) for k in range(i % 4))
        turns = [Turn("user", "<image>" * len(images) + f"Q{i}"), Turn("assistant", f"A{i}")]
        if i % 2:
            turns += [Turn("user", "more"), Turn("assistant", "no")]
        return Conversation(tuple(turns), images)

    build_conversations(prefix, [talk(i) for i in range(30)], tokenizer)
    return prefix
