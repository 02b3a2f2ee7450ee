"""The optimizer's state by model parameter, whichever of megatron-core's three optimizers holds it.

The fp32 optimizer updates the parameters themselves, the bf16 one updates fp32 main copies, and the distributed
optimizer updates flat shards of either. All three are read and written here as *pieces*: a flat range [start, stop) of
one model parameter with its fp32 master value and its moments, AdamW's or those of an optimizer that says their shapes
(:class:`ShapedState`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn
from torch.distributed import ProcessGroup

from mm15_megatron.checkpoint.exchange import Share
from mm15_megatron.errors import CheckpointError
from mm15_megatron.utils.ranks import gathered_objects

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the state whose shape is not its parameter's.

    Attributes:
        global_shape: shape of the whole.
        split_dim: dimension that is split over the parameter's tensor-parallel group; None = replicated.
    """

    global_shape: tuple[int, ...]
    split_dim: int | None

    def local_shape(self, shards: int) -> tuple[int, ...]:
        """Return the shape of one of ``shards`` slices."""
        return tuple(n // shards if dim == self.split_dim else n for dim, n in enumerate(self.global_shape))


@runtime_checkable
class ShapedState(Protocol):
    """An inner optimizer that says which state it keeps."""

    def create_states(self) -> None:
        """Create the state of every parameter that has none yet."""

    def state_shapes(self, parameter: torch.Tensor) -> Mapping[str, StateTensor]:
        """Return the whole shapes of a parameter's state, by kind, where they are not the parameter's."""


@runtime_checkable
class SharesParameters(Protocol):
    """An optimizer whose ranks each update some of the parameters."""

    def share_parameters(self) -> None:
        """Send every parameter from the rank that updates it to the others (every rank must call)."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter's state that this rank holds.

    Attributes:
        parameter: the model parameter.
        start: first element of the flattened parameter that the piece covers.
        stop: one past its last element.
        tensors: by kind, the live fp32 tensor: ``master`` and the moments, with ``stop - start`` elements each unless
            ``shapes`` says otherwise.
        shapes: by kind, the whole shapes of tensors that are not shaped like the parameter; those are never cut.
    """

    parameter: nn.Parameter
    start: int
    stop: int
    tensors: dict[str, torch.Tensor]
    shapes: Mapping[str, StateTensor] = field(default_factory=dict)

    @torch.no_grad()
    def write(self, kind: str, whole: torch.Tensor) -> None:
        """Copy this piece's range out of a tensor of the parameter's size, or a tensor of ``shapes``."""
        live = self.tensors[kind]
        if kind not in self.shapes:
            whole = whole.reshape(-1)[self.start : self.stop]
        live.copy_(whole.reshape(live.shape))


def inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers of this rank that hold parameters (a rank whose modules are all frozen has none)."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in chained if not part.is_stub_optimizer]


def pieces(optimizer: MegatronOptimizer) -> list[Piece]:
    """Describe every piece of state this rank holds; state that no step has created yet is created as zeros."""
    found = []
    for part in inner_optimizers(optimizer):
        inner = part.optimizer
        _create_moments(inner)
        for parameter, main in _mains(part):
            start, stop = 0, parameter.numel()
            if isinstance(part, DistributedOptimizer):
                owned = part._get_model_param_range_map(parameter)["param"]
                start, stop = owned.start, owned.end
            state, shaped = inner.state[main], isinstance(inner, ShapedState)
            moments = {kind: state[kind] for kind in (state if shaped else _MOMENTS)}
            shapes = inner.state_shapes(main) if shaped else {}
            found.append(Piece(parameter, start, stop, {"master": main, **moments}, shapes))
    return found


@dataclass(frozen=True)
class WholeState:
    """One whole tensor of the state of a parameter.

    Attributes:
        parameter: the model parameter.
        kind: ``master`` or a moment.
        tensor: of the parameter's shape, or of this rank's slice of ``shape``.
        shape: the whole shape; None = the parameter's.
    """

    parameter: nn.Parameter
    kind: str
    tensor: torch.Tensor
    shape: StateTensor | None = None


def whole_states(optimizer: MegatronOptimizer) -> Iterator[WholeState]:
    """Yield the state that this rank holds whole: all but the distributed optimizer's."""
    local: dict[nn.Parameter, Piece] = {piece.parameter: piece for piece in pieces(optimizer)}
    for part in inner_optimizers(optimizer):
        if isinstance(part, DistributedOptimizer):
            continue
        for parameter, _ in _mains(part):
            piece = local[parameter]
            for kind, tensor in piece.tensors.items():
                yield WholeState(parameter, kind, tensor.detach(), piece.shapes.get(kind))


@dataclass(frozen=True)
class ScatteredState:
    """One tensor of the state of a parameter that lies scattered over the ranks of its data-parallel group.

    Attributes:
        parameter: the model parameter.
        kind: ``master`` or a moment.
        held: this rank's range, flat and live; empty if it has none.
        shares: who holds which range of the flattened parameter.
    """

    parameter: nn.Parameter
    kind: str
    held: torch.Tensor
    shares: tuple[Share, ...]


def scattered_states(optimizer: MegatronOptimizer) -> Iterator[ScatteredState]:
    """Yield the distributed optimizer's state, of every parameter of this rank's model that it updates."""
    local: dict[nn.Parameter, Piece] = {piece.parameter: piece for piece in pieces(optimizer)}
    for part in inner_optimizers(optimizer):
        if not isinstance(part, DistributedOptimizer):
            continue
        for buffer in part.buffers:
            for parameter, shares in _shares(buffer, part.data_parallel_group):
                for kind in ("master", *_MOMENTS):
                    held = local[parameter].tensors[kind].detach() if parameter in local else torch.empty(0)
                    yield ScatteredState(parameter, kind, held.reshape(-1), shares)


def get_step(optimizer: MegatronOptimizer) -> int:
    """Return AdamW's step count, agreed over all ranks (a rank may hold no state at all).

    Raises:
        CheckpointError: if parameters were updated a different number of times, on any rank or on two.
    """
    mine = {count for part in inner_optimizers(optimizer) for count in _counts(part.optimizer)}
    counts = set().union(*gathered_objects(mine))
    if len(counts) > 1:
        raise CheckpointError(
            f"parameters were updated different numbers of times: {sorted(counts)}",
            fix="report this: one step count is stored for the whole optimizer",
        )
    return max(counts, default=0)


@torch.no_grad()
def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Write AdamW's step count everywhere it is kept: per parameter (torch) or per group (fused kernels)."""
    for part in inner_optimizers(optimizer):
        inner = part.optimizer
        _create_moments(inner)
        if isinstance(inner, torch.optim.AdamW):
            for state in inner.state.values():
                state["step"].fill_(step)
        else:
            for group in inner.param_groups:
                group["step"] = step


@torch.no_grad()
def publish_masters(optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel]) -> None:
    """Make the model's parameters follow the master weights, on every rank, after the latter were written."""
    parts = inner_optimizers(optimizer)
    for part in parts:
        if isinstance(part, (DistributedOptimizer, Float16OptimizerWithFloat16Params)):
            part._copy_main_params_to_model_params()
    if isinstance(optimizer, SharesParameters):
        optimizer.share_parameters()
    # A rank that owns no shard still takes part in the gather, so the chunks decide, not the optimizer.
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            gather_parameters(chunk)


def gather_parameters(chunk: DistributedDataParallel) -> None:
    """Fetch every parameter from the ranks that updated it, now (every rank of the data-parallel group must call).

    An FP8 weight has a second copy for the other direction of its matrix product. megatron-core makes it follow after
    each gather but this one: a forced gather of overlapping buckets.
    """
    chunk.start_param_sync(force_sync=True)
    quantised = [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]
    if quantised and chunk.ddp_config.overlap_param_gather:
        post_all_gather_processing(quantised)


def _mains(part: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Pair each model parameter with the fp32 tensor (whole or flat shard) that the inner optimizer updates."""
    pairs: list[tuple[list[list[nn.Parameter]], list[list[torch.Tensor]]]]
    if isinstance(part, DistributedOptimizer):
        pairs = [
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            (part.float16_groups, part.fp32_from_float16_groups),
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
        ]
    else:
        own = [group["params"] for group in part.optimizer.param_groups]
        pairs = [(own, own)]
    for model_groups, main_groups in pairs:
        for model_group, main_group in zip(model_groups, main_groups, strict=True):
            yield from zip(model_group, main_group, strict=True)


def _create_moments(inner: torch.optim.Optimizer) -> None:
    if isinstance(inner, ShapedState):
        inner.create_states()
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            if "exp_avg" in state:
                continue
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
            if isinstance(inner, torch.optim.AdamW):
                # torch's fused kernel reads the count where the parameter is, the others read it on the host
                place = parameter.device if group["fused"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)


def _counts(inner: torch.optim.Optimizer) -> set[int]:
    if isinstance(inner, torch.optim.AdamW):
        return {int(state["step"].item()) for state in inner.state.values() if "step" in state}
    return {int(group["step"]) for group in inner.param_groups if group["params"] and "step" in group}


def _shares(buffer: _ParamAndGradBuffer, group: ProcessGroup) -> Iterator[tuple[nn.Parameter, tuple[Share, ...]]]:
    """Say who holds which range of each parameter of a buffer.

    A bucket is cut into equally long shards, one a rank, wherever that cuts the parameters in it.
    """
    ranks = torch.distributed.get_process_group_ranks(group)
    for bucket in buffer.buckets:
        length = bucket.grad_data.numel() // len(ranks)
        for parameter in bucket.params_list:
            first, end = (at - bucket.offset for at in buffer.param_index_map[parameter][:2])
            yield (
                parameter,
                tuple(
                    Share(ranks[i], max(length * i, first) - first, min(length * (i + 1), end) - first)
                    for i in range(first // length, -(-end // length))
                ),
            )
