"""State that FP8 layers keep beside their parameters: amax histories and scales of delayed scaling.

The other recipes compute their scales anew from each tensor and have no state. Transformer Engine keeps one table for a
module; here it is cut by matrix product and named after the weight, so that a checkpoint does not depend on how many
experts a rank holds. The tensors of a product are its input, weight and output on the way forward, the gradients of
output and input on the way back; every rank of the amax reduction group holds equal values.

L: steps of amax that are remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.fp8_utils import get_fp8_recipe, is_first_last_bf16_layer, is_float8tensor
from megatron.core.transformer import TransformerConfig
from torch import nn

from mm15_megatron.errors import BackendError
from mm15_megatron.models.global_parameters import GlobalParameter, global_parameters

TENSORS = {"scaling_fwd": 3, "scaling_bwd": 2}
"""Tensors of one matrix product in Transformer Engine's tables."""


@dataclass(frozen=True)
class AmaxState:
    """The delayed scaling of one matrix product in one direction; the tensors are views of the module's tables.

    Attributes:
        name: global name of the weight without ``.weight``, and the direction: ``....linear_fc1.scaling_fwd``.
        weight: the weight it belongs to.
        scale_N: fp32 [3] or [2], factor before the cast to FP8.
        history_LN: fp32 [L, 3] or [L, 2]; row 0 is being filled, rows 1 to L - 1 are the past, oldest first.
    """

    name: str
    weight: GlobalParameter
    scale_N: torch.Tensor
    history_LN: torch.Tensor

    def write(self, *, scale_N: torch.Tensor, history_LN: torch.Tensor) -> None:
        """Take over a saved state; of a history of another length the newest steps are kept."""
        self.scale_N.copy_(scale_N)
        self.history_LN.zero_()
        self.history_LN[0].copy_(history_LN[0])
        kept = min(self.history_LN.shape[0], history_LN.shape[0]) - 1
        if kept:
            self.history_LN[-kept:].copy_(history_LN[-kept:])


def open_tables(chunks: Iterable[nn.Module]) -> None:
    """Make the tables of delayed scaling before the first forward pass does, so that a saved state can be put in."""
    for module, config in _fp8_modules(chunks):
        if config.fp8_recipe == "delayed" and not module.fp8_meta_tensors_initialized:
            module.fp8_meta["num_gemms"] = len(_weights(module))
            module.init_fp8_meta_tensors(get_fp8_recipe(config))


def amax_states(chunks: Iterable[nn.Module]) -> Iterator[AmaxState]:
    """Find the delayed scaling of this rank's model chunks (MM15Model, unwrapped); nothing with other recipes."""
    chunks = list(chunks)
    named = {item.parameter: item for item in global_parameters(chunks)}
    for module, config in _fp8_modules(chunks):
        if config.fp8_recipe != "delayed" or not module.fp8_meta_tensors_initialized:
            continue
        for index, weight in enumerate(_weights(module)):
            item = named[weight]
            for direction, tensors in TENSORS.items():
                table = module.fp8_meta[direction]
                columns = slice(index * tensors, (index + 1) * tensors)
                yield AmaxState(
                    name=f"{item.name.removesuffix('.weight')}.{direction}",
                    weight=item,
                    scale_N=table.scale[columns],
                    history_LN=table.amax_history[:, columns],
                )


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter's values in its nominal dtype: an FP8 weight dequantised, another one as it is."""
    detached = parameter.detach()
    return detached.dequantize() if is_float8tensor(parameter) else detached


def fill(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give a parameter its initial values.

    A trained FP8 weight also keeps them on the host in its nominal dtype, bf16, from where the optimizer takes its fp32
    master.

    Raises:
        BackendError: this Transformer Engine keeps them elsewhere.
    """
    parameter.copy_(values)
    if not is_float8tensor(parameter):
        return
    if not parameter.requires_grad:
        parameter.clear_high_precision_init_val()  # type: ignore[attr-defined]
        return
    if not hasattr(parameter, "_high_precision_init_val"):
        raise BackendError(
            "precision.fp8_param_gather: this Transformer Engine does not keep initial values where 2.11 does",
            fix="install the version that requirements-gpu.txt names, or set precision.fp8_param_gather=false",
        )
    parameter._high_precision_init_val = values.to("cpu", parameter.dtype)  # type: ignore[attr-defined]


def _fp8_modules(chunks: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, TransformerConfig]]:
    """Linear layers that compute in FP8, with the configuration they were built by."""
    for chunk in chunks:
        for block in chunk.modules():
            # megatron-core's layers know their configuration and their number; a linear layer belongs to one of them
            if not hasattr(block, "self_attention"):
                continue
            config = block.config
            if not config.fp8 or is_first_last_bf16_layer(config, block.layer_number - 1):
                continue
            for module in block.modules():
                if hasattr(module, "fp8_meta") and _weights(module):
                    yield module, config


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The weights a module multiplies by: one, or one an expert."""
    own = dict(module.named_parameters(recurse=False))
    if "weight" in own and own["weight"].dim() == 2:
        return [own["weight"]]
    grouped = [name for name in own if name.startswith("weight")]
    return [own[f"weight{index}"] for index in range(len(grouped))] if "weight0" in own else []
