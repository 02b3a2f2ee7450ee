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
    shard = losses.vocabulary_shard(vocab_size=VOCAB, padded_size=PADDED, group=group)
    mine = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    result = losses.token_losses(mine * 1.0, labels, shard)
    ((result.cross_entropy_T + Z * result.squared_lse_T) * weights).sum().backward()
    return result.cross_entropy_T.detach(), result.squared_lse_T.detach(), mine.grad


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
