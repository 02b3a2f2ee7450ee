"""Vocabulary-parallel losses against torch, on one and on two ranks, with and without padded ids."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.training import losses

TOKENS, VOCAB, PADDED, Z = 37, 50, 64, 0.3
FP32 = {"rtol": 2e-6, "atol": 2e-6}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, padded V], labels and weights."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, PADDED, generator=g) * 3
    return logits, torch.randint(0, VOCAB, (TOKENS,), generator=g), torch.rand(TOKENS, generator=g)


def expected() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, squared logsumexp and the gradient of their weighted sum, by torch over the real ids."""
    logits, labels, weights = inputs()
    logits.requires_grad_()
    real = logits[:, :VOCAB]
    ce = F.cross_entropy(real, labels, reduction="none")
    squared = real.logsumexp(-1).square()
    ((ce + Z * squared) * weights).sum().backward()
    assert logits.grad is not None
    return ce.detach(), squared.detach(), logits.grad


def on_rank(chunk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by ours on this rank's share of the vocabulary."""
    losses.CHUNK_TOKENS = chunk
    logits, labels, weights = inputs()
    group = torch.distributed.group.WORLD
    mine = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    result = losses.target_losses(
        mine * 1.0,
        labels,
        weights,
        shard=losses.vocabulary_shard(vocab_size=VOCAB, padded_size=PADDED, group=group),
        kernels=losses.loss_kernels(compiled=False),
        z_loss_coeff=Z,
    )
    weighted = ((result.cross_entropy_T + Z * result.squared_lse_T) * weights).sum()
    torch.testing.assert_close(result.total.detach(), weighted, **FP32)
    (result.total * 1.0).backward()
    return result.cross_entropy_T, result.squared_lse_T, mine.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [8, 1024])
def test_losses_and_gradients_equal_torch(world_size: int, chunk: int) -> None:
    """Any number of ranks, any chunk; with four ranks the last shard holds padding alone."""
    answers = run_on_ranks(on_rank, world_size, chunk=chunk)
    ce, squared, gradient = expected()
    for answer in answers:
        torch.testing.assert_close(answer[0], ce, **FP32)
        torch.testing.assert_close(answer[1], squared, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(torch.cat([a[2] for a in answers], dim=1), gradient, rtol=2e-5, atol=2e-6)


class _Logits(torch.autograd.Function):
    """Hands logits on and notes where they and their gradient lie."""

    @staticmethod
    def forward(ctx, logits, places):  # type: ignore[no-untyped-def]
        ctx.places = places
        out = logits.clone()
        places.append(out.data_ptr())
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        ctx.places.append(gradient.data_ptr())
        return gradient, None


def in_half_precision() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Gradient of bf16 logits, that of the same logits in fp32, and where logits and gradient lie."""
    group = torch.distributed.group.WORLD
    logits, labels, weights = inputs()
    rounded, places, gradients = logits.bfloat16(), [], []
    for given in (rounded, rounded.float()):
        leaf = given[None].clone().requires_grad_()
        result = losses.target_losses(
            _Logits.apply(leaf, places).flatten(0, 1),
            labels,
            weights,
            shard=losses.vocabulary_shard(vocab_size=VOCAB, padded_size=PADDED, group=group),
            kernels=losses.loss_kernels(compiled=False),
            z_loss_coeff=Z,
        )
        result.total.backward()
        gradients.append(leaf.grad[0])
    return *gradients, places


def test_gradient_lies_where_the_logits_were_and_is_rounded_once() -> None:
    """In either dtype no second tensor of the logits' size exists; bf16 gradients are the fp32 ones, rounded."""
    ((half, whole, places),) = run_on_ranks(in_half_precision, 1)
    assert places[0] == places[1]
    assert places[2] == places[3]
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, whole.bfloat16())


def without_gradient() -> tuple[bool, torch.Tensor]:
    """In evaluation: whether the total asks for a backward pass, and the losses."""
    logits, labels, weights = inputs()
    shard = losses.vocabulary_shard(vocab_size=VOCAB, padded_size=PADDED, group=torch.distributed.group.WORLD)
    kernels = losses.LossKernels(losses.loss_kernels(compiled=False).statistics, _no_gradient)
    result = losses.target_losses(logits, labels, weights, shard=shard, kernels=kernels, z_loss_coeff=Z)
    return result.total.requires_grad, result.cross_entropy_T


def _no_gradient(*arguments: object) -> None:
    raise AssertionError("evaluation computed a gradient")


def test_evaluation_computes_no_gradient() -> None:
    """Logits that need none are passed over once."""
    ((asks, cross_entropy),) = run_on_ranks(without_gradient, 1)
    assert not asks
    torch.testing.assert_close(cross_entropy, expected()[0], **FP32)
