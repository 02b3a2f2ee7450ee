"""Rotary embedding and core attention against plain formulas written here."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from mm15_megatron.models.attention import LocalCoreAttention, packed_rows
from mm15_megatron.models.rope import apply_rotary, rotary_table

FP32 = {"rtol": 1e-5, "atol": 1e-6}


def core(mask: AttnMaskType) -> LocalCoreAttention:
    """A core attention as megatron-core builds it."""
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4)
    return LocalCoreAttention(config=config, layer_number=1, attn_mask_type=mask, attention_type="self")


def test_rotation_matches_complex_multiplication(generator: torch.Generator) -> None:
    """Half-rotation is a rotation of (x_i, x_{i + K/2}) by position * base^(-2i/K)."""
    positions = torch.tensor([0, 1, 7, 3])
    x = torch.randn(4, 2, 8, generator=generator)
    rotated = apply_rotary(x, rotary_table(positions, head_dim=8, base=100.0))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = positions[:, None] * 100.0 ** (-torch.arange(4) * 2 / 8)[None]
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), dim=-1), **FP32)


def test_rotation_depends_on_distance_alone(generator: torch.Generator) -> None:
    """The product of a rotated query and key is a function of their distance."""
    q, k = torch.randn(2, 1, 1, 16, generator=generator).unbind()
    products = []
    for shift in (0, 5, 200):
        table = rotary_table(torch.tensor([3 + shift, 1 + shift]), head_dim=16, base=10000.0)
        rotated = apply_rotary(torch.cat((q, k)), table)
        products.append((rotated[0] * rotated[1]).sum())
    torch.testing.assert_close(products[0], products[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(products[0], products[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("explicit_mask", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_attention_equals_a_dense_masked_softmax(
    kv_heads: int, explicit_mask: bool, generator: torch.Generator
) -> None:
    """Segments attend causally to themselves alone, with grouped key/value heads, forward and backward."""
    bounds = [0, 3, 3, 9, 10, 10, 10]
    q = torch.randn(10, 4, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(10, kv_heads, 8, generator=generator, requires_grad=True) for _ in range(2))
    rows = packed_rows(torch.tensor(bounds, dtype=torch.int32), max_segment=10, rotary=None)
    if explicit_mask:
        rows.segments = None  # as on a GPU, where the bounds stay on the device
    out = core(AttnMaskType.causal)(q, k, v, packed_seq_params=rows)

    segment = torch.bucketize(torch.arange(10), torch.tensor(sorted(set(bounds))[1:]), right=True)
    allowed = (segment[:, None] == segment[None]) & (torch.arange(10)[:, None] >= torch.arange(10)[None])
    repeated = [x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v)]
    scores = torch.einsum("qnk,snk->nqs", q, repeated[0]) / math.sqrt(8)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = torch.einsum("nqs,snk->qnk", weights, repeated[1]).flatten(1)
    torch.testing.assert_close(out, expected, **FP32)

    probe = torch.randn(out.shape, generator=generator)
    for mine, reference in zip(
        torch.autograd.grad((out * probe).sum(), (q, k, v)),
        torch.autograd.grad((expected * probe).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, **FP32)


def test_encoder_attention_sees_everything(generator: torch.Generator) -> None:
    """Without bounds every token of a tile attends to every other of the same tile."""
    q, k, v = torch.randn(3, 5, 2, 4, 8, generator=generator).unbind()
    out = core(AttnMaskType.no_mask)(q, k, v)
    scores = torch.einsum("qbnk,sbnk->bnqs", q, k) / math.sqrt(8)
    expected = torch.einsum("bnqs,sbnk->qbnk", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(out, expected, **FP32)


def test_varlen_kernel_accepts_the_call() -> None:
    """The CUDA kernel's front end takes our arguments and answers with the right shape (on meta tensors)."""
    q = torch.empty(10, 4, 16, device="meta", dtype=torch.bfloat16)
    k, v = (torch.empty(10, 2, 16, device="meta", dtype=torch.bfloat16) for _ in range(2))
    rows = packed_rows(torch.empty(5, device="meta", dtype=torch.int32), max_segment=10, rotary=None)
    assert rows.segments is None
    assert core(AttnMaskType.causal)(q, k, v, packed_seq_params=rows).shape == (10, 64)
