"""Small datasets of every kind for the page of samples, with real pictures whose content is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.formats.base import Interleaved
from mm15_megatron.data.image.pillow import check_image
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.preprocess.cli import run_tool
from mm15_megatron.data.preprocess.encode import encode_record
from mm15_megatron.data.sft import Conversation, Turn, build_conversations
from mm15_megatron.data.tokenizer import Tokenizer

from ..helpers.tools import load_tool
from .images import encode_image, photo

WORDS = "A palace with a red roof under a blue sky, and people who walk before it. USER: ASSISTANT: where is (0,1)?"
HOSTILE = (
    '</span></p></article></main><script>window.hacked = 1</script><img src="https://example.org/x.png" '
    'onerror="window.hacked = 2">&lt;b&gt; " title="x" \u202e ]]> --> ünïcödé 北京 🏯\x00\r\n'
)
RED_BOX = (60, 40, 150, 95)  # left, top, right, bottom in pixels of a picture of 200 x 120
RED_SIZE = (200, 120)


def byte_tokenizer(path: Path) -> Tokenizer:
    """A small byte-level BPE: characters of several bytes are several tokens, words are few."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator([WORDS] * 3, trainer)
    inner.save(str(path))
    return Tokenizer(path)


def captions(prefix: Path, tokenizer: Tokenizer) -> Path:
    """Five captions; one is an attack, one image is turned by EXIF."""
    texts = [WORDS, HOSTILE, "two\nlines\tand a tab", "short", ""]
    build_captions(prefix, [(photo(60 + 9 * n, 90 - 7 * n, seed=n), text) for n, text in enumerate(texts)], tokenizer)
    return prefix


def talk(prefix: Path, tokenizer: Tokenizer) -> Path:
    """Conversations with 0 to 4 images: up to two are split."""

    def one(count: int) -> Conversation:
        images = tuple(photo(70 + 40 * n, 150 - 20 * n, seed=n, form="JPEG") for n in range(count))
        first = Turn("user", "".join(f"image {n} <image>" for n in range(count)) + " what?")
        return Conversation((first, Turn("assistant", "This."), Turn("user", "Why?"), Turn("assistant", "So.")), images)

    build_conversations(prefix, [one(count) for count in (0, 1, 2, 3, 4)], tokenizer)
    return prefix


def web(prefix: Path, tokenizer: Tokenizer) -> Path:
    """Interleaved documents that are longer than a row of 128 tokens, and one that begins with a run of images."""
    documents = [[f"{WORDS} {n}", photo(50, 80, seed=n), WORDS * (n + 1), photo(80, 50, seed=9 + n)] for n in range(3)]
    with DatasetWriter(
        prefix, kind="interleaved", tokenizer_digest=tokenizer.digest, image_sentinel_id=tokenizer.image_id
    ) as writer:
        for parts in [*documents, [*(photo(30, 30, seed=n) for n in range(6)), "The end."]]:
            encoded = encode_record(Interleaved(tuple(parts)), tokenizer, where="")
            images = [check_image(image, max_pixels=10**6) for image in encoded.images]
            writer.add_document(encoded.tokens, images=images)
        writer.count_dropped({"too few <words>": 3})
    return prefix


def text(prefix: Path, tokenizer: Tokenizer, *, documents: int) -> Path:
    """Text; every tenth document is longer than a row of 128 tokens."""
    with DatasetWriter(
        prefix, kind="text", tokenizer_digest=tokenizer.digest, image_sentinel_id=tokenizer.image_id
    ) as writer:
        for number in range(documents):
            ids = tokenizer.encode(f"document {number}: {WORDS * (9 if number % 10 == 0 else 1)}")
            writer.add_document([*ids, tokenizer.eos_id])
    return prefix


def red_picture() -> bytes:
    """A gray picture with a red box."""
    width, height = RED_SIZE
    left, top, right, bottom = RED_BOX
    pixels = np.full((height, width, 3), 120, np.uint8)
    pixels[top:bottom, left:right] = (235, 10, 10)
    return encode_image(pixels)


def grounding(prefix: Path, tokenizer: Tokenizer, *, folder: Path) -> Path:
    """Ferret's GRIT through the tool that reads it: a box around the red, one around all, and a point."""
    (folder / "red.png").write_bytes(red_picture())
    width, height = RED_SIZE
    talks = [
        {"from": "human", "value": "<image>\nWhere is the red?"},
        {"from": "gpt", "value": "Here <bbox_location0>, in all of it <bbox_location1>."},
    ]
    record = {
        "id": 0,
        "image": "red.png",
        "image_w": width,
        "image_h": height,
        "conversations": talks,
        "box_x1y1x2y2": [[], [list(RED_BOX), [0, 0, width, height]]],
    }
    points = record | {
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is at <bbox_location0>?"},
            {"from": "gpt", "value": "Red."},
        ],
        "box_x1y1x2y2": [[list(RED_BOX)], []],
    }
    (folder / "grit.json").write_text(json.dumps([record, points]), encoding="utf-8")
    words = ["grit", str(folder / "grit.json"), "--image-root", str(folder), "--point-share", "1", "--points", "center"]
    words += ["--output", str(prefix), "--tokenizer", str(tokenizer.path), "--workers", "0"]
    assert run_tool("", load_tool("preprocess_sft").READERS, words) == 0
    return prefix


def broken(prefix: Path, tokenizer: Tokenizer) -> Path:
    """One good conversation, and seven that are wrong each in its own way."""
    good = photo(60, 90, seed=1)
    sentinel, a, b = tokenizer.image_id, 40, 41

    def image(data: bytes, height: int = 60) -> list[EncodedImage]:
        return [EncodedImage(data, height, 90)]

    with DatasetWriter(
        prefix, kind="conversations", tokenizer_digest=tokenizer.digest, image_sentinel_id=sentinel
    ) as writer:
        writer.add_document([sentinel, a, b], images=image(good), loss_mask=[0, 1, 1])
        writer.add_document([sentinel, a, b], images=image(good[:900]), loss_mask=[0, 1, 1])
        writer.add_document([sentinel, a, b], images=image(b"<script>window.hacked = 3</script>"), loss_mask=[0, 1, 1])
        writer.add_document([sentinel, a, b], images=image(good, height=50), loss_mask=[0, 1, 1])
        writer.add_document([], loss_mask=[])
        writer.add_document([a, 70_000, b], loss_mask=[0, 1, 1])
        writer.add_document([a, b], loss_mask=[0, 0])
        writer.add_document([sentinel] * 20 + [a], images=image(good) * 20, loss_mask=[0] * 20 + [1])
    return prefix
