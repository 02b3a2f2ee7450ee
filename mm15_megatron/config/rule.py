"""What every rule shares: its type, and the errors that more than one rule raises."""

from __future__ import annotations

from collections.abc import Callable

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError

Rule = Callable[[RunConfig, int], None]
"""Raises a ConfigError if a configuration cannot be trained by that many processes."""


def divides(what: str, value: int, *, by: str, divisor: int, fix: str = "") -> None:
    """Raise a ConfigError unless ``value`` is a multiple of ``divisor``."""
    if value % divisor:
        raise ConfigError(f"{what} = {value} is not divisible by {by} = {divisor}", fix=fix or f"change {what} or {by}")
