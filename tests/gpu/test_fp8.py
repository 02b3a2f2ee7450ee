"""FP8 on a GPU: each recipe trains like bf16, its state is saved, and what does not fit is refused before it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import is_float8tensor

from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.checkpoint.store import load_training, open_checkpoint
from mm15_megatron.config.rules_precision import fp8_alignment
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.validate import validate
from mm15_megatron.errors import ConfigError
from mm15_megatron.models.fp8_state import amax_states, plain
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.training.step import StepParts
from tests.helpers.layouts import change

from .evidence import Seen, assert_computed_in, watched, weights_of
from .marks import EACH_RECIPE, in_recipe
from .models import STEPS, Runs, constant_rate, engine_config, losses, model_of, parts_of
from .tolerances import BF16_STEPS, FORWARD, FP8_LOSS, LEARNED, assert_repeats

FEW_STEPS = 10
HISTORY = 16


def in_decoder(name: str) -> bool:
    """Whether a layer belongs to the decoder, not to the encoder."""
    return name.startswith("language_model.decoder.")


def assert_follows(found: list[float], reference: list[float]) -> None:
    """Assert that the losses of an FP8 run stay beside those of bf16."""
    furthest = max(abs(a - b) for a, b in zip(found, reference[: len(found)], strict=True))
    assert furthest < FP8_LOSS * reference[0], f"{found} instead of {reference}"


def watched_losses(topology: Topology, cfg: RunConfig, steps: int) -> tuple[list[float], dict[str, Seen], StepParts]:
    """Losses of a run, and what its layers did in their last pass."""
    parts = parts_of(topology, cfg)
    with watched(model_of(parts)) as seen:
        found = losses(parts, steps)
    return found, seen, parts


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
@pytest.mark.parametrize("recipe", EACH_RECIPE)
def test_loss_follows_bf16(cuda_rank: Topology, bf16_runs: Callable[[str], Runs], recipe: str, preset: str) -> None:
    """Fifty steps from the same weights on the same rows; every linear layer in FP8, those of the encoder too."""
    reference, _ = bf16_runs(preset)
    found, seen, _ = watched_losses(cuda_rank, engine_config(recipe, preset, fp8_vision=True), STEPS)
    assert_computed_in(recipe, seen)
    assert reference[-1] < LEARNED * reference[0]
    assert_follows(found, reference)


@pytest.mark.parametrize("recipe", [in_recipe("tensorwise")])
def test_the_encoder_stays_in_bf16_unless_asked(
    cuda_rank: Topology, bf16_runs: Callable[[str], Runs], recipe: str
) -> None:
    found, seen, _ = watched_losses(cuda_rank, engine_config(recipe), FEW_STEPS)
    assert not all(in_decoder(name) for name in seen)
    assert_computed_in(recipe, seen, where=in_decoder)
    assert_follows(found, bf16_runs("debug_dense")[0])


@pytest.mark.parametrize("recipe", [in_recipe("tensorwise")])
def test_first_and_last_layers_stay_in_bf16_where_asked(
    cuda_rank: Topology, bf16_runs: Callable[[str], Runs], recipe: str
) -> None:
    cfg = engine_config(recipe, first_last_layers_bf16=True)
    found, seen, _ = watched_losses(cuda_rank, cfg, FEW_STEPS)
    edges = tuple(f"language_model.decoder.layers.{index}." for index in (0, cfg.language.num_layers - 1))
    assert any(name.startswith(edges) for name in seen)
    assert_computed_in(recipe, seen, where=lambda name: in_decoder(name) and not name.startswith(edges))
    assert_follows(found, bf16_runs("debug_dense")[0])


@pytest.mark.parametrize("recipe", [in_recipe("tensorwise"), in_recipe("blockwise")])
def test_weights_are_kept_in_fp8_where_asked(
    cuda_rank: Topology, bf16_runs: Callable[[str], Runs], recipe: str
) -> None:
    found, seen, _ = watched_losses(cuda_rank, engine_config(recipe, fp8_param_gather=True), FEW_STEPS)
    assert_computed_in(recipe, seen, where=in_decoder)
    kept = {name: [is_float8tensor(weight) for weight in weights_of(one.layer)] for name, one in seen.items()}
    assert all(all(quantised) == any(quantised) == in_decoder(name) for name, quantised in kept.items()), kept
    assert_follows(found, bf16_runs("debug_dense")[0])


@pytest.mark.parametrize("recipe", [in_recipe("delayed")])
def test_amax_is_remembered_as_long_as_asked(
    cuda_rank: Topology, bf16_runs: Callable[[str], Runs], recipe: str
) -> None:
    """The histories are filled on the way forward and on the way back."""
    found, seen, parts = watched_losses(cuda_rank, engine_config(recipe, fp8_amax_history_len=HISTORY), FEW_STEPS)
    assert_computed_in(recipe, seen, where=in_decoder)
    states = list(amax_states([model_of(parts)]))
    assert {state.history_LN.shape[0] for state in states} == {HISTORY}
    assert all(state.history_LN.any() for state in states), [s.name for s in states if not s.history_LN.any()]
    assert_follows(found, bf16_runs("debug_dense")[0])


@pytest.mark.parametrize("recipe", [in_recipe("tensorwise")])
def test_the_router_fills_blocks_where_asked(
    cuda_rank: Topology, bf16_runs: Callable[[str], Runs], recipe: str
) -> None:
    """Experts receive whole blocks of tokens; without the option they do not."""
    arrived: dict[bool, list[int]] = {True: [], False: []}
    found: dict[bool, list[float]] = {}
    for padded, counts in arrived.items():
        parts = parts_of(cuda_rank, engine_config(recipe, "debug_moe", moe_router_padding_for_quantization=padded))
        experts = [layer.mlp.experts for layer in model_of(parts).language_model.decoder.layers[1::2]]
        for module in experts:
            module.register_forward_pre_hook(lambda _, arguments, counts=counts: counts.extend(arguments[1].tolist()))
        with watched(model_of(parts)) as seen:
            found[padded] = losses(parts, FEW_STEPS)
        assert_computed_in(recipe, seen, where=in_decoder)
    block = fp8_alignment(recipe)
    assert all(tokens % block == 0 for tokens in arrived[True])
    assert any(tokens % block for tokens in arrived[False])
    for run in found.values():
        assert_follows(run, bf16_runs("debug_moe")[0])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("recipe", [in_recipe("delayed"), in_recipe("tensorwise"), in_recipe("blockwise")])
def test_a_checkpoint_keeps_the_scales(cuda_rank: Topology, recipe: str, kept: bool, tmp_path: Path) -> None:
    """Two runs resume from one checkpoint: bitwise equal weights and scales, and the losses of the run that went on.

    Weights that are kept in FP8 are cast by restored scales, and their copies for the backward pass follow a forced
    gather of overlapping buckets: five more steps would tell of stale ones, here and in the run that saved.
    """
    gathered = {name: kept for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")}
    cfg = change(engine_config(recipe, fp8_param_gather=kept), train={"run_dir": str(tmp_path)}, parallel=gathered)
    straight = parts_of(cuda_rank, cfg)
    losses(straight, 5)
    folder = save_checkpoint(
        cfg, straight.chunks, straight.optimizer, topology=cuda_rank, step=5, data_digest="", progress={}
    )
    saved = state_of(straight)
    assert any("scaling" in name for name in saved) == (recipe == "delayed")
    resumed = []
    for _ in range(2):
        parts = parts_of(cuda_rank, cfg)
        load_training(open_checkpoint(folder), cfg, parts.chunks, parts.optimizer)
        constant_rate(parts.optimizer)
        restored = state_of(parts)
        assert restored.keys() == saved.keys()
        assert [name for name, value in saved.items() if not torch.equal(restored[name], value)] == []
        resumed.append(losses(parts, 5))
    went_on = losses(straight, 5)
    assert_repeats(went_on, *resumed, floor=BF16_STEPS)
    assert resumed[0][0] == pytest.approx(went_on[0], rel=FORWARD)


def state_of(parts: StepParts) -> dict[str, torch.Tensor]:
    """Copies of weights and of delayed scaling's state, by name."""
    model = model_of(parts)
    state = {name: plain(parameter).clone() for name, parameter in model.named_parameters()}
    for scaling in amax_states([model]):
        state |= {f"{scaling.name}.scale": scaling.scale_N.clone(), f"{scaling.name}.past": scaling.history_LN.clone()}
    return state


def test_planted_misalignment_is_refused(cuda_rank: Topology) -> None:
    """Rows of 84 tokens, two in a micro-batch, are no multiple of 16: validation says so, no kernel does."""
    cfg = change(
        engine_config("tensorwise"),
        data={"seq_length": 84, "sources": (), "tokenizer": "x"},
        train={"micro_batch_size": 2},
    )
    with pytest.raises(ConfigError, match="= 168 is not divisible by"):
        validate(cfg, world_size=1)
