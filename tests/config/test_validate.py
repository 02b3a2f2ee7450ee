"""Every validation rule is triggered by one case, and the cases around it pass."""

from __future__ import annotations

import pytest

from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.tree import with_values
from mm15_megatron.config.validate import (
    RULES,
    data_parallel_size,
    feasible_first_stages,
    tiles_of_split_image,
    validate,
)
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import resolve

from .test_rules_overlap import CASES as OVERLAP_CASES

TRAINABLE = apply_overrides(resolve("debug_dense"), ["data.sources=[{prefix: a}]", "data.tokenizer=tokenizer.json"])

RULE = {rule.__name__: rule for rule in RULES}

TP2 = "parallel.tensor_model_parallel_size=2"
TP4 = "parallel.tensor_model_parallel_size=4"
PP2 = "parallel.pipeline_model_parallel_size=2"
PP3 = "parallel.pipeline_model_parallel_size=3"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
MOE = "moe.num_moe_experts=4"
CP2 = "parallel.context_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"

TE = ["parallel.device=cuda", "kernels.transformer_impl=transformer_engine", "kernels.params_dtype=bf16"]
FP8 = [*TE, "precision.fp8=hybrid"]
SELECTIVE = "kernels.recompute_granularity=selective"
ENDS = ("start", "end")
GRAPHS = "kernels.cuda_graph_scope=[mlp]"

SAMPLES = ["data.batch_unit=samples", "data.mixture_unit=sample"]

MIXED = ["tiling.mixed_resolution_images=3"]

CASES = [
    ("_ranges", 1, ["train.steps=0"], "train.steps = 0 is out of range"),
    ("_ranges", 1, ["optimizer.lr=0"], "give a value > 0"),
    ("_ranges", 1, ["optimizer.adam_beta2=1"], "give a value >= 0 and < 1"),
    ("_ranges", 1, ["schedule.min_lr_ratio=1.1"], "give a value >= 0 and <= 1"),
    ("_ranges", 1, ["data.num_workers=-1"], "give a value >= 0"),
    ("_world_size", 3, [TP2], "3 processes cannot be split into tensor 2 x pipeline 1 x context 1 = 2"),
    ("_world_size", 0, [], "0 processes cannot be split"),
    ("_decoder_heads", 1, ["language.num_query_groups=3"], "num_attention_heads = 4 is not divisible by"),
    ("_decoder_heads", 1, ["language.kv_channels=15"], "use an even number"),
    (
        "_tensor_split_of_decoder",
        4,
        [TP4, "language.num_query_groups=2"],
        "language.num_query_groups = 2 is not divisible",
    ),
    ("_tensor_split_of_decoder", 2, [TP2, "language.ffn_hidden_size=33"], "language.ffn_hidden_size = 33"),
    (
        "_tensor_split_of_decoder",
        2,
        [TP2, "language.make_vocab_size_divisible_by=1"],
        "make_vocab_size_divisible_by = 1",
    ),
    (
        "_tensor_split_of_encoder",
        4,
        [TP4, "language.num_query_groups=4", "parallel.encoder_parallel=tensor"],
        "set parallel.encoder_parallel=data",
    ),
    (
        "_encoder_shape",
        1,
        ["vision.image_size=57"],
        "vision.image_size = 57 is not divisible by vision.patch_size = 14",
    ),
    ("_encoder_shape", 1, ["vision.num_attention_heads=5"], "vision.hidden_size = 32 is not divisible"),
    (
        "_encoder_shape",
        1,
        ["vision.position_embedding=sincos", "vision.hidden_size=34"],
        "vision.hidden_size = 34 is not divisible by the sines and cosines of two axes = 4",
    ),
    ("_feature_layer", 1, ["vision.feature_layer=-4"], "is no block of an encoder of 3"),
    ("_feature_layer", 1, ["vision.feature_layer=0"], "count from the end"),
    ("_connector_grid", 1, ["connector.num_tokens=5"], "connector.num_tokens = 5 is not a square"),
    ("_connector_grid", 1, ["connector.num_tokens=25"], "more than the 4x4 patches"),
    (
        "_connector_heads",
        1,
        ["connector.kind=attention_pool", "connector.num_attention_heads=3"],
        "connector.hidden_size = 16 is not divisible by connector.num_attention_heads = 3",
    ),
    ("_image_fits_row", 1, ["data.seq_length=5"], "an image of 1 tiles x 4 tokens and text overflow"),
    ("_image_fits_row", 1, ["tiling.mode=dynamic", "data.seq_length=41", "data.max_tiles=20"], "10 tiles x 4 tokens"),
    ("_tile_budget", 1, ["tiling.mode=dynamic", "tiling.min_tiles=5", "tiling.max_tiles=4"], "is above"),
    ("_tile_budget", 1, ["tiling.mode=static", "tiling.max_split_images=0"], "splits nothing"),
    ("_tile_budget", 1, ["tiling.mode=static", *MIXED, "tiling.indicator=index"], "splits images of any number"),
    ("_tile_budget", 1, ["tiling.mode=static", *MIXED, "data.max_tiles=14"], "at least 15"),
    ("_tile_budget", 1, ["tiling.mode=dynamic"], "cannot hold 2 image.s. of 10 tiles"),
    ("_tile_budget", 1, ["tiling.mode=static", "data.max_tiles=9"], "at least 10"),
    (
        "_pipeline_split",
        5,
        ["parallel.pipeline_model_parallel_size=5"],
        "cannot give each of 5 pipeline stages a layer",
    ),
    ("_pipeline_split", 1, ["parallel.num_layers_in_first_pipeline_stage=2"], "has no effect without a pipeline"),
    ("_pipeline_split", 1, [VPP2], "virtual_pipeline_model_parallel_size = 2 has no effect without a pipeline"),
    ("_pipeline_split", 2, [PP2, "parallel.num_layers_in_first_pipeline_stage=4"], "leaves 0 of 4 layers to 1 other"),
    ("_pipeline_split", 3, [PP3, VPP2], "cannot give each of 3 pipeline stages x 2 model chunks a layer"),
    ("_interleaving", 2, [PP2, "parallel.virtual_pipeline_model_parallel_size=1"], "is a plain pipeline"),
    ("_interleaving", 2, [PP2, VPP2, "train.global_batch_size=6"], "the micro-batches of a step = 3 is not divisible"),
    (
        "_interleaving",
        2,
        [PP2, VPP2, "train.rampup_batch_size=[4, 2, 10]", "train.global_batch_size=8"],
        "the micro-batches of a step = 1 is not divisible",
    ),
    ("_routing", 1, [MOE, "moe.moe_router_topk=5"], "moe_router_topk = 5 is more than moe.num_moe_experts = 4"),
    ("_routing", 1, [MOE, "moe.moe_layer_period=5"], "makes none of 4 layers sparse"),
    ("_expert_parallel", 2, [EP2], "but the model has no experts"),
    ("_expert_parallel", 3, [MOE, "parallel.expert_model_parallel_size=3", "train.global_batch_size=12"], "= 4 is not"),
    ("_expert_parallel", 1, [MOE, EP2], "the ranks of a pipeline stage .tensor x data x context. = 1 is not divisible"),
    ("_expert_parallel", 2, [MOE, TP2, "parallel.expert_tensor_parallel_size=4"], "size = 2 is not divisible by"),
    ("_tokens_of_a_rank", 2, [MOE, TP2, "data.seq_length=127", "train.micro_batch_size=1"], "= 127 is not divisible"),
    (
        "_tokens_of_a_rank",
        1,
        [MOE, "moe.moe_expert_capacity_factor=1", "moe.moe_capacity_group_size=48"],
        "data.seq_length = 128 is not divisible by moe.moe_capacity_group_size = 48",
    ),
    (
        "_tokens_of_a_rank",
        2,
        [MOE, TP2, "moe.moe_expert_capacity_factor=1", "moe.moe_capacity_group_size=128", "train.micro_batch_size=1"],
        "the tokens of one tensor-parallel rank = 64 is not divisible",
    ),
    ("_sequence_parallel", 1, ["parallel.sequence_parallel=true"], "has no effect with"),
    (
        "_sequence_parallel",
        2,
        [TP2, "parallel.sequence_parallel=true", "data.seq_length=127", "train.micro_batch_size=1"],
        "data.seq_length x train.micro_batch_size = 127 is not divisible",
    ),
    ("_batch", 3, [], "is not divisible by train.micro_batch_size 2 x data-parallel size 3 = 6"),
    ("_batch", 1, ["train.rampup_batch_size=[0, 2, 10]"], "does not lead up to 8"),
    ("_batch", 1, ["train.rampup_batch_size=[10, 2, 10]"], "does not lead up to 8"),
    ("_batch", 1, ["train.rampup_batch_size=[3, 2, 10]"], "the start of train.rampup_batch_size = 3"),
    ("_batch", 1, ["train.rampup_batch_size=[2, 3, 10]"], "the increment of train.rampup_batch_size = 3"),
    ("_batch", 1, ["train.rampup_batch_size=[2, 4, 10]"], "start of the ramp = 6 is not divisible"),
    ("_schedule", 1, ["train.steps=2"], "does not end before the schedule .2 steps."),
    ("_schedule", 1, ["schedule.decay=constant", "schedule.decay_steps=9"], "has no effect on a constant rate"),
    ("_optimizer_overlap", 1, ["parallel.overlap_param_gather=true"], "needs the distributed optimizer"),
    (
        "_optimizer_overlap",
        1,
        ["parallel.overlap_param_gather=true", "parallel.use_distributed_optimizer=true"],
        "overlap_grad_reduce=False",
    ),
    (
        "_something_trains",
        1,
        ["freeze.vision=true", "freeze.connector=true", "freeze.language=true"],
        "nothing to train",
    ),
    ("_sources", 1, ["data.sources=[{weight: 1}]"], r"data.sources\[0\] has prefix ''"),
    ("_sources", 1, ["data.validation_sources=[{prefix: a, weight: 0}]"], "weight 0.0"),
    ("_sources", 1, ["data.sources=[{prefix: a, weight: -1}]"], "weight -1.0"),
    ("_sources", 1, ["data.sources=[{prefix: a, weight: 1, epochs: 2}]"], "has epochs 2.0 and weight 1.0"),
    ("_sources", 1, ["data.sources=[{prefix: a, epochs: 0}]"], "epochs above 0"),
    (
        "_sources",
        1,
        ["data.sources=[{prefix: a, epochs: 1, changes: [{first: 5, weight: 1}]}]"],
        "epochs 1.0 and weight None, changes 1",
    ),
    (
        "_sources",
        1,
        ["data.sources=[{prefix: a, changes: [{first: 5, weight: 1}, {first: 5, weight: 2}]}]"],
        r"has changes from \[5, 5\] on",
    ),
    ("_sources", 1, ["data.sources=[{prefix: a, changes: [{first: 0, weight: 1}]}]"], r"has changes from \[0\] on"),
    ("_sources", 1, ["data.validation_sources=[{prefix: a, epochs: 2}]"], "every validation reads the same first rows"),
    ("_sources", 1, ["train.validation_interval=5"], "there is no data.validation_sources"),
    (
        "_context_parallel",
        4,
        [TP2, CP2],
        "language.num_query_groups = 2 is not divisible by parallel.tensor_model_parallel_size 2 x parallel.context",
    ),
    ("_needs_cuda", 1, ["kernels.transformer_impl=transformer_engine"], "transformer_impl = transformer_engine has no"),
    ("_needs_cuda", 1, ["kernels.norm_impl=apex"], "kernels.norm_impl = apex has no kernel"),
    ("_needs_cuda", 1, ["kernels.optimizer_impl=apex"], "kernels.optimizer_impl = apex has no kernel"),
    ("_needs_cuda", 1, ["kernels.gradient_accumulation_fusion=true"], "leave kernels.gradient_accumulation_fusion at"),
    (
        "_needs_transformer_engine",
        1,
        ["parallel.device=cuda", "kernels.moe_permute_fusion=true"],
        "needs Transformer Engine's kernel, and kernels.transformer_impl = local",
    ),
    ("_needs_transformer_engine", 1, [*TE, "kernels.norm_impl=apex"], "hold norms of their own"),
    ("_recomputation", 1, ["kernels.recompute_modules=[attention]"], r"unknown modules \['attention'\]"),
    ("_recomputation", 1, [SELECTIVE, "kernels.recompute_modules=[]"], "nothing to recompute"),
    ("_recomputation", 1, [SELECTIVE, MOE, "kernels.recompute_modules=[moe_act]"], "holds moe_act, which"),
    ("_recomputation", 1, [SELECTIVE, "kernels.recompute_modules=[layernorm]"], "recompute mlp or moe instead"),
    ("_recomputation", 1, [SELECTIVE, "kernels.recompute_modules=[moe]"], "the model has no experts"),
    ("_recomputation", 1, [*TE, SELECTIVE, "kernels.recompute_modules=[layernorm]"], "other norms are part of"),
    ("_recomputation", 1, [*TE, SELECTIVE, MOE, "kernels.recompute_modules=[moe, moe_act]"], "keep one of them"),
    ("_cuda_graphs", 1, [*TE, "kernels.cuda_graph_scope=[attn]"], r"names \['attn'\], which have no static"),
    ("_cuda_graphs", 1, [GRAPHS, "parallel.device=cuda"], "found kernels.transformer_impl = local"),
    ("_cuda_graphs", 1, [GRAPHS, *TE[:2]], "found kernels.params_dtype = fp32"),
    ("_cuda_graphs", 1, [GRAPHS, *TE, "freeze.language=true"], "found freeze.language = True"),
    (
        "_cuda_graphs",
        1,
        [GRAPHS, *TE, MOE, "parallel.overlap_moe_expert_parallel_comm=true"],
        "set parallel.overlap_moe_expert_parallel_comm=false, or",
    ),
    (
        "_cuda_graphs",
        1,
        [GRAPHS, *TE, SELECTIVE, "kernels.recompute_modules=[core_attn, mlp]"],
        "selective with mlp in kernels.recompute_modules",
    ),
    ("_cuda_graphs", 1, [GRAPHS, *TE, "kernels.recompute_granularity=full"], "recompute_granularity = full\n"),
    ("_cuda_graphs", 1, [GRAPHS, *TE, MOE, "moe.moe_layer_period=1"], "every layer is sparse"),
    (
        "_cuda_graphs",
        2,
        [GRAPHS, *TE, PP2, "train.rampup_batch_size=[4, 4, 10]"],
        "captured for one number of micro-batches",
    ),
    ("_fp8_needs", 1, ["precision.fp8=hybrid"], "needs Transformer Engine on a GPU, found parallel.device = cpu"),
    ("_fp8_needs", 1, ["precision.fp8=e4m3", "parallel.device=cuda"], "kernels.transformer_impl = local"),
    ("_fp8_needs", 1, [*FP8[:2], "precision.fp8=hybrid"], "quantises bf16 layers"),
    (
        "_fp8_first_and_last_layers",
        1,
        [*FP8, "precision.first_last_layers_bf16=true", "precision.fp8_recipe=delayed"],
        "its amax reduction covers all layers at once",
    ),
    (
        "_fp8_first_and_last_layers",
        2,
        [*FP8, PP2, "precision.first_last_layers_bf16=true", "precision.num_layers_at_end_in_bf16=3"],
        r"keep each at most 2 \(the layers of a stage\)",
    ),
    (
        "_fp8_first_and_last_layers",
        1,
        [
            *FP8,
            "precision.first_last_layers_bf16=true",
            "precision.num_layers_at_start_in_bf16=2",
            "precision.num_layers_at_end_in_bf16=3",
        ],
        "both together at most 4",
    ),
    ("_fp8_parameter_gather", 1, ["precision.fp8_param_gather=true"], "precision.fp8 is null"),
    (
        "_fp8_parameter_gather",
        1,
        [*FP8, "precision.fp8_param_gather=true"],
        "parallel.use_distributed_optimizer = False and optimizer.name = adamw",
    ),
    (
        "_fp8_parameter_gather",
        1,
        [
            *FP8,
            "precision.fp8_param_gather=true",
            "parallel.use_distributed_optimizer=true",
            "optimizer.name=adafactor",
        ],
        "optimizer.name = adafactor",
    ),
    ("_fp8_experts", 1, [*FP8, "precision.moe_router_padding_for_quantization=true"], "moe.num_moe_experts = 0"),
    ("_fp8_experts", 1, [MOE, "precision.moe_router_padding_for_quantization=true"], "precision.fp8 = None"),
    (
        "_fp8_recomputation",
        1,
        [*FP8, MOE, SELECTIVE, "precision.fp8_recipe=delayed", "kernels.recompute_modules=[layernorm, mlp]"],
        "holds layernorm, and precision.fp8_recipe = delayed",
    ),
    ("_fp8_tokens", 1, [*FP8, "data.seq_length=84"], "data.seq_length x train.micro_batch_size = 168 is not divisible"),
    ("_fp8_tokens", 1, [*FP8, "data.seq_length=72", "precision.fp8_recipe=mxfp8"], "= 144 is not divisible"),
    ("_fp8_tokens", 2, [*FP8, CP2, "data.seq_length=72"], "context_parallel_size 2 x 16"),
    (
        "_fp8_tokens",
        2,
        [*FP8, TP2, "parallel.sequence_parallel=true", "data.seq_length=64", "precision.fp8_recipe=blockwise"],
        "tensor_model_parallel_size 2 x 128",
    ),
    ("_fp8_widths", 1, [*FP8, "language.hidden_size=40"], "language.hidden_size = 40 is not divisible by 1 ranks x 16"),
    (
        "_fp8_widths",
        2,
        [*FP8, TP2, "precision.fp8_recipe=blockwise", "parallel.sequence_parallel=true"],
        "language.hidden_size = 64 is not divisible by 128, the blocks",
    ),
    (
        "_fp8_parameter_gather",
        1,
        [*FP8, "precision.fp8_param_gather=true", "precision.fp8_recipe=mxfp8"],
        "passes these weights through",
    ),
    (
        "_fp8_first_and_last_layers",
        1,
        [*FP8, "precision.first_last_layers_bf16=true", *(f"precision.num_layers_at_{end}_in_bf16=0" for end in ENDS)],
        "keeps no layer in bf16",
    ),
    ("_fp8_widths", 2, [*FP8, TP2, "language.ffn_hidden_size=80"], "language.ffn_hidden_size = 80"),
    ("_fp8_widths", 1, [*FP8, "vision.ffn_hidden_size=72", "precision.fp8_vision=true"], "vision.ffn_hidden_size = 72"),
    ("_context_parallel", 2, [CP2, "data.seq_length=127", "train.micro_batch_size=1"], "= 127 is not divisible"),
    ("_loss_spikes", 1, ["faults.loss_spike_window=5"], "= 5 is not between 8 and 10000 steps"),
    ("_hangs", 1, ["faults.hang_timeout_minutes=10"], "= 10.0 is not between 0 and .*: collectives would give up"),
    (
        "_whole_parameters",
        2,
        ["optimizer.name=adafactor", "parallel.use_distributed_optimizer=true"],
        "adafactor needs whole matrices",
    ),
    ("_data_units", 1, ["data.batch_unit=samples"], "data.mixture_unit = row wants rows of one source"),
    (
        "_data_units",
        1,
        ["data.batch_unit=samples", "data.mixture_unit=token"],
        "data.mixture_unit = token wants rows of one source",
    ),
    ("_data_units", 1, [*SAMPLES, *TE, "kernels.cuda_graph_scope=[mlp]"], "another number of micro-batches"),
    (
        "_data_units",
        1,
        ["data.shuffle=blocks", "data.shuffle_block=2000000"],
        "= 2000000 x data.shuffle_window = 64 is",
    ),
    ("_data_units", 1, [*TE, "data.decoder=dali_gpu"], "found data.num_workers = 1 and parallel.device = cuda"),
    ("_data_units", 1, ["data.decoder=dali_gpu", "data.num_workers=0"], "num_workers = 0 and parallel.device = cpu"),
    ("_data_units", 1, ["data.shuffle=blocks", "data.shuffle_window=0"], "use fewer blocks, or smaller ones"),
    ("_training_sources", 1, ["data.sources=[]"], r"`data: {sources: \[{prefix: PATH, weight: 1}\]}`"),
    ("_tokenizer", 1, ["data.tokenizer="], "give data.tokenizer=PATH"),
    ("_run_directory", 1, ["train.run_dir="], "give train.run_dir=PATH"),
    ("_run_directory", 1, ["train.run_dir= "], "train.run_dir = ' ' names no directory"),
    ("_init_from", 1, ["checkpoint.init_from= "], "checkpoint.init_from = ' ' names no checkpoint"),
    ("_init_from", 1, ["train.run_dir=a", "checkpoint.init_from=b/../a"], "init_from = b/../a is of train.run_dir = a"),
    ("_init_from", 1, ["train.run_dir=a", "checkpoint.init_from=a/checkpoints/step_00000002"], "resumes from itself"),
]


@pytest.mark.parametrize(
    ("rule", "world", "overrides", "message"), CASES, ids=lambda v: v if isinstance(v, str) else None
)
def test_rule(rule, world, overrides, message):
    cfg = apply_overrides(TRAINABLE, overrides)
    with pytest.raises(ConfigError, match=message) as direct:
        RULE[rule](cfg, world)
    assert direct.value.fix
    with pytest.raises(ConfigError, match=message):
        validate(cfg, world_size=world)


def test_types_are_checked_for_configurations_made_in_python():
    for path, value in (("train.steps", 2.0), ("tiling.mode", "diagonal"), ("optimizer.lr", "fast")):
        with pytest.raises(ConfigError, match=path):
            validate(with_values(TRAINABLE, {path: value}), world_size=1)


def test_every_rule_has_a_case():
    assert set(RULE) == {case[0] for case in (*CASES, *OVERLAP_CASES)} | {"_types_and_choices"}


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, []),
        (2, [TP2, "parallel.sequence_parallel=true"]),
        (2, [TP2, "parallel.encoder_parallel=tensor"]),
        (2, [PP2]),
        (4, [TP2, PP2]),
        (3, [PP3]),
        (3, [PP3, "parallel.num_layers_in_first_pipeline_stage=2"]),
        (3, [PP3, "parallel.num_layers_in_first_pipeline_stage=1"]),
        (2, [PP2, VPP2]),
        (2, [CP2]),
        (2, [MOE, EP2]),
        (2, [MOE, TP2]),
        (8, [MOE, TP2, PP2, EP2, "parallel.sequence_parallel=true"]),
        (2, [MOE, TP2, EP2, "parallel.expert_tensor_parallel_size=1"]),
        (2, [MOE, TP2, "moe.moe_expert_capacity_factor=1", "moe.moe_capacity_group_size=64"]),
        (2, ["parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true"]),
        (1, ["train.rampup_batch_size=[2, 2, 10]"]),
        (1, ["freeze.vision=true", "freeze.connector=true"]),
        (1, ["tiling.mode=static"]),
        (1, ["tiling.mode=static", "tiling.indicator=index"]),
        (1, ["tiling.mode=static", *MIXED, "tiling.max_split_images=0"]),
        (3, [*SAMPLES, "train.global_batch_size=7"]),
        (2, [*SAMPLES, PP2, VPP2, "train.global_batch_size=7"]),
        (1, ["data.shuffle=blocks", "data.shuffle_block=8"]),
        (1, [*TE, "data.decoder=dali_gpu", "data.num_workers=0"]),
        (1, ["data.sources=[{prefix: a, epochs: 2}, {prefix: b, changes: [{first: 9, weight: 0}]}]"]),
        (1, ["train.run_dir=runs/b", "checkpoint.init_from=runs/a"]),
        (1, ["vision.feature_layer=-3"]),
        (1, ["vision.position_embedding=sincos", "vision.class_token=false", "connector.num_attention_heads=3"]),
        (1, ["connector.kind=attention_pool", "connector.num_tokens=5"]),
        (1, ["optimizer.lr=null"]),
        (1, ["kernels.recompute_granularity=full", "kernels.recompute_num_layers=2"]),
        (1, ["data.validation_sources=[{prefix: a}]", "train.validation_interval=5"]),
        (1, [SELECTIVE, "kernels.recompute_modules=[mlp, core_attn]"]),
        (1, [*TE, MOE, SELECTIVE, "kernels.recompute_modules=[mlp, layernorm]"]),
        (1, [SELECTIVE, MOE, "kernels.recompute_modules=[core_attn, moe]"]),
        (1, ["parallel.device=cuda", "kernels.norm_impl=apex", "kernels.gradient_accumulation_fusion=true"]),
        (1, [*TE, MOE, SELECTIVE, "kernels.recompute_modules=[moe_act]", "kernels.moe_permute_fusion=true"]),
        (1, [*FP8, "precision.first_last_layers_bf16=true"]),
        (1, [*FP8, "precision.fp8_vision=true", "precision.fp8_recipe=delayed"]),
        (2, [*FP8, "precision.fp8_param_gather=true", "parallel.use_distributed_optimizer=true"]),
        (1, [*FP8, MOE, "precision.moe_router_padding_for_quantization=true", "precision.fp8_recipe=blockwise"]),
    ],
)
def test_layouts_that_pass(world, overrides):
    validate(apply_overrides(TRAINABLE, overrides), world_size=world)


def test_data_parallel_size():
    cfg = apply_overrides(resolve("debug_dense"), [TP2, PP2])
    assert data_parallel_size(cfg, world_size=12) == 3


def test_feasible_first_stages():
    assert feasible_first_stages(apply_overrides(resolve("debug_dense"), [PP2])) == (1, 2, 3)
    assert feasible_first_stages(apply_overrides(resolve("debug_dense"), [PP3])) == (1, 2)
    assert feasible_first_stages(apply_overrides(resolve("debug_dense"), [PP2, VPP2])) == (1,)


@pytest.mark.parametrize(("mode", "tiles"), [("none", 1), ("static", 5), ("dynamic", 10)])
def test_tiles_of_split_image(mode, tiles):
    assert tiles_of_split_image(apply_overrides(resolve("debug_dense"), [f"tiling.mode={mode}"])) == tiles
