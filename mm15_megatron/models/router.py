"""The router of a sparse layer: which experts a token visits, who is dropped, and the two router losses.

megatron-core's router normalises its losses by targets, lets padding into capacity and dispatch, and measures capacity
on whatever tokens a rank happens to hold. Here every statistic belongs to something that no layout changes: a row, or a
fixed group of tokens.

T: tokens of this rank (a sequence shard under tensor parallelism); E: experts; K: experts a token visits; R: rows of
the micro-batch; G: capacity groups of this rank; C: tokens of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch.nn import functional as F

from mm15_megatron.models.router_ledger import RouterLedger


@dataclass(frozen=True)
class RoutingRules:
    """How tokens are routed (MM1 section 4: top-2, balance 0.01, router z 0.001).

    Attributes:
        topk: K.
        row_length: tokens of a row.
        balance_loss: seq_aux_loss counts all K choices of a token, gshard_top1 its first choice alone.
        balance_coeff: weight of the balance loss.
        z_coeff: weight of the router z-loss.
        capacity: tokens an expert takes from one group; None = dropless.
        group_size: C.
        drop_policy: who stays when an expert is full: probs = the largest gates, position = first choices before
            second ones, each in token order (GShard).
    """

    topk: int
    row_length: int
    balance_loss: str
    balance_coeff: float
    z_coeff: float
    capacity: int | None
    group_size: int
    drop_policy: str


@dataclass(frozen=True)
class Choices:
    """The experts of each token.

    Attributes:
        experts_TK: int64, best first.
        gates_TK: their weights, summing to 1 (with K = 1 the softmax probability itself).
        scores_TE: softmax over all experts.
    """

    experts_TK: torch.Tensor
    gates_TK: torch.Tensor
    scores_TE: torch.Tensor


def choose(logits_TE: torch.Tensor, topk: int) -> Choices:
    """Pick the top-k experts; gates are the softmax over the chosen logits (g1 / (g1 + g2) of GShard)."""
    scores_TE = torch.softmax(logits_TE, dim=-1)
    best_TK, experts_TK = logits_TE.topk(topk, dim=-1)
    gates_TK = torch.softmax(best_TK, dim=-1) if topk > 1 else scores_TE.gather(1, experts_TK)
    return Choices(experts_TK, gates_TK, scores_TE)


def within_capacity(choices: Choices, padding_T: torch.Tensor, rules: RoutingRules) -> torch.Tensor:
    """Which choices an expert of limited capacity takes, bool [T, K]; padding takes no place.

    Each group of ``rules.group_size`` consecutive tokens fills the experts by itself, so the answer does not depend on
    how many groups a rank holds.
    """
    experts, size, topk = choices.scores_TE.shape[1], rules.group_size, rules.topk
    # One row a group, one column a choice; first choices of all tokens come before any second choice.
    experts_GX = choices.experts_TK.view(-1, size, topk).transpose(1, 2).flatten(1)
    padding_GX = padding_T.view(-1, 1, size).expand(-1, topk, -1).flatten(1)
    gates_GX = choices.gates_TK.detach().view(-1, size, topk).transpose(1, 2).flatten(1)
    if rules.drop_policy == "probs":
        order_GX = gates_GX.masked_fill(padding_GX, -1.0).argsort(dim=1, descending=True, stable=True)
    else:
        order_GX = torch.arange(size * topk, device=experts_GX.device).expand_as(experts_GX)
    wanted_GXE = F.one_hot(experts_GX.gather(1, order_GX), experts)
    wanted_GXE = wanted_GXE * ~padding_GX.gather(1, order_GX)[..., None]
    place_GX = (wanted_GXE.cumsum(dim=1) * wanted_GXE).sum(dim=-1)  # 1 = the first to arrive; 0 = padding
    taken_GX = (place_GX > 0) & (place_GX <= (rules.capacity or 0))
    taken_GX = torch.empty_like(taken_GX).scatter_(1, order_GX, taken_GX)
    return taken_GX.view(-1, topk, size).transpose(1, 2).reshape(-1, topk)


def balance_weights(counts_RE: torch.Tensor, choices_per_token: int) -> torch.Tensor:
    """Weight of a token's probability in the balance loss of its row, [R, E]; the sum over tokens is tokens x loss.

    The balance loss of a row of n tokens is E * sum_e f_e P_e, with f_e = counts / (n * choices) and P_e the mean
    probability: 1 at balance, E if one expert gets everything (Switch, GShard).
    """
    tokens_R1 = counts_RE.sum(dim=-1, keepdim=True) / choices_per_token
    return counts_RE * (counts_RE.shape[-1] / (choices_per_token * tokens_R1.clamp(min=1.0)))


class _AttachLoss(torch.autograd.Function):
    """Hand on a tensor unchanged, and send ``scale`` as the gradient of a loss on the way back."""

    @staticmethod
    def forward(ctx, carrier, loss, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(scale)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (scale,) = ctx.saved_tensors
        return gradient, scale, None


class RowRouter(TopKRouter):
    """megatron-core's router parameters with statistics by row, capacity by group and padding left out.

    In evaluation nothing is dropped and no loss is attached: an answer must not depend on its neighbours (unpublished:
    our default; AXLearn keeps the capacity).

    Args:
        config: the decoder's.
        pg_collection: groups; the tokens of a row may be spread over ``tp_cp``.
        rules: how tokens are routed.
        ledger: adds up the losses and loads of a step and knows the weight of a token's loss in it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        rules: RoutingRules,
        ledger: RouterLedger,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.rules = rules
        self.ledger = ledger

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the tokens of this rank.

        Args:
            logits: fp32 [T, 1, E].
            padding_mask: bool [T, 1], True = padding; None = all tokens are real.

        Returns:
            Gates [T, E], 0 where a token does not go, and the routing map, bool [T, E]; rows of padding are empty.
        """
        logits_TE = logits.flatten(0, 1)
        padding_T = (
            torch.zeros(logits_TE.shape[0], dtype=torch.bool, device=logits.device)
            if padding_mask is None
            else padding_mask.flatten()
        )
        # Whatever stands in padding must not reach a sum, not even times zero.
        logits_TE = logits_TE.masked_fill(padding_T[:, None], 0.0)
        choices = choose(logits_TE, self.rules.topk)
        counted = self.training and torch.is_grad_enabled()  # a recomputed pass counts when it is run again
        taken_TK = ~padding_T[:, None].expand(-1, self.rules.topk)
        if self.rules.capacity is not None and self.training:
            taken_TK = within_capacity(choices, padding_T, self.rules)
        nowhere_TE = torch.zeros_like(logits_TE)
        map_TE = nowhere_TE.bool().scatter(1, choices.experts_TK, taken_TK)
        gates_TE = nowhere_TE.scatter(1, choices.experts_TK, choices.gates_TK * taken_TK)
        if counted:
            gates_TE = self._with_losses(gates_TE, logits_TE, choices, padding_T, taken_TK)
        return gates_TE, map_TE

    def _with_losses(
        self,
        gates_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        choices: Choices,
        padding_T: torch.Tensor,
        taken_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Attach the sums of both losses over this rank's real tokens and enter them in the ledger."""
        rules, real_T = self.rules, ~padding_T
        wanted_TE = torch.zeros_like(logits_TE).scatter(1, choices.experts_TK, 1.0) * real_T[:, None]
        counted, per_token = wanted_TE, rules.topk
        if rules.balance_loss == "gshard_top1":
            counted, per_token = F.one_hot(choices.experts_TK[:, 0], logits_TE.shape[1]) * real_T[:, None], 1
        row_T, rows = self._rows(logits_TE.shape[0], logits_TE.device)
        counts_RE = logits_TE.new_zeros(rows, logits_TE.shape[1]).index_add_(0, row_T, counted.to(logits_TE.dtype))
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(counts_RE, group=self.tp_cp_group)
        weight_TE = balance_weights(counts_RE, per_token)[row_T]
        balance = (choices.scores_TE * weight_TE * real_T[:, None]).sum()
        z = (logits_TE.logsumexp(dim=-1).square() * real_T).sum()
        self.ledger.add(
            self.layer_number - 1,
            balance=balance.detach(),
            z=z.detach(),
            wanted_E=wanted_TE.sum(dim=0),
            dropped=wanted_TE.sum() - taken_TK.sum(),
        )
        loss = rules.balance_coeff * balance + rules.z_coeff * z
        return _AttachLoss.apply(gates_TE, loss, self.ledger.loss_scale)

    def _rows(self, tokens: int, device: torch.device) -> tuple[torch.Tensor, int]:
        """Row of each token of this rank, and the rows of the micro-batch."""
        shards, shard = self.tp_cp_group.size(), self.tp_cp_group.rank()
        index_T = torch.arange(shard * tokens, (shard + 1) * tokens, device=device)
        return index_T // self.rules.row_length, -(-tokens * shards // self.rules.row_length)
