"""English text for the benchmark, and a tokenizer trained on it: what every Python brings along, drawn at random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCABULARY: Final = 16_384
SOURCE: Final = (
    "paragraphs of the Python language reference drawn at random, every fiftieth word replaced by a number or a word "
    "put together from two; a log-normal number of paragraphs in a document"
)
_PARAGRAPHS_MEAN, _PARAGRAPHS_DEVIATION = 2.0, 0.9  # of the logarithm: a few long documents, many short ones
_RARE: Final = 50
_NUMBERS: Final = 1_000_000


def paragraphs() -> list[str]:
    """Return the paragraphs of Python's language reference, in a fixed order."""
    return [part for name in sorted(topics) for part in topics[name].split("\n\n") if len(part) > 40]


def documents(*, characters: int, seed: int = 1) -> Iterator[str]:
    """Yield documents until they hold ``characters`` characters together.

    Real text never stops showing words that were not seen before, so words are replaced: a tokenizer that remembers
    words does not know all of them.
    """
    random, known = np.random.default_rng(seed), paragraphs()
    vocabulary = sorted({word for part in known for word in part.split() if word.isalpha()})
    written = 0
    while written < characters:
        count = 1 + int(random.lognormal(_PARAGRAPHS_MEAN, _PARAGRAPHS_DEVIATION))
        words = "\n\n".join(known[i] for i in random.integers(0, len(known), count)).split(" ")
        for at in random.integers(0, len(words), len(words) // _RARE):
            one, two, number = random.integers(0, (len(vocabulary), len(vocabulary), _NUMBERS))
            words[at] = str(number) if number % 2 else vocabulary[one] + vocabulary[two]
        text = " ".join(words)
        written += len(text)
        yield text


def write_jsonl(path: Path, *, characters: int) -> int:
    """Write documents as JSON lines with one field ``text``; return how many."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for text in documents(characters=characters):
            stream.write(json.dumps({"text": text}) + "\n")
            count += 1
    return count


def train_tokenizer(folder: Path, *, vocabulary: int = VOCABULARY) -> Path:
    """Train a byte-level BPE tokenizer; return its ``tokenizer.json``, in a folder that transformers can load too."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(paragraphs(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "tokenizer.json"
