"""The FP8 advisor measures a small sparse model on this GPU and advises."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm15_megatron.bench.fp8_advice import GRADIENT_ERROR, OUTPUT_ERROR
from mm15_megatron.bench.fp8_record import RECIPES, read_sweep
from tests.helpers.tools import load_tool

from .marks import NEEDS_TE

SMALL = (
    "language.num_layers=2",
    "language.hidden_size=1024",
    "language.ffn_hidden_size=2048",
    "language.num_attention_heads=8",
    "language.num_query_groups=8",
    "moe.num_moe_experts=4",
    "parallel.expert_model_parallel_size=1",
    "data.seq_length=1024",
    "train.micro_batch_size=1",
)


@NEEDS_TE
def test_the_sweep_measures_and_advises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every recipe is measured or refused with a reason; the file gives the same advice again."""
    numbers = tmp_path / "numbers.json"
    tool = load_tool("advise_fp8")
    command = ["--preset", "mm1_3b_moe", *SMALL, "--repeats", "2", "--micro-batches", "2"]
    assert tool.main([*command, "--record", str(numbers)]) == 0
    measured = capsys.readouterr().out
    sweep = read_sweep(numbers)
    assert (sweep.failed, sweep.unmeasured, sweep.stopped) == ((), (), "")
    assert sweep.versions.keys() >= {"torch", "transformer-engine", "megatron-core", "driver", "commit"}
    times = {m.product.name: m.times for m in sweep.measured}
    assert set(times["decoder.fc1"]) | set(sweep.refused) == {"bf16", *RECIPES}
    assert set(times["experts.fc1"]) == set(times["decoder.fc1"])
    for name, by_recipe in times.items():
        for recipe, timing in by_recipe.items():
            assert timing.output_error <= OUTPUT_ERROR, (name, recipe)
            assert timing.gradient_error <= GRADIENT_ERROR, (name, recipe)
            assert (timing.output_error > 0) == (recipe != "bf16"), (name, recipe)
    assert sweep.attention_ms is not None
    assert sweep.attention_ms > 0
    assert tool.main(["--recorded", str(numbers)]) == 0
    assert capsys.readouterr().out == measured
