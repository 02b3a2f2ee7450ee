"""Flat text: round trips, comments, and what it refuses to read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm15_megatron.config.dump import Difference, diff, dump_flat, load_flat, value_text
from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.config.tree import OPTIONS, SECTIONS, flatten, with_values
from mm15_megatron.errors import ConfigError


def test_order_is_the_declaration_order():
    lines = dump_flat(RunConfig()).splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(OPTIONS) == list(flatten(RunConfig()))
    assert SECTIONS[0] == "language"


@settings(deadline=None, derandomize=True, database=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    number=st.floats(allow_nan=False, allow_infinity=False),
    weights=st.lists(st.floats(0, 1e9), max_size=3),
    ramp=st.none() | st.tuples(st.integers(), st.integers(), st.integers()),
)
def test_round_trip(text, number, weights, ramp):
    cfg = with_values(
        RunConfig(),
        {
            "train.run_dir": text,
            "optimizer.lr": number,
            "data.sources": tuple(SourceConfig(prefix=text, weight=w) for w in weights),
            "train.rampup_batch_size": ramp,
        },
    )
    assert load_flat(dump_flat(cfg)) == cfg
    assert load_flat(dump_flat(cfg, notes=dict.fromkeys(OPTIONS, "why # not"))) == cfg


def test_absent_options_keep_their_default():
    assert load_flat("# a comment\n\ntrain.steps = 3\n") == with_values(RunConfig(), {"train.steps": 3})


def test_diff():
    left = RunConfig()
    right = with_values(left, {"train.steps": 3, "language.num_layers": 5})
    assert diff(left, left) == []
    assert diff(left, right) == [
        Difference("language.num_layers", 24, 5),
        Difference("train.steps", 200_000, 3),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.steps 3", "line 1 is not"),
        ("train.steps = 3\ntrain.steps = 4", "given twice, again in line 2"),
        ("train.steps = three", "not JSON"),
        ("train.steps = 3 4", "follows the value"),
        ("train.steps = 3.5", r"\(line 1\) has the wrong type"),
        ("train.stepz = 3", "did you mean 'steps'"),
        ("optimizer.lr = NaN", "wrong type"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ConfigError, match=message):
        load_flat(text)


def test_foreign_values_are_refused():
    with pytest.raises(ConfigError, match="cannot be written as text"):
        value_text(object())
