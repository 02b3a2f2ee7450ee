"""The typed errors of the project.

Every message says three things: what is wrong, the values that were found, and what to do about it.
An error raised for bad user input is always one of these classes; anything else that escapes is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class MM15Error(Exception):
    """Base class of every error that is about the user's input rather than about our code.

    Args:
        problem: what is wrong, in one sentence, with the values found.
        fix: what the user can do about it, as an imperative sentence.
    """

    def __init__(self, problem: str, *, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem}\n  fix: {fix}" if fix else problem)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep ``fix`` when the error crosses a process boundary."""
        return (_rebuild, (type(self), self.problem, self.fix))


def _rebuild(kind: type[MM15Error], problem: str, fix: str) -> MM15Error:
    return kind(problem, fix=fix)


class ConfigError(MM15Error):
    """A configuration value is unknown, malformed, or impossible in combination with others."""


class DataError(MM15Error):
    """A dataset, tokenizer or sample is missing, damaged, foreign or inconsistent."""


class CheckpointError(MM15Error):
    """A checkpoint is missing, damaged, incomplete or belongs to another model."""


class BackendError(MM15Error):
    """A requested library or device is not usable on this machine (the import error is in the message)."""


class ConversionError(MM15Error):
    """Weights cannot be mapped between this project's layout and another one."""


def did_you_mean(word: str, choices: Iterable[str], *, limit: int = 3) -> str:
    """Return a hint such as ``did you mean 'hidden_size'?``, or the list of choices when nothing is close.

    Args:
        word: what the user wrote.
        choices: the valid words.
        limit: how many suggestions to show.
    """
    valid: Sequence[str] = sorted(choices)
    near = get_close_matches(word, valid, n=limit, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "valid choices: " + ", ".join(valid)
