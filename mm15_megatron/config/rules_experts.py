"""Rules of the sparse layers: how many experts, who holds them, and what capacity is measured on."""

from __future__ import annotations

from mm15_megatron.config.rule import Rule, divides
from mm15_megatron.config.rules_layout import data_parallel_size
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError


def expert_tensor_size(config: RunConfig) -> int:
    """Return the ranks one expert is split over."""
    return config.parallel.expert_tensor_parallel_size or config.parallel.tensor_model_parallel_size


def _routing(config: RunConfig, world_size: int) -> None:
    moe = config.moe
    if not moe.num_moe_experts:
        return
    if moe.moe_router_topk > moe.num_moe_experts:
        raise ConfigError(
            f"moe.moe_router_topk = {moe.moe_router_topk} is more than moe.num_moe_experts = {moe.num_moe_experts}",
            fix="lower moe.moe_router_topk",
        )
    if moe.moe_layer_period > config.language.num_layers:
        raise ConfigError(
            f"moe.moe_layer_period = {moe.moe_layer_period} makes none of {config.language.num_layers} layers sparse "
            "(the last layer of each group is)",
            fix="lower moe.moe_layer_period, or set moe.num_moe_experts=0",
        )


def _expert_parallel(config: RunConfig, world_size: int) -> None:
    p, experts = config.parallel, config.moe.num_moe_experts
    if not experts:
        if p.expert_model_parallel_size > 1:
            raise ConfigError(
                f"parallel.expert_model_parallel_size = {p.expert_model_parallel_size}, but the model has no experts",
                fix="set parallel.expert_model_parallel_size=1",
            )
        return
    divides(
        "moe.num_moe_experts", experts, by="parallel.expert_model_parallel_size", divisor=p.expert_model_parallel_size
    )
    split = expert_tensor_size(config)
    divides(
        "parallel.tensor_model_parallel_size",
        p.tensor_model_parallel_size,
        by="parallel.expert_tensor_parallel_size",
        divisor=split,
    )
    ranks = data_parallel_size(config, world_size=world_size) * p.tensor_model_parallel_size * p.context_parallel_size
    divides(
        "the ranks of a pipeline stage (tensor x data x context)",
        ranks,
        by=f"expert parallel {p.expert_model_parallel_size} x expert tensor parallel {split}",
        divisor=p.expert_model_parallel_size * split,
        fix="start more processes, or spread the experts over fewer ranks",
    )


def _tokens_of_a_rank(config: RunConfig, world_size: int) -> None:
    """Sparse layers cut the tokens over the tensor-parallel group, with sequence parallelism or without."""
    if not config.moe.num_moe_experts:
        return
    tp, row = config.parallel.tensor_model_parallel_size, config.data.seq_length
    tokens = row * config.train.micro_batch_size
    divides("data.seq_length x train.micro_batch_size", tokens, by="parallel.tensor_model_parallel_size", divisor=tp)
    if config.moe.moe_expert_capacity_factor is None:
        return
    group, shards = config.moe.moe_capacity_group_size, tp * config.parallel.context_parallel_size
    for what, count in (("data.seq_length", row), ("the tokens of one tensor-parallel rank", tokens // shards)):
        divides(what, count, by="moe.moe_capacity_group_size", divisor=group)


EXPERT_SPLIT_RULES: tuple[Rule, ...] = (_expert_parallel,)
EXPERT_RULES: tuple[Rule, ...] = (_routing, *EXPERT_SPLIT_RULES, _tokens_of_a_rank)
