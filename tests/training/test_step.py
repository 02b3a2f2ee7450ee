"""Steps that update nothing: poisoned batches, batches without targets, a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm15_megatron.batch import MMBatch
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.parity.trace import build_parts, gathered, micro_batches
from mm15_megatron.training.run import Feed, Run
from mm15_megatron.training.step import StepOutput, StepParts, accumulate_gradients, apply_gradients, train_step

from ..helpers.layouts import LAYOUTS, Layout, debug_config
from .runs import records, run_arguments

Fault = Callable[[MMBatch], MMBatch]
BAD_STEP = 2
SKIPPING = {"one": Layout(1, {}), **{name: LAYOUTS[name] for name in ("pp2", "dp2", "dp2-dist-opt-overlap")}}


def _poison(batch: MMBatch) -> MMBatch:
    """Every pixel of this rank's tiles is NaN."""
    return batch if batch.tiles_N3HW is None else replace(batch, tiles_N3HW=batch.tiles_N3HW * math.nan)


def _without_targets(batch: MMBatch) -> MMBatch:
    return batch if batch.loss_mask_T is None else replace(batch, loss_mask_T=torch.zeros_like(batch.loss_mask_T))


def _stream(parts: StepParts, *, step: int, fault: Fault | None, ranks: Iterable[int]) -> Iterator[MMBatch]:
    spoils = step == BAD_STEP and fault is not None and parts.topology.data_rank in ranks
    for batch in micro_batches(parts.cfg, parts.topology, step=step):
        yield fault(batch) if spoils else batch


def _train(parts: StepParts, *, step: int, fault: Fault | None = None, ranks: Iterable[int] = ()) -> StepOutput:
    train = parts.cfg.train
    count = train.global_batch_size // train.micro_batch_size // parts.topology.data_size
    return train_step(parts, _stream(parts, step=step, fault=fault, ranks=ranks), num_microbatches=count)


def _final_parameters(parts: StepParts) -> dict[str, torch.Tensor]:
    if parts.cfg.parallel.overlap_param_gather:
        for chunk in parts.chunks:
            chunk.start_param_sync(force_sync=True)
    return gathered(parts, lambda item: item.parameter.data)


def _run_on_rank(
    cfg: RunConfig, steps: list[int], fault: Fault | None, ranks: tuple[int, ...]
) -> tuple[list[StepOutput], dict[str, torch.Tensor]]:
    parts = build_parts(cfg)
    outputs = [_train(parts, step=step, fault=fault, ranks=ranks) for step in steps]
    result = outputs, _final_parameters(parts)
    close_topology()
    return result


def _run(
    layout: str, steps: list[int], *, fault: Fault | None = None, ranks: tuple[int, ...] = ()
) -> tuple[list[StepOutput], dict[str, torch.Tensor]]:
    """Outputs of the steps, equal on all ranks but for NaN, and the parameters of all stages."""
    chosen = SKIPPING[layout]
    cfg = chosen.apply(debug_config())
    results = run_on_ranks(_run_on_rank, chosen.world_size, cfg=cfg, steps=steps, fault=fault, ranks=ranks)
    for outputs, _ in results:
        assert [repr(output) for output in outputs] == [repr(output) for output in results[0][0]]
    return results[0][0], {name: whole for _, parameters in results for name, whole in parameters.items()}


def _assert_bitwise(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize(
    ("layout", "fault", "ranks"),
    [
        ("dp2", _poison, (1,)),
        ("dp2-dist-opt-overlap", _poison, (1,)),
        ("one", _without_targets, (0,)),
        ("pp2", _without_targets, (0,)),
        ("dp2-dist-opt-overlap", _without_targets, (0, 1)),
    ],
)
def test_bad_batch_is_as_if_it_had_not_been(layout: str, fault: Fault, ranks: tuple[int, ...]) -> None:
    """All other steps and the parameters are bitwise those of a run without the batch: no trace of it anywhere."""
    outputs, parameters = _run(layout, [0, 1, BAD_STEP, 3, 4], fault=fault, ranks=ranks)
    bad = outputs.pop(BAD_STEP)
    assert not bad.applied
    assert math.isnan(bad.loss)
    assert (bad.targets == 0.0) == (fault is _without_targets)
    expected_outputs, expected_parameters = _run(layout, [0, 1, 3, 4])
    assert outputs == expected_outputs
    assert all(output.applied for output in outputs)
    _assert_bitwise(parameters, expected_parameters)


def test_one_rank_without_targets_does_not_stop_a_step() -> None:
    """Targets count over the global batch: the other rank's are enough."""
    outputs, _ = _run("dp2", [BAD_STEP], fault=_without_targets, ranks=(1,))
    assert outputs[0].applied
    assert outputs[0].targets > 0
    assert math.isfinite(outputs[0].loss)


def _state(parts: StepParts) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state, copied."""
    assert parts.optimizer is not None
    found = {f"parameter {name}": p.detach().clone() for c in parts.chunks for name, p in c.named_parameters()}
    for index, part in enumerate(parts.optimizer.chained_optimizers):
        for number, entries in enumerate(part.optimizer.state.values()):
            for name, value in entries.items():
                found[f"state {index}.{number}.{name}"] = torch.as_tensor(value).detach().clone()
    return found


def _refuse_finite_gradients(cfg: RunConfig) -> None:
    parts = build_parts(cfg)
    assert parts.optimizer is not None
    _train(parts, step=0)
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    count = cfg.train.global_batch_size // cfg.train.micro_batch_size // parts.topology.data_size
    accumulate_gradients(parts, micro_batches(cfg, parts.topology, step=1), num_microbatches=count)
    before = _state(parts)  # after the forward pass, which gathered the parameters
    norm, applied = apply_gradients(parts.optimizer, loss_is_finite=False)
    assert math.isfinite(norm)
    assert norm > 0
    assert not applied
    assert any(name.endswith("exp_avg") for name in before)
    _assert_bitwise(_state(parts), before)
    assert apply_gradients(parts.optimizer) == (norm, True)
    assert any(not torch.equal(value, before[name]) for name, value in _state(parts).items())
    close_topology()


@pytest.mark.parametrize("layout", ["one", "dp2-dist-opt-overlap"])
def test_loss_that_is_not_finite_changes_nothing(layout: str) -> None:
    """Finite gradients do not save the step: parameters and optimizer state stay, and the same step can follow."""
    chosen = SKIPPING[layout]
    run_on_ranks(_refuse_finite_gradients, chosen.world_size, cfg=chosen.apply(debug_config()))


class _SpoiledFeed(Feed):
    """A real feed with two bad steps."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.feed.loader, run.watchdog)
        self._run = run

    def __next__(self) -> MMBatch:
        batch = super().__next__()
        fault = {2: _poison, 3: _without_targets}.get(self._run.state.step + 1)
        return fault(batch) if fault else batch


def _spoil(run: Run) -> None:
    run.feed = _SpoiledFeed(run)


def test_loop_counts_skipped_steps_and_says_why(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """A line for each, a counter that survives a resume, and a schedule that goes on with the rows."""
    argv = arguments("schedule.warmup_steps=5", "schedule.decay_steps=9")
    code, log = run_arguments([*argv, "train.steps=4"], world_size=2, prepare=_spoil)
    assert code == 0
    assert "step 2 updated nothing: loss nan, gradient norm nan\n" in log
    assert "step 3 updated nothing: no row of its batch has a target, so its loss is not a number\n" in log
    _, log = run_arguments([*argv, "train.steps=5"])
    assert "step 4, 32 rows consumed, 2 updates applied" in log
    seen = records(tmp_path / "run")
    assert [record["train/skipped_steps"] for record in seen] == [0, 1, 2, 2, 2]
    assert [record["train/loss"] is None for record in seen] == [False, True, True, False, False]
    assert [record["train/targets"] == 0 for record in seen] == [False, False, True, False, False]
    assert [record["lr/language"] for record in seen] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
