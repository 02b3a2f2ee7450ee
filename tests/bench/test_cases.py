"""What is measured with which settings, what cannot run here, and what no longer fits into the time."""

from __future__ import annotations

import pytest

from mm15_megatron.bench.cases import CASES, Budget, Case, Device, case_config, choose_cases, why_not_run
from mm15_megatron.bench.slices import choose_slice
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import resolve

HOPPER = Device("cuda", "NVIDIA H200", 139 * 2**30, fp8_problems={"mxfp8": "Device compute capability 10.0 or higher."})
BARE = Device("cuda", "NVIDIA H200", 139 * 2**30, transformer_engine_problem="ImportError: no such library")
LAPTOP = Device("cpu", "some processor", 16 * 2**30)


def config_of(case: Case, device: Device = HOPPER, *, options=()):
    preset = {"dense": "mm1_30b", "moe": "mm1_3b_moe"}[case.family]
    part = choose_slice(resolve(preset), device=device.kind, memory=139 * 2**30, margin=0.1, micro_batches=4, fp8=True)
    return case_config(case, part.config, device=device, options=options)


def test_every_slice_runs_in_bf16_in_every_recipe_and_with_local_layers():
    for family in ("dense", "moe"):
        plain = [case for case in CASES if case.family == family and not (case.fp8_vision or case.graphs)]
        recipes = {(case.recipe, case.local) for case in plain}
        fp8 = {(recipe, False) for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")}
        assert recipes == fp8 | {(None, False), (None, True)}
    assert len({case.name for case in CASES}) == len(CASES)


def test_what_targets_need_comes_first_and_most_memory_before_it():
    names = [case.name for case in CASES[:5]]
    assert names[:3] == ["dense-fp8-tensorwise-vision", "dense-bf16", "dense-fp8-tensorwise"]
    assert names[3:] == ["moe-fp8-tensorwise-vision", "moe-bf16"]
    assert [case.name for case in CASES if case.beside_bare] == ["dense-bf16", "moe-bf16"]
    assert CASES[-3].precision == "FP8 tensorwise, CUDA graphs"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_settings_of_every_case_can_be_trained(case):
    cfg = config_of(case)
    formats = {None: None, "tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
    assert cfg.precision.fp8 == formats[case.recipe]
    assert cfg.kernels.params_dtype == "bf16"
    assert cfg.kernels.transformer_impl == ("local" if case.local else "transformer_engine")
    assert cfg.kernels.moe_permute_fusion == (case.family == "moe" and not case.local)
    assert cfg.precision.fp8_vision == case.fp8_vision
    assert cfg.kernels.cuda_graph_scope == (("mlp",) if case.graphs else ())


def test_without_a_compiler_fusions_stay_off():
    plain = Device("cuda", "NVIDIA H200", 139 * 2**30, compile_problem="RuntimeError: no C compiler")
    assert config_of(CASES[0]).kernels.compile_fusions
    assert not config_of(CASES[0], plain).kernels.compile_fusions
    assert config_of(Case("moe")).kernels.moe_permute_fusion
    assert not config_of(Case("moe"), plain).kernels.moe_permute_fusion, "Triton compiles it"


def test_options_override_every_case():
    cfg = config_of(CASES[2], options=["precision.fp8_vision=true", "kernels.compile_fusions=false"])
    assert cfg.precision.fp8_vision
    assert not cfg.kernels.compile_fusions


def test_an_impossible_option_is_refused_by_the_rules_of_every_run():
    with pytest.raises(ConfigError, match="first_last_layers_bf16"):
        config_of(Case("dense", "delayed"), options=["precision.first_last_layers_bf16=true"])


def test_what_cannot_run_says_why():
    assert why_not_run(Case("dense", "mxfp8"), HOPPER) == "needs Blackwell: Device compute capability 10.0 or higher."
    assert why_not_run(Case("dense", "tensorwise"), HOPPER) is None
    assert "no such library" in str(why_not_run(Case("moe"), BARE))
    assert why_not_run(Case("moe", local=True), BARE) is None
    assert "CUDA" in str(why_not_run(Case("dense"), LAPTOP))
    assert why_not_run(Case("dense", local=True), LAPTOP) is None


def test_cases_are_chosen_by_name_and_keep_their_order():
    assert choose_cases(None) == CASES
    assert [case.name for case in choose_cases("moe-bf16, dense-bf16")] == ["dense-bf16", "moe-bf16"]
    with pytest.raises(ConfigError, match="'dense-fp8' is no case"):
        choose_cases("dense-fp8")
    with pytest.raises(ConfigError, match="names no case"):
        choose_cases(" , ")


def test_a_case_is_expected_to_take_as_long_as_its_family_did():
    budget, cfg = Budget(300.0), config_of(CASES[0])
    guess = budget.expected(CASES[0], cfg, steps=5, peak_tflops=750.0)
    assert 30 < guess < 90
    assert budget.expected(CASES[0], cfg, steps=50, peak_tflops=750.0) > guess
    budget.note(Case("dense"), 60.0)
    budget.note(Case("dense", "tensorwise"), 40.0)
    assert budget.expected(Case("dense", "delayed"), cfg, steps=5, peak_tflops=750.0) == pytest.approx(46.0)
    assert budget.expected(Case("moe"), config_of(Case("moe")), steps=5, peak_tflops=750.0) != pytest.approx(46.0)


def test_a_case_that_no_longer_fits_is_named():
    budget = Budget(300.0)
    assert budget.refusal(46.0, spent=254.0) is None
    assert budget.refusal(46.0, spent=255.0) == "out of time: about 46 s needed, 45 s of 300 s left"
