"""How well the held-out questions are answered, beside two baselines: 3-nearest-neighbour, and shuffled pictures.

3-nearest-neighbour reads the pixels of the source scans and is told where each digit is: an upper hand. The same
model with the pictures shuffled among questions of one kind must fall to chance: if it does not, the questions give
the answers away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from examples.quickstart import digits
from mm15_megatron.accounting import model_parameters
from mm15_megatron.data.image.decode_pil import build_codec
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.sft import Turn, encode_prompt
from mm15_megatron.data.tokenizer import IMAGE_TOKEN, Tokenizer
from mm15_megatron.errors import DataError
from mm15_megatron.evaluation.generate import Generator, Prompt
from mm15_megatron.evaluation.metrics import Score, exact_match, scores_by_kind
from mm15_megatron.evaluation.report import Shown, write_grid
from mm15_megatron.evaluation.restore import Restored

NEW_TOKENS = 8  # "3 8 1 4" and the end of text
CHANCE_MARGIN = 0.05  # shuffled pictures may be answered this much better than by chance before the result is void
NEIGHBOURS = 3
SHOWN = (("single", 6), ("pair", 4), ("three", 3), ("four", 4), ("count", 3), ("cell", 4))


@dataclass(frozen=True)
class Asked:
    """One held-out question: what is known about it, and the encoded picture."""

    kind: str
    question: str
    answer: str
    digits: tuple[int, ...]
    cells: tuple[int, ...]
    scans: tuple[int, ...]
    picture: bytes


def read_questions(folder: Path, *, tokenizer: Tokenizer) -> list[Asked]:
    """Read the held-out source and what lies beside it.

    Raises:
        DataError: the two do not belong together, or a file is missing or damaged.
    """
    source = IndexedSource(folder / "heldout", tokenizer_digest=tokenizer.digest, kinds=("conversations",))
    path = folder / "heldout_questions.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", fix="build the dataset again") from error
    if len(known) != source.num_documents:
        raise DataError(
            f"{path} has {len(known)} questions, the source {source.num_documents}", fix="build the dataset again"
        )
    return [
        Asked(
            kind=entry["kind"],
            question=entry["question"],
            answer=entry["answer"],
            digits=tuple(entry["digits"]),
            cells=tuple(entry["cells"]),
            scans=tuple(entry["scans"]),
            picture=source.image_bytes(number).tobytes(),
        )
        for number, entry in enumerate(known)
    ]


def answer_all(
    generator: Generator, asked: Sequence[Asked], pictures: Sequence[bytes], tokenizer: Tokenizer
) -> list[str]:
    """Ask every question about the picture given with it."""
    prompts = [
        Prompt(tuple(encode_prompt([Turn("user", f"{IMAGE_TOKEN}\n{a.question}")], tokenizer)), (picture,))
        for a, picture in zip(asked, pictures, strict=True)
    ]
    return [tokenizer.decode(ids).strip() for ids in generator.generate(prompts, max_new_tokens=NEW_TOKENS)]


def shuffled(asked: Sequence[Asked], *, seed: int) -> list[int]:
    """For each question the index of another question of its kind, whose picture it gets."""
    rng = np.random.default_rng(seed)
    given = list(range(len(asked)))
    for kind in {a.kind: None for a in asked}:
        ring = rng.permutation([i for i, a in enumerate(asked) if a.kind == kind]).tolist()
        for here, there in zip(ring, ring[1:] + ring[:1], strict=True):
            given[here] = there
    return given


def chance(asked: Sequence[Asked], given: Sequence[int]) -> Mapping[str, float]:
    """How often a shuffled picture has the right answer by luck, or the most frequent answer is right, by kind."""
    levels = {}
    for kind in {a.kind: None for a in asked}:
        mine = [i for i, a in enumerate(asked) if a.kind == kind]
        truths = [asked[i].answer for i in mine]
        lucky = sum(asked[i].answer == asked[given[i]].answer for i in mine)
        levels[kind] = max(lucky, max(truths.count(truth) for truth in set(truths))) / len(mine)
    return levels


def nearest_neighbours(asked: Sequence[Asked]) -> Mapping[str, Score]:
    """Read every source scan by its nearest training scans; a picture is right if all its scans are."""
    train, held = digits.split_scans()
    classifier = KNeighborsClassifier(NEIGHBOURS).fit(train.pixels.reshape(len(train.digits), -1), train.digits)
    right = classifier.predict(held.pixels.reshape(len(held.digits), -1)) == held.digits
    listings = [a for a in asked if a.kind in digits.KINDS]
    return scores_by_kind((a.kind, bool(right[list(a.scans)].all())) for a in listings)


def draw_answers(path: Path, asked: Sequence[Asked], answers: Sequence[str]) -> None:
    """Write the picture grid: the first questions of each kind."""
    cells = []
    codec = build_codec(threads=1)
    for kind, count in SHOWN:
        for i in [i for i, a in enumerate(asked) if a.kind == kind][:count]:
            pixels = codec.decode([np.frombuffer(asked[i].picture, np.uint8)])[0].numpy()
            right = exact_match(answers[i], asked[i].answer)
            cells.append(Shown(pixels, asked[i].question, answers[i], asked[i].answer, right))
    write_grid(path, cells)


def evaluate_all(restored: Restored, *, data: Path) -> tuple[dict[str, Any], list[Asked], list[str]]:
    """Answer everything (every rank must call) and return the figures, the questions and the answers."""
    tokenizer = Tokenizer(data / "tokenizer.json")
    asked = read_questions(data, tokenizer=tokenizer)
    generator = Generator(
        restored.model,
        restored.cfg,
        topology=restored.topology,
        eos_id=tokenizer.eos_id,
        image_id=tokenizer.image_id,
    )
    start = time.perf_counter()
    answers = answer_all(generator, asked, [a.picture for a in asked], tokenizer)
    answering = time.perf_counter() - start
    given = shuffled(asked, seed=restored.cfg.train.seed)
    blind = answer_all(generator, asked, [asked[i].picture for i in given], tokenizer)
    levels = chance(asked, given)
    truths = [(a.kind, a.answer) for a in asked]
    figures: dict[str, Any] = {
        "step": restored.checkpoint.step,
        "parameters": model_parameters(restored.cfg).total,
        "answers_per_second": round(len(asked) / answering, 1),
        "accuracy": _plain(_scores(truths, answers)),
        "baselines": {
            f"{NEIGHBOURS}_nearest_neighbours": _plain(nearest_neighbours(asked)),
            "shuffled_pictures": _plain(_scores(truths, blind)),
            "chance": {kind: round(level, 4) for kind, level in levels.items()},
        },
    }
    figures["void"] = [
        kind for kind, score in _scores(truths, blind).items() if score.interval[0] > levels[kind] + CHANCE_MARGIN
    ]
    return figures, asked, answers


def _scores(truths: Sequence[tuple[str, str]], answers: Sequence[str]) -> Mapping[str, Score]:
    return scores_by_kind(
        (kind, exact_match(answer, truth)) for (kind, truth), answer in zip(truths, answers, strict=True)
    )


def _plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {kind: score.as_dict() for kind, score in scores.items()}
