"""FP8 on a GPU: each recipe trains like bf16, its state is saved, and what does not fit is refused before it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mm15_megatron.checkpoint.store import load_training, open_checkpoint, save_checkpoint
from mm15_megatron.config.schema import PrecisionConfig, RunConfig
from mm15_megatron.config.validate import validate
from mm15_megatron.errors import ConfigError
from mm15_megatron.models.backend import fp8_problem
from mm15_megatron.models.build import build_model
from mm15_megatron.models.fp8_state import amax_states
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.parity.stream import Row, rank_batches, row_of
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.step import StepParts, train_step
from tests.helpers.layouts import change, debug_config

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
STEPS = 50
# FP8 rounds to 3 bits of mantissa; the loss of a model this small follows bf16's within this over 50 steps.
FP8_LOSS = 0.05


def config(recipe: str | None, preset: str = "debug_dense", **precision: object) -> RunConfig:
    """A debug model whose widths every recipe accepts; recipe None is bf16."""
    fp8 = {"fp8": None if recipe is None else "hybrid", **({} if recipe is None else {"fp8_recipe": recipe})}
    return change(
        debug_config(preset),
        language={"hidden_size": 256, "kv_channels": 64, "ffn_hidden_size": 512, "init_method_std": 0.05},
        vision={"hidden_size": 128, "ffn_hidden_size": 256},
        kernels={"transformer_impl": "transformer_engine", "params_dtype": "bf16"},
        parallel={"device": "cuda", "use_distributed_optimizer": bool(precision.get("fp8_param_gather"))},
        precision={**fp8, **precision},
        optimizer={"lr": 1e-3, "connector_lr": None},
    )


def needs(recipe: str) -> None:
    """Skip where this device does not have the recipe."""
    problem = fp8_problem(PrecisionConfig(fp8="hybrid", fp8_recipe=recipe))
    if problem is not None:
        pytest.skip(f"{recipe}: {problem}")


def parts_of(topology: Topology, cfg: RunConfig) -> StepParts:
    """Model and optimizer at a constant learning rate."""
    chunks = wrap_chunks(cfg, [build_model(cfg, stage=topology.stages[0])])
    optimizer = build_optimizer(cfg, chunks)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"]
    return StepParts(cfg=cfg, topology=topology, chunks=chunks, optimizer=optimizer)


def losses(parts: StepParts, steps: int) -> list[float]:
    """Losses of ``steps`` steps on one step's rows: images, text and padding."""
    kinds = ("several", "text", "one", "padded")
    rows = [Row(row_of(kind, parts.cfg, seed=number), number) for number, kind in enumerate(kinds)]
    batches = [batch.to("cuda") for batch in rank_batches(rows, parts.cfg, data_rank=0, data_size=1)]
    outputs = [train_step(parts, iter(batches), num_microbatches=len(batches)) for _ in range(steps)]
    assert all(output.applied for output in outputs)
    return [output.loss for output in outputs]


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_follows_bf16(cuda_rank: Topology, recipe: str, preset: str) -> None:
    """Fifty steps from the same weights on the same rows, the encoder in FP8 too."""
    needs(recipe)
    reference = losses(parts_of(cuda_rank, config(None, preset)), STEPS)
    found = losses(parts_of(cuda_rank, config(recipe, preset, fp8_vision=True)), STEPS)
    assert reference[-1] < 0.7 * reference[0]
    assert max(abs(a - b) for a, b in zip(found, reference, strict=True)) < FP8_LOSS * reference[0]
    assert found != reference, "nothing was computed in FP8"


@pytest.mark.parametrize(
    ("recipe", "preset", "options"),
    [
        ("tensorwise", "debug_dense", {"first_last_layers_bf16": True}),
        ("tensorwise", "debug_dense", {"fp8_param_gather": True}),
        ("blockwise", "debug_dense", {"fp8_param_gather": True}),
        ("delayed", "debug_dense", {"fp8_wgrad": False, "fp8_amax_history_len": 16}),
        ("tensorwise", "debug_moe", {"moe_router_padding_for_quantization": True}),
    ],
)
def test_options_train(cuda_rank: Topology, recipe: str, preset: str, options: dict[str, object]) -> None:
    needs(recipe)
    reference = losses(parts_of(cuda_rank, config(None, preset)), 10)
    found = losses(parts_of(cuda_rank, config(recipe, preset, **options)), 10)
    assert max(abs(a - b) for a, b in zip(found, reference, strict=True)) < FP8_LOSS * reference[0]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_a_checkpoint_keeps_the_scales(cuda_rank: Topology, recipe: str, tmp_path: Path) -> None:
    """The five steps after a resume are those of the run that went on."""
    needs(recipe)
    cfg = change(config(recipe), train={"run_dir": str(tmp_path)})
    straight = parts_of(cuda_rank, cfg)
    losses(straight, 5)
    folder = save_checkpoint(
        cfg, straight.chunks, straight.optimizer, topology=cuda_rank, step=5, data_digest="", progress={}
    )
    saved = {s.name: s.history_LN.clone() for s in amax_states([straight.chunks[0].module])}
    assert bool(saved) == (recipe == "delayed")
    resumed = parts_of(cuda_rank, cfg)
    load_training(open_checkpoint(folder), cfg, resumed.chunks, resumed.optimizer)
    restored = {s.name: s.history_LN for s in amax_states([resumed.chunks[0].module])}
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], history) for name, history in saved.items())
    for group in resumed.optimizer.param_groups:
        group["lr"] = group["max_lr"]
    assert losses(resumed, 5) == pytest.approx(losses(straight, 5), rel=1e-6)


def test_planted_misalignment_is_refused(cuda_rank: Topology) -> None:
    """Rows of 84 tokens, two in a micro-batch, are no multiple of 16: validation says so, no kernel does."""
    cfg = change(
        config("tensorwise"), data={"seq_length": 84, "sources": (), "tokenizer": "x"}, train={"micro_batch_size": 2}
    )
    with pytest.raises(ConfigError, match="= 168 is not divisible by"):
        validate(cfg, world_size=1)


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
@pytest.mark.parametrize("kernels", [{"gradient_accumulation_fusion": True}, {"optimizer_impl": "torch"}])
def test_kernels_compute_the_same(cuda_rank: Topology, kernels: dict[str, object], preset: str) -> None:
    """Fused accumulation and torch's fused AdamW against Transformer Engine's defaults, in bf16."""
    cfg = config(None, preset)
    reference = losses(parts_of(cuda_rank, cfg), 10)
    found = losses(parts_of(cuda_rank, dataclasses.replace(cfg, kernels=change(cfg, kernels=kernels).kernels)), 10)
    assert found == pytest.approx(reference, rel=2e-2)


def test_fused_permutation_computes_the_same(cuda_rank: Topology) -> None:
    cfg = config(None, "debug_moe")
    reference = losses(parts_of(cuda_rank, cfg), 10)
    found = losses(parts_of(cuda_rank, change(cfg, kernels={"moe_permute_fusion": True})), 10)
    assert found == pytest.approx(reference, rel=2e-2)
