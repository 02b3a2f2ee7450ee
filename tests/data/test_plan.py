"""The dry run says what a run would read, writes its tables, and needs neither ranks nor torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mm15_megatron.config.schema import DataConfig, LanguageConfig, RunConfig, SourceConfig, TrainConfig
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.open_order import open_order, plan_folder
from mm15_megatron.data.plan import plan_text
from mm15_megatron.data.tokenizer import Tokenizer


def silent(done: int, total: int, source: str) -> None:
    """Say nothing."""


@pytest.fixture
def cfg(tmp_path: Path, tokenizer: Tokenizer) -> RunConfig:
    build = {"tokenizer_digest": tokenizer.digest, "image_sentinel_id": tokenizer.image_id}
    with DatasetWriter(tmp_path / "books", kind="text", **build) as writer:
        for length in range(1, 200):
            writer.add_document([9] * length)
    with DatasetWriter(tmp_path / "pairs", kind="captions", **build) as writer:
        for length in range(1, 100):
            writer.add_document([tokenizer.image_id, *[9] * (length % 30)], images=[EncodedImage(b"x", 20, 30)])
    sources = tuple(SourceConfig(prefix=str(tmp_path / name)) for name in ("books", "pairs"))
    return RunConfig(
        language=LanguageConfig(vocab_size=128),
        data=DataConfig(tokenizer=str(tokenizer.path), sources=sources, seq_length=400),
        train=TrainConfig(global_batch_size=8, steps=50, run_dir=str(tmp_path / "run")),
    )


def cells(text: str, name: str) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in text.splitlines() if line.strip().startswith(name)]


def test_rows_of_one_source(cfg: RunConfig) -> None:
    text = plan_text(cfg, tell=silent)
    order = open_order(cfg).order
    books, pairs = order.sources
    rows = books.table.before(books.chunks)[-1]
    assert order.rows_before_repeat(1000) >= rows
    epoch, run = cells(text, "books")
    assert epoch[:6] == ["books", "text", "199", "198", str(rows), f"{sum(range(2, 200)):,}"]
    assert [float(cell.rstrip("%")) > 90 for cell in epoch[7:9]] == [True, True]
    assert run == ["books", "weight 1", f"{200 / rows:,.3f}", "50.00%", *run[4:]]
    epoch, run = cells(text, "pairs")
    tokens = sum(length % 30 for length in range(1, 100))
    assert epoch[3:7] == ["96", str(pairs.table.before(1)[-1]), f"{tokens:,}", f"{96 * 144:,}"]
    assert "left out in an epoch: source pairs: of 99 documents 96 kept" in text
    assert "left out in an epoch: source books: of 199 documents 198 kept" in text
    assert text.startswith(f"plan of 50 steps, 400 rows of training, order {order.digest[:12]}\n")
    assert sorted(path.suffix for path in plan_folder(cfg).iterdir()) == [".rows", ".rows"]
    assert text.splitlines()[-1].startswith("0.00")


def test_batches_of_samples(cfg: RunConfig) -> None:
    mixed = replace(cfg, data=replace(cfg.data, mixture_unit="sample", batch_unit="samples"))
    text = plan_text(mixed, tell=silent)
    assert "plan of 50 steps, 400 samples of training" in text
    assert re.search(r"a step of 8 samples takes \d\.\d rows \(\d to \d in 16 steps\)", text)
    assert cells(text, "books")[0][4] == "-"
    assert cells(text, "books")[1][4] == "50.00%"


def test_rows_of_mixed_sources(cfg: RunConfig) -> None:
    text = plan_text(replace(cfg, data=replace(cfg.data, mixture_unit="sample")), tell=silent)
    found = re.search(
        r"rows of mixed sources: fill (.*)%, (.*)% of the bound \(the first 8,192 samples, (.*) rows\)", text
    )
    assert found is not None
    fill, of_bound, rows = (float(number.replace(",", "")) for number in found.groups())
    # half the samples are texts of 100 tokens, half captions of 15 and an image of 144
    assert fill / 100 * rows * 400 == pytest.approx(4096 * (100 + 159), rel=0.02)
    assert 90 < of_bound <= 100  # first fit decreasing reaches 93.6 of these sizes


def test_the_command_needs_no_torch(cfg: RunConfig, tmp_path: Path) -> None:
    sources = ", ".join(f"{{prefix: {source.prefix}, epochs: 1}}" for source in cfg.data.sources)
    arguments = [f"data.tokenizer={cfg.data.tokenizer}", f"data.sources=[{sources}]", "language.vocab_size=128"]
    arguments += [
        f"train.run_dir={tmp_path / 'run'}",
        "train.steps=4",
        "data.seq_length=400",
        "train.global_batch_size=8",
    ]
    program = (
        "import sys; from mm15_megatron.train import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--plan", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "books")[1][1] == "epochs 1"
    failed = subprocess.run(
        [sys.executable, "-m", "mm15_megatron.train", "--plan", *arguments, "data.max_images=0"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert failed.returncode == 2
    assert "data.max_images = 0 is out of range" in failed.stderr
