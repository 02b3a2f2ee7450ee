"""Write the quickstart's data as the files that others publish, for the preprocessing tools to read.

    python -m examples.quickstart.build_dataset --out runs/quickstart

Writes below ``files/`` of that folder

    images/                   every picture, PNG or JPEG, a thousand to a folder
    captions.jsonl            a picture and its caption a line
    interleaved.jsonl         positioned documents: some pictures, a paragraph behind each
    text.jsonl                documents without pictures
    conversations.json        LLaVA's form, one or two questions about a picture
    heldout.json              the same, one held-out question each

and below ``data/`` the ``tokenizer.json`` and ``heldout_questions.json``, which says of each held-out question its
kind, its answer and what is in the picture. ``preprocess.sh`` makes the datasets of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.quickstart import digits
from mm15_megatron.data.sft import Turn, render
from mm15_megatron.data.tokenizer import IMAGE_TOKEN, Tokenizer

SEED = 20250
SHARES = (0.3, 0.25, 0.2, 0.25)  # of the kinds of pictures: singles, pairs, threes, fours
VOCABULARY = 256  # tokens at most
TURNS = 2  # questions a conversation asks about its picture, at most
PICTURES = (2, 3, 4)  # of an interleaved document
SUMS = 5  # of a document without pictures


@dataclass(frozen=True)
class Sizes:
    """How much is written: training documents of each kind, and held-out questions of each kind but singles."""

    captions: int = 15000
    interleaved: int = 7000
    text: int = 3000
    conversations: int = 36000
    heldout: int = 360


def pictures(scans: digits.Scans, count: int, rng: np.random.Generator) -> Iterator[digits.Picture]:
    """Compose ``count`` distorted training pictures; the kinds come in fixed shares, the scans at random."""
    for kind in rng.choice(len(SHARES), size=count, p=SHARES).tolist():
        chosen = rng.integers(len(scans.digits), size=kind + 1).tolist()
        yield digits.compose(scans, chosen, rng, distort=True)


def questions(
    scans: digits.Scans, count: int, rng: np.random.Generator
) -> Iterator[tuple[digits.Picture, list[digits.Question]]]:
    """Pictures with one or two questions in random order."""
    for picture in pictures(scans, count, rng):
        asked = digits.questions(picture, rng)
        yield picture, [asked[index] for index in rng.permutation(len(asked))[:TURNS]]


def dialogue(question: digits.Question, *, first: bool) -> tuple[Turn, Turn]:
    """A question and its answer; the picture stands before the first question."""
    asked = f"{IMAGE_TOKEN}\n{question.text}" if first else question.text
    return Turn("user", asked), Turn("assistant", question.answer)


def sums(rng: np.random.Generator) -> str:
    """A few sums of one digit, such as ``3 and 5 are 8``."""
    totals = rng.integers(10, size=SUMS)
    firsts = rng.integers(totals + 1)
    return ", ".join(f"{a} and {t - a} are {t}" for a, t in zip(firsts.tolist(), totals.tolist(), strict=True))


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


# --- The tokenizer


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
    """Texts of every kind about a few pictures, in the form that the datasets give them."""
    rng = np.random.default_rng(SEED)
    for picture in pictures(scans, 500, rng):
        yield f"{digits.caption(picture)}\n"
        yield sums(rng)
        for question in digits.questions(picture, rng):
            for piece in render(dialogue(question, first=True)):
                yield from piece.text.split(IMAGE_TOKEN)


# --- The files


class Album:
    """Writes the pictures of one kind of document, every second one a JPEG.

    Args:
        folder: folder of all files.
        kind: name of the pictures' folder.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind, self.count = folder, kind, 0

    def add(self, picture: digits.Picture) -> str:
        """Write a picture and return its name, below the folder of all files."""
        jpeg = self.count % 2 == 1
        name = f"images/{self.kind}/{self.count // 1000:02}/{self.count:05}.{'jpg' if jpeg else 'png'}"
        path = self.folder / name
        if self.count % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(digits.encode(picture.pixels, jpeg=jpeg))
        self.count += 1
        return name


def caption_lines(album: Album, found: Iterable[digits.Picture]) -> Iterator[Mapping[str, Any]]:
    """Hugging Face's form of an image folder: ``file_name`` and ``text``."""
    for picture in found:
        yield {"file_name": album.add(picture), "text": digits.caption(picture)}


def interleaved_lines(
    album: Album, scans: digits.Scans, count: int, rng: np.random.Generator
) -> Iterator[Mapping[str, Any]]:
    """Positioned documents: a placeholder for each picture, behind it a paragraph that says what it shows."""
    for size in rng.choice(PICTURES, size=count).tolist():
        shown = list(pictures(scans, size, rng))
        text = "".join(f"{IMAGE_TOKEN}{digits.caption(picture)}" for picture in shown)
        yield {"text": text, "images": [album.add(picture) for picture in shown]}


def llava_records(
    album: Album, asked: Iterable[tuple[digits.Picture, Sequence[digits.Question]]]
) -> Iterator[Mapping[str, Any]]:
    """LLaVA's form of conversations: turns of ``human`` and ``gpt``, the picture's name beside them."""
    for number, (picture, several) in enumerate(asked):
        turns = [turn for at, question in enumerate(several) for turn in dialogue(question, first=at == 0)]
        speakers = {"user": "human", "assistant": "gpt"}
        yield {
            "id": f"{album.kind}-{number}",
            "image": album.add(picture),
            "conversations": [{"from": speakers[turn.role], "value": turn.text} for turn in turns],
        }


def build(folder: Path, sizes: Sizes) -> None:
    """Write everything under ``folder``."""
    train, held = digits.split_scans()
    build_training(folder, train, sizes)
    build_heldout(folder, heldout(held, sizes.heldout))


def build_training(folder: Path, scans: digits.Scans, sizes: Sizes) -> None:
    """Write the tokenizer and the training files, from these scans alone."""
    train_tokenizer(vocabulary_texts(scans), folder / "data" / "tokenizer.json")
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    of_captions, of_documents, of_text, of_conversations = (
        np.random.default_rng((SEED, number)) for number in range(4)
    )
    captioned = pictures(scans, sizes.captions, of_captions)
    _write_lines(files / "captions.jsonl", caption_lines(Album(files, "captions"), captioned))
    documents = interleaved_lines(Album(files, "interleaved"), scans, sizes.interleaved, of_documents)
    _write_lines(files / "interleaved.jsonl", documents)
    _write_lines(files / "text.jsonl", ({"text": sums(of_text)} for _ in range(sizes.text)))
    asked = questions(scans, sizes.conversations, of_conversations)
    _write_array(files / "conversations.json", llava_records(Album(files, "conversations"), asked))


def build_heldout(folder: Path, asked: Sequence[tuple[digits.Picture, digits.Question]]) -> None:
    """Write the held-out questions, and what is known about them."""
    files, data = folder / "files", folder / "data"
    records = llava_records(Album(files, "heldout"), ((picture, [question]) for picture, question in asked))
    _write_array(files / "heldout.json", records)
    known = (
        {
            "kind": question.kind,
            "question": question.text,
            "answer": question.answer,
            "digits": picture.digits,
            "cells": picture.cells,
            "scans": picture.scans,
        }
        for picture, question in asked
    )
    _write_array(data / "heldout_questions.json", known)


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{json.dumps(record)}\n" for record in records)


def _write_array(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n", encoding="utf-8")


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder to write into")
    arguments = parser.parse_args()
    sizes = Sizes()
    build(arguments.out, sizes)
    print(
        f"{arguments.out}/files: {sizes.captions} captions, {sizes.interleaved} interleaved documents, {sizes.text} "
        f"texts, {sizes.conversations} conversations, {digits.HELD_OUT_SCANS + 5 * sizes.heldout} held-out questions"
    )


if __name__ == "__main__":
    main()
