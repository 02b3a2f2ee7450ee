"""A trained model from a run directory, weights alone, in any layout."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from mm15_megatron.checkpoint.store import Checkpoint, load_weights, open_latest
from mm15_megatron.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from mm15_megatron.config.validate import check_split
from mm15_megatron.errors import CheckpointError
from mm15_megatron.models.build import build_model
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.parallel.rendezvous import Rendezvous
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import Topology, build_topology, close_topology


@dataclass(frozen=True)
class Restored:
    """A model that answers.

    Attributes:
        cfg: the configuration of the run that trained it, in the layout of this job and without FP8.
        checkpoint: what was loaded.
        topology: groups and ranks.
        model: this rank's part, in evaluation mode.
    """

    cfg: RunConfig
    checkpoint: Checkpoint
    topology: Topology
    model: MM15Model


def whole_rows(parallel: ParallelConfig) -> ParallelConfig:
    """Return the same tensor and expert split with all layers and all tokens of a row on every rank.

    An answer has no backward pass to overlap with, and no buffers of its size.
    """
    return replace(
        parallel,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        num_layers_in_first_pipeline_stage=None,
        overlap_moe_expert_parallel_comm=False,
        tp_comm_overlap=False,
    )


def answering(trained: RunConfig, *, parallel: ParallelConfig | None = None) -> RunConfig:
    """Return the configuration of a model that answers, from the one it was trained with.

    It computes in bf16 what was trained in FP8: stored weights are dequantised, answers have lengths that FP8 does not
    take, and the scales that delayed scaling learned belong to training.
    """
    return replace(
        trained,
        parallel=parallel or whole_rows(trained.parallel),
        precision=PrecisionConfig(),
        kernels=replace(trained.kernels, cuda_graph_scope=()),
    )


def restore_model(
    run_dir: str, *, place: Rendezvous, stack: ExitStack, parallel: ParallelConfig | None = None
) -> Restored:
    """Load the latest checkpoint of a run (every rank must call).

    Args:
        run_dir: directory of the run.
        place: what the launcher said.
        stack: leaves the process groups when it closes.
        parallel: the layout of this job; None = as the run was trained, but on one stage and with whole rows, from
            which answers are generated.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: this job's processes cannot be split that way.
        BackendError: the device is not usable.
    """
    checkpoint = open_latest(run_dir)
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint", fix="train first, or name the directory of another run")
    cfg = answering(checkpoint.config, parallel=parallel)
    check_split(cfg, world_size=place.world_size)
    torch.set_num_threads(max(1, cfg.train.threads_per_rank))
    stack.callback(close_topology)
    topology = build_topology(cfg.parallel, place=place)
    seed_everything(cfg.train.seed, topology=topology)
    model = build_model(cfg, stage=topology.stages[0])
    load_weights(checkpoint, cfg, [model])
    return Restored(cfg, checkpoint, topology, model.eval())
