"""Checkpoints of a run on a device: written beside the training, from pinned memory, and gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm15_megatron.checkpoint.background import BackgroundWriter
from mm15_megatron.checkpoint.save import save_checkpoint, take_snapshot
from mm15_megatron.checkpoint.staging import Staging
from mm15_megatron.checkpoint.store import load_training, open_checkpoint
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.training.step import StepParts
from tests.helpers.layouts import change

from .models import gpu_config, losses, parts_of

BEFORE, AFTER = 2, 5
MOMENT = {"step": BEFORE, "data_digest": "fixed", "progress": {}}
FP32_STEPS = 1e-4
"""Of the losses of five steps: the order of a device's atomic sums is not fixed."""


def checkpointed(run_dir: Path, kind: str, optimizer: str, *, distributed: bool) -> RunConfig:
    """A small model in fp32 whose checkpoints go to ``run_dir``."""
    return change(
        gpu_config("local", "fp32"),
        train={"run_dir": str(run_dir)},
        checkpoint={"format": kind},
        optimizer={"name": optimizer},
        parallel={"use_distributed_optimizer": distributed},
    )


def trained(topology: Topology, cfg: RunConfig) -> StepParts:
    """A model after the steps that come before a save."""
    parts = parts_of(topology, cfg)
    losses(parts, BEFORE)
    return parts


def resumed(topology: Topology, cfg: RunConfig, folder: Path) -> list[float]:
    """Losses of the steps of a new model that starts from a checkpoint."""
    fresh = parts_of(topology, cfg)
    load_training(open_checkpoint(folder), cfg, fresh.chunks, fresh.optimizer)
    return losses(fresh, AFTER)


OPTIMIZERS = [("adamw", False), ("adamw", True), ("adafactor", False)]


@pytest.mark.parametrize(("optimizer", "distributed"), OPTIMIZERS)
@pytest.mark.parametrize("kind", ["torch_dist", "zarr"])
def test_the_run_goes_on_and_its_snapshot_is_saved(
    cuda_rank: Topology, kind: str, optimizer: str, distributed: bool, tmp_path: Path
) -> None:
    """A run that starts from it takes the steps of the run that went on while it was written."""
    cfg = checkpointed(tmp_path, kind, optimizer, distributed=distributed)
    parts = trained(cuda_rank, cfg)
    writer = BackgroundWriter(cuda_rank.place, timeout_minutes=5)
    try:
        writer.submit(take_snapshot(cfg, parts.chunks, parts.optimizer, topology=cuda_rank, **MOMENT))
        straight = losses(parts, AFTER)
        written = writer.result()
    finally:
        writer.close()
    assert written.error is None
    assert resumed(cuda_rank, cfg, Path(written.folder)) == pytest.approx(straight, rel=FP32_STEPS)


@pytest.mark.parametrize(("optimizer", "distributed"), OPTIMIZERS)
@pytest.mark.parametrize("kind", ["torch_dist", "zarr"])
def test_a_save_that_the_run_waits_for(
    cuda_rank: Topology, kind: str, optimizer: str, distributed: bool, tmp_path: Path
) -> None:
    """What is written lies on the device."""
    cfg = checkpointed(tmp_path, kind, optimizer, distributed=distributed)
    parts = trained(cuda_rank, cfg)
    folder = save_checkpoint(cfg, parts.chunks, parts.optimizer, topology=cuda_rank, **MOMENT)
    assert resumed(cuda_rank, cfg, folder) == pytest.approx(losses(parts, AFTER), rel=FP32_STEPS)


def test_staging_is_pinned_and_holds_what_was_live() -> None:
    """The copy is the tensor of that moment, however busy the device is, and what follows does not reach it."""
    staging = Staging()
    live = {"a": torch.randn(1 << 20, device="cuda"), "b": torch.randn(3, 5, device="cuda", dtype=torch.bfloat16)}
    expected = {key: tensor.cpu().clone() for key, tensor in live.items()}
    torch.cuda._sleep(100_000_000)
    places, grown = staging.hold(live)
    for tensor in live.values():
        tensor.zero_()
    torch.cuda.synchronize()
    assert grown
    assert staging.pinned
    assert all(torch.equal(place.view(staging.memory), expected[key]) for key, place in places.items())
    assert not staging.hold(live)[1]
    staging.release()
    torch.cuda.synchronize()


def test_pages_that_cannot_be_pinned() -> None:
    """The driver's refusal costs speed and reaches no later kernel."""
    staging = Staging()
    staging.hold({"a": torch.ones(1 << 16, device="cuda")})
    # the same pages once more: refused
    assert not staging.pin()
    assert torch.ones(4, device="cuda").sum().item() == 4
    staging.release()
