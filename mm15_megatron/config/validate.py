"""What a configuration must satisfy before a process group exists: one small function a rule, each naming the fix."""

from __future__ import annotations

from mm15_megatron.config.rule import Rule
from mm15_megatron.config.rules_experts import EXPERT_RULES, EXPERT_SPLIT_RULES, expert_tensor_size
from mm15_megatron.config.rules_kernels import KERNEL_RULES
from mm15_megatron.config.rules_layout import (
    LAYOUT_RULES,
    SPLIT_RULES,
    data_parallel_size,
    feasible_first_stages,
    virtual_stages,
)
from mm15_megatron.config.rules_model import MODEL_RULES, tiles_of_split_image
from mm15_megatron.config.rules_overlap import OVERLAP_RULES
from mm15_megatron.config.rules_precision import PRECISION_RULES
from mm15_megatron.config.rules_training import DATA_RULES, LEFT_TO_THE_USER, TRAINING_RULES
from mm15_megatron.config.schema import RunConfig

__all__ = [
    "LEFT_TO_THE_USER",
    "RULES",
    "Rule",
    "check_data",
    "check_split",
    "data_parallel_size",
    "expert_tensor_size",
    "feasible_first_stages",
    "tiles_of_split_image",
    "validate",
    "virtual_stages",
]

RULES: tuple[Rule, ...] = (
    *MODEL_RULES,
    *LAYOUT_RULES,
    *EXPERT_RULES,
    *KERNEL_RULES,
    *PRECISION_RULES,
    *OVERLAP_RULES,
    *TRAINING_RULES,
    *LEFT_TO_THE_USER,
)
"""Every rule, cheapest and most general first."""


def validate(config: RunConfig, *, world_size: int) -> None:
    """Check that ``config`` can be trained by ``world_size`` processes.

    Args:
        config: the configuration of the run.
        world_size: number of processes (ranks).

    Raises:
        ConfigError: the first rule that fails, with the values and the fix.
    """
    for rule in RULES:
        rule(config, world_size)


def check_data(config: RunConfig) -> None:
    """Check that the data of ``config`` can become rows.

    Raises:
        ConfigError: the first rule that fails, with the values and the fix.
    """
    for rule in (*MODEL_RULES, *DATA_RULES):
        rule(config, 1)


def check_split(config: RunConfig, *, world_size: int) -> None:
    """Check that the model of ``config`` can be split over ``world_size`` processes that do not train it.

    Raises:
        ConfigError: the first rule that fails, with the values and the fix.
    """
    for rule in (*SPLIT_RULES, *EXPERT_SPLIT_RULES):
        rule(config, world_size)
