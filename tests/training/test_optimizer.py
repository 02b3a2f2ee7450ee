"""The real optimizer: who is in which group, and what one step of it does."""

from __future__ import annotations

import pytest
import torch

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.parity.trace import build_parts, micro_batches
from mm15_megatron.training.schedule import apply_schedule
from mm15_megatron.training.step import StepParts, train_step

from ..helpers.layouts import change, debug_config

RATES = {"language": 1e-3, "connector": 8e-5, "vision": 2e-4}
# A first AdamW step moves an entry by lr * g / (|g| + eps); what is left is the rounding of weights around one.
ROUNDING = 2e-3


def _config(**optimizer: object) -> RunConfig:
    rates = {"lr": RATES["language"], "connector_lr": RATES["connector"], "vision_lr": RATES["vision"]}
    return debug_config(optimizer=rates | optimizer)


def _module(name: str) -> str:
    known = {"vision_encoder": "vision", "connector": "connector"}
    return known.get(name.removeprefix("module.").partition(".")[0], "language")


def _named(parts: StepParts) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for chunk in parts.chunks for name, parameter in chunk.named_parameters()}


def _step(parts: StepParts, *, step: int = 0) -> tuple[float, float]:
    """One step on a batch of the stream: (loss, gradient norm before clipping)."""
    train = parts.cfg.train
    count = train.global_batch_size // train.micro_batch_size // parts.topology.data_size
    output = train_step(parts, micro_batches(parts.cfg, parts.topology, step=step), num_microbatches=count)
    assert output.applied
    return output.loss, output.grad_norm


def _check_groups(cfg: RunConfig) -> None:
    parts = build_parts(cfg)
    assert parts.optimizer is not None
    named = _named(parts)
    assert {_module(name) for name in named} == set(RATES)
    factor = apply_schedule(parts.optimizer, cfg, step=1)
    assert factor == pytest.approx(1 / cfg.schedule.warmup_steps)
    group_of = {id(parameter): group for group in parts.optimizer.param_groups for parameter in group["params"]}
    assert len(group_of) == len(named)
    for name, parameter in named.items():
        group = group_of[id(parameter)]
        decayed = parameter.dim() > 1 or cfg.optimizer.decay_norms_and_biases
        assert group["max_lr"] == RATES[_module(name)], name
        assert group["wd_mult"] == (1.0 if decayed else 0.0), name
        assert group["lr"] == pytest.approx(factor * RATES[_module(name)]), name
        assert group["weight_decay"] == (cfg.optimizer.weight_decay if decayed else 0.0), name
    close_topology()


@pytest.mark.parametrize("decay_all", [False, True])
def test_every_parameter_has_its_rate_and_its_decay(decay_all: bool) -> None:
    """Three rates; matrices are decayed, and norms and biases only where asked."""
    run_on_ranks(_check_groups, 1, cfg=_config(decay_norms_and_biases=decay_all))


def _check_first_step(cfg: RunConfig) -> None:
    parts = build_parts(cfg)
    before = {name: parameter.detach().clone() for name, parameter in _named(parts).items()}
    _step(parts)
    for module, rate in RATES.items():
        moved = torch.cat(
            [(p - before[name]).abs().flatten() for name, p in _named(parts).items() if _module(name) == module]
        )
        assert moved.max().item() == pytest.approx(rate, rel=ROUNDING), module
        assert moved[moved > 0].median().item() == pytest.approx(rate, rel=ROUNDING), module
    close_topology()


def test_first_step_moves_each_module_by_its_own_rate() -> None:
    """Without decay, AdamW's first step moves an entry by the learning rate of its module."""
    run_on_ranks(_check_first_step, 1, cfg=_config(weight_decay=0.0, adam_eps=1e-12))


def _norms(cfg: RunConfig) -> tuple[float, float]:
    """Gradient norm before clipping, and what it is after the step."""
    parts = build_parts(cfg)
    _, norm = _step(parts)
    squares = sum(p.main_grad.double().square().sum() for p in _named(parts).values())
    close_topology()
    return norm, float(squares) ** 0.5


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
def test_clipping(clip_grad: float) -> None:
    """The gradients an update uses have the clip's norm; a clip of 0 leaves them alone."""
    before, after = run_on_ranks(_norms, 1, cfg=_config(clip_grad=clip_grad))[0]
    assert before > 0.02
    assert after == pytest.approx(clip_grad or before, rel=1e-5)


def _losses_of_bf16_sums(cfg: RunConfig) -> list[float]:
    parts = build_parts(cfg)
    assert {p.main_grad.dtype for p in _named(parts).values()} == {torch.bfloat16}
    losses = [_step(parts)[0] for _ in range(6)]
    close_topology()
    return losses


@pytest.mark.parametrize("sharded", [False, True])
def test_bf16_gradients_train(sharded: bool) -> None:
    """With gradients accumulated and reduced in bf16, a batch seen again and again is learned."""
    parallel = {"grad_reduce_in_fp32": False, "use_distributed_optimizer": sharded}
    cfg = change(_config(), kernels={"params_dtype": "bf16"}, parallel=parallel)
    results = run_on_ranks(_losses_of_bf16_sums, 2, cfg=cfg)
    assert results[0] == results[1]
    assert results[0] == sorted(results[0], reverse=True)
    assert results[0][-1] < results[0][0] - 0.2
