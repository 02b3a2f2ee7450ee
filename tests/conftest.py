"""Shared by all tests: tables that tests fill and the terminal shows at the end of the run."""

from __future__ import annotations

import logging
import warnings

import pytest

from tests.helpers.tables import FaultMatrix

# megatron-core warns at import about every optional library that is absent; here they are absent on purpose.
warnings.filterwarnings("ignore", module="megatron.*")
logging.getLogger("megatron").setLevel(logging.ERROR)

TABLES = pytest.StashKey[dict[str, list[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start with empty tables."""
    config.stash[TABLES] = {}


@pytest.fixture
def table(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Tables by title; append lines to one and they are printed when the run ends."""
    return request.config.stash[TABLES]


@pytest.fixture
def fault_matrix(table: dict[str, list[str]]) -> FaultMatrix:
    """Adds a line to the table of faults: what was done, at which moment, and what was seen to come of it."""

    def add(fault: str, moment: str, outcome: str) -> None:
        table.setdefault("fault matrix (fault, moment, outcome)", []).append(f"{fault:34} {moment:34} {outcome}")

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables."""
    for title, lines in config.stash[TABLES].items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
