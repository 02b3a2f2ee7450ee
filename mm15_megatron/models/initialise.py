"""Initial weights as a pure function of (seed, global parameter name).

Every rank draws the whole parameter from a generator keyed by its name and keeps its slice, so the initial model does
not depend on tensor, pipeline or data parallelism, on the backend, or on the order in which modules were built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.fp8_state import fill
from mm15_megatron.models.global_parameters import GlobalParameter, global_parameters

_RESIDUAL_OUTPUTS = (".self_attention.linear_proj.weight", ".linear_fc2.weight")
_EMBEDDINGS = ("class_token", "position_embedding", "query_embedding")


def initial_std(name: str, shape: tuple[int, ...], cfg: RunConfig) -> float | None:
    """Standard deviation of a parameter's initial values; None for constants (norms: 1, biases: 0).

    The decoder draws with ``language.init_method_std``, divided by sqrt(2 L) for the layers that write to the residual
    stream. Encoder and connector use fan-in scaling (variance 1 / fan_in), 0.02 for embeddings, and the encoder's
    residual outputs are divided by sqrt(2 L) too. Unpublished: our default.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _EMBEDDINGS:
        return 0.02
    if leaf == "bias" or len(shape) == 1:
        return None
    residual = name.endswith(_RESIDUAL_OUTPUTS)
    if name.startswith("language_model."):
        return (
            cfg.language.init_method_std / (2 * cfg.language.num_layers) ** 0.5
            if residual
            else cfg.language.init_method_std
        )
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size
    return fan_in**-0.5 / ((2 * cfg.vision.num_layers) ** 0.5 if residual else 1.0)


def draw_whole(item: GlobalParameter, cfg: RunConfig) -> torch.Tensor:
    """Return the whole initial parameter, fp32 on the parameter's device."""
    device = item.parameter.device
    std = initial_std(item.name, tuple(item.global_shape), cfg)
    if std is None:
        fill = 0.0 if item.name.endswith("bias") else 1.0
        return torch.full(item.global_shape, fill, dtype=torch.float32, device=device)
    digest = hashlib.sha256(f"{cfg.train.seed}/{item.name}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.randn(item.global_shape, generator=generator, device=device) * std


@torch.no_grad()
def initialise(chunks: Iterable[nn.Module], cfg: RunConfig) -> None:
    """Fill every parameter of this rank's model chunks in place; parameters on the meta device have no values."""
    for item in global_parameters(chunks):
        if item.parameter.is_meta:
            continue
        fill(item.parameter, item.slice_of(draw_whole(item, cfg)))
