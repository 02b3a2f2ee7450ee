"""The ledger of real runs: equal whatever the layout and however often they stop, and exact to the row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.checkpoint.publish import checkpoints_folder, published
from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.indexed.writer import DatasetWriter, EncodedImage
from mm15_megatron.data.ledger import COUNTS, EMPTY, Ledger
from mm15_megatron.data.tokenizer import train_character_tokenizer
from mm15_megatron.parity.ranks import RankFailure

from ..data.images import photo
from ..helpers.parity import FP32_SCALAR
from .runs import records, run_arguments

Arguments = Callable[..., list[str]]

SEQ_LENGTH, STEPS = 128, 6
UNITS = {
    "rows": ["data.mixture_unit=row"],
    "tokens": ["data.mixture_unit=token"],
    "mixed rows": ["data.mixture_unit=sample"],
    "samples": ["data.mixture_unit=sample", "data.batch_unit=samples"],
}
DP2 = ["parallel.overlap_grad_reduce=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module")
def data_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Pairs with a broken picture, long texts, and documents of text and pictures."""
    folder = tmp_path_factory.mktemp("three")
    tokenizer = train_character_tokenizer([*map(chr, range(32, 127)), "\n"], folder / "tokenizer.json")
    pairs = [(photo(30 + i % 20, 40, seed=i), "a caption " * (1 + i % 3)) for i in range(40)]
    build_captions(folder / "pairs", pairs, tokenizer)
    build = {"tokenizer_digest": tokenizer.digest, "image_sentinel_id": tokenizer.image_id}
    rng = np.random.default_rng(0)
    with DatasetWriter(folder / "books", kind="text", **build) as writer:
        for length in rng.integers(1, 300, 40):
            writer.add_document([9] * int(length))
    good = photo(40, 40)
    with DatasetWriter(folder / "pages", kind="interleaved", **build) as writer:
        for number in range(30):
            tokens = [9] * int(rng.integers(2, 30)) + [tokenizer.image_id] + [8] * int(rng.integers(100))
            data = good[: len(good) // 2] if number % 5 == 0 else good
            writer.add_document(tokens, images=[EncodedImage(data, 40, 40)])
    named = ", ".join(f"{{prefix: {folder / name}}}" for name in ("pairs", "books", "pages"))
    tokenizer_path = f"data.tokenizer={folder / 'tokenizer.json'}"
    return [tokenizer_path, f"data.sources=[{named}]", "data.decoder=pil", "data.num_workers=0"]


def ledger_of(run_dir: Path) -> tuple[Ledger, int]:
    """The ledger of the last checkpoint, and what was consumed."""
    state = json.loads((published(checkpoints_folder(run_dir))[-1] / "state.json").read_text())
    return Ledger.from_dict(state["progress"]["ledger"]), state["progress"]["consumed"]


@pytest.mark.parametrize("unit", UNITS)
def test_it_is_exact_in_every_layout_and_after_resumptions(unit: str, arguments: Arguments, tmp_path: Path) -> None:
    shared = [*UNITS[unit], f"data.seq_length={SEQ_LENGTH}", "train.global_batch_size=8"]
    shared += ["train.micro_batch_size=2", "schedule.decay_steps=6", "schedule.warmup_steps=1"]
    shared += ["optimizer.adam_eps=1e-5"]
    code, log = run_arguments(arguments(*shared, f"train.steps={STEPS}", run_dir="one"))
    assert code == 0
    for steps, layout, ranks in ((2, DP2, 2), (4, PP2, 2), (STEPS, [], 1)):
        # a token mixture and epochs depend on the length of a run: it stays what it was
        assert run_arguments(arguments(*shared, *layout, f"train.steps={steps}"), world_size=ranks)[0] == 0
    straight, consumed = ledger_of(tmp_path / "one")
    resumed, also = ledger_of(tmp_path / "run")
    assert consumed == also == 8 * STEPS
    one, two = records(tmp_path / "one"), records(tmp_path / "run")
    assert [r["train/loss"] for r in two] == pytest.approx([r["train/loss"] for r in one], abs=FP32_SCALAR)
    for ledger, seen in ((straight, one), (resumed, two)):
        rows = sum(record["data/rows"] for record in seen)
        assert (ledger.rows, ledger.tokens) == (rows, rows * SEQ_LENGTH)
        assert ledger.column("samples").sum() == (consumed if unit == "samples" else ledger.column("samples").sum())
        weights = ledger.sums[:, 1]
        assert weights.sum() == pytest.approx(sum(record["train/targets"] for record in seen))
        losses = sum(record["train/loss"] * record["train/targets"] for record in seen)
        assert ledger.sums[:, 0].sum() == pytest.approx(losses, rel=FP32_SCALAR)
        last = {name: value for name, value in seen[-1].items() if name.startswith("ledger/")}
        for number, name in enumerate(ledger.names):
            assert [last[f"ledger/{name}/{what}"] for what in COUNTS] == ledger.counts[number].tolist()
    # rows without samples fill steps of samples up, and how many depends on the ranks
    kept = [number for number, name in enumerate(straight.names) if name != EMPTY]
    assert resumed.counts[kept].tolist() == straight.counts[kept].tolist()
    assert resumed.sums == pytest.approx(straight.sums, rel=FP32_SCALAR)
    assert straight.column("substituted")[2] > 0
    assert not straight.column("substituted")[:2].any()
    for what in ("epochs", "left_out"):
        names = [f"ledger/{name}/{what}" for name in ("pairs", "books", "pages")]
        assert [two[-1][name] for name in names] == [one[-1][name] for name in names]
    assert one[-1]["ledger/books/left_out"] > 0, "documents of one token"
    table = log[log.index("\nledger\n") :]
    assert f"{straight.rows:,} rows x {SEQ_LENGTH} = {straight.tokens:,} tokens, padding included" in table
    assert "x nothing to predict" in table


def test_a_changed_mixture_is_refused_by_name(arguments: Arguments) -> None:
    argv = arguments("train.global_batch_size=2", "train.steps=1", "schedule.warmup_steps=0")
    assert run_arguments(argv)[0] == 0
    fewer = [a.rpartition(", {")[0] + "]" if a.startswith("data.sources=") else a for a in argv]
    with pytest.raises(RankFailure, match="source pages is not there any more"):
        run_arguments(fewer)
