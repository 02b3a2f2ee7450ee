"""Build the model chunks of this rank, with their initial weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.models.backend import check_fp8, resolve_backend
from mm15_megatron.models.global_parameters import global_parameters
from mm15_megatron.models.initialise import initialise
from mm15_megatron.models.mm_model import MM15Model, Stage


def build_model(cfg: RunConfig, *, stage: Stage) -> MM15Model:
    """Build one chunk of the model and fill it with its initial weights.

    Raises:
        ConfigError: if the configuration asks for a model this version cannot build.
        BackendError: if the layer implementation is not usable here.
    """
    check_fp8(cfg.precision)
    model = MM15Model(cfg, backend=resolve_backend(cfg.kernels), stage=stage)
    initialise([model], cfg)
    return model


def build_chunks(cfg: RunConfig, *, stages: Sequence[Stage]) -> list[MM15Model]:
    """Build this rank's model chunks in the order of their virtual ranks (one without interleaving).

    Raises:
        ConfigError: as :func:`build_model`.
        BackendError: as :func:`build_model`.
    """
    return [build_model(cfg, stage=stage) for stage in stages]


@torch.no_grad()
def check_replicas(chunks: Sequence[MM15Model], *, group: ProcessGroup) -> None:
    """Check that replicated parameters are bitwise equal inside the tensor-parallel group (every rank must call).

    The initial weights are a function of the name, so they are; a driver that draws differently on one device would let
    replicas drift apart for a whole run.

    Raises:
        BackendError: names the parameters that differ.
    """
    if group.size() == 1:
        return
    # Experts have groups of their own: a tensor-parallel rank may rightly hold others.
    replicated = [item for item in global_parameters(chunks) if item.split_dim is None and item.tensor_group == group]
    mine = torch.stack([torch.hash_tensor(item.parameter.detach().float()) for item in replicated]).view(torch.int64)
    others = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(others, mine, group=group)
    differing = (torch.stack(others) != mine).any(dim=0).tolist()
    names = [item.name for item, differs in zip(replicated, differing, strict=True) if differs]
    if names:
        raise BackendError(
            f"{len(names)} replicated parameters differ between tensor-parallel ranks: {', '.join(names[:5])}",
            fix="use devices and drivers of one kind inside a tensor-parallel group",
        )
