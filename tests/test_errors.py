"""The typed errors: message, fix, pickling, suggestions."""

from __future__ import annotations

import pickle

import pytest

from mm15_megatron.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    MM15Error,
    did_you_mean,
)


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, BackendError, ConversionError])
def test_message_fix_and_pickle(kind):
    error = kind("7 is not 8", fix="add one")
    assert isinstance(error, MM15Error)
    assert str(error) == "7 is not 8\n  fix: add one"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.problem, again.fix) == (kind, "7 is not 8", "add one")
    assert str(kind("alone")) == "alone"


def test_did_you_mean():
    assert did_you_mean("hiden", ["hidden", "layers"]) == "did you mean 'hidden'?"
    assert did_you_mean("qqq", ["b", "a"]) == "valid choices: a, b"
