"""What a checkpoint holds: one description of the model's and the optimizer's tensors, keyed by global parameter name.

    model.<name>                  the parameter, in its own dtype
    optimizer.<name>.master       fp32 master weight of a trained parameter
    optimizer.<name>.exp_avg      first moment (AdaFactor's momentum), fp32
    optimizer.<name>.exp_avg_sq   second moment; with AdaFactor of vectors alone, fp32
    optimizer.<name>.row          AdaFactor: second moment of a matrix's rows, fp32
    optimizer.<name>.column       AdaFactor: second moment of the columns of each matrix of the parameter, fp32
    fp8.<name>.scale, .history    delayed scaling of FP8 layers alone (``models/fp8_state.py``)

and one number for the whole optimizer, its step count. Names and whole shapes do not depend on the layout, the
optimizer class or the dtype (``models/global_parameters.py``), so any layout reads what any other wrote. The master
weight is stored even where it is the parameter itself; it is the truth when training resumes, and the model's
parameters follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed import ProcessGroup

from mm15_megatron.checkpoint.exchange import Scattered, assembled
from mm15_megatron.checkpoint.optimizer_state import (
    StateTensor,
    gather_parameters,
    get_step,
    pieces,
    publish_masters,
    scattered_states,
    set_step,
    whole_states,
)
from mm15_megatron.models.fp8_state import AmaxState, amax_states, open_tables, plain
from mm15_megatron.models.global_parameters import GlobalParameter, global_parameters, spread_by_size

OPTIMIZER_PREFIX, FP8_PREFIX = "optimizer.", "fp8."


@dataclass(frozen=True)
class StateToSave:
    """What this rank writes or holds of the state: every tensor shard is written by exactly one rank.

    Attributes:
        tensors: by key, those that it writes and holds; live tensors or copies.
        scattered: by key, those that it writes or holds a range of (the distributed optimizer's).
        held: by key, these ranges, flat; live tensors or copies.
        optimizer_step: AdamW's step count, equal on every rank.
    """

    tensors: Mapping[str, ShardedTensor]
    scattered: Mapping[str, Scattered]
    held: Mapping[str, torch.Tensor]
    optimizer_step: int

    def data(self) -> dict[str, torch.Tensor]:
        """Return all that this rank holds, by key."""
        return {key: tensor.data for key, tensor in self.tensors.items()} | dict(self.held)

    def without_data(self) -> StateToSave:
        """Return the description alone."""
        return replace(self, tensors={key: one.without_data() for key, one in self.tensors.items()}, held={})

    def with_data(self, data: Mapping[str, torch.Tensor]) -> StateToSave:
        """Return the same with other tensors in place of its own, by key."""
        tensors = {key: replace(one, data=data[key]) for key, one in self.tensors.items()}
        return replace(self, tensors=tensors, held={key: one for key, one in data.items() if key in self.scattered})

    def to_write(self) -> dict[str, ShardedTensor]:
        """Return the tensors that this rank writes, those it does not hold sent by the others (every rank must call).

        Raises:
            CheckpointError: a rank has no memory for what it will write; every rank raises it.
            RuntimeError: another rank is gone.
        """
        return {**self.tensors, **assembled(self.scattered, self.held)}


@dataclass(frozen=True)
class StateToLoad:
    """What this rank needs of a checkpoint.

    Attributes:
        tensors: by key, requests without data.
        restore: puts the loaded tensors, by key, where they belong.
    """

    tensors: dict[str, ShardedTensor]
    restore: Callable[[Mapping[str, torch.Tensor]], None]


class Resized(Protocol):
    """A replicated tensor that is stored in another size than the model's.

    Attributes:
        stored_shape: shape of the stored tensor.
    """

    @property
    def stored_shape(self) -> tuple[int, ...]: ...  # noqa: D102
    def apply(self, stored: torch.Tensor) -> torch.Tensor: ...  # noqa: D102


def model_key(name: str) -> str:
    """Key of a parameter."""
    return f"model.{name}"


def optimizer_key(name: str, kind: str) -> str:
    """Key of one tensor of a trained parameter's optimizer state."""
    return f"{OPTIMIZER_PREFIX}{name}.{kind}"


def unwrapped(chunks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the models inside data-parallel wrappers."""
    return [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in chunks]


def state_to_save(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> StateToSave:
    """Describe what this rank writes, and what it sends to those that write (every rank must call)."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            gather_parameters(chunk)  # otherwise the next forward pass would fetch the last update
    items = list(global_parameters(unwrapped(chunks)))
    writers = _writers_of_copies(items)
    in_data_group = _writers_in_data_group(items, writers)
    mine = {i.parameter: i for i in items if in_data_group.get(i.parameter) == i.data_group.rank()}
    tensors = {}
    for item in mine.values():
        key = model_key(item.name)
        tensors[key] = _sharded(item, key, plain(item.parameter))
    for state in whole_states(optimizer):
        if state.parameter not in mine:
            continue
        item = mine[state.parameter]
        if state.shape is not None and state.shape.split_dim is None and writers[state.parameter] != _own(item):
            continue  # every tensor-parallel rank holds all of it
        key = optimizer_key(item.name, state.kind)
        tensors[key] = _sharded(item, key, state.tensor, shape=state.shape)
    for scaling in amax_states(unwrapped(chunks)):
        if scaling.weight.is_first_replica:
            for key, tensor in _amax_tensors(scaling).items():
                tensors[key] = ShardedTensor.from_rank_offsets(key, tensor.contiguous(), replica_id=0)
    scattered, held = _scattered(items, in_data_group, optimizer)
    return StateToSave(tensors, scattered, held, get_step(optimizer))


def _scattered(
    items: Sequence[GlobalParameter], writers: Mapping[nn.Parameter, int], optimizer: MegatronOptimizer
) -> tuple[dict[str, Scattered], dict[str, torch.Tensor]]:
    """Describe what lies scattered over data groups: what this rank writes or holds a range of, and these ranges."""
    scattered, held = {}, {}
    written = {item.parameter: item for item in items if item.parameter in writers}
    for state in scattered_states(optimizer):
        if state.parameter not in written:
            continue
        item, writer = written[state.parameter], writers[state.parameter]
        key = optimizer_key(item.name, state.kind)
        if state.held.numel():
            held[key] = state.held
        if state.held.numel() or writer == item.data_group.rank():
            rank = torch.distributed.get_global_rank(item.data_group, writer)
            scattered[key] = Scattered(_request(item, key, torch.float32), rank, state.shares)
    return scattered, held


def weights_to_load(chunks: Sequence[nn.Module]) -> StateToLoad:
    """Request the parameters alone (evaluation, conversion)."""
    items = {model_key(item.name): item for item in global_parameters(unwrapped(chunks))}

    @torch.no_grad()
    def restore(loaded: Mapping[str, torch.Tensor]) -> None:
        for key, item in items.items():
            item.parameter.copy_(loaded[key].reshape(item.parameter.shape))

    return StateToLoad({key: _request(item, key, item.parameter.dtype) for key, item in items.items()}, restore)


def weights_to_start(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    resized: Mapping[str, Resized],
) -> StateToLoad:
    """Request the parameters alone, as the initial weights of a run with a fresh optimizer.

    They are read in fp32: the masters take them as they are stored, and the model's parameters follow the masters.

    Args:
        chunks: this rank's wrapped model chunks.
        optimizer: a freshly built optimizer over them; its moments and its count start at zero.
        resized: by key, the tables that are stored in another size.
    """
    items = {item.parameter: item for item in global_parameters(unwrapped(chunks))}
    held = pieces(optimizer)
    tensors = {}
    for item in items.values():
        key = model_key(item.name)
        if key in resized:
            stored = torch.empty(resized[key].stored_shape, dtype=torch.float32, device="meta")
            tensors[key] = ShardedTensor.from_rank_offsets(key, stored, replica_id=0).without_data()
        else:
            tensors[key] = _request(item, key, torch.float32)

    @torch.no_grad()
    def restore(loaded: Mapping[str, torch.Tensor]) -> None:
        weights = {key: resized[key].apply(loaded[key]) if key in resized else loaded[key] for key in tensors}
        for item in items.values():
            if not item.parameter.requires_grad:
                item.parameter.copy_(weights[model_key(item.name)].reshape(item.parameter.shape))
        for piece in held:
            piece.write("master", weights[model_key(items[piece.parameter].name)])
        set_step(optimizer, 0)
        publish_masters(optimizer, chunks)

    return StateToLoad(tensors, restore)


def training_to_load(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, optimizer_step: int
) -> StateToLoad:
    """Request what training needs: frozen parameters, and masters and moments of the pieces this rank updates."""
    items = {item.parameter: item for item in global_parameters(unwrapped(chunks))}
    held = pieces(optimizer)
    frozen = {model_key(item.name): item for item in items.values() if not item.parameter.requires_grad}
    tensors = {key: _request(item, key, item.parameter.dtype) for key, item in frozen.items()}
    for piece in held:
        item = items[piece.parameter]
        for kind in piece.tensors:
            key = optimizer_key(item.name, kind)
            tensors[key] = _request(item, key, torch.float32, shape=piece.shapes.get(kind))

    @torch.no_grad()
    def restore(loaded: Mapping[str, torch.Tensor]) -> None:
        for key, item in frozen.items():
            item.parameter.copy_(loaded[key].reshape(item.parameter.shape))
        for piece in held:
            for kind in piece.tensors:
                piece.write(kind, loaded[optimizer_key(items[piece.parameter].name, kind)])
        set_step(optimizer, optimizer_step)
        publish_masters(optimizer, chunks)

    return StateToLoad(tensors, restore)


def amax_to_load(chunks: Sequence[nn.Module], stored: Mapping[str, tuple[int, ...]]) -> StateToLoad:
    """Request the delayed scaling that is stored for this rank's FP8 layers.

    A layer without any (the checkpoint was written in bf16 or with another recipe) starts with an empty history. The
    length of the histories may differ.

    Args:
        chunks: this rank's model chunks.
        stored: key and shape of every stored tensor.
    """
    models = unwrapped(chunks)
    if any(key.startswith(FP8_PREFIX) for key in stored):
        open_tables(models)
    states = [state for state in amax_states(models) if stored.keys() >= _amax_tensors(state).keys()]
    tensors = {}
    for key in (key for state in states for key in _amax_tensors(state)):
        empty = torch.empty(stored[key], dtype=torch.float32, device="meta")
        tensors[key] = ShardedTensor.from_rank_offsets(key, empty, replica_id=0).without_data()

    @torch.no_grad()
    def restore(loaded: Mapping[str, torch.Tensor]) -> None:
        for state in states:
            scale, history = (loaded[key] for key in _amax_tensors(state))
            state.write(scale_N=scale, history_LN=history)

    return StateToLoad(tensors, restore)


def _amax_tensors(state: AmaxState) -> dict[str, torch.Tensor]:
    return {
        f"{FP8_PREFIX}{state.name}.scale": state.scale_N,
        f"{FP8_PREFIX}{state.name}.history": state.history_LN,
    }


def expected_shapes(
    chunks: Sequence[nn.Module], requested: Mapping[str, ShardedTensor] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the keys of this rank's parameters and of what it requests, with the shapes of the whole tensors."""
    shapes = {model_key(item.name): item.global_shape for item in global_parameters(unwrapped(chunks))}
    return shapes | {key: tuple(tensor.global_shape) for key, tensor in (requested or {}).items()}


def _writers_in_data_group(
    items: Sequence[GlobalParameter], writers: Mapping[nn.Parameter, tuple[int, int]]
) -> dict[nn.Parameter, int]:
    """Say which rank of its data group writes this slice of a parameter; none for what others write."""
    return {
        item.parameter: writers[item.parameter][0]
        for item in items
        if not item.tied_copy and (item.split_dim is not None or writers[item.parameter][1] == item.tensor_group.rank())
    }


def _writers_of_copies(items: Sequence[GlobalParameter]) -> dict[nn.Parameter, tuple[int, int]]:
    """Say who writes of a parameter what is not split: the rank in its data group and the one in its tensor group.

    An encoder that every tensor-parallel rank holds whole is most of it: no single rank should write it alone.
    """
    owners = spread_by_size(items)
    writers: dict[nn.Parameter, tuple[int, int]] = {}
    loads: dict[tuple[ProcessGroup, int], list[int]] = {}
    for item in sorted(items, key=lambda i: (i.split_dim is not None, -i.parameter.numel(), i.name)):
        owner = owners[item.parameter]
        held = loads.setdefault((item.tensor_group, owner), [0] * item.tensor_group.size())
        writers[item.parameter] = owner, held.index(min(held))
        held[writers[item.parameter][1]] += 1 if item.split_dim is not None else item.parameter.numel()
    return writers


def _own(item: GlobalParameter) -> tuple[int, int]:
    return item.data_group.rank(), item.tensor_group.rank()


def _sharded(
    item: GlobalParameter, key: str, tensor: torch.Tensor, *, shape: StateTensor | None = None
) -> ShardedTensor:
    """Describe this rank's slice of a tensor that is shaped like the parameter, or as ``shape`` says."""
    local = item.local_view(tensor) if shape is None else tensor
    split_dim = item.split_dim if shape is None else shape.split_dim
    offsets = [] if split_dim is None else [(split_dim, item.shard_index, item.shards)]
    return ShardedTensor.from_rank_offsets(key, local, *offsets, replica_id=0)


def _request(item: GlobalParameter, key: str, dtype: torch.dtype, *, shape: StateTensor | None = None) -> ShardedTensor:
    size = item.parameter.shape if shape is None else shape.local_shape(item.shards)
    return _sharded(item, key, torch.empty(size, dtype=dtype, device="meta"), shape=shape).without_data()
