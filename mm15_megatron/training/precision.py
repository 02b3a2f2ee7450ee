"""Which AdamW kernel updates the parameters, and what FP8 asks of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import distrib_optimizer

from mm15_megatron.config.schema import KernelConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.models.backend import apex_problem, transformer_engine_problem


def adam_implementation(kernels: KernelConfig) -> str:
    """Return whose AdamW updates the parameters: torch, transformer_engine or apex."""
    if kernels.optimizer_impl is not None:
        return kernels.optimizer_impl
    return "transformer_engine" if kernels.transformer_impl == "transformer_engine" else "torch"


@contextmanager
def chosen_adam(kernels: KernelConfig) -> Iterator[None]:
    """Have megatron-core build the AdamW that ``kernels`` names.

    megatron-core takes the first one that imports: Transformer Engine's, else apex's, else torch's. The choice is made
    when its module is imported, so for the time of the build its name is bound to ours.

    Raises:
        BackendError: the library is not usable here, with the reason.
    """
    name = adam_implementation(kernels)
    chosen = torch.optim.AdamW if name == "torch" else _fused_adam(name)
    before = mcore_optimizer.Adam, mcore_optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam
    mcore_optimizer.Adam = distrib_optimizer.Adam = chosen
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = name == "torch"
    try:
        yield
    finally:
        mcore_optimizer.Adam, mcore_optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam = before


def _fused_adam(name: str) -> type[torch.optim.Optimizer]:
    problem = transformer_engine_problem() if name == "transformer_engine" else apex_problem("amp_C")
    if problem is not None:
        raise BackendError(
            f"kernels.optimizer_impl = {name}, but its FusedAdam is not usable here: {problem}",
            fix="install requirements-gpu.txt on a CUDA machine, or set kernels.optimizer_impl=torch",
        )
    if name == "transformer_engine":
        from transformer_engine.pytorch.optimizers import FusedAdam
    else:
        from apex.optimizers import FusedAdam
    return FusedAdam  # type: ignore[no-any-return]


def use_fused_kernel(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's AdamW update all parameters of a CUDA device in one kernel each (its default is several)."""
    if isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            on_cuda = bool(group["params"]) and all(parameter.is_cuda for parameter in group["params"])
            group["fused"], group["foreach"] = on_cuda, False if on_cuda else group["foreach"]
