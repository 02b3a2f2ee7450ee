"""The run that the tests of launchers compare theirs with."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.launched import TRAIN, environment, losses, run, run_options


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every run is told."""
    return run_options(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def straight(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run in one process, which saves nothing."""
    run_dir = tmp_path_factory.mktemp("alone")
    run([sys.executable, *TRAIN, *arguments, f"train.run_dir={run_dir}"], environment())
    return losses(run_dir)
