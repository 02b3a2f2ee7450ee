"""What fills the tables that the terminal shows when the tests have run."""

from __future__ import annotations

from collections.abc import Callable

FaultMatrix = Callable[[str, str, str], None]
"""Takes a fault, the moment it came at, and what was seen to come of it."""
