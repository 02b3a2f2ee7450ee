"""Attention over packed rows on a GPU: a row's bounds are padded to a constant number, which may change nothing."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from mm15_megatron.data.packing import MAX_SAMPLES_PER_ROW
from mm15_megatron.models.attention import LocalCoreAttention, packed_rows
from mm15_megatron.models.backend import resolve_backend
from mm15_megatron.models.transformer_config import language_transformer_config
from mm15_megatron.parallel.topology import Topology

from .marks import IMPLEMENTATIONS
from .models import gpu_config, relative
from .tolerances import BF16, BF16_GRADIENT, BF16_ORDER

TOKENS = 512
SEGMENTS = MAX_SAMPLES_PER_ROW + 1
"""Of one row: as many samples as may be packed, and the padding behind them."""


def attended(
    core: torch.nn.Module, ends: list[int], *, dtype: torch.dtype, heads: tuple[int, int, int]
) -> list[torch.Tensor]:
    """Output and gradients of query, key and value; equal operands in every call."""
    queries, groups, channels = heads
    generator = torch.Generator("cuda").manual_seed(1)
    query, key, value, gradient = (
        torch.randn(TOKENS, *rest, device="cuda", dtype=torch.bfloat16, generator=generator).to(dtype)
        for rest in ((queries, channels), (groups, channels), (groups, channels), (queries * channels,))
    )
    operands = [tensor.requires_grad_() for tensor in (query, key, value)]
    bounds_G = torch.tensor([0, *ends], dtype=torch.int32, device="cuda")
    rows = packed_rows(bounds_G, max_segment=TOKENS, rotary=None)
    output = core(*operands, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=rows)
    return [output.detach(), *torch.autograd.grad(output, operands, gradient)]


@pytest.mark.parametrize("ends", [[TOKENS], [200, 201, 232, TOKENS]], ids=["one segment", "several"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_segments_change_nothing(cuda_rank: Topology, implementation: str, ends: list[int]) -> None:
    """257 segments, most of them empty, against the same row without the empty ones; both against an explicit mask."""
    cfg = gpu_config(implementation, "bf16")
    settings = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    settings |= {"config": language_transformer_config(cfg), "pg_collection": cuda_rank.groups}
    core = resolve_backend(cfg.kernels).core_attention(**settings)
    heads = (cfg.language.num_attention_heads, cfg.language.num_query_groups, cfg.language.kv_channels)
    padded = ends + [TOKENS] * (SEGMENTS - len(ends))
    full, short = (attended(core, chosen, dtype=torch.bfloat16, heads=heads) for chosen in (padded, ends))
    exact = attended(LocalCoreAttention(**settings), ends, dtype=torch.float32, heads=heads)
    for name, found, same, reference in zip(("output", "query", "key", "value"), full, short, exact, strict=True):
        assert relative(found, same) < BF16_ORDER, name
        assert relative(found, reference) < (BF16 if name == "output" else BF16_GRADIENT), name
