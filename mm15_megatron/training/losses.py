"""Language-model losses on vocabulary-parallel logits.

T: tokens of the packed row; V: this rank's share of the padded vocabulary; C: tokens of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class TokenLosses:
    """Per-token losses, fp32 [T], equal on every rank of the tensor-parallel group.

    Attributes:
        cross_entropy_T: -log p(label).
        squared_lse_T: logsumexp(logits) ** 2, the LM z-loss before its coefficient.
    """

    cross_entropy_T: torch.Tensor
    squared_lse_T: torch.Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the vocabulary whose logits this rank holds.

    Attributes:
        group: tensor-parallel group.
        start: first token id of the shard.
        real: how many of the shard's columns are real token ids; the rest is padding and never gets probability.
    """

    group: ProcessGroup
    start: int
    real: int


def vocabulary_shard(*, vocab_size: int, padded_size: int, group: ProcessGroup) -> VocabularyShard:
    """Describe this rank's share of a vocabulary of ``vocab_size`` ids padded to ``padded_size``."""
    width = padded_size // group.size()
    start = width * group.rank()
    return VocabularyShard(group=group, start=start, real=max(0, min(width, vocab_size - start)))


def token_losses(logits_TV: torch.Tensor, labels_T: torch.Tensor, shard: VocabularyShard) -> TokenLosses:
    """Cross-entropy and squared logsumexp of every token (MM1: z-loss 1e-4 for the 30B model; AXLearn's formula).

    The fp32 copy of the logits exists for one chunk of tokens at a time, and the gradient is written into the storage
    of ``logits_TV``: nobody else may read the logits after this call.

    Args:
        logits_TV: this rank's logits, any floating dtype.
        labels_T: int64 target ids; tokens without a target may hold any id of the vocabulary, their loss is to be
            masked.
        shard: which ids the columns are.
    """
    cross_entropy, squared = _VocabularyLosses.apply(logits_TV, labels_T, shard)
    return TokenLosses(cross_entropy, squared)


class _VocabularyLosses(torch.autograd.Function):
    """Forward keeps the logits and their logsumexp; backward recomputes each chunk's softmax in place."""

    @staticmethod
    def forward(ctx, logits_TV, labels_T, shard):  # type: ignore[no-untyped-def]
        tokens = logits_TV.shape[0]
        lse_T = logits_TV.new_empty(tokens, dtype=torch.float32)
        target_T = torch.empty_like(lse_T)
        for part in _chunks(tokens):
            logits_CV = _real_logits(logits_TV[part], shard)
            lse_T[part], target_T[part] = _reduce(logits_CV, labels_T[part], shard)
        ctx.save_for_backward(logits_TV, labels_T, lse_T)
        ctx.shard = shard
        return lse_T - target_T, lse_T.square()

    @staticmethod
    def backward(ctx, grad_ce_T, grad_sq_T):  # type: ignore[no-untyped-def]
        logits_TV, labels_T, lse_T = ctx.saved_tensors
        shard = ctx.shard
        with torch.no_grad():
            for part in _chunks(logits_TV.shape[0]):
                softmax_CV = (_real_logits(logits_TV[part], shard) - lse_T[part, None]).exp_()
                softmax_CV *= (grad_ce_T[part] + 2.0 * lse_T[part] * grad_sq_T[part])[:, None]
                column_C, mine_C = _columns(labels_T[part], shard)
                softmax_CV.scatter_add_(1, column_C[:, None], torch.where(mine_C, -grad_ce_T[part], 0.0)[:, None])
                logits_TV.data[part] = softmax_CV.to(logits_TV.dtype)
        return logits_TV.data, None, None


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_TOKENS, tokens)) for start in range(0, tokens, CHUNK_TOKENS)]


def _real_logits(logits_CV: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    logits_CV = logits_CV.to(torch.float32, copy=True)
    logits_CV[:, shard.real :] = float("-inf")
    return logits_CV


def _columns(labels_C: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each label in this shard (clamped), and whether the shard holds it."""
    column_C = labels_C - shard.start
    mine_C = (column_C >= 0) & (column_C < shard.real)
    return column_C.clamp(0, max(shard.real - 1, 0)), mine_C


def _reduce(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logsumexp and the label's logit over the whole vocabulary."""
    peak_C = logits_CV.amax(dim=-1)
    parallel = shard.group.size() > 1
    if parallel:
        torch.distributed.all_reduce(peak_C, op=torch.distributed.ReduceOp.MAX, group=shard.group)
    column_C, mine_C = _columns(labels_C, shard)
    target_C = torch.where(mine_C, logits_CV.gather(1, column_C[:, None])[:, 0], 0.0)
    sums_2C = torch.stack(((logits_CV - peak_C[:, None]).exp_().sum(dim=-1), target_C))
    if parallel:
        torch.distributed.all_reduce(sums_2C, group=shard.group)
    return sums_2C[0].log() + peak_C, sums_2C[1]
