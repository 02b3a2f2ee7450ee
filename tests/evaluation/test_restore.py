"""A checkpoint of one layout answers the same in another, with weights alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.evaluation.generate import Generator, Prompt
from mm15_megatron.evaluation.restore import answering, restore_model, whole_rows
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.ranks import RankFailure, rank_place, run_on_ranks
from mm15_megatron.parity.trace import build_parts

from ..helpers.layouts import LAYOUTS, change, debug_config

PROMPTS = [Prompt(tuple(range(start, start + 4))) for start in range(0, 80, 20)]
SPECIAL = {"eos_id": 256, "image_id": 255}
NEW = 4


def _save_and_answer(cfg: RunConfig) -> list[list[int]]:
    parts = build_parts(cfg)
    save_checkpoint(
        cfg, parts.chunks, parts.optimizer, topology=parts.topology, step=3, data_digest="stream", progress={}
    )
    generator = Generator(parts.chunks[0].module, cfg, topology=parts.topology, **SPECIAL)
    answers = generator.generate(PROMPTS, max_new_tokens=NEW)
    close_topology()
    return answers


def _restore_and_answer(run_dir: str, tensor_size: int) -> tuple[int, list[list[int]]]:
    parallel = replace(debug_config().parallel, tensor_model_parallel_size=tensor_size)
    with ExitStack() as stack:
        restored = restore_model(run_dir, place=rank_place(), stack=stack, parallel=parallel)
        generator = Generator(restored.model, restored.cfg, topology=restored.topology, **SPECIAL)
        return restored.checkpoint.step, generator.generate(PROMPTS, max_new_tokens=NEW)


def test_a_checkpoint_of_two_ranks_answers_the_same_on_one_and_on_two(tmp_path: Path) -> None:
    cfg = change(
        LAYOUTS["tp2"].apply(debug_config()), language={"init_method_std": 0.3}, train={"run_dir": str(tmp_path)}
    )
    answers, _ = run_on_ranks(_save_and_answer, 2, cfg=cfg)
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
    for size in (1, 2):
        for result in run_on_ranks(_restore_and_answer, size, run_dir=str(tmp_path), tensor_size=size):
            assert result == (3, answers)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="CheckpointError: .*holds no checkpoint"):
        run_on_ranks(_restore_and_answer, 1, run_dir=str(tmp_path), tensor_size=1)


def _restore_as_trained(run_dir: str) -> None:
    with ExitStack() as stack:
        restore_model(run_dir, place=rank_place(), stack=stack)


def test_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """The layout of training, on too few ranks."""
    cfg = change(
        debug_config("debug_moe"), parallel={"expert_model_parallel_size": 2}, train={"run_dir": str(tmp_path)}
    )
    run_on_ranks(_save_and_answer, 2, cfg=cfg)
    with pytest.raises(RankFailure, match="ConfigError: the ranks of a pipeline stage .* = 1 is not divisible"):
        run_on_ranks(_restore_as_trained, 1, run_dir=str(tmp_path))


def _generate_from_half_rows(cfg: RunConfig) -> None:
    parts = build_parts(cfg)
    Generator(parts.chunks[0].module, cfg, topology=parts.topology, **SPECIAL)


def test_half_rows_are_refused() -> None:
    cfg = change(debug_config(), parallel={"context_parallel_size": 2})
    with pytest.raises(RankFailure, match="context_parallel_size = 2: answers are generated from whole rows"):
        run_on_ranks(_generate_from_half_rows, 2, cfg=cfg)


def test_a_model_that_answers_overlaps_nothing() -> None:
    """Neither overlap outlives training: both need micro-batches of one size, one of them a backward pass."""
    trained = replace(debug_config().parallel, tp_comm_overlap=True, overlap_moe_expert_parallel_comm=True)
    assert whole_rows(trained) == debug_config().parallel


def test_a_model_that_answers_computes_in_bf16() -> None:
    fp8 = ["precision.fp8=hybrid", "precision.fp8_recipe=delayed", "precision.fp8_vision=true"]
    graphs = ["kernels.cuda_graph_scope=[mlp]", "kernels.params_dtype=bf16"]
    found = answering(apply_overrides(debug_config(), [*fp8, *graphs]))
    assert found == apply_overrides(debug_config(), ["kernels.params_dtype=bf16"])
