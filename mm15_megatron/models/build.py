"""Build the model chunks of this rank, with their initial weights."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError
from mm15_megatron.models.backend import resolve_backend
from mm15_megatron.models.initialise import initialise
from mm15_megatron.models.mm_model import MM15Model, Stage


def build_model(cfg: RunConfig, *, stage: Stage) -> MM15Model:
    """Build one stage of the model and fill it with its initial weights.

    Raises:
        ConfigError: if the configuration asks for a model this version cannot build.
        BackendError: if the layer implementation is not usable here.
    """
    if cfg.moe.num_moe_experts:
        raise ConfigError(
            f"moe.num_moe_experts = {cfg.moe.num_moe_experts}: this version trains dense decoders",
            fix="set moe.num_moe_experts=0; MoE presets can be printed and counted",
        )
    model = MM15Model(cfg, backend=resolve_backend(cfg.kernels.transformer_impl), stage=stage)
    initialise([model], cfg)
    return model


@torch.no_grad()
def synchronise_replicas(model: MM15Model, *, group: ProcessGroup) -> int:
    """Make replicated parameters bitwise equal inside the tensor-parallel group.

    The initial weights are a function of the name, so nothing should differ; what does (a driver that draws
    differently) is overwritten by the group's first rank and counted.

    Returns:
        The number of replicated parameters that had differed on any rank of the group.
    """
    if group.size() == 1:
        return 0
    source = torch.distributed.get_global_rank(group, 0)
    differing = 0
    for parameter in model.parameters():
        if getattr(parameter, "tensor_model_parallel", False) is True:
            continue
        reference = parameter.detach().clone()
        torch.distributed.broadcast(reference, src=source, group=group)
        flag = torch.tensor([int(not torch.equal(reference, parameter))], device=parameter.device)
        torch.distributed.all_reduce(flag, group=group)
        differing += int(flag.item() > 0)
        parameter.copy_(reference)
    return differing
