"""What a GPU test needs beside a GPU, as marks: ``tools/gpu_environment.py`` reads them without running a test."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet

from mm15_megatron.bench.fp8_record import RECIPES
from mm15_megatron.config.schema import PrecisionConfig
from mm15_megatron.models.backend import fp8_problem, transformer_engine_problem

TE_PROBLEM = transformer_engine_problem()
NEEDS_TE = pytest.mark.skipif(TE_PROBLEM is not None, reason=f"Transformer Engine: {TE_PROBLEM}")
IMPLEMENTATIONS = ("local", pytest.param("transformer_engine", marks=NEEDS_TE))


def in_recipe(recipe: str, *values: object) -> ParameterSet:
    """Parameters of a test that begin with an FP8 recipe, skipped where the device does not have it.

    On a GPU with Transformer Engine the question opens CUDA in the process that collects. Nothing here is forked from
    it: tests of several ranks and of tools start their processes afresh.
    """
    problem = fp8_problem(PrecisionConfig(fp8="hybrid", fp8_recipe=recipe))
    mark = pytest.mark.skipif(problem is not None, reason=f"{recipe}: {problem}")
    return pytest.param(recipe, *values, marks=mark)


EACH_RECIPE = tuple(in_recipe(recipe) for recipe in RECIPES)
BF16_AND_EACH_RECIPE = (pytest.param(None, marks=NEEDS_TE, id="bf16"), *EACH_RECIPE)
