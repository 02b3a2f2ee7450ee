"""Rules of overlapped communication: each is triggered by a case, and the layouts around it pass."""

from __future__ import annotations

import pytest

from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.rules_overlap import OVERLAP_RULES
from mm15_megatron.config.validate import validate
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import resolve

TRAINABLE = apply_overrides(resolve("debug_moe"), ["data.sources=[{prefix: a}]", "data.tokenizer=tokenizer.json"])
RULE = {rule.__name__: rule for rule in OVERLAP_RULES}

EP2 = "parallel.expert_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
SELECTIVE = "kernels.recompute_granularity=selective"
BF16 = "kernels.params_dtype=bf16"
EXPERTS = ["parallel.overlap_moe_expert_parallel_comm=true", BF16]
TP2SP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
TE = ["parallel.device=cuda", "kernels.transformer_impl=transformer_engine", BF16]
TENSOR = ["parallel.tp_comm_overlap=true", *TE, *TP2SP]
FP8 = "precision.fp8=hybrid"

CASES = [
    ("_overlapped_experts", 2, EXPERTS, "moe.num_moe_experts = 4 and parallel.expert_model_parallel_size = 1"),
    ("_overlapped_experts", 2, [*EXPERTS, "moe.num_moe_experts=0"], "moe.num_moe_experts = 0"),
    ("_overlapped_experts", 2, [EXPERTS[0], EP2], "for bf16, and kernels.params_dtype = fp32"),
    ("_overlapped_experts", 4, [*EXPERTS, EP2, PP2], "pipeline_model_parallel_size = 2 without model chunks"),
    ("_overlapped_experts", 2, [*EXPERTS, EP2, "train.micro_batch_size=4"], "no effect on a step of one micro-batch"),
    (
        "_overlapped_recomputation",
        2,
        [*EXPERTS, EP2, "kernels.recompute_granularity=full"],
        "found kernels.recompute_granularity = full\n",
    ),
    (
        "_overlapped_recomputation",
        2,
        [*EXPERTS, EP2, SELECTIVE, "kernels.recompute_modules=[core_attn, moe]"],
        "selective with moe in kernels.recompute_modules",
    ),
    (
        "_overlapped_tensor_parallelism",
        2,
        ["parallel.tp_comm_overlap=true", "parallel.device=cuda", BF16, *TP2SP],
        "found kernels.transformer_impl = local",
    ),
    (
        "_overlapped_tensor_parallelism",
        2,
        ["parallel.tp_comm_overlap=true", *TE[:2], *TP2SP],
        "found kernels.params_dtype = fp32",
    ),
    (
        "_overlapped_tensor_parallelism",
        2,
        ["parallel.tp_comm_overlap=true", *TE, TP2SP[0]],
        "found parallel.sequence_parallel = False",
    ),
    ("_overlapped_tensor_parallelism", 1, ["parallel.tp_comm_overlap=true", *TE], "sequence_parallel = False"),
    (
        "_overlapped_tensor_parallelism",
        2,
        [*TENSOR, FP8, "precision.fp8_recipe=blockwise", "language.hidden_size=128"],
        "no buffers for precision.fp8_recipe = blockwise",
    ),
    (
        "_overlapped_tensor_parallelism",
        2,
        [*TENSOR, FP8, "precision.fp8_recipe=mxfp8", "data.seq_length=64"],
        r"= 128 is not divisible by .* 1 x tensor_model_parallel_size 2 x 128",
    ),
]


@pytest.mark.parametrize(
    ("rule", "world", "overrides", "message"), CASES, ids=lambda v: v if isinstance(v, str) else None
)
def test_rule(rule: str, world: int, overrides: list[str], message: str) -> None:
    cfg = apply_overrides(TRAINABLE, overrides)
    with pytest.raises(ConfigError, match=message) as direct:
        RULE[rule](cfg, world)
    assert direct.value.fix
    with pytest.raises(ConfigError) as whole:
        validate(cfg, world_size=world)
    assert str(whole.value) == str(direct.value)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, [*EXPERTS, EP2]),
        (4, [*EXPERTS, EP2, PP2, VPP2]),
        (4, [*EXPERTS, EP2, "parallel.tensor_model_parallel_size=2"]),
        (2, [*EXPERTS, EP2, SELECTIVE]),
        (2, TENSOR),
        (2, [*TENSOR, FP8]),
        (2, [*TENSOR, FP8, "precision.fp8_recipe=delayed"]),
        (2, [*TENSOR, FP8, "precision.fp8_recipe=mxfp8"]),
        (4, [*TENSOR, EXPERTS[0], EP2]),
    ],
)
def test_layouts_that_pass(world: int, overrides: list[str]) -> None:
    validate(apply_overrides(TRAINABLE, overrides), world_size=world)
