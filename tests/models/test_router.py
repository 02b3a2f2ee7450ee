"""Routing rules against definitions written out token by token, and what must not change them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mm15_megatron.models.router import RoutingRules, RowRouter, balance_weights, choose, within_capacity
from mm15_megatron.models.router_ledger import BALANCE, LOAD, RouterLedger, Z
from mm15_megatron.models.transformer_config import language_transformer_config
from mm15_megatron.parallel.topology import Topology
from tests.helpers.layouts import debug_config

RULES = RoutingRules(
    topk=2,
    row_length=16,
    balance_loss="seq_aux_loss",
    balance_coeff=0.01,
    z_coeff=0.001,
    capacity=3,
    group_size=8,
    drop_policy="position",
)
# One sum in another order.
FP32_SUM = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture
def logits_TE() -> torch.Tensor:
    """32 tokens, 4 experts, the first one popular."""
    logits = torch.randn(32, 4, generator=torch.Generator().manual_seed(3))
    logits[:, 0] += 1.0
    return logits


@pytest.fixture
def padding_T() -> torch.Tensor:
    """Padding at the end of the second row."""
    padding = torch.zeros(32, dtype=torch.bool)
    padding[26:] = True
    return padding


def test_gates_are_gshards(logits_TE: torch.Tensor) -> None:
    """g1 / (g1 + g2) of the softmax over all experts, best expert first."""
    choices = choose(logits_TE, 2)
    probabilities = torch.softmax(logits_TE, dim=-1)
    best = probabilities.sort(dim=-1, descending=True)
    assert torch.equal(choices.experts_TK, best.indices[:, :2])
    gates = best.values[:, :2] / best.values[:, :2].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(choices.gates_TK, gates, **FP32_SUM)


def test_one_expert_keeps_its_probability(logits_TE: torch.Tensor) -> None:
    """With top-1 the gate is the softmax probability: a gate of one would teach the router nothing."""
    choices = choose(logits_TE, 1)
    torch.testing.assert_close(choices.gates_TK[:, 0], choices.scores_TE.max(dim=-1).values, **FP32_SUM)


@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize("capacity", [1, 3, 8])
def test_capacity_token_by_token(logits_TE: torch.Tensor, padding_T: torch.Tensor, policy: str, capacity: int) -> None:
    """Each group of 8 tokens fills the experts by itself, in the policy's order, without padding."""
    rules = replace(RULES, capacity=capacity, drop_policy=policy)
    choices = choose(logits_TE, 2)
    expected = torch.zeros(32, 2, dtype=torch.bool)
    for start in range(0, 32, 8):
        queue = [(t, k) for k in range(2) for t in range(start, start + 8) if not padding_T[t]]
        if policy == "probs":
            queue.sort(key=lambda place: -float(choices.gates_TK[place]))
        room = [capacity] * 4
        for token, k in queue:
            expert = int(choices.experts_TK[token, k])
            if room[expert]:
                room[expert] -= 1
                expected[token, k] = True
    assert torch.equal(within_capacity(choices, padding_T, rules), expected)
    if capacity < 8:
        assert not expected[:26].all(), "the case drops someone"


def test_second_choices_wait_for_all_first_choices() -> None:
    """A late first choice displaces an early second one (megatron-core's position policy would not)."""
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    taken = within_capacity(
        choose(logits, 2), torch.zeros(4, dtype=torch.bool), replace(RULES, capacity=3, group_size=4)
    )
    assert taken.tolist() == [[True, False], [True, True], [True, True], [True, False]]


def test_capacity_does_not_see_other_groups(logits_TE: torch.Tensor, padding_T: torch.Tensor) -> None:
    """A rank that holds half of the groups decides the same for them."""
    whole = within_capacity(choose(logits_TE, 2), padding_T, RULES)
    halves = [
        within_capacity(choose(part, 2), pad, RULES)
        for part, pad in zip(logits_TE.chunk(2), padding_T.chunk(2), strict=True)
    ]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("choices_per_token", [1, 2])
def test_balance_loss_of_a_row(logits_TE: torch.Tensor, choices_per_token: int) -> None:
    """Weights times probabilities, summed over a row, are its tokens times E * sum f_e P_e."""
    scores, rows = torch.softmax(logits_TE, dim=-1), logits_TE.view(2, 16, 4)
    counts_RE = torch.zeros(2, 4)
    for row in range(2):
        for token in range(16):
            for expert in rows[row, token].topk(choices_per_token).indices:
                counts_RE[row, expert] += 1
    weights_RE = balance_weights(counts_RE, choices_per_token)
    for row in range(2):
        share = counts_RE[row] / (16 * choices_per_token)
        loss = 4 * (share * scores.view(2, 16, 4)[row].mean(dim=0)).sum()
        found = (weights_RE[row] * scores.view(2, 16, 4)[row]).sum()
        torch.testing.assert_close(found, 16 * loss, **FP32_SUM)


def test_balance_is_one_when_balanced_and_experts_when_collapsed() -> None:
    """The scale of the published coefficient."""
    even = balance_weights(torch.full((1, 4), 8.0), 2)
    assert even.tolist() == [[1.0] * 4]
    collapsed = balance_weights(torch.tensor([[16.0, 0.0, 0.0, 0.0]]), 1)
    assert collapsed.tolist() == [[4.0, 0.0, 0.0, 0.0]]


def test_row_of_padding_has_no_weight() -> None:
    """No division by zero for a row without a token."""
    assert balance_weights(torch.zeros(1, 4), 2).tolist() == [[0.0] * 4]
    assert math.isfinite(float(balance_weights(torch.zeros(1, 4), 2).sum()))


@pytest.mark.parametrize("variant", ["seq_aux_loss", "gshard_top1"])
def test_attached_losses_are_the_written_formula(
    variant: str, one_rank: Topology, logits_TE: torch.Tensor, padding_T: torch.Tensor
) -> None:
    """The gradient that reaches the logits, and the sums in the books, against autograd on the definition.

    loss = scale * (0.01 * sum over rows of n E sum_e f_e P_e + 0.001 * sum over tokens of logsumexp ** 2), real tokens.
    """
    scale, experts = 0.37, 4
    rules = replace(RULES, balance_loss=variant, capacity=None)
    ledger = RouterLedger([1], experts=experts, device="cpu")
    ledger.begin(loss_scale=torch.tensor(scale))
    config = language_transformer_config(debug_config("debug_moe"))
    router = RowRouter(config, pg_collection=one_rank.groups, rules=rules, ledger=ledger)
    router.set_layer_number(2)
    given = logits_TE[:, None].clone().requires_grad_()
    gates_TE, map_TE = router.routing(given, padding_T[:, None])
    (gates_TE * 0.0).sum().backward()

    logits = logits_TE.clone().requires_grad_()
    balance, z, chosen = torch.zeros(()), torch.zeros(()), torch.zeros(experts)
    for row in (slice(0, 16), slice(16, 26)):
        scores, k = torch.softmax(logits[row], dim=-1), 1 if variant == "gshard_top1" else 2
        counts = torch.bincount(logits_TE[row].topk(k).indices.flatten(), minlength=experts)
        tokens = row.stop - row.start
        balance = balance + tokens * experts * (counts / (tokens * k) * scores.mean(dim=0)).sum()
        z = z + logits[row].logsumexp(dim=-1).square().sum()
        chosen += torch.bincount(logits_TE[row].topk(2).indices.flatten(), minlength=experts)
    (scale * (rules.balance_coeff * balance + rules.z_coeff * z)).backward()
    torch.testing.assert_close(given.grad[:, 0], logits.grad, rtol=1e-5, atol=1e-9)
    assert logits.grad[:26].abs().min() > 1e-7, "every real token is taught something"
    assert not map_TE[26:].any()
    assert ledger.totals[0, BALANCE].item() == pytest.approx(balance.item(), rel=1e-6)
    assert ledger.totals[0, Z].item() == pytest.approx(z.item(), rel=1e-6)
    assert ledger.totals[0, LOAD:].tolist() == chosen.tolist()


def test_what_stands_in_padding_reaches_nothing(one_rank: Topology, logits_TE: torch.Tensor) -> None:
    """Not a number in a padding token stays there."""
    ledger = RouterLedger([1], experts=4, device="cpu")
    ledger.begin(loss_scale=torch.tensor(1.0))
    config = language_transformer_config(debug_config("debug_moe"))
    router = RowRouter(config, pg_collection=one_rank.groups, rules=RULES, ledger=ledger)
    router.set_layer_number(2)
    padding = torch.zeros(32, dtype=torch.bool)
    padding[30:] = True
    logits = logits_TE.masked_fill(padding[:, None], torch.nan)[:, None].requires_grad_()
    gates, _ = router.routing(logits, padding[:, None])
    gates.sum().backward()
    assert gates.isfinite().all()
    assert logits.grad.isfinite().all()
    assert ledger.totals.isfinite().all()
