"""The matrix products of a rank against the FLOPs of the model and against shapes worked out by hand."""

from __future__ import annotations

import pytest

from mm15_megatron.accounting import connector_forward_flops, planned_tiles_per_row, sparse_layers, step_flops
from mm15_megatron.accounting.flops import layer_forward_flops, trained_language, trained_tile, vision_forward_flops
from mm15_megatron.accounting.matrix_products import MatrixProduct, matrix_products
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import resolve
from mm15_megatron.presets.reference_layouts import at_reference_layout

SUM_ROUNDING = 1e-12  # the same whole numbers, added as floats in another order
# equal shares need a row's tiles to divide by the ranks that share them; the class token stands in no FLOP count
WITHOUT_CLASS_TOKEN = "vision.class_token=false"


def by_name(cfg: RunConfig, *, stage: int = 0) -> dict[str, MatrixProduct]:
    return {product.name: product for product in matrix_products(cfg, stage=stage)}


def linear_flops(cfg: RunConfig, *, rows: float) -> float:
    """The part of ``step_flops`` that are products with weights of the decoder and of the encoder."""
    tiles = rows * planned_tiles_per_row(cfg)
    whole = step_flops(cfg, rows=rows, tiles=tiles)
    attention = sum(
        trained_language(cfg, layer_forward_flops(cfg, sparse=s)) for s in sparse_layers(cfg)
    ) - trained_language(cfg, _weights_of_layers(cfg))
    freeze, vision = cfg.freeze, vision_forward_flops(cfg.vision)
    seen = 1 if freeze.vision else 3
    return whole.language - rows * attention + tiles * seen * vision.weights


def _weights_of_layers(cfg: RunConfig):
    forward = [layer_forward_flops(cfg, sparse=s) for s in sparse_layers(cfg)]
    return type(forward[0])(weights=sum(f.weights for f in forward))


def all_ranks(cfg: RunConfig) -> float:
    """FLOPs of one micro-batch on all ranks that work on it together."""
    parallel = cfg.parallel
    stages = range(parallel.pipeline_model_parallel_size)
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return ranks * sum(p.trained_flops for stage in stages for p in matrix_products(cfg, stage=stage))


@pytest.mark.parametrize("preset", ["mm1_3b", "mm1_30b", "mm1_3b_moe", "mm1_7b_moe", "mm15_7b", "debug_moe"])
@pytest.mark.parametrize("extra", [(), ("freeze.vision=true",), ("freeze.language=true", "freeze.vision=true")])
def test_flops_sum_to_the_linear_part_of_a_step(preset: str, extra: tuple[str, ...]) -> None:
    cfg = apply_overrides(resolve(preset), [WITHOUT_CLASS_TOKEN, *extra])
    assert all_ranks(cfg) == pytest.approx(linear_flops(cfg, rows=cfg.train.micro_batch_size), rel=SUM_ROUNDING)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor_model_parallel_size=2",),
        ("parallel.pipeline_model_parallel_size=2",),
        ("parallel.context_parallel_size=2",),
        ("parallel.tensor_model_parallel_size=4", "parallel.expert_tensor_parallel_size=1"),
        ("parallel.tensor_model_parallel_size=4", "parallel.expert_model_parallel_size=8"),
    ],
)
def test_a_layout_divides_the_work_and_adds_none(layout: tuple[str, ...]) -> None:
    whole = apply_overrides(resolve("mm1_3b_moe"), [WITHOUT_CLASS_TOKEN, "train.micro_batch_size=2"])
    split = apply_overrides(whole, layout)
    assert all_ranks(split) == pytest.approx(all_ranks(whole), rel=SUM_ROUNDING)


def test_a_tensor_parallel_encoder_repeats_its_patch_embedding() -> None:
    whole = apply_overrides(resolve("mm1_3b"), [WITHOUT_CLASS_TOKEN])
    split = apply_overrides(whole, ["parallel.tensor_model_parallel_size=4", "parallel.encoder_parallel=tensor"])
    again = 3 * by_name(whole)["patches.embedding"].trained_flops
    assert all_ranks(split) == pytest.approx(all_ranks(whole) + again, rel=SUM_ROUNDING)
    assert by_name(split)["vision.fc2"].in_features == 1280


def test_the_shapes_of_30b_on_a_tensor_parallel_rank() -> None:
    found = by_name(resolve("mm1_30b"))
    shapes = {n: (p.rows, p.in_features, p.out_features, p.groups, p.count) for n, p in found.items()}
    tile = 27**2 + 1
    assert shapes == {
        "patches.embedding": (2 * 27**2, 588, 1280, 1, 1),
        "vision.qkv": (2 * tile, 1280, 3840, 1, 32),
        "vision.proj": (2 * tile, 1280, 1280, 1, 32),
        "vision.fc1": (2 * tile, 1280, 5120, 1, 32),
        "vision.fc2": (2 * tile, 5120, 1280, 1, 32),
        "decoder.qkv": (4096, 7168, 3 * 7168 // 8, 1, 48),
        "decoder.proj": (4096, 7168 // 8, 7168, 1, 48),
        "decoder.fc1": (4096, 7168, 2 * 19200 // 8, 1, 48),
        "decoder.fc2": (4096, 19200 // 8, 7168, 1, 48),
        "output.logits": (4096, 7168, 49152 // 8, 1, 1),
    }
    assert {n for n, p in found.items() if p.fp8 == "never"} == {"patches.embedding", "output.logits"}
    assert {n for n, p in found.items() if p.normed} == {"vision.qkv", "vision.fc1", "decoder.qkv", "decoder.fc1"}
    assert found["decoder.fc1"].edge_count == 2


def test_the_experts_of_a_sparse_model() -> None:
    found = by_name(at_reference_layout("mm1_3b_moe", gpus=64))
    fc1, fc2, router = found["experts.fc1"], found["experts.fc2"], found["router.logits"]
    assert (fc1.groups, fc1.rows, fc1.in_features, fc1.out_features) == (2, 2 * 4096, 3072, 2 * 8064)
    assert (fc2.in_features, fc2.out_features, fc2.fp8) == (8064, 3072, "experts")
    assert fc1.rows_per_group == 4096
    assert (router.rows, router.out_features, router.fp8) == (4096, 64, "never")
    assert (fc1.count, found["decoder.fc1"].count, found["decoder.qkv"].count) == (13, 13, 26)
    assert fc1.edge_count + found["decoder.fc1"].edge_count == found["decoder.qkv"].edge_count == 2


def test_each_group_is_padded() -> None:
    product = MatrixProduct("experts.fc1", "experts", rows=4 * 1001, in_features=8, out_features=8, groups=4)
    assert product.padded_rows(16) == 4 * 1008
    assert MatrixProduct("vision.qkv", "vision", 1460, 8, 8).padded_rows(16) == 1472


def test_recomputed_layers_run_twice() -> None:
    cfg = resolve("mm1_3b_moe")  # recomputes the encoder
    assert by_name(cfg)["vision.fc1"].forward_passes == 2
    assert by_name(apply_overrides(cfg, ["freeze.vision=true"]))["vision.fc1"].forward_passes == 1
    selective = ["kernels.recompute_granularity=selective", "kernels.recompute_modules=[moe]"]
    found = by_name(apply_overrides(cfg, selective))
    assert {n for n, p in found.items() if p.forward_passes == 2 and p.part != "vision"} == {
        "router.logits",
        "experts.fc1",
        "experts.fc2",
    }
    full = by_name(apply_overrides(cfg, ["kernels.recompute_granularity=full"]))
    assert full["decoder.proj"].forward_passes == 2
    assert full["output.logits"].forward_passes == 1


def test_stages_hold_their_own() -> None:
    cfg = apply_overrides(resolve("mm1_30b"), ["parallel.pipeline_model_parallel_size=4"])
    parts = [{p.part for p in matrix_products(cfg, stage=stage)} for stage in range(4)]
    assert parts == [{"patches", "vision", "decoder"}, {"decoder"}, {"decoder"}, {"decoder", "output"}]
    assert sum(by_name(cfg, stage=stage)["decoder.qkv"].count for stage in range(4)) == 48
    assert by_name(cfg, stage=1)["decoder.qkv"].edge_count == 0
    with pytest.raises(ConfigError, match="stage 4 of 4"):
        matrix_products(cfg, stage=4)


def test_frozen_modules_compute_no_gradients() -> None:
    cfg = apply_overrides(resolve("mm1_3b"), ["freeze.vision=true", "freeze.language=true"])
    found = by_name(cfg)
    assert (found["vision.fc1"].weight_gradient, found["vision.fc1"].input_gradient) == (False, False)
    assert (found["decoder.fc1"].weight_gradient, found["decoder.fc1"].input_gradient) == (False, True)


def test_the_connector_is_left_to_its_own_count() -> None:
    cfg = apply_overrides(resolve("mm1_3b"), [WITHOUT_CLASS_TOKEN])
    whole = step_flops(cfg, rows=1, tiles=planned_tiles_per_row(cfg))
    attention = whole.language + whole.vision - all_ranks(cfg)
    assert attention > 0
    assert whole.connector == planned_tiles_per_row(cfg) * trained_tile(cfg)[1]
    assert connector_forward_flops(cfg).total > 0
