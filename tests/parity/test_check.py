"""Whole checks on real ranks: what agrees passes, each planted fault fails and is named; the command's exit codes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from types import ModuleType

import pytest

from mm15_megatron.errors import ConfigError
from mm15_megatron.parity import check
from mm15_megatron.parity.check import Outcome, check_parity
from mm15_megatron.parity.layouts import default_layouts, parse_layouts
from mm15_megatron.parity.trace import Prepare

from ..helpers.layouts import change, debug_config
from ..helpers.tools import TOOLS, load_tool
from . import faults

TOOL = TOOLS / "check_parity.py"
LAYER_3 = "gradient of language_model.decoder.layers.3.mlp."
CAPACITY = {"moe_expert_capacity_factor": 0.8, "moe_capacity_group_size": 32}


def checked(
    layouts: str, *, preset: str = "debug_dense", steps: int = 1, prepare: Prepare | None = None
) -> tuple[list[Outcome], list[str]]:
    lines: list[str] = []
    cfg = debug_config(preset)
    return check_parity(cfg, parse_layouts(layouts), write=lines.append, steps=steps, prepare=prepare), lines


@pytest.mark.parametrize(
    ("fault", "preset", "layout", "place"),
    [
        (faults.wrong_positions, "debug_dense", "pp2", "decoder.layers.0.self_attention ("),
        (faults.encoder_reduction_undone, "debug_dense", "tp2sp", "gradient of connector.mlp.2.bias ("),
        (faults.norm_counted_twice, "debug_dense", "dp2", "gradient norm of step 1"),
        (faults.update_forgets_the_connector, "debug_dense", "dp2", "update of connector."),
        (faults.dummy_times_zero, "debug_dense", "dp2", "merged_input ("),
        (
            faults.expert_reduction_undone,
            "debug_moe",
            "tp2sp-etp1",
            LAYER_3 + "experts.",
        ),
        (
            faults.router_losses_over_targets,
            "debug_moe",
            "ep2",
            LAYER_3 + "router.weight (",
        ),
        (faults.padding_routed, "debug_moe", "ep2", "decoder.layers.1.mlp ("),
    ],
)
def test_planted_fault_fails_and_is_named(fault: Prepare, preset: str, layout: str, place: str) -> None:
    (outcome,), lines = checked(layout, preset=preset, prepare=fault)
    assert not outcome.passes
    assert outcome.difference is not None
    assert outcome.difference.place.startswith(place), outcome.difference.place
    assert f"DIFFERS at {place}" in "\n".join(lines)
    assert lines[-1] == f"1 of 1 layouts differ: {layout}"


def test_the_encoder_is_named_with_the_connector() -> None:
    (outcome,), _ = checked("tp2", prepare=faults.encoder_reduction_undone)
    assert outcome.difference is not None
    assert "of vision_encoder" in outcome.difference.place
    assert "of connector" in outcome.difference.place
    assert "language_model" not in outcome.difference.place


def test_an_infinite_dummy_is_told_apart() -> None:
    (outcome,), _ = checked("dp2", prepare=faults.dummy_times_zero)
    assert outcome.difference is not None
    assert "not finite" in outcome.difference.place


def test_a_layout_whose_ranks_fail_is_reported() -> None:
    (outcome,), lines = checked("dp2", prepare=faults.rank_one_dies)
    assert not outcome.passes
    assert "ArithmeticError: planted" in outcome.failure
    assert "FAILED" in "\n".join(lines)


def test_packed_and_resumed_runs_pass() -> None:
    outcomes, lines = checked("packed,dp2-overlap-resume,resume:tp2>one", steps=2)
    assert [o.layout.name for o in outcomes if not o.passes] == []
    assert outcomes[1].difference is not None
    assert (outcomes[1].difference.parameter, outcomes[1].difference.loss) == (0.0, 0.0)
    assert lines[-1] == "all 3 layouts compute what one rank computes"


def test_packed_rows_of_a_sparse_model() -> None:
    """Without balance loss and capacity, which are statistics of rows, segments alone equal segments packed."""
    outcomes, _ = checked("packed", preset="debug_moe", steps=2)
    assert outcomes[0].passes


@pytest.mark.parametrize(("layouts", "steps"), [("tp2", 0), ("resume", 1)])
def test_too_few_steps_are_refused(layouts: str, steps: int) -> None:
    with pytest.raises(ConfigError, match=f"--steps {steps} leaves nothing"):
        checked(layouts, steps=steps)


def test_rows_without_room_are_refused() -> None:
    cfg = change(debug_config(), data={"seq_length": 32})
    with pytest.raises(ConfigError, match="too short for rows of three tiles"):
        check_parity(cfg, parse_layouts("tp2"), write=lambda line: None)


def test_a_reference_that_diverges_is_refused() -> None:
    cfg = change(debug_config(), language={"init_method_std": 1e30})
    with pytest.raises(ConfigError, match=r"not finite, first at decoder\.layers\.0"):
        check_parity(cfg, parse_layouts("accum1"), write=lambda line: None, steps=1)


@pytest.fixture
def tool() -> ModuleType:
    return load_tool("check_parity")


def test_command_passes() -> None:
    """As a user starts it: the ranks come from a script that is not imported twice, and nothing else is printed."""
    arguments = ["--preset", "debug_dense", "train.seed=7", "--layouts", "dp2,mbs1", "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    found = subprocess.run(
        [sys.executable, str(TOOL), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert "optimizer.adam_eps: 1e-08 -> 1e-05" in found.stdout
    assert "all 2 layouts compute what one rank computes" in found.stdout


def test_command_fails_on_a_difference(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = functools.partial(check_parity, prepare=faults.wrong_positions)
    monkeypatch.setattr(check, "check_parity", faulty)
    assert tool.main(["--preset", "debug_dense", "--layouts", "dp2", "--steps", "1"]) == 1
    assert "DIFFERS at decoder.layers.0.self_attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "debug_dense", "--layouts", "tpp2"], "did you mean 'tpN'"),
        (["--preset", "debug_dens"], "did you mean 'debug_dense'"),
        (["--preset", "debug_dense", "language.widht=3"], "has no field 'widht'"),
        (["--preset", "debug_dense", "--layouts", "pp8"], "layout pp8: language.num_layers = 4"),
        (["--preset", "debug_dense", "--device", "cuda"], "no usable CUDA device"),
    ],
)
def test_command_refuses_bad_input(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_states_the_rule(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "every\nchoice of structure is kept" in text
    assert "tensor-parallel size" in text


@pytest.mark.parametrize(
    ("preset", "moe"),
    [
        ("debug_moe", CAPACITY),
        pytest.param("debug_dense", {}, marks=pytest.mark.soak),
        pytest.param("debug_moe", {}, marks=pytest.mark.soak),
    ],
    ids=["capacity", "dense", "dropless"],
)
def test_every_default_layout(preset: str, moe: dict[str, object]) -> None:
    """Five steps in every layout of the default set."""
    cfg = change(debug_config(preset), moe=moe)
    outcomes = check_parity(cfg, parse_layouts(default_layouts(cfg)), write=lambda line: print(line, file=sys.stderr))
    assert [outcome.layout.name for outcome in outcomes if not outcome.passes] == []
