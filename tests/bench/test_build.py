"""What a case is built from, on one rank of the CPU: the trainer's parts at the peak learning rate."""

from __future__ import annotations

from contextlib import ExitStack

from mm15_megatron.accounting import model_parameters
from mm15_megatron.bench.cases import Case, Device, case_config
from mm15_megatron.bench.measure import Scale, build, state_bytes
from mm15_megatron.bench.slices import choose_slice
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.presets import resolve
from mm15_megatron.training.step import train_step


def small_config() -> RunConfig:
    part = choose_slice(resolve("debug_moe"), device="cpu", memory=2**34, margin=0.1, micro_batches=2, fp8=False)
    return case_config(Case("moe", local=True), part.config, device=Device("cpu", "some processor", 2**34))


def facts(cfg: RunConfig) -> tuple[int, int, int, set[float], int]:
    with ExitStack() as stack:
        parts, batches = build(cfg, stack, scale=Scale("cpu"))
        before = state_bytes(parts)
        output = train_step(parts, iter(batches), num_microbatches=len(batches))
        assert output.applied
        rates = {group["lr"] / group["max_lr"] for group in parts.optimizer.param_groups}
        tensors = len(list(parts.chunks[0].module.parameters()))
        return before, state_bytes(parts), tensors, rates, len(batches)


def test_the_optimizer_holds_two_moments_after_its_first_step():
    cfg = small_config()
    ((before, after, tensors, rates, micro_batches),) = run_on_ranks(facts, 1, cfg=cfg)
    assert before == 0
    # two fp32 moments a parameter, and torch's fp32 step counter of every tensor
    assert after == 8 * model_parameters(cfg).total + 4 * tensors
    assert rates == {1.0}
    assert micro_batches == 2
