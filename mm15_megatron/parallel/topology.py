"""The process groups of a run and this rank's place in each."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from mm15_megatron.batch import RankView
from mm15_megatron.config.schema import ParallelConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.parallel import cpu_emulation
from mm15_megatron.parallel.rendezvous import Rendezvous, join


@dataclass(frozen=True)
class Topology:
    """Groups, sizes and ranks.

    Attributes:
        place: what the launcher said.
        device: the device this rank computes on.
        groups: megatron-core's process groups.
        encoder_groups: the groups the encoder is built on: pipeline size 1, and tensor size 1 when it is data-parallel
            inside the tensor-parallel group.
        tensor_rank: rank in the tensor-parallel group.
        tensor_size: its size.
        pipeline_rank: stage.
        pipeline_size: stages.
        data_rank: rank in the data-parallel group.
        data_size: its size.
        encoder_shares_tiles: True when each tensor rank encodes a share of the tiles.
        model_chunks: chunks of the model this rank holds; more than one with interleaving.
    """

    place: Rendezvous
    device: torch.device
    groups: ProcessGroupCollection
    encoder_groups: ProcessGroupCollection
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    encoder_shares_tiles: bool
    model_chunks: int = 1

    @property
    def stages(self) -> tuple[ChunkStage, ...]:
        """The place of each of this rank's model chunks in the forward pass."""
        return tuple(ChunkStage(self, index) for index in range(self.model_chunks))

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens and encodes images."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def tile_rank(self) -> int:
        """Place among the ranks that share the tiles of a micro-batch: tensor-parallel ranks, then context-parallel."""
        return self.groups.cp.rank() * self.tensor_size + self.tensor_rank

    @property
    def tile_ranks(self) -> int:
        """How many ranks share the tiles of a micro-batch."""
        return self.groups.cp.size() * self.tensor_size

    def own_tokens(self, whole_T: torch.Tensor) -> torch.Tensor:
        """Cut this context-parallel rank's tokens out of a tensor over the whole micro-batch."""
        return whole_T.chunk(self.groups.cp.size())[self.groups.cp.rank()]

    @property
    def view(self) -> RankView:
        """What the data pipeline has to know."""
        return RankView(
            data_rank=self.data_rank,
            data_size=self.data_size,
            tensor_rank=self.tile_rank,
            tensor_size=self.tile_ranks,
            reads_images=self.is_first_stage,
            shares_tiles=self.encoder_shares_tiles,
        )


@dataclass(frozen=True)
class ChunkStage:
    """The place of one model chunk: megatron-core deals the virtual stages to the pipeline ranks in turn.

    Attributes:
        topology: the rank that holds it.
        index: which of the rank's chunks it is.
    """

    topology: Topology
    index: int

    @property
    def groups(self) -> ProcessGroupCollection:
        """megatron-core's process groups."""
        return self.topology.groups

    @property
    def encoder_groups(self) -> ProcessGroupCollection:
        """The groups the encoder is built on."""
        return self.topology.encoder_groups

    @property
    def encoder_shares_tiles(self) -> bool:
        """Whether each tensor rank encodes a share of the tiles."""
        return self.topology.encoder_shares_tiles

    def own_tokens(self, whole_T: torch.Tensor) -> torch.Tensor:
        """Cut this context-parallel rank's tokens out of a tensor over the whole micro-batch."""
        return self.topology.own_tokens(whole_T)

    @property
    def position(self) -> int:
        """Place in the forward pass, from 0."""
        return self.index * self.topology.pipeline_size + self.topology.pipeline_rank

    @property
    def virtual_rank(self) -> int | None:
        """Which of its rank's chunks it is; None without interleaving."""
        return self.index if self.topology.model_chunks > 1 else None

    @property
    def is_first_stage(self) -> bool:
        """Whether the chunk embeds tokens and encodes images."""
        return self.position == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the chunk ends with the output layer."""
        return self.position == self.topology.model_chunks * self.topology.pipeline_size - 1


def prepare_device(device: str, *, local_rank: int) -> torch.device:
    """Select this rank's device before any group exists.

    Raises:
        BackendError: if CUDA was asked for and is absent, or this machine has too few GPUs.
    """
    if device == "cpu":
        cpu_emulation.install()
        return torch.device("cpu")
    if cpu_emulation.is_installed() or not torch.cuda.is_available():
        raise BackendError(
            f"parallel.device = cuda, but torch {torch.__version__} finds no usable CUDA device",
            fix="set parallel.device=cpu, or install a CUDA build of torch on a machine with a GPU",
        )
    visible = torch.cuda.device_count()
    index = 0 if visible == 1 else local_rank  # a launcher may show each task its own device alone
    if index >= visible:
        raise BackendError(
            f"local rank {local_rank} has no GPU: it sees {visible}", fix="start at most one rank for each GPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def launch_order(parallel: ParallelConfig) -> dict[str, str]:
    """Return what makes a device start kernels in the order in which they were launched; read when it is first used.

    A tensor-parallel layer launches its collective and then a matrix product that needs not wait for it; megatron-core
    relies on the collective starting first. Experts' all-to-all overlaps with products of another stream instead.
    """
    ordered = parallel.tensor_model_parallel_size > 1 and not parallel.overlap_moe_expert_parallel_comm
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if parallel.device == "cuda" and ordered else {}


def build_topology(parallel: ParallelConfig, *, place: Rendezvous) -> Topology:
    """Join the job and build every process group of the layout.

    Raises:
        BackendError: if the device is not usable.
    """
    for name, value in launch_order(parallel).items():
        os.environ.setdefault(name, value)
    device = prepare_device(parallel.device, local_rank=place.local_rank)
    if not torch.distributed.is_initialized():
        join(place, device=parallel.device, timeout_minutes=parallel.distributed_timeout_minutes)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,  # what moves on the CPU does so in the default group
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    shares_tiles = parallel.encoder_parallel == "data"
    alone = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return Topology(
        place=place,
        device=device,
        groups=groups,
        encoder_groups=_encoder_groups(alone, tensor=alone if shares_tiles else groups.tp),
        tensor_rank=groups.tp.rank(),
        tensor_size=groups.tp.size(),
        pipeline_rank=groups.pp.rank(),
        pipeline_size=groups.pp.size(),
        data_rank=groups.dp.rank(),
        data_size=groups.dp.size(),
        encoder_shares_tiles=shares_tiles,
        model_chunks=parallel.virtual_pipeline_model_parallel_size or 1,
    )


def _encoder_groups(alone: ProcessGroup, *, tensor: ProcessGroup) -> ProcessGroupCollection:
    """The encoder lives whole on stage 0: every group but the tensor-parallel one is this rank alone."""
    groups = ProcessGroupCollection()
    groups.tp = tensor
    for name in ("cp", "pp", "ep", "expt_tp", "tp_cp", "tp_ep", "embd", "pos_embd"):
        setattr(groups, name, alone)
    return groups


def close_topology() -> None:
    """Leave the job: destroy every group so that the process can end, or join another layout."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
