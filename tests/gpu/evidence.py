"""What Transformer Engine's linear layers did in their last forward pass: proof that FP8 ran, and where.

A loss that differs from bf16's proves nothing where bf16 does not repeat itself. Two things do: the layer's own flag,
which it sets at the beginning of every forward pass, and the rounding of its output, which is compared with the exact
product of what went in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm15_megatron.bench.fp8_advice import OUTPUT_ERROR
from mm15_megatron.models.fp8_state import plain

ROUNDED = 1e-2
"""Between a product of bf16, whose result alone is rounded (by 0.2 %), and one with an operand in E4M3 (by 2.6 %)."""
KINDS = {
    "tensorwise": "float8_current_scaling",
    "delayed": "delayed",
    "blockwise": "float8_block_scaling",
    "mxfp8": "mxfp8",
}
"""The question that Transformer Engine's recipe answers with yes."""


@dataclass(frozen=True)
class Seen:
    """One layer's last forward pass.

    Attributes:
        layer: the layer.
        fp8: whether it computed in FP8, as it says itself.
        recipe: Transformer Engine's recipe; None in bf16.
        error: scalar, norm of the difference from the exact product over its norm; None where a norm is part of the
            layer.
    """

    layer: nn.Module
    fp8: bool
    recipe: Any
    error: torch.Tensor | None


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    """The matrices a layer of Transformer Engine multiplies by: one, or one an expert; none if it is no such layer."""
    if not hasattr(layer, "fp8_meta"):
        return []
    return [p for name, p in layer.named_parameters(recurse=False) if name.startswith("weight")]


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Seen]]:
    """Look at every linear layer of Transformer Engine while the model runs; by name, the last pass of each."""
    seen: dict[str, Seen] = {}
    handles = [
        module.register_forward_hook(_observer(name, seen))
        for name, module in model.named_modules()
        if weights_of(module)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _observer(name: str, seen: dict[str, Seen]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    @torch.no_grad()
    def observe(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        x, *splits = arguments
        error = None
        own = dict(layer.named_parameters(recurse=False))
        if not any(key.startswith("layer_norm") for key in own):
            # megatron-core's layers return their bias beside the product, Transformer Engine's own add it
            product, bias = (output[0], None) if isinstance(output, tuple) else (output, own.get("bias"))
            error = product_error(x, weights_of(layer), product, splits=splits[0] if splits else None, bias_O=bias)
        seen[name] = Seen(layer, layer.fp8, layer.fp8_meta["recipe"] if layer.fp8 else None, error)

    return observe


def product_error(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    output: torch.Tensor,
    *,
    splits: Sequence[int] | None = None,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """How far a layer's output is from the result in fp32: norm of the difference over the norm of the result.

    Args:
        x: [..., I], the layer's input.
        weights: [O, I], one or one an expert.
        output: [..., O].
        splits: rows of each expert; None with one weight.
        bias_O: what the layer adds; None = nothing.
    """
    x, output = x.flatten(0, -2).float(), output.flatten(0, -2).float()
    rows = x.split([x.shape[0]] if splits is None else list(splits))
    exact = torch.cat([part @ plain(weight).float().T for part, weight in zip(rows, weights, strict=True)])
    exact = exact if bias_O is None else exact + bias_O.float()
    return (output - exact).norm() / exact.norm()


def in_blocks(name: str) -> bool:
    """Whether a layer belongs to the blocks of the decoder or of the encoder."""
    return name.startswith(("language_model.decoder.layers.", "vision_encoder.blocks.layers."))


def assert_computed_in(
    recipe: str | None, seen: dict[str, Seen], *, where: Callable[[str], bool] | None = None
) -> None:
    """Assert that layers computed in FP8 by a recipe and all others in bf16.

    Args:
        recipe: the recipe; None: every layer computed in bf16.
        seen: what was watched.
        where: takes a layer's name and says whether it belongs to FP8; None: all of the decoder and of the encoder do,
            and none of the connector.
    """
    where = where or in_blocks
    in_fp8 = {name for name in seen if recipe is not None and where(name)}
    assert seen, "no layer of Transformer Engine ran"
    assert in_fp8 or recipe is None, f"none of {list(seen)} belongs to FP8"
    for name, one in seen.items():
        assert one.fp8 == (name in in_fp8), f"{name} {'computed' if one.fp8 else 'did not compute'} in FP8"
        if recipe is not None and one.fp8:
            assert getattr(one.recipe, KINDS[recipe])(), f"{name} computed by {one.recipe}"
        if one.error is not None:
            least, most = (ROUNDED, OUTPUT_ERROR) if one.fp8 else (0.0, ROUNDED)
            assert least <= one.error.item() <= most, f"{name}: {one.error.item():.2%}, not {least:.0%} to {most:.0%}"
