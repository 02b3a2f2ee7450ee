"""Builders of captions and conversations, and the chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mm15_megatron import __version__
from mm15_megatron.data.build import BuildOptions
from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.samples import SampleRef, read_sample
from mm15_megatron.data.sft import (
    Conversation,
    Turn,
    build_conversations,
    encode,
    encode_prompt,
    parse_turns,
    render,
    render_prompt,
)
from mm15_megatron.data.tokenizer import Tokenizer
from mm15_megatron.errors import DataError
from tests.data.images import photo

USER, ANSWER = Turn("user", "<image>\nWhat?"), Turn("assistant", "7")


def test_captions_are_image_caption_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    picture = photo(31, 17)
    manifest = build_captions(tmp_path / "c", [(picture, "a cat"), (picture, "a </s> <image>")], tokenizer)
    assert (manifest.kind, manifest.documents, manifest.images) == ("captions", 2, 2)
    assert manifest.rendering == "captions-1"
    assert manifest.meta["program"] == f"mm15_megatron {__version__}"
    assert manifest.meta["options"]["on_bad_image"] == "raise"
    source = IndexedSource(tmp_path / "c", tokenizer_digest=tokenizer.digest)
    sample = read_sample(source, SampleRef(4, 0, 0, 99))
    assert sample.tokens.tolist() == [tokenizer.image_id, *tokenizer.encode("a cat"), tokenizer.eos_id]
    assert sample.loss_mask.all()
    assert [(i.source, i.item, i.height, i.width) for i in sample.images] == [(4, 0, 31, 17)]
    assert source.image_bytes(0).tobytes() == picture
    assert tokenizer.decode(read_sample(source, SampleRef(0, 1, 0, 999)).tokens) == "a </s> <image>"


def test_exif_orientation_swaps_the_stored_size(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    build_captions(tmp_path / "c", [(photo(20, 50, form="JPEG", exif=exif), "x")], tokenizer)
    assert IndexedSource(tmp_path / "c").image_sizes.tolist() == [[50, 20]]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "no bytes"),
        (b"hello", "not an allowed image format"),
        (b"GIF89a....", "GIF is refused"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000 is refused"),
        (photo(40, 40)[:300], "body"),
        (photo(40, 40)[:20], "header"),
        (photo(300, 400), "300x400 pixels, the limit is 100000"),
    ],
)
def test_bad_images_raise_or_are_dropped_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, bad: bytes, reason: str
) -> None:
    pairs = [(photo(8, 8), "a"), (bad, "b"), (photo(9, 9), "c")]
    with pytest.raises(DataError, match=f"pair 1 of .*{reason}"):
        build_captions(tmp_path / "c", pairs, tokenizer, options=BuildOptions(max_image_pixels=100_000))
    assert list(tmp_path.iterdir()) == []
    options = BuildOptions(on_bad_image="drop", max_image_pixels=100_000)
    manifest = build_captions(tmp_path / "c", pairs, tokenizer, options=options)
    assert (manifest.documents, manifest.dropped) == (2, {"bad image": 1})


def test_header_check_alone_accepts_a_truncated_body(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = [(photo(40, 40, form="JPEG")[:700], "a")]
    assert build_captions(tmp_path / "c", pairs, tokenizer, options=BuildOptions(decode_images=False)).documents == 1


def test_unknown_option() -> None:
    with pytest.raises(DataError, match="on_bad_image is 'ignore'"):
        BuildOptions(on_bad_image="ignore")


def test_template_and_loss_on_answers_alone(tokenizer: Tokenizer) -> None:
    tokens, mask = encode(render([USER, ANSWER, Turn("user", "Sure?"), Turn("assistant", "Yes")]), tokenizer)
    shown = "".join(
        "#" if t == tokenizer.image_id else "$" if t == tokenizer.eos_id else tokenizer.decode([t]) for t in tokens
    )
    assert shown == "USER: #\nWhat? ASSISTANT: 7$USER: Sure? ASSISTANT: Yes$"
    assert "".join(c if m else "." for c, m in zip(shown, mask, strict=True)) == (
        "." * len("USER: #\nWhat? ASSISTANT:") + " 7$" + "." * len("USER: Sure? ASSISTANT:") + " Yes$"
    )


def test_a_prompt_is_a_prefix_of_the_training_ids(tokenizer: Tokenizer) -> None:
    turns = [USER, ANSWER, Turn("user", "Sure?"), Turn("assistant", "Yes")]
    tokens, _ = encode(render(turns), tokenizer)
    for end in (1, 3):
        prompt = encode_prompt(turns[:end], tokenizer)
        assert tokens[: len(prompt)] == prompt
    with pytest.raises(DataError, match="does not end with a user turn"):
        render_prompt(turns)
    with pytest.raises(DataError, match="a prompt of 0 turns"):
        render_prompt([])


def test_conversations_on_disk(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text_only = Conversation((Turn("user", "Hi"), Turn("assistant", "Ho")))
    two = Conversation((Turn("user", "<image><image>"), ANSWER), (photo(5, 6), photo(7, 8)))
    manifest = build_conversations(tmp_path / "c", [text_only, two], tokenizer)
    assert (manifest.kind, manifest.documents, manifest.images) == ("conversations", 2, 2)
    source = IndexedSource(tmp_path / "c")
    assert read_sample(source, SampleRef(0, 0, 0, 999)).images == ()
    sample = read_sample(source, SampleRef(0, 1, 0, 999))
    assert [(i.item, i.height, i.width) for i in sample.images] == [(0, 5, 6), (1, 7, 8)]
    assert tokenizer.decode(sample.tokens[sample.loss_mask]) == " 7"


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ((USER, ANSWER), 2, "conversation 0 of .* has 1 <image> placeholders and 2 images"),
        ((USER, ANSWER), 0, "has 1 <image> placeholders and 0 images"),
        ((ANSWER,), 0, "turn 0 has role 'assistant', expected 'user'"),
        ((USER, USER), 2, "turn 1 has role 'user', expected 'assistant'"),
        ((Turn("system", "x"),), 0, "role 'system'"),
        ((Turn("user", "x"), Turn("assistant", "<image>")), 1, "an answer holds <image>"),
        ((USER,), 1, "no answer to learn from"),
        ((), 0, "no answer to learn from"),
    ],
)
def test_malformed_conversations(
    tmp_path: Path, tokenizer: Tokenizer, turns: tuple[Turn, ...], images: int, message: str
) -> None:
    talk = Conversation(turns, tuple(photo(4, 4) for _ in range(images)))
    with pytest.raises(DataError, match=message):
        build_conversations(tmp_path / "c", [talk], tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_with_a_bad_image_is_dropped_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    talk = Conversation((USER, ANSWER), (b"junk",))
    with pytest.raises(DataError, match="conversation 0 of"):
        build_conversations(tmp_path / "c", [talk], tokenizer)
    manifest = build_conversations(tmp_path / "c", [talk], tokenizer, options=BuildOptions(on_bad_image="drop"))
    assert (manifest.documents, manifest.dropped) == (0, {"bad image": 1})


def test_parse_turns() -> None:
    assert parse_turns([{"role": "user", "text": "a"}, {"role": "assistant", "content": "b"}]) == (
        Turn("user", "a"),
        Turn("assistant", "b"),
    )
    with pytest.raises(DataError, match="turn 0 has the fields"):
        parse_turns([{"role": "user"}])
    with pytest.raises(DataError, match="turn 0 has the fields"):
        parse_turns([{"text": "x"}])


def test_placeholders_are_checked_when_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    build_captions(tmp_path / "c", [(photo(5, 6), "ab")], tokenizer)
    positions = tmp_path / "c_image_positions.npy"
    source = IndexedSource(tmp_path / "c")
    source.image_positions = np.load(positions) + 1
    with pytest.raises(
        DataError, match=r"document 0 of source 'c' has image placeholders at \[0\], its index says \[1\]"
    ):
        read_sample(source, SampleRef(0, 0, 0, 4))


def test_a_piece_of_a_document_has_its_images_alone(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d", kind="interleaved", tokenizer_digest="", image_sentinel_id=3) as writer:
        pictures = [EncodedImage(b"x", 10 + n, 20) for n in range(3)]
        writer.add_document([5, 3, 6, 7, 3, 3, 8], images=pictures)
    sample = read_sample(IndexedSource(tmp_path / "d"), SampleRef(2, 0, 3, 6))
    assert sample.tokens.tolist() == [7, 3, 3]
    assert [(i.source, i.item, i.height) for i in sample.images] == [(2, 1, 11), (2, 2, 12)]
    assert (sample.first_image, sample.images_in_document) == (1, 3)
