"""Faults to plant: each breaks one rule in every rank of a layout, as a wrong line in the package would."""

from __future__ import annotations

from typing import Any

import torch

from mm15_megatron.models import mm_model
from mm15_megatron.models.image_merge import merge_image_tokens
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.models.rope import rotary_table
from mm15_megatron.models.router_ledger import RouterLedger
from mm15_megatron.models.sparse_layer import SparseFeedForward
from mm15_megatron.models.vision_encoder import VisionEncoder
from mm15_megatron.parallel import reduce
from mm15_megatron.parity import trace
from mm15_megatron.training import optimizer, step


def wrong_positions() -> None:
    """Rotary positions advance once in three tokens."""
    mm_model.rotary_table = lambda ids, **kwargs: rotary_table(ids // 3, **kwargs)


def encoder_reduction_undone() -> None:
    """The gradients of the tiles of other ranks are not added."""
    reduce.sum_over_tensor_group = lambda parameters, topology: None


def norm_counted_twice() -> None:
    """The gradient norm is that of two copies of the model."""
    square = step.squared_gradient_norm
    step.squared_gradient_norm = lambda optimizer, *, device: 2.0 * square(optimizer, device=device)


def update_forgets_the_connector() -> None:
    """The optimizer leaves out the parameters of the connector, whose gradients and norm are right."""
    build = optimizer.build_optimizer

    def without_connector(cfg: Any, chunks: Any) -> Any:
        built = build(cfg, chunks)
        take = built.step_with_ready_grads

        def update() -> bool:
            kept = [(p, p.detach().clone()) for p in chunks[0].module.connector.parameters()]
            applied = take()
            for parameter, value in kept:
                parameter.data.copy_(value)
            return applied

        built.step_with_ready_grads = update
        return built

    trace.build_optimizer = without_connector


def dummy_times_zero() -> None:
    """The dummy tile overflows, and instead of being dropped by index its tokens are multiplied by zero."""
    encode = VisionEncoder.forward

    def overflowing(self: VisionEncoder, tiles_N3HW: torch.Tensor) -> torch.Tensor:
        blank_N = (tiles_N3HW == 0).flatten(1).all(dim=1)
        return encode(self, tiles_N3HW).masked_fill(blank_N[:, None, None], torch.inf)

    def with_dummies(self: MM15Model, batch: Any) -> torch.Tensor:
        return self.connector(self.vision_encoder(batch.tiles_N3HW))

    def merged(text_T1H: torch.Tensor, tokens_NPH: torch.Tensor, slots_NP: torch.Tensor) -> torch.Tensor:
        real, dummies = tokens_NPH[: len(slots_NP)], tokens_NPH[len(slots_NP) :]
        return merge_image_tokens(text_T1H, real, slots_NP) + 0.0 * dummies.sum()

    VisionEncoder.forward, MM15Model.image_tokens = overflowing, with_dummies
    mm_model.merge_image_tokens = merged


def expert_reduction_undone() -> None:
    """Expert gradients are reduced over the data-parallel group of the other parameters."""
    build = SparseFeedForward.__init__

    def mark(self: SparseFeedForward, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for parameter in self.experts.parameters():
            parameter.allreduce = True

    SparseFeedForward.__init__ = mark


def router_losses_over_targets() -> None:
    """Router losses are divided by the targets of the batch instead of its tokens."""
    begin = RouterLedger.begin
    RouterLedger.begin = lambda self, *, loss_scale: begin(self, loss_scale=torch.ones_like(loss_scale))


def padding_routed() -> None:
    """The routers take padding for tokens."""
    padding = MM15Model._padding
    MM15Model._padding = lambda self, batch: torch.zeros_like(padding(self, batch))


def rank_one_dies() -> None:
    """One rank raises while the others compute."""
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("planted")
