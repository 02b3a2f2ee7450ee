"""A small real dataset and the command line of a run on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.tokenizer import train_character_tokenizer

from ..data.images import photo


@pytest.fixture(scope="session")
def data_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a tokenizer and a captioned source of sixty images (debug_dense's vocabulary holds both)."""
    folder = tmp_path_factory.mktemp("dataset")
    tokenizer = train_character_tokenizer([*map(chr, range(32, 127)), "\n"], folder / "tokenizer.json")
    for name, count in (("train", 60), ("held", 20)):
        pairs = [(photo(30 + i % 20, 40, seed=i), "a caption " * (1 + i % 3)) for i in range(count)]
        build_captions(folder / name, pairs, tokenizer)
    return [
        f"data.tokenizer={folder / 'tokenizer.json'}",
        f"data.sources=[{{prefix: {folder / 'train'}}}]",
        f"data.validation_sources=[{{prefix: {folder / 'held'}}}]",
        "data.decoder=pil",
        "data.num_workers=0",
    ]


@pytest.fixture
def arguments(data_arguments: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    """Make the arguments of a debug_dense run in a fresh run directory."""

    def make(*more: str, run_dir: str = "run") -> list[str]:
        shared = ["--preset", "debug_dense", "train.threads_per_rank=1"]
        quiet = (
            []
            if any(argument.startswith("logging.tensorboard") for argument in more)
            else ["logging.tensorboard=false"]
        )
        return [*shared, *quiet, f"train.run_dir={tmp_path / run_dir}", *data_arguments, *more]

    return make
