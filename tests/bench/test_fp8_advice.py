"""The FP8 advisor's decisions on recorded numbers (invented for these tests), and what a sweep would measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mm15_megatron.accounting.matrix_products import MatrixProduct
from mm15_megatron.bench.fp8_advice import (
    GRADIENT_ERROR,
    OUTPUT_ERROR,
    WORTHWHILE,
    Advice,
    advise,
    as_trained,
    check_same_products,
    linear_ms,
    plan,
    rows_of_experts,
)
from mm15_megatron.bench.fp8_record import ATTENTION, Failed, Measured, Sweep, Timing, read_sweep, sweep_to_json
from mm15_megatron.bench.fp8_text import advice_text, headline
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.rules_precision import PRECISION_RULES
from mm15_megatron.errors import ConfigError, DataError
from mm15_megatron.presets import resolve
from mm15_megatron.presets.reference_layouts import at_reference_layout

RECORDED = Path(__file__).parent / "recorded"
SCENARIOS = sorted(p.stem.removeprefix("invented_") for p in RECORDED.glob("*.json") if "malformed" not in p.name)
TO_FOUR_DIGITS = 1e-3  # the recorded times are rounded


def recorded(name: str) -> Sweep:
    return read_sweep(RECORDED / f"invented_{name}.json")


def advice_on(name: str) -> tuple[Sweep, Advice]:
    sweep = recorded(name)
    return sweep, advise(sweep)


def test_every_recording_says_that_it_is_invented() -> None:
    assert {"clear_win", "small_experts", "one_recipe", "encoder_excluded", "mixed", "error_too_large"} == set(
        SCENARIOS
    )
    for name in SCENARIOS:
        assert "invented" in recorded(name).source
        assert "invented" in recorded(name).device


def test_a_clear_win_is_said_with_its_numbers() -> None:
    sweep, advice = advice_on("clear_win")
    chosen = advice.chosen
    assert chosen is not None
    assert (chosen.recipe, chosen.vision) == ("tensorwise", True)
    assert chosen.ratios == {"decoder": pytest.approx(1.5, rel=TO_FOUR_DIGITS), "vision": pytest.approx(1.3, rel=0.01)}
    assert 1 < chosen.step_speedup < chosen.step_bound < chosen.linear_speedup < 1.5
    text = advice_text(sweep, advice)
    assert "FP8 pays: tensorwise, 1.48x of the linear layers, about 1.35x of the step (at most 1.41x)" in text
    assert "1460 rows are no multiples of 16 and are padded to 1472" in text
    assert "not tried: mxfp8: invented reason" in text
    assert advice.options[:3] == (
        "precision.fp8=hybrid",
        "precision.fp8_recipe=tensorwise",
        "precision.fp8_vision=true",
    )


def test_small_experts_lose() -> None:
    sweep, advice = advice_on("small_experts")
    assert advice.chosen is None
    assert advice.options == ("precision.fp8=null",)
    assert headline(advice).startswith("FP8 does not pay here: the best recipe, tensorwise, has 0.94x")
    text = advice_text(sweep, advice)
    assert "experts.fc1 is slower in tensorwise (0.70x)" in text
    assert "64 rows an expert" in text
    assert "the host needs 50.00 ms to launch" in text
    assert "experts lose with tensorwise (0.70x) where the dense layers of the decoder have 1.20x" in text


def test_the_only_recipe_that_runs_is_taken() -> None:
    sweep, advice = advice_on("one_recipe")
    assert [v.recipe for v in advice.verdicts] == ["delayed"]
    assert advice.chosen is not None
    assert advice.chosen.recipe == "delayed"
    text = advice_text(sweep, advice)
    assert all(f"not tried: {recipe}: invented reason" in text for recipe in ("mxfp8", "blockwise", "tensorwise"))


def test_the_encoder_is_left_out_where_it_loses() -> None:
    sweep, advice = advice_on("encoder_excluded")
    assert advice.chosen is not None
    assert (advice.chosen.recipe, advice.chosen.vision) == ("tensorwise", False)
    assert "precision.fp8_vision=false" in advice.options
    assert any("the encoder stays in bf16: its products have 0.90x" in remark for remark in advice.remarks)
    assert not any("vision.fc1 is slower" in remark for remark in advice.remarks)
    whole = linear_ms(sweep, "tensorwise", parts=("decoder", "experts", "vision"))
    without = linear_ms(sweep, "tensorwise", parts=("decoder", "experts"))
    assert without < whole


def test_layers_kept_in_bf16_are_counted_so() -> None:
    sweep = recorded("encoder_excluded")
    assert sweep.keeps_edges
    without_edges = replace(sweep, keeps_edges=False)
    parts = ("decoder", "experts")
    kept = sum(
        item.product.edge_count
        * (item.times["bf16"].step_ms(item.product) - item.times["tensorwise"].step_ms(item.product))
        for item in sweep.measured
        if item.product.fp8 in parts
    )
    assert linear_ms(sweep, "tensorwise", parts=parts) == pytest.approx(
        linear_ms(without_edges, "tensorwise", parts=parts) + kept
    )
    assert kept > 0
    assert "precision.first_last_layers_bf16=true" in advise(sweep).options


def test_of_equally_fast_recipes_the_one_that_rounds_least_is_taken() -> None:
    _, advice = advice_on("mixed")
    assert advice.chosen is not None
    assert advice.chosen.recipe == "blockwise"
    near = {v.recipe: v.step_speedup for v in advice.verdicts}
    assert near["tensorwise"] > 0.97 * near["blockwise"]
    by_recipe = {v.recipe: v for v in advice.verdicts}
    assert (by_recipe["tensorwise"].vision, by_recipe["delayed"].vision) == (True, False)


def test_a_rounding_beyond_the_limit_refuses_a_recipe_and_the_encoder() -> None:
    sweep, advice = advice_on("error_too_large")
    delayed = next(v for v in advice.verdicts if v.recipe == "delayed")
    assert delayed.rounds_too_much
    assert delayed.output_error > OUTPUT_ERROR
    assert delayed.step_speedup > WORTHWHILE
    assert advice.chosen is not None
    assert (advice.chosen.recipe, advice.chosen.vision) == ("tensorwise", False)
    text = advice_text(sweep, advice)
    assert "delayed is refused for its rounding: outputs differ from bf16 by 31.0% (limit 10%)" in text
    assert "its rounding is beyond the limit" in text


def test_gradients_have_a_limit_of_their_own() -> None:
    sweep = recorded("one_recipe")
    (item, *others) = (m for m in sweep.measured if m.product.fp8 == "decoder")
    worse = {**item.times, "delayed": replace(item.times["delayed"], gradient_error=GRADIENT_ERROR * 1.01)}
    rest = [m for m in sweep.measured if m is not item]
    advice = advise(replace(sweep, measured=(Measured(item.product, worse), *rest)))
    assert others
    assert advice.chosen is None
    assert headline(advice) == "FP8 cannot be used here: keep bf16"


def test_nothing_measured_in_fp8_is_bf16() -> None:
    sweep = recorded("clear_win")
    bare = tuple(Measured(m.product, {"bf16": m.times["bf16"]}) for m in sweep.measured)
    advice = advise(replace(sweep, measured=bare))
    assert advice.chosen is None
    assert advice.remarks == ("no FP8 recipe was measured throughout: bf16 is what this machine trains in",)
    assert "FP8 cannot be used here" in advice_text(replace(sweep, measured=bare), advice)


def test_the_step_by_hand() -> None:
    product = MatrixProduct("decoder.fc1", "decoder", rows=16, in_features=16, out_features=16, count=2)
    times = {"bf16": Timing(2.0, 4.0, 0.1), "tensorwise": Timing(1.0, 2.0, 0.1)}
    recomputed = replace(product, forward_passes=2)
    sweep = replace(recorded("one_recipe"), measured=(Measured(product, times),), attention_ms=6.0)
    (verdict,) = advise(sweep, other_share=0.1).verdicts
    assert verdict.linear_speedup == pytest.approx(2.0)
    assert verdict.step_bound == pytest.approx(18 / 12)
    assert verdict.step_speedup == pytest.approx(20 / 14)
    assert linear_ms(replace(sweep, measured=(Measured(recomputed, times),)), None, parts=()) == 16.0


def without(sweep: Sweep, failures: list[Failed], **changes: object) -> Sweep:
    """The same sweep, had those measurements failed."""
    lost = {(failure.product, failure.recipe) for failure in failures}
    measured = tuple(
        Measured(m.product, {r: t for r, t in m.times.items() if (m.product.name, r) not in lost})
        for m in sweep.measured
        if (m.product.name, "bf16") not in lost
    )
    absent = tuple(m.product.name for m in sweep.measured if (m.product.name, "bf16") in lost)
    return replace(sweep, measured=measured, unmeasured=absent, failed=tuple(failures), **changes)


def test_a_recipe_that_failed_at_a_layer_gets_no_verdict() -> None:
    problem = "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"
    sweep = without(
        recorded("clear_win"), [Failed(name, "tensorwise", problem) for name in ("decoder.fc1", "vision.fc1")]
    )
    advice = advise(sweep)
    assert advice.failed == ("tensorwise",)
    assert advice.chosen is not None
    assert advice.chosen.recipe == "delayed"
    assert "tensorwise" not in {verdict.recipe for verdict in advice.verdicts}
    assert headline(advice).endswith("; no verdict on tensorwise: failed")
    text = advice_text(sweep, advice)
    assert f"- tensorwise failed at decoder.fc1, vision.fc1: {problem}" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| decoder.fc1"))
    assert "failed" in row


def test_a_failure_at_the_encoder_keeps_the_encoder_in_bf16() -> None:
    sweep = without(recorded("clear_win"), [Failed("vision.fc2", "tensorwise", "RuntimeError: no kernel")])
    advice = advise(sweep)
    assert advice.failed == ()
    assert advice.chosen is not None
    assert (advice.chosen.recipe, advice.chosen.vision) == ("tensorwise", False)
    assert "vision" not in advice.chosen.ratios
    assert "precision.fp8_vision=false" in advice.options
    assert "the encoder stays in bf16: tensorwise failed at vision.fc2" in advice.remarks


def test_without_any_recipe_left_it_is_bf16_and_says_why() -> None:
    sweep = without(recorded("one_recipe"), [Failed("decoder.qkv", "delayed", "RuntimeError: no kernel")])
    advice = advise(sweep)
    assert advice.options == ("precision.fp8=null",)
    assert headline(advice) == "FP8 cannot be used here: keep bf16; no verdict on delayed: failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unmeasured": ("decoder.fc2",)}, "decoder.fc2 has no time in bf16: the sweep was ended from outside"),
        (
            {"unmeasured": ("decoder.fc2",), "failed": (Failed("decoder.fc2", "bf16", "OutOfMemoryError: no room"),)},
            "decoder.fc2 has no time in bf16: see what failed",
        ),
        (
            {"unmeasured": ("decoder.fc1", "decoder.fc2"), "stopped": "the device is gone"},
            "decoder.fc1, decoder.fc2 have no time in bf16: the device is gone",
        ),
        ({"attention_ms": None}, "attention has no time in bf16"),
    ],
)
def test_part_of_a_step_is_no_advice(changes: dict[str, object], message: str) -> None:
    whole = recorded("clear_win")
    absent = changes.get("unmeasured", ())
    measured = tuple(m for m in whole.measured if m.product.name not in absent)
    sweep = replace(whole, measured=measured, **changes)
    advice = advise(sweep)
    assert (advice.verdicts, advice.chosen, advice.options) == ((), None, ())
    assert headline(advice).startswith(f"no advice: {message}")
    text = advice_text(sweep, advice)
    assert "options to copy" not in text
    assert "about" not in headline(advice)
    assert "| decoder.qkv" in text
    assert all(f"failed at {failure.product}: {failure.problem}" in text for failure in sweep.failed)
    check_same_products(sweep, resolve(sweep.preset), stage=0)


def test_delayed_scaling_is_said_to_be_timed_pessimistically() -> None:
    pessimistic = "delayed: each layer was timed alone and updates its amax history by itself"
    assert pessimistic in advice_text(*advice_on("one_recipe"))
    sweep = recorded("one_recipe")
    bare = replace(sweep, measured=tuple(Measured(m.product, {"bf16": m.times["bf16"]}) for m in sweep.measured))
    assert pessimistic not in advice_text(bare, advise(bare))


def test_the_text_says_when_and_with_what_it_was_measured() -> None:
    sweep = replace(recorded("one_recipe"), versions={"torch": "2.11.0", "driver": "580.1"})
    assert f"measured {sweep.date} with torch 2.11.0, driver 580.1" in advice_text(sweep, advise(sweep))


@pytest.mark.parametrize(("name", "usual"), [("mixed", "e4m3"), ("clear_win", "hybrid")])
def test_the_format_is_the_users_or_the_usual_one_of_the_recipe(name: str, usual: str) -> None:
    sweep = recorded(name)
    assert advise(sweep).options[0] == "precision.fp8=hybrid"
    assert advise(replace(sweep, fp8_format="")).options[0] == f"precision.fp8={usual}"


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match=f"a share of {share}"):
        advise(recorded("clear_win"), other_share=share)


@pytest.mark.parametrize("name", ["clear_win", "one_recipe", "mixed", "encoder_excluded", "error_too_large"])
def test_the_options_are_ones_that_training_accepts(name: str) -> None:
    sweep, advice = advice_on(name)
    cfg = apply_overrides(resolve(sweep.preset), advice.options)
    for rule in PRECISION_RULES:
        rule(cfg, 64)


@pytest.mark.parametrize("name", SCENARIOS)
def test_numbers_survive_the_file(name: str, tmp_path: Path) -> None:
    sweep = recorded(name)
    path = tmp_path / "again.json"
    path.write_text(json.dumps(sweep_to_json(sweep)), encoding="utf-8")
    assert read_sweep(path) == sweep


def test_a_record_of_failures_survives_the_file(tmp_path: Path) -> None:
    sweep = without(
        recorded("clear_win"),
        [Failed(ATTENTION, "bf16", "RuntimeError: one"), Failed("decoder.fc1", "bf16", "RuntimeError: two")],
        attention_ms=None,
        stopped="the device is gone",
    )
    path = tmp_path / "again.json"
    for kept in (sweep, replace(sweep, measured=())):
        path.write_text(json.dumps(sweep_to_json(kept)), encoding="utf-8")
        assert read_sweep(path) == kept


def test_a_malformed_file_is_named() -> None:
    with pytest.raises(DataError, match=r"measured\[0\]: times: bf16 holds .*forwards_ms"):
        recorded("malformed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=1), "version 1 of recorded numbers, not 2"),
        (lambda c: c.update(measured=[]), "no measured product"),
        (lambda c: c.update(attention_ms="long"), "attention_ms is 'long'"),
        (lambda c: c.update(failed=[{"product": "a", "recipe": "fp4", "problem": ""}]), "a failed in 'fp4', which is"),
        (lambda c: c["measured"][0]["times"].pop("bf16"), "bf16 must be among them"),
        (lambda c: c["measured"][1]["times"].update(fp4=c["measured"][1]["times"]["bf16"]), "bf16 must be among them"),
        (lambda c: c["measured"][0]["times"]["bf16"].update(forward_ms=0), "all above 0"),
        (lambda c: c["measured"][0]["product"].update(rows=0), "all above 0"),
        (lambda c: c["measured"][0]["product"].update(rows=1.5), "rows is 1.5"),
        (lambda c: c["measured"][0]["times"]["bf16"].update(forward_ms=float("nan")), "forward_ms is nan"),
    ],
)
def test_each_fault_of_a_file_is_named(change, message: str, tmp_path: Path) -> None:
    content = sweep_to_json(recorded("clear_win"))
    content = json.loads(json.dumps(content))
    change(content)
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_sweep(path)


def test_an_absent_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read recorded numbers"):
        read_sweep(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"version": 1,', encoding="utf-8")
    with pytest.raises(DataError, match="cannot read recorded numbers"):
        read_sweep(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="holds list, not"):
        read_sweep(tmp_path / "list.json")


def test_numbers_of_another_configuration_are_refused() -> None:
    sweep = recorded("clear_win")
    cfg = resolve("mm1_30b")
    check_same_products(sweep, cfg, stage=0)
    wider = apply_overrides(cfg, ["data.seq_length=8192"])
    with pytest.raises(ConfigError, match="decoder.qkv has rows 4096 there and 8192 here"):
        check_same_products(sweep, wider, stage=0)
    with pytest.raises(ConfigError, match="patches.embedding is not measured there"):
        check_same_products(replace(sweep, measured=sweep.measured[1:]), cfg, stage=0)
    with pytest.raises(ConfigError, match=r"decoder.fc1 has count 48 there and 47 here, edge_count 2 there and 1 here"):
        check_same_products(sweep, apply_overrides(cfg, ["moe.num_moe_experts=8", "moe.moe_layer_period=48"]), stage=0)
    extra = Measured(replace(sweep.measured[0].product, name="patches.other"), sweep.measured[0].times)
    with pytest.raises(ConfigError, match="patches.other is no product of it"):
        check_same_products(replace(sweep, measured=(*sweep.measured, extra)), cfg, stage=0)


def test_the_plan_of_30b() -> None:
    chosen = plan(resolve("mm1_30b"), unusable={"mxfp8": "needs Blackwell"})
    recipes = {product.name: chosen.recipes_of(product) for product in chosen.products}
    assert chosen.recipes == ("tensorwise", "delayed", "blockwise")
    assert recipes["decoder.fc1"] == recipes["vision.fc1"] == chosen.recipes
    assert recipes["output.logits"] == recipes["patches.embedding"] == ()
    assert chosen.refused == {"mxfp8": "needs Blackwell"}
    assert len(chosen.products) == 10


def test_the_plan_of_the_sparse_3b() -> None:
    chosen = plan(at_reference_layout("mm1_3b_moe", gpus=64), unusable={})
    shapes = {p.name: (p.rows, p.groups, p.in_features, p.out_features) for p in chosen.products}
    assert shapes["experts.fc1"] == (8192, 2, 3072, 16128)
    assert shapes["experts.fc2"] == (8192, 2, 8064, 3072)
    recipes = {product.name: chosen.recipes_of(product) for product in chosen.products}
    assert recipes["experts.fc1"] == ("tensorwise", "delayed", "blockwise", "mxfp8")
    assert recipes["router.logits"] == ()


def test_a_recipe_that_the_layout_refuses_is_not_measured() -> None:
    cfg = apply_overrides(resolve("mm1_30b"), ["precision.first_last_layers_bf16=true"])
    chosen = plan(cfg, unusable={})
    assert "amax reduction covers all layers" in chosen.refused["delayed"]
    odd = apply_overrides(resolve("mm1_30b"), ["language.ffn_hidden_size=19264"])  # 2408 on each of 8 ranks
    assert set(plan(odd, unusable={}).refused) == {"tensorwise", "delayed", "blockwise", "mxfp8"}
    narrow = apply_overrides(resolve("mm1_30b"), ["vision.ffn_hidden_size=5136"])  # a multiple of 16, not of 32
    found = plan(narrow, unusable={})
    assert set(found.refused_vision) == {"mxfp8"}
    by_name = {product.name: product for product in found.products}
    assert found.recipes_of(by_name["vision.fc1"]) == ("tensorwise", "delayed", "blockwise")


def test_any_configuration_is_measured_as_it_would_be_trained() -> None:
    trained = as_trained(resolve("debug_moe"), "blockwise", vision=True)
    assert (trained.kernels.transformer_impl, trained.kernels.params_dtype) == ("transformer_engine", "bf16")
    precision = trained.precision
    assert (precision.fp8, precision.fp8_recipe, precision.fp8_vision) == ("e4m3", "blockwise", True)
    assert as_trained(resolve("debug_moe"), "tensorwise").precision.fp8 == "hybrid"
    hybrid = apply_overrides(resolve("debug_moe"), ["precision.fp8=hybrid"])
    assert as_trained(hybrid, "blockwise").precision.fp8 == "hybrid"
    assert as_trained(resolve("debug_moe"), None).precision.fp8 is None


def test_rows_of_experts_never_come_in_blocks() -> None:
    product = MatrixProduct("experts.fc1", "experts", rows=4096, in_features=16, out_features=16, groups=4)
    rows = rows_of_experts(product)
    assert rows == (1027, 1021, 1027, 1021)
    uneven = replace(product, rows=10, groups=4)
    assert sum(rows_of_experts(uneven)) == 10
    assert min(rows_of_experts(replace(product, rows=2))) >= 0
    assert rows_of_experts(replace(product, groups=1)) == (4096,)
