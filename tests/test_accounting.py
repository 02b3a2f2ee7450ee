"""Accounting against the published and derived figures of MM1 and MM1.5."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mm15_megatron.accounting import (
    chunk_layers,
    connector_forward_flops,
    connector_parameters,
    device_peak_tflops,
    language_parameters,
    learning_rate_law,
    memory_estimate,
    model_parameters,
    padded_vocab_size,
    pipeline_layer_split,
    planned_tiles_per_row,
    resolved_learning_rate,
    sparse_layers,
    stage_costs,
    stage_layers,
    step_flops,
    vision_forward_flops,
    vision_parameters,
    vision_tower_parameters,
)
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import resolve

PRINTED_3 = 5e-3  # the references print three significant digits
PRINTED_4 = 5e-4  # ... four
BILLION, MILLION, TERA = 1e9, 1e6, 1e12


@pytest.mark.parametrize(
    ("preset", "non_embedding"),
    [
        ("mm1_lr_9m", 10.2e6),
        ("mm1_lr_85m", 84.9e6),
        ("mm1_lr_302m", 308e6),
        ("mm1_ablation_base", 1.233e9),
        ("mm1_3b", 2.914e9),
        ("mm1_7b", 6.476e9),
        ("mm1_7b_moe_dense", 6.375e9),
        ("mm1_30b", 29.68e9),
    ],
)
def test_non_embedding_parameters(preset, non_embedding):
    cfg = resolve(preset.removesuffix("_dense"))
    dense = replace(cfg, moe=replace(cfg.moe, num_moe_experts=0))
    assert language_parameters(dense).non_embedding == pytest.approx(non_embedding, rel=PRINTED_3)


def test_decoder_of_3b_by_hand():
    attention, feed_forward, norms = 4 * 3072**2, 3 * 3072 * 8064, 2 * 3072
    counts = language_parameters(resolve("mm1_3b"))
    assert counts.non_embedding == 26 * (attention + feed_forward + norms) + 3072
    assert counts.total == counts.non_embedding + 49152 * 3072


@pytest.mark.parametrize(
    ("preset", "sparse", "total", "active"),
    [
        ("mm1_3b_moe", 13, 63.78, 3.88),
        ("mm1_7b_moe", 8, 45.38, 7.63),
        ("mm15_1b_moe", 12, 27.4, 1.65),
        ("mm15_3b_moe", 13, 63.8, 3.9),
    ],
)
def test_sparse_models(preset, sparse, total, active):
    cfg = resolve(preset)
    counts = language_parameters(cfg)
    assert sum(sparse_layers(cfg)) == sparse
    assert counts.non_embedding == pytest.approx(total * BILLION, rel=PRINTED_3)
    assert counts.active_non_embedding == pytest.approx(active * BILLION, rel=PRINTED_3)


def test_the_last_layer_of_each_group_is_sparse():
    assert [i for i, s in enumerate(sparse_layers(resolve("mm1_7b_moe"))) if s] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert not any(sparse_layers(resolve("mm1_3b")))


def test_all_in_totals_of_the_sparse_models():
    assert 64.55 < model_parameters(resolve("mm1_3b_moe")).total / BILLION < 64.65  # published: 64B
    assert 46.2 < model_parameters(resolve("mm1_7b_moe")).total / BILLION < 46.3  # published: 47B
    dense = model_parameters(resolve("mm1_3b"))
    assert dense.active == dense.total


def test_image_towers():
    vit_h, vit_l = resolve("mm1_3b").vision, resolve("mm1_ablation_base").vision
    assert vision_tower_parameters(vit_h, projection=1024) == pytest.approx(632.68 * MILLION, abs=5e3)
    assert vision_tower_parameters(replace(vit_h, image_size=224), projection=1024) == pytest.approx(632.08e6, abs=5e3)
    assert vision_tower_parameters(vit_l, projection=768) == pytest.approx(304.29 * MILLION, abs=5e3)
    assert vision_tower_parameters(replace(vit_l, image_size=224), projection=768) == pytest.approx(303.97e6, abs=5e3)
    assert vision_parameters(vit_h) == pytest.approx(631.4 * MILLION, rel=PRINTED_4)


def test_built_encoder_leaves_out_what_is_not_used():
    vision = resolve("mm1_3b").vision
    block = 12 * 1280**2 + 13 * 1280
    whole = vision_parameters(vision)
    assert vision_parameters(replace(vision, feature_layer=-2)) == whole - block
    assert vision_parameters(replace(vision, class_token=False)) == whole - 2 * 1280
    assert vision_parameters(replace(vision, post_layernorm=True)) == whole + 2 * 1280
    assert vision_parameters(replace(vision, image_size=672, position_grid_size=27)) == whole


@pytest.mark.parametrize(
    ("vision", "image", "totals"),
    [
        ("mm1_3b", 378, (24.76, 31.06, 39.45, 77.20)),
        ("mm1_3b", 336, (24.57, 30.86, 39.25, 77.01)),
        ("mm1_ablation_base", 336, (22.71, 29.01, 37.40, 75.15)),
    ],
)
def test_c_abstractor(vision, image, totals):
    for width, total in zip((2048, 3072, 4096, 7168), totals, strict=True):
        cfg = apply_overrides(resolve(vision), [f"vision.image_size={image}", f"language.hidden_size={width}"])
        assert connector_parameters(cfg) == pytest.approx(total * MILLION, abs=5e3)


def test_average_pool_is_one_linear_layer():
    cfg = apply_overrides(resolve("mm1_3b"), ["connector.kind=average_pool"])
    assert connector_parameters(cfg) == 1280 * 3072 + 3072
    assert connector_forward_flops(cfg).total == 2 * 144 * 1280 * 3072


@pytest.mark.parametrize(("size", "billions"), [("600m", 0.68), ("1b", 1.21), ("3b", 2.72)])
def test_aim_encoders(size, billions):
    vision = resolve(f"mm1_encoder_aim_{size}").vision
    d = vision.hidden_size
    assert vision_parameters(vision) == pytest.approx(billions * BILLION, rel=PRINTED_3)
    assert vision_parameters(vision) == (3 * 14**2 + 1) * d + 24 * (12 * d**2 + 4 * d) + 4 * d


def test_sincos_positions_cost_nothing():
    vision = resolve("mm1_encoder_aim_600m").vision
    assert vision_parameters(replace(vision, image_size=672)) == vision_parameters(vision)
    learned = replace(vision, position_embedding="learned")
    assert vision_parameters(learned) == vision_parameters(vision) + 16**2 * 1536


def test_attention_pool_by_hand():
    cfg = resolve("mm1_connector_attention_pool_336_144")
    d = c = 1024
    h, tokens, patches = 2048, 144, 24**2
    projections, norms, positions = c * c + 2 * d * c, 2 * (c + d), patches * d
    assert connector_parameters(cfg) == tokens * c + positions + norms + projections + c * h + h
    flops = connector_forward_flops(cfg)
    assert flops.weights == 2 * (patches * d * 2 * c + tokens * c * h)
    assert flops.attention == 2 * (2 * tokens * patches * c)  # scores and weighted values


def test_padded_vocabulary():
    assert padded_vocab_size(apply_overrides(resolve("debug_dense"), ["language.vocab_size=257"])) == 384


@pytest.mark.parametrize(
    ("non_embedding", "rate"),
    [
        (9.4e6, 6.624e-4),
        (8.49e7, 2.620e-4),
        (3.02e8, 1.535e-4),
        (1.208e9, 8.559e-5),
        (1.2e9, 8.583e-5),
        (2.9e9, 5.918e-5),
        (6.4e9, 4.239e-5),
        (6.44e9, 4.228e-5),
        (3e10, 2.211e-5),
    ],
)
def test_learning_rate_law(non_embedding, rate):
    assert learning_rate_law(non_embedding) == pytest.approx(rate, rel=PRINTED_4)


def test_learning_rate_law_refuses_nothing():
    with pytest.raises(ConfigError, match="no value at N = 0"):
        learning_rate_law(0)


def test_resolved_learning_rate():
    assert resolved_learning_rate(resolve("mm1_3b")) == 6e-5
    assert resolved_learning_rate(resolve("mm1_lr_85m")) == pytest.approx(2.620e-4, rel=PRINTED_4)
    by_law = [apply_overrides(resolve(name), ["optimizer.lr=null"]) for name in ("mm1_3b", "mm1_3b_moe")]
    assert resolved_learning_rate(by_law[0]) == resolved_learning_rate(by_law[1])


@pytest.mark.parametrize(
    ("preset", "per_token", "language", "vision_share", "total", "step"),
    [
        ("mm1_30b", 188.7, 772.8, 5.9, 822.6, 421),
        ("mm1_3b", 20.4, 83.4, 36.4, 132.6, 67.9),
        ("mm1_3b_moe", 26.2, 107.2, 30.9, 156.4, 80.1),
    ],
)
def test_roofline(preset, per_token, language, vision_share, total, step):
    cfg = resolve(preset)
    flops = step_flops(cfg, rows=1, tiles=16)
    assert flops.language / 4096 == pytest.approx(per_token * 1e9, rel=PRINTED_3)
    assert flops.language == pytest.approx(language * TERA, rel=PRINTED_4)
    assert 100 * flops.vision / flops.total == pytest.approx(vision_share, abs=0.06)
    # the reference charges the squeeze-excite weights at every pixel; they act once a tile (0.15 TFLOP a row)
    assert flops.total == pytest.approx(total * TERA, abs=0.2 * TERA)
    assert step_flops(cfg, rows=512, tiles=512 * 16).total == pytest.approx(step * 1e15, rel=PRINTED_3)


def test_encoder_flops():
    cfg = resolve("mm1_30b")
    assert vision_forward_flops(cfg.vision).total == pytest.approx(1.005 * TERA, rel=PRINTED_4)
    assert step_flops(cfg, rows=0, tiles=16).vision == pytest.approx(48.3 * TERA, rel=PRINTED_3)
    frozen = apply_overrides(cfg, ["freeze.vision=true"])
    assert step_flops(frozen, rows=0, tiles=16).vision == pytest.approx(16.1 * TERA, rel=PRINTED_3)


def test_frozen_modules_skip_what_they_need_not_compute():
    def flops(*frozen: str) -> tuple[float, float]:
        cfg = apply_overrides(resolve("mm1_3b"), [f"freeze.{name}=true" for name in frozen])
        step = step_flops(cfg, rows=1, tiles=1)
        return step.language, step.connector

    language, connector = flops()
    forward = connector_forward_flops(resolve("mm1_3b")).total
    assert connector == 3 * forward
    assert flops("connector") == (language, 2 * forward)  # the encoder's gradients still pass through it
    assert flops("connector", "vision") == (language, forward)
    assert 2 / 3 * language < flops("language")[0] < language  # input gradients and all of attention remain
    assert flops("language", "connector", "vision")[0] == pytest.approx(language / 3)


@pytest.mark.parametrize(
    ("preset", "tiles"),
    [("mm1_3b", 16), ("mm15_3b_sft", 28), ("mm1_3b_sft", 14), ("debug_dense", 8), ("debug_vision", 16)],
)
def test_planned_tiles(preset, tiles):
    assert planned_tiles_per_row(resolve(preset)) == tiles


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_pipeline_split_is_the_best(stages):
    cfg = apply_overrides(resolve("mm1_30b"), [f"parallel.pipeline_model_parallel_size={stages}"])
    chosen = pipeline_layer_split(cfg)
    assert sum(chosen) == 48
    assert len(chosen) == stages
    assert max(chosen[1:]) - min(chosen[1:]) <= 1
    assert list(chosen[1:]) == sorted(chosen[1:], reverse=True)
    slowest = max(stage_costs(cfg, chosen))
    for first in range(1, 48 - stages + 2):
        rest, left = divmod(48 - first, stages - 1)
        split = (first, *(rest + (i < left) for i in range(stages - 1)))
        assert max(stage_costs(cfg, split)) >= slowest


def test_interleaved_split():
    cfg = apply_overrides(
        resolve("mm1_30b"),
        ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=3"],
    )
    split = pipeline_layer_split(cfg)
    assert len(split) == 12
    assert sum(split) == 48
    assert [len(layers) for layers in chunk_layers(cfg)] == list(split)
    assert [layer for layers in chunk_layers(cfg) for layer in layers] == list(range(48))
    held = [stage_layers(cfg, stage) for stage in range(4)]
    assert sorted(layer for layers in held for layer in layers) == list(range(48))
    assert held[1] == tuple(layer for piece in (1, 5, 9) for layer in chunk_layers(cfg)[piece])
    assert sum(stage_costs(cfg, split)) == pytest.approx(step_flops(cfg, rows=1, tiles=16).total, rel=1e-12)


def test_interleaving_keeps_more_activations():
    pp4 = ["parallel.pipeline_model_parallel_size=4", "parallel.num_layers_in_first_pipeline_stage=12"]
    plain = apply_overrides(resolve("mm1_30b"), pp4)
    interleaved = apply_overrides(
        plain,
        ["parallel.virtual_pipeline_model_parallel_size=3", "parallel.num_layers_in_first_pipeline_stage=4"],
    )
    last = [memory_estimate(cfg, world_size=32, stage=3) for cfg in (plain, interleaved)]
    assert last[0].parameters == last[1].parameters
    assert last[1].activations > last[0].activations  # 9 passes of a third of the layers against 1 of all


def test_memory_of_attention_pooling():
    pool = apply_overrides(resolve("debug_dense"), ["connector.kind=attention_pool", "connector.num_attention_heads=2"])
    average = apply_overrides(pool, ["connector.kind=average_pool"])
    kept = [memory_estimate(cfg, world_size=1).activations for cfg in (pool, average)]
    tiles = planned_tiles_per_row(pool) * pool.train.micro_batch_size
    assert kept[0] - kept[1] == 4 * tiles * (2 * 16 * (32 + 16) + 2 * 4 * 16)


@pytest.mark.parametrize(
    ("seq_length", "overrides", "bytes_of_a_column"),
    [
        ("data.seq_length=2048", ["kernels.params_dtype=fp32"], 4 * 4096),
        ("data.seq_length=2048", ["kernels.params_dtype=bf16"], 2 * 4096 + 4 * 1024),  # and a widened chunk
        ("data.seq_length=2048", ["kernels.params_dtype=bf16", "kernels.compile_fusions=true"], 2 * 4096),
        ("data.seq_length=256", ["kernels.params_dtype=bf16"], 2 * 512 + 4 * 512),
    ],
)
def test_memory_of_the_loss(seq_length: str, overrides: list[str], bytes_of_a_column: int):
    """Logits of two rows, and their gradient in the same place."""
    cfg = apply_overrides(resolve("debug_dense"), [seq_length, "train.micro_batch_size=2", *overrides])
    wide = replace(cfg, language=replace(cfg.language, vocab_size=cfg.language.vocab_size + 1024))
    more = memory_estimate(wide, world_size=1).activations - memory_estimate(cfg, world_size=1).activations
    assert padded_vocab_size(wide) - padded_vocab_size(cfg) == 1024
    assert more == 1024 * bytes_of_a_column


def test_pipeline_split_of_small_models():
    pp2 = ["parallel.pipeline_model_parallel_size=2"]
    assert pipeline_layer_split(resolve("debug_dense")) == (4,)
    assert pipeline_layer_split(apply_overrides(resolve("debug_vision"), pp2)) == (1, 3)
    fixed = apply_overrides(resolve("debug_dense"), [*pp2, "parallel.num_layers_in_first_pipeline_stage=3"])
    assert pipeline_layer_split(fixed) == (3, 1)


def test_stage_costs_add_up():
    cfg = apply_overrides(resolve("mm1_3b_moe"), ["parallel.pipeline_model_parallel_size=2"])
    whole = step_flops(cfg, rows=1, tiles=16).total
    assert sum(stage_costs(cfg, (10, 16))) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.pipeline_model_parallel_size=5"],
        ["parallel.pipeline_model_parallel_size=3", "parallel.num_layers_in_first_pipeline_stage=3"],
    ],
)
def test_impossible_pipeline_split(overrides):
    with pytest.raises(ConfigError, match="cannot be split over"):
        pipeline_layer_split(apply_overrides(resolve("debug_dense"), overrides))


def test_memory_of_one_rank_is_exact_for_parameters_and_optimizer():
    cfg = resolve("debug_dense")
    count, memory = model_parameters(cfg).total, memory_estimate(cfg, world_size=1)
    assert memory.parameters == 4 * count
    assert memory.gradients == 4 * count
    assert memory.optimizer == 8 * count  # fp32 parameters are their own master copy
    assert memory.activations > 0
    assert memory.total == memory.parameters + memory.gradients + memory.optimizer + memory.activations


def test_memory_of_mixed_precision_and_sharded_state():
    cfg = apply_overrides(resolve("debug_dense"), ["kernels.params_dtype=bf16"])
    count = model_parameters(cfg).total
    memory = memory_estimate(cfg, world_size=4)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (2 * count, 4 * count, 12 * count)
    sharded = memory_estimate(apply_overrides(cfg, ["parallel.use_distributed_optimizer=true"]), world_size=4)
    assert sharded.optimizer == memory.optimizer / 4
    low = memory_estimate(apply_overrides(cfg, ["parallel.grad_reduce_in_fp32=false"]), world_size=4)
    assert low.gradients == 2 * count


def test_memory_of_layouts():
    cfg = resolve("debug_dense")
    whole = memory_estimate(cfg, world_size=1)
    split = apply_overrides(cfg, ["parallel.pipeline_model_parallel_size=2"])
    stages = [memory_estimate(split, world_size=2, stage=i) for i in (0, 1)]
    assert sum(stage.parameters for stage in stages) == whole.parameters
    tensor = apply_overrides(cfg, ["parallel.tensor_model_parallel_size=2"])
    sharded_encoder = apply_overrides(tensor, ["parallel.encoder_parallel=tensor"])
    parameters = [memory_estimate(c, world_size=2).parameters for c in (cfg, tensor, sharded_encoder)]
    assert parameters[0] > parameters[1] > parameters[2] > parameters[0] / 2
    experts = [
        memory_estimate(
            apply_overrides(resolve("debug_moe"), [f"parallel.expert_model_parallel_size={n}"]), world_size=4
        )
        for n in (1, 2)
    ]
    held = 4 * 2 * 3 * 64 * 192 * 4  # four experts in two layers, fp32
    assert experts[0].parameters - experts[1].parameters == held / 2


def test_memory_of_frozen_modules_and_recomputation():
    cfg = resolve("debug_dense")
    whole = memory_estimate(cfg, world_size=1)
    frozen = memory_estimate(apply_overrides(cfg, ["freeze.vision=true"]), world_size=1)
    assert whole.gradients - frozen.gradients == 4 * vision_parameters(cfg.vision)
    assert frozen.activations < whole.activations
    full = memory_estimate(apply_overrides(cfg, ["kernels.recompute_granularity=full"]), world_size=1)
    assert full.activations < whole.activations
    vision = apply_overrides(cfg, ["kernels.recompute_vision=true"])
    assert memory_estimate(vision, world_size=1).activations < whole.activations


def test_a_30b_stage_fits_the_usual_layout():
    estimate = memory_estimate(resolve("mm1_30b"), world_size=384)
    assert 20 * BILLION < estimate.total < 80 * BILLION


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", None),
        ("some laptop", None),
    ],
)
def test_device_peaks(name, peak):
    assert device_peak_tflops(name) == peak


FP8 = ["kernels.params_dtype=bf16", "precision.fp8=hybrid"]


def test_memory_of_fp8():
    """debug_dense: 64 wide, 4 heads of 16 over 2 groups, 192 inside; the encoder 32 wide and 64 inside."""
    plain = memory_estimate(apply_overrides(resolve("debug_dense"), FP8[:1]), world_size=1)
    cfg = apply_overrides(resolve("debug_dense"), FP8)
    quantised = memory_estimate(cfg, world_size=1)
    layer, block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192, 4 * 32 * 32 + 2 * 32 * 64
    assert quantised.parameters - plain.parameters == 2 * 4 * layer
    assert (quantised.gradients, quantised.optimizer) == (plain.gradients, plain.optimizer)
    tokens = cfg.data.seq_length * cfg.train.micro_batch_size
    assert plain.activations - quantised.activations == pytest.approx(tokens * 4 * (2 * 64 - 64 + 192))
    gathered = memory_estimate(apply_overrides(cfg, ["precision.fp8_param_gather=true"]), world_size=1)
    assert gathered.parameters == plain.parameters
    encoder = memory_estimate(apply_overrides(cfg, ["precision.fp8_vision=true"]), world_size=1)
    assert encoder.parameters - quantised.parameters == 2 * 3 * block
    ends = memory_estimate(apply_overrides(cfg, ["precision.first_last_layers_bf16=true"]), world_size=1)
    assert ends.parameters - plain.parameters == 2 * 2 * layer


def test_memory_of_fp8_experts():
    """debug_moe: what is sent to the experts and their product are FP8; the norm before them is not."""
    plain, quantised = (apply_overrides(resolve("debug_moe"), options) for options in (FP8[:1], FP8))
    saved = memory_estimate(plain, world_size=1).activations - memory_estimate(quantised, world_size=1).activations
    dense, sparse = 64 - 64 + 64 + 192, 64 - 64 + 2 * (64 + 192)
    assert saved == plain.data.seq_length * plain.train.micro_batch_size * 2 * (dense + sparse)


@pytest.mark.parametrize(
    ("preset", "modules", "freed"),
    [
        ("debug_dense", "core_attn", 0),
        ("debug_dense", "mlp", 4 * 3 * 192),
        ("debug_moe", "layernorm", 2 * 64),
        ("debug_moe", "mlp, layernorm", 2 * (3 * 192 + 64)),
        ("debug_moe", "moe", 2 * 2 * (64 + 3 * 192)),
        ("debug_moe", "moe_act", 2 * 2 * 192),
    ],
)
def test_memory_that_selective_recomputation_frees(preset: str, modules: str, freed: int):
    """debug_moe: every second of four layers is sparse, each token visits two experts."""
    cfg = resolve(preset)
    selective = ["kernels.recompute_granularity=selective", f"kernels.recompute_modules=[{modules}]"]
    kept, recomputed = (memory_estimate(c, world_size=1).activations for c in (cfg, apply_overrides(cfg, selective)))
    assert kept - recomputed == pytest.approx(4 * cfg.data.seq_length * cfg.train.micro_batch_size * freed)
