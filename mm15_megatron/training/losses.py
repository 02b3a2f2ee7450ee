"""Language-model losses on vocabulary-parallel logits.

One pass over the logits leaves both the losses and the gradient: a chunk of tokens becomes the exponentials of its
shifted logits, and these become the gradient once their sum is known on all ranks. What is kept for the backward pass
is the gradient in the storage of the logits; the backward pass multiplies it by the gradient of the total.

T: tokens of the packed row; V: this rank's share of the padded vocabulary; C: tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from mm15_megatron.accounting import LOSS_CHUNK_TOKENS

CHUNK_TOKENS = LOSS_CHUNK_TOKENS
_LOWEST = torch.finfo(torch.float32).min

Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class TargetLosses:
    """Losses of a packed row, fp32, equal on every rank of the tensor-parallel group.

    Attributes:
        total: scalar, sum over tokens of weight x (cross-entropy + z-loss coefficient x squared logsumexp); the only
            one that carries a gradient.
        cross_entropy_T: -log p(label) of each token, not weighted.
        squared_lse_T: logsumexp(logits) ** 2 of each token, the LM z-loss before its coefficient.
    """

    total: torch.Tensor
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


@dataclass(frozen=True)
class LossKernels:
    """The two passes over a chunk of logits.

    Attributes:
        statistics: (logits_CV, labels_C, start, real) -> fp32 [C] peak of this rank's logits, sum of their exponentials
            relative to that peak, logit of the label where this rank holds it and 0 elsewhere; and these exponentials,
            fp32 [C, V], or None.
        write_gradient: (logits_CV, exponentials_CV, labels_C, peak_C, lse_C, slope_C, weight_C, start, real) -> None;
            writes slope x softmax - weight x one-hot(label) over the logits, 0 in padding columns.
    """

    statistics: Callable[..., Statistics]
    write_gradient: Callable[..., None]


def loss_kernels(*, compiled: bool) -> LossKernels:
    """Choose how the passes are computed.

    Eagerly the exponentials of a chunk are kept between the passes (in the logits themselves if these are fp32).
    Compiled, each pass is one fused reduction or one fused write on the logits in their own dtype, and nothing of the
    chunk's size is kept: computing an exponential again costs less than the memory it would go through. Compilation
    takes place at the first use, once for each length of a chunk: a row has one, and one more if the last is shorter.
    """
    if not compiled:
        return LossKernels(_statistics, _write_gradient)
    return LossKernels(
        torch.compile(_fused_statistics, dynamic=False, fullgraph=True),
        torch.compile(_fused_write_gradient, dynamic=False, fullgraph=True),
    )


def vocabulary_shard(*, vocab_size: int, padded_size: int, group: ProcessGroup) -> VocabularyShard:
    """Describe this rank's share of a vocabulary of ``vocab_size`` ids padded to ``padded_size``."""
    width = padded_size // group.size()
    start = width * group.rank()
    return VocabularyShard(group=group, start=start, real=max(0, min(width, vocab_size - start)))


def target_losses(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    weight_T: torch.Tensor,
    *,
    shard: VocabularyShard,
    kernels: LossKernels,
    z_loss_coeff: float,
) -> TargetLosses:
    """Cross-entropy and squared logsumexp of every token (MM1: z-loss 1e-4 for the 30B model; AXLearn's formula).

    An fp32 copy of the logits exists for one chunk of tokens at a time at most, and the gradient is written into the
    storage of ``logits_TV``: nobody else may read the logits after this call, and there is one backward pass.

    Args:
        logits_TV: this rank's logits, any floating dtype, not a leaf.
        labels_T: int64 target ids; tokens without a target may hold any id of the vocabulary.
        weight_T: fp32, what each token's loss weighs in the total; 0 without a target.
        shard: which ids the columns are.
        kernels: how the passes are computed.
        z_loss_coeff: weight of the squared logsumexp beside the cross-entropy.
    """
    return TargetLosses(*_VocabularyLosses.apply(logits_TV, labels_T, weight_T, shard, kernels, z_loss_coeff))


class _VocabularyLosses(torch.autograd.Function):
    """Forward leaves the gradient of the total in the logits; backward scales it."""

    @staticmethod
    def forward(ctx, logits_TV, labels_T, weight_T, shard, kernels, z_loss_coeff):  # type: ignore[no-untyped-def]
        lse_T = logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)
        target_T = torch.empty_like(lse_T)
        for part in _chunks(logits_TV.shape[0]):
            logits_CV, labels_C, weight_C = logits_TV[part], labels_T[part], weight_T[part]
            peak_C, sum_C, own_C, exponentials_CV = kernels.statistics(logits_CV, labels_C, shard.start, shard.real)
            lse_C, target_T[part] = _over_vocabulary(peak_C, sum_C, own_C, shard.group)
            if ctx.needs_input_grad[0]:
                slope_C = weight_C * (1.0 + 2.0 * z_loss_coeff * lse_C)
                kernels.write_gradient(
                    logits_CV, exponentials_CV, labels_C, peak_C, lse_C, slope_C, weight_C, shard.start, shard.real
                )
            lse_T[part] = lse_C
        cross_entropy_T, squared_T = lse_T - target_T, lse_T.square()
        ctx.save_for_backward(logits_TV)
        ctx.mark_non_differentiable(cross_entropy_T, squared_T)
        return (weight_T * (cross_entropy_T + z_loss_coeff * squared_T)).sum(), cross_entropy_T, squared_T

    @staticmethod
    def backward(ctx, grad_total, *unused):  # type: ignore[no-untyped-def]
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV.data.mul_(grad_total.to(gradient_TV.dtype)), None, None, None, None, None


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_TOKENS, tokens)) for start in range(0, tokens, CHUNK_TOKENS)]


def _over_vocabulary(
    peak_C: torch.Tensor, sum_C: torch.Tensor, own_C: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logsumexp and the label's logit over the whole vocabulary."""
    if group.size() == 1:
        return sum_C.log() + peak_C, own_C
    whole_C = peak_C.clone()
    torch.distributed.all_reduce(whole_C, op=torch.distributed.ReduceOp.MAX, group=group)
    sums_2C = torch.stack((sum_C * (peak_C - whole_C).exp(), own_C))
    torch.distributed.all_reduce(sums_2C, group=group)
    return sums_2C[0].log() + whole_C, sums_2C[1]


def _columns(labels_C: torch.Tensor, start: int, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each label in this shard (clamped), [C, 1], and whether the shard holds it, [C]."""
    column_C = labels_C - start
    mine_C = (column_C >= 0) & (column_C < real)
    return column_C.clamp(0, max(real - 1, 0))[:, None], mine_C


def _statistics(logits_CV: torch.Tensor, labels_C: torch.Tensor, start: int, real: int) -> Statistics:
    work_CV = logits_CV.float()  # the logits themselves if they are fp32
    if real < work_CV.shape[1]:
        work_CV[:, real:] = float("-inf")
    peak_C = work_CV.amax(dim=-1).clamp_(min=_LOWEST)  # finite where the shard holds padding alone
    column_C1, mine_C = _columns(labels_C, start, real)
    own_C = torch.where(mine_C, work_CV.gather(1, column_C1)[:, 0], 0.0)
    work_CV.sub_(peak_C[:, None]).exp_()
    return peak_C, work_CV.sum(dim=-1), own_C, work_CV


def _write_gradient(
    logits_CV: torch.Tensor,
    exponentials_CV: torch.Tensor,
    labels_C: torch.Tensor,
    peak_C: torch.Tensor,
    lse_C: torch.Tensor,
    slope_C: torch.Tensor,
    weight_C: torch.Tensor,
    start: int,
    real: int,
) -> None:
    column_C1, mine_C = _columns(labels_C, start, real)
    gradient_CV = exponentials_CV.mul_((slope_C * (peak_C - lse_C).exp())[:, None])
    gradient_CV.scatter_add_(1, column_C1, torch.where(mine_C, -weight_C, 0.0)[:, None])
    if gradient_CV is not logits_CV:
        logits_CV.copy_(gradient_CV)


def _fused_statistics(logits_CV: torch.Tensor, labels_C: torch.Tensor, start: int, real: int) -> Statistics:
    real_CV = _masked(logits_CV, real)
    peak_C = real_CV.amax(dim=-1).clamp(min=_LOWEST)
    column_C1, mine_C = _columns(labels_C, start, real)
    own_C = torch.where(mine_C, logits_CV.gather(1, column_C1)[:, 0].float(), 0.0)
    return peak_C, (real_CV - peak_C[:, None]).exp().sum(dim=-1), own_C, None


def _fused_write_gradient(
    logits_CV: torch.Tensor,
    no_exponentials: None,
    labels_C: torch.Tensor,
    peak_C: torch.Tensor,
    lse_C: torch.Tensor,
    slope_C: torch.Tensor,
    weight_C: torch.Tensor,
    start: int,
    real: int,
) -> None:
    column_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    is_label_CV = (column_V == (labels_C - start)[:, None]) & (column_V < real)
    softmax_CV = (_masked(logits_CV, real) - lse_C[:, None]).exp()
    logits_CV.copy_(slope_C[:, None] * softmax_CV - torch.where(is_label_CV, weight_C[:, None], 0.0))


def _masked(logits_CV: torch.Tensor, real: int) -> torch.Tensor:
    """The logits in fp32 with padding columns at minus infinity."""
    if real == logits_CV.shape[1]:
        return logits_CV.float()
    column_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    return torch.where(column_V < real, logits_CV.float(), float("-inf"))
