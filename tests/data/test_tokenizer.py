"""The tokenizer over both real libraries."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mm15_megatron.data.tokenizer import Tokenizer, train_character_tokenizer
from mm15_megatron.errors import DataError

TEXTS = [f"the number {i} stands beside the number {i * 7 % 13}, said the reader" for i in range(60)]


@pytest.fixture(scope="module")
def byte_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    inner.train_from_iterator(TEXTS, trainer)
    inner.save(str(path))
    return path


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "t"), vocab_size=60, model_type="bpe", minloglevel=2
    )
    return folder / "t.model"


def test_byte_level_json_round_trips_any_text(byte_bpe: Path) -> None:
    tokenizer = Tokenizer(byte_bpe)
    for text in (" said the reader 7", "café 数 \n\t", "</s><image><|endoftext|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids


def test_sentinel_past_the_vocabulary(byte_bpe: Path) -> None:
    tokenizer = Tokenizer(byte_bpe)
    assert tokenizer.image_id == tokenizer.vocab_size == tokenizer.required_vocab_size - 1
    assert tokenizer.pad_id == tokenizer.eos_id
    tokenizer.check_fits(tokenizer.vocab_size + 1)
    with pytest.raises(
        DataError, match=rf"needs {tokenizer.vocab_size + 1} ids .* the model has {tokenizer.vocab_size}"
    ):
        tokenizer.check_fits(tokenizer.vocab_size)


def test_sentencepiece_round_trip_and_special_ids(sentencepiece_model: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_model)
    assert tokenizer.decode(tokenizer.encode("the reader said 7")) == "the reader said 7"
    assert (tokenizer.eos_id, tokenizer.image_id) == (2, 60)
    assert tokenizer.eos_id not in tokenizer.encode("</s>")
    assert tokenizer.decode([tokenizer.image_id, *tokenizer.encode("the"), tokenizer.eos_id]) == "the"


def test_sentencepiece_user_defined_image_token_is_refused_in_text(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "t"), vocab_size=60, model_type="bpe",
        user_defined_symbols=["<image>"], minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.image_id < tokenizer.vocab_size == tokenizer.required_vocab_size
    with pytest.raises(DataError, match="contains the image sentinel"):
        tokenizer.encode("see <image> here")


def test_character_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_character_tokenizer(["ba c\n"], tmp_path / "new" / "chars.json")
    assert tokenizer.encode("\n abc") == [4, 5, 6, 7, 8]
    assert tokenizer.decode([3, 6, 7, 2, 1]) == "ab"
    assert tokenizer.encode("z") == [0]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.vocab_size) == (1, 2, 3, 9)
    assert train_character_tokenizer(["c", "ab \n"], tmp_path / "again.json").digest == tokenizer.digest


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    tokenizer = train_character_tokenizer(["abc"], tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps(json.loads((tmp_path / "a.json").read_text()), indent=7))
    assert Tokenizer(tmp_path / "b.json").digest == tokenizer.digest
    assert train_character_tokenizer(["abcd"], tmp_path / "c.json").digest != tokenizer.digest


def test_pickle(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.digest, copy.encode("hi")) == (tokenizer.digest, tokenizer.encode("hi"))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Tokenizer(tmp_path / "none.json")
    for name, content in (
        ("a.json", b"not json"),
        ("b.json", b'{"model": 3}'),
        ("c.json", b"\xff\xfe"),
        ("d.model", b"xy"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="is not a"):
            Tokenizer(tmp_path / name)
    (tmp_path / "e.txt").write_bytes(b"")
    with pytest.raises(DataError, match="ends in '.txt'"):
        Tokenizer(tmp_path / "e.txt")
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "f.json"))
    with pytest.raises(DataError, match="no end-of-text token"):
        Tokenizer(tmp_path / "f.json")
