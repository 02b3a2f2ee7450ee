"""AdaFactor on data-parallel ranks: each updates some of the parameters, whole, and sends them to the others.

Gradients are reduced to every rank (megatron-core's data-parallel wrapper). A rank keeps masters and state of the
parameters it updates alone, so the optimizer's memory falls with the number of data-parallel ranks. megatron-core's
optimizers hold these; what is ours is who updates what, and the broadcast behind the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import ProcessGroup

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.global_parameters import GlobalParameter, global_parameters, module_of, spread_by_size
from mm15_megatron.models.matrices import matrix_shard
from mm15_megatron.training.adafactor import AdaFactor

_BROADCAST_BYTES: Final = 64 << 20  # copied together for one broadcast


class WholeParameterOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """megatron-core's optimizers over the parameters that this rank updates.

    Args:
        parts: the optimizers.
        items: every trained parameter of this rank's model.
        owners: by parameter, the rank of ``data_group`` that updates it.
    """

    def __init__(
        self, parts: list[MegatronOptimizer], items: Sequence[GlobalParameter], owners: dict[nn.Parameter, int]
    ) -> None:
        super().__init__(parts)
        self._items = list(items)
        self._owners = owners

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update this rank's parameters, and share them."""
        updated = bool(super().step_with_ready_grads())
        self.share_parameters()
        return updated

    @torch.no_grad()
    def share_parameters(self) -> None:
        """Send every parameter from the rank that updates it to the others (every rank must call)."""
        for group in dict.fromkeys(item.data_group for item in self._items):
            if group.size() > 1:
                held = [item.parameter for item in self._items if item.data_group == group]
                for owner in range(group.size()):
                    for bucket in _buckets([p for p in held if self._owners[p] == owner]):
                        _broadcast(bucket, owner, group)


def build_adafactor(
    cfg: RunConfig, chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, *, rates: dict[str, float]
) -> WholeParameterOptimizer:
    """Build AdaFactor over the wrapped chunks.

    Args:
        cfg: the run.
        chunks: this rank's model chunks.
        config: megatron-core's options: precision and clipping.
        rates: peak learning rate of each module.
    """
    items = list(global_parameters([chunk.module for chunk in chunks]))
    owners = spread_by_size(items)
    trained = [item for item in items if item.parameter.requires_grad]
    parts = []
    for tensor_group, held in _by_tensor_group(trained, default=chunks[0].module.stage.groups.tp):
        mine = [item for item in held if owners[item.parameter] == item.data_group.rank()]
        inner = AdaFactor(_groups(cfg, mine, rates), cfg.optimizer, group=tensor_group)
        if config.bf16:
            part = Float16OptimizerWithFloat16Params(inner, config, None, lambda *_: None)
        else:
            part = FP32Optimizer(inner, config, lambda *_: None)
        # every parameter counts once in the norm: on the one rank that updates it, on the first that holds it whole
        part.grad_stats_parallel_group = torch.distributed.group.WORLD
        part.tp_group = chunks[0].module.stage.groups.tp
        parts.append(part)
    return WholeParameterOptimizer(parts, trained, owners)


def _by_tensor_group(
    items: Sequence[GlobalParameter], *, default: ProcessGroup
) -> list[tuple[ProcessGroup, list[GlobalParameter]]]:
    """Part parameters by the ranks that split them; all but experts' come first, even if there is none."""
    found: dict[ProcessGroup, list[GlobalParameter]] = {default: []}
    for item in items:
        found.setdefault(item.tensor_group, []).append(item)
    return list(found.items())


def _groups(cfg: RunConfig, items: Sequence[GlobalParameter], rates: dict[str, float]) -> list[dict[str, Any]]:
    """One parameter group a module and decay."""
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for module, rate in rates.items():
        for decay in (1.0, 0.0):
            groups[module, decay] = {"params": [], "shards": [], "max_lr": rate, "wd_mult": decay}
    for item in items:
        decays = cfg.optimizer.decay_norms_and_biases or item.parameter.dim() > 1
        group = groups[module_of(item.name), 1.0 if decays else 0.0]
        group["params"].append(item.parameter)
        group["shards"].append(matrix_shard(item, cfg))
    return list(groups.values())


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Part parameters into lists of one dtype of about ``_BROADCAST_BYTES``."""
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        bucket: list[torch.Tensor] = []
        for parameter in parameters:
            if parameter.dtype != dtype:
                continue
            bucket.append(parameter.data)
            if sum(tensor.nbytes for tensor in bucket) >= _BROADCAST_BYTES:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _broadcast(tensors: list[torch.Tensor], owner: int, group: ProcessGroup) -> None:
    flat = _flatten_dense_tensors(tensors)
    torch.distributed.broadcast(flat, src=torch.distributed.get_global_rank(group, owner), group=group)
    if group.rank() != owner:
        for tensor, updated in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
            tensor.copy_(updated)
