"""Build the quickstart's data in the final indexed format: captions, conversations, and held-out questions.

    python -m examples.quickstart.build_dataset --out runs/quickstart/data

Writes ``tokenizer.json``, the training sources ``captions`` and ``conversations``, and the source ``heldout`` (one
question a document) with ``heldout_questions.json``, which says of each document its kind, question, answer, and what
is in the picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.quickstart import digits
from mm15_megatron.data.build import BuildOptions
from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.sft import Conversation, Turn, build_conversations, render
from mm15_megatron.data.tokenizer import IMAGE_TOKEN, Tokenizer

SEED = 20250
SHARES = (0.4, 0.25, 0.15, 0.2)  # of the kinds of pictures: singles, pairs, threes, fours
VOCABULARY = 256  # tokens at most
TURNS = 2  # questions a conversation asks about its picture, at most


@dataclass(frozen=True)
class Sizes:
    """How much is built: training pictures of each source, and held-out pictures of each kind but singles."""

    captions: int = 15000
    conversations: int = 45000
    heldout: int = 360


def pictures(scans: digits.Scans, count: int, rng: np.random.Generator) -> Iterator[digits.Picture]:
    """Compose ``count`` distorted training pictures; the kinds come in fixed shares, the scans at random."""
    for kind in rng.choice(len(SHARES), size=count, p=SHARES).tolist():
        chosen = rng.integers(len(scans.digits), size=kind + 1).tolist()
        yield digits.compose(scans, chosen, rng, distort=True)


def captions(scans: digits.Scans, count: int, rng: np.random.Generator) -> Iterator[tuple[bytes, str]]:
    """Pictures, every second one a JPEG, and their captions."""
    for number, picture in enumerate(pictures(scans, count, rng)):
        yield digits.encode(picture.pixels, jpeg=number % 2 == 1), digits.caption(picture)


def conversations(scans: digits.Scans, count: int, rng: np.random.Generator) -> Iterator[Conversation]:
    """Pictures, every second one a JPEG, with one or two questions in random order."""
    for number, picture in enumerate(pictures(scans, count, rng)):
        asked = digits.questions(picture, rng)
        order = rng.permutation(len(asked))[:TURNS]
        turns = [turn for at, index in enumerate(order) for turn in dialogue(asked[index], first=at == 0)]
        yield Conversation(tuple(turns), (digits.encode(picture.pixels, jpeg=number % 2 == 1),))


def dialogue(question: digits.Question, *, first: bool) -> tuple[Turn, Turn]:
    """A question and its answer; the picture stands before the first question."""
    asked = f"{IMAGE_TOKEN}\n{question.text}" if first else question.text
    return Turn("user", asked), Turn("assistant", question.answer)


def heldout(scans: digits.Scans, count: int) -> list[tuple[digits.Picture, digits.Question]]:
    """Every held-out scan as a single, and ``count`` questions of each other kind; the same whatever was trained on."""
    rng = np.random.default_rng(SEED + 1)
    asked: list[tuple[digits.Picture, digits.Question]] = []
    for scan in range(len(scans.digits)):
        picture = digits.compose(scans, [scan], rng, distort=False)
        asked.append((picture, digits.questions(picture, rng)[0]))
    for size in (2, 3, 4):
        for _ in range(count):
            picture = digits.compose(scans, rng.integers(len(scans.digits), size=size).tolist(), rng, distort=False)
            asked.append((picture, digits.questions(picture, rng)[0]))
    for kind in (1, 2):
        for _ in range(count):
            size = int(rng.integers(2, 5))
            picture = digits.compose(scans, rng.integers(len(scans.digits), size=size).tolist(), rng, distort=False)
            asked.append((picture, digits.questions(picture, rng)[kind]))
    return asked


def train_tokenizer(texts: Iterable[str], path: Path) -> Tokenizer:
    """Train a byte-level BPE until every word is one token; a digit in an answer is one token with its space.

    Short sequences make the quickstart quick: a question and its answer are about 17 tokens instead of 45 characters.
    """
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<unk>", "<pad>", "</s>", IMAGE_TOKEN]
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    inner.save(str(path))
    return Tokenizer(path)


def vocabulary_texts(scans: digits.Scans) -> Iterator[str]:
    """Questions, answers and captions of a few pictures, in the form the conversations give them."""
    rng = np.random.default_rng(SEED)
    for picture in pictures(scans, 500, rng):
        yield digits.caption(picture)
        for question in digits.questions(picture, rng):
            for piece in render(dialogue(question, first=True)):
                yield from piece.text.split(IMAGE_TOKEN)


def build(folder: Path, sizes: Sizes) -> None:
    """Write everything under ``folder``."""
    train, held = digits.split_scans()
    tokenizer = build_training(folder, train, sizes)
    write_heldout(folder, heldout(held, sizes.heldout), tokenizer)


def build_training(folder: Path, scans: digits.Scans, sizes: Sizes) -> Tokenizer:
    """Write the tokenizer and the training sources, from these scans alone."""
    tokenizer = train_tokenizer(vocabulary_texts(scans), folder / "tokenizer.json")
    rng = np.random.default_rng(SEED)
    options = BuildOptions(decode_images=False)  # they were encoded a moment ago: headers are checked, pixels are not
    build_captions(folder / "captions", captions(scans, sizes.captions, rng), tokenizer, options=options)
    build_conversations(
        folder / "conversations", conversations(scans, sizes.conversations, rng), tokenizer, options=options
    )
    return tokenizer


def write_heldout(folder: Path, asked: Sequence[tuple[digits.Picture, digits.Question]], tokenizer: Tokenizer) -> None:
    """Write the held-out questions as an indexed source, and what is known about them beside it."""
    documents = (
        Conversation(dialogue(question, first=True), (digits.encode(picture.pixels, jpeg=number % 2 == 1),))
        for number, (picture, question) in enumerate(asked)
    )
    build_conversations(folder / "heldout", documents, tokenizer)
    known = [
        {
            "kind": question.kind,
            "question": question.text,
            "answer": question.answer,
            "digits": picture.digits,
            "cells": picture.cells,
            "scans": picture.scans,
        }
        for picture, question in asked
    ]
    (folder / "heldout_questions.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart/data"), help="folder to write into")
    arguments = parser.parse_args()
    sizes = Sizes()
    build(arguments.out, sizes)
    print(
        f"{arguments.out}: {sizes.captions} captions, {sizes.conversations} conversations, "
        f"{digits.HELD_OUT_SCANS + 5 * sizes.heldout} held-out questions"
    )


if __name__ == "__main__":
    main()
