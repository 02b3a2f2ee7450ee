"""Literal values of everything that decides which row comes when, so that no constant changes unnoticed.

A run continues from its checkpoint only while these hold. If one of them has to change, raise
``packing.PACKING_VERSION`` with it (and the rendering's number in ``indexed.format.RENDERINGS`` for a template): a run
from before is then refused with a message, instead of going on with other rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.data.captions import encode_caption
from mm15_megatron.data.indexed.format import RENDERINGS
from mm15_megatron.data.mixture import Mixture, Weights
from mm15_megatron.data.packing import PACKING_VERSION, Sizes, pack
from mm15_megatron.data.permutation import derive_key, permute
from mm15_megatron.data.sft import Turn, render
from mm15_megatron.data.source_order import OrderOptions, digest_of
from mm15_megatron.data.tokenizer import Tokenizer
from tests.data.rows import RULES, row_order, text_source


def test_version() -> None:
    assert PACKING_VERSION == 3, "write down the new values of this file"


def test_keys() -> None:
    assert derive_key(1) == 9839846683125730088
    assert derive_key(1, "epoch", 0, 3) == 3690412825128455691


def test_permutation() -> None:
    assert permute(np.arange(10), 10, key=7).tolist() == [7, 1, 8, 5, 4, 6, 0, 9, 2, 3]
    assert permute(np.array([0, 1, 99_999]), 100_000, key=7).tolist() == [50627, 78882, 4201]


def test_mixture() -> None:
    mixture = Mixture([Weights(0, (0.5, 0.3, 0.2))], seed=1)
    assert mixture.choose(0, 12).tolist() == [0, 1, 0, 2, 1, 0, 1, 0, 2, 1, 0, 2]
    assert mixture.choose(10**12, 10**12 + 12).tolist() == [2, 1, 0, 1, 0, 0, 1, 0, 2, 0, 0, 1]
    assert mixture.count_before(100_000).tolist() == [50002, 29999, 19999]


def test_packing() -> None:
    tokens = [20, 12, 1, 8, 8, 8, 8, 30, 2, 2]
    images = [0, 0, 1, 2, 2, 1, 0, 0, 1, 0]
    tiles = [0, 0, 1, 2, 2, 5, 4, 0, 1, 0]
    found = Sizes(*(np.array(values) for values in (tokens, images, tiles)))
    assert pack(found, RULES).tolist() == [1, 1, 3, 2, 2, 3, 2, 0, 0, 2]
    assert pack(found, replace(RULES, seq_length=64)).tolist() == [1, 2, 2, 1, 1, 0, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("unit", "rows"),
    [
        (
            "row",
            [
                ["0:0[0:4]", "0:3[0:3]"],
                ["0:4[0:32]"],
                ["0:4[31:40]", "0:1[0:9]", "0:2[0:14]"],
                ["1:2[0:6]", "1:1[0:6]", "1:0[0:20]"],
                ["0:0[0:4]", "0:3[0:3]"],
                ["0:4[0:32]"],
            ],
        ),
        (
            "sample",
            [
                ["0:3[0:3]", "1:0[0:20]", "0:1[0:9]"],
                ["1:2[0:6]", "1:1[0:6]", "1:1[0:6]", "1:1[0:6]", "1:1[0:6]"],
                ["0:4[0:32]"],
                ["0:4[0:32]"],
                ["0:1[0:9]", "0:4[31:40]", "0:1[0:9]", "0:0[0:4]"],
                ["0:2[0:14]", "0:2[0:14]", "0:0[0:4]"],
            ],
        ),
    ],
)
def test_rows(tmp_path: Path, unit: str, rows: list[list[str]]) -> None:
    sources = [text_source(tmp_path / "a", [4, 9, 14, 3, 40]), text_source(tmp_path / "b", [20, 6, 6])]
    order = row_order(sources, [2, 1], unit=unit)
    found = [[f"{s.source}:{s.document}[{s.first}:{s.stop}]" for s in order.row(r).samples] for r in range(6)]
    assert found == rows


def test_digest_of_the_order() -> None:
    decides = OrderOptions(seed=1).decides(RULES) | {"sources": ["aa", "bb"], "shares": [[0, [0.75, 0.25]]]}
    assert digest_of(decides) == "616f80ba16b7aad1909a2d88bef8547aa5c55b6c0f63cbb04341940b0cbe53fe"


def test_renderings(tokenizer: Tokenizer) -> None:
    assert (RENDERINGS["captions"], RENDERINGS["conversations"]) == ("captions-1", "llava15-1")
    assert encode_caption("a cat", tokenizer) == [tokenizer.image_id, *tokenizer.encode("a cat"), tokenizer.eos_id]
    pieces = render([Turn("user", "<image>\nWhat?"), Turn("assistant", "7")])
    assert [(piece.text, piece.target) for piece in pieces] == [
        ("USER: <image>\nWhat? ASSISTANT:", False),
        (" 7", True),
    ]
