"""The whole model on one rank: packing does not leak, images land in their slots, padding changes nothing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from mm15_megatron.batch import MMBatch
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import DataError
from mm15_megatron.models.build import build_model
from mm15_megatron.models.global_parameters import global_parameters
from mm15_megatron.models.image_merge import merge_image_tokens
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.parity.stream import Segment, batch_of_rows, row_of
from tests.helpers.layouts import change, debug_config

# The same sums in other shapes (a segment alone is a smaller matrix product).
FP32_SHAPES = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(params=["debug_dense", "debug_moe"])
def cfg(request: pytest.FixtureRequest) -> RunConfig:
    """A dense model and one with experts."""
    return debug_config(request.param)


@pytest.fixture
def model(one_rank: Topology, cfg: RunConfig) -> MM15Model:
    """The model on one rank, evaluation mode."""
    return build(one_rank, cfg)


def build(one_rank: Topology, cfg: RunConfig) -> MM15Model:
    """Build a model on the one-rank topology."""
    return build_model(cfg, stage=one_rank.stages[0]).eval()


def logits(model: MM15Model, batch: MMBatch) -> torch.Tensor:
    """Logits [T, V] of a batch; a batch without tiles gets a dummy."""
    if batch.tiles_N3HW is not None and batch.tiles_N3HW.shape[0] == 0:
        batch = dataclasses.replace(batch, tiles_N3HW=torch.zeros(1, 3, 56, 56))
    return model(batch)[0]


@pytest.mark.parametrize("kind", ["text", "one", "several"])
def test_packed_segments_equal_the_segments_alone(model: MM15Model, cfg: RunConfig, kind: str) -> None:
    """Outputs and gradients of a segment do not depend on what is packed beside it."""
    row = row_of(kind, cfg, seed=5)
    packed = logits(model, batch_of_rows([row, row_of("padded", cfg, seed=6)], cfg))
    at = 0
    for segment in row:
        alone = logits(model, batch_of_rows([[segment]], cfg))
        length = len(segment.tokens)
        torch.testing.assert_close(packed[at : at + length], alone[:length], **FP32_SHAPES)
        at += length


def test_padding_amount_changes_no_real_token(model: MM15Model, cfg: RunConfig) -> None:
    """A longer row with more padding gives the same logits for the real tokens."""
    row = row_of("padded", cfg, seed=3)
    longer = change(cfg, data={"seq_length": 2 * cfg.data.seq_length})
    length = len(row[0].tokens)
    torch.testing.assert_close(
        logits(model, batch_of_rows([row], cfg))[:length],
        logits(model, batch_of_rows([row], longer))[:length],
        **FP32_SHAPES,
    )


def test_an_image_changes_what_follows_it_only(model: MM15Model, cfg: RunConfig) -> None:
    """Other pixels change the slots and the tokens after them, never those before (causality) or of other segments."""
    row = row_of("several", cfg, seed=9)
    first = row[0]
    other = dataclasses.replace(first, tiles=first.tiles.roll(1, dims=0))
    before = logits(model, batch_of_rows([row], cfg))
    after = logits(model, batch_of_rows([[other, row[1]]], cfg))
    second_tile = Segment(first.tokens, first.tile_starts, torch.cat((first.tiles[:1], -first.tiles[1:])), False)
    late = logits(model, batch_of_rows([[second_tile, row[1]]], cfg))
    start, length = first.tile_starts[1], len(first.tokens)
    assert not torch.allclose(before[:length], after[:length], atol=1e-4)
    torch.testing.assert_close(before[length:], after[length:], **FP32_SHAPES)
    torch.testing.assert_close(before[:start], late[:start], **FP32_SHAPES)
    assert not torch.allclose(before[start:length], late[start:length], atol=1e-4)


def test_dummy_tile_is_dropped_not_multiplied_by_zero(one_rank: Topology, cfg: RunConfig) -> None:
    """A text-only batch runs the encoder on a dummy: exact zero gradients, and not even infinities reach the text."""
    model = build(one_rank, cfg)
    batch = batch_of_rows([row_of("text", cfg, seed=1)], cfg)
    zeros = dataclasses.replace(batch, tiles_N3HW=torch.zeros(1, 3, 56, 56))
    model(zeros).sum().backward()
    encoder = [p for name, p in model.named_parameters() if not name.startswith("language_model")]
    assert encoder
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in encoder)
    infinite = dataclasses.replace(batch, tiles_N3HW=torch.full((1, 3, 56, 56), float("inf")))
    assert torch.equal(model(infinite), model(zeros))


def test_merge_writes_each_slot_once(generator: torch.Generator) -> None:
    """Row-major tokens land at their slots; everything else is untouched."""
    text = torch.randn(6, 1, 3, generator=generator)
    tokens = torch.randn(2, 2, 3, generator=generator)
    merged = merge_image_tokens(text, tokens, torch.tensor([[4, 5], [0, 1]]))
    assert torch.equal(merged[[4, 5, 0, 1], 0], tokens.reshape(4, 3))
    assert torch.equal(merged[2:4], text[2:4])


def test_initial_weights_are_a_function_of_seed_and_name(one_rank: Topology, cfg: RunConfig) -> None:
    """Two builds agree bitwise; another seed differs; scales are as documented."""
    first, second = build(one_rank, cfg), build(one_rank, cfg)
    other = build(one_rank, change(cfg, train={"seed": 7}))
    for a, b, c in zip(
        global_parameters([first]), global_parameters([second]), global_parameters([other]), strict=True
    ):
        assert torch.equal(a.parameter, b.parameter), a.name
        if a.parameter.dim() > 1:
            assert not torch.equal(a.parameter, c.parameter), a.name
    weights = {item.name: item.parameter for item in global_parameters([first])}
    std = weights["language_model.embedding.word_embeddings.weight"].std().item()
    assert std == pytest.approx(cfg.language.init_method_std, rel=0.05)
    residual = weights["language_model.decoder.layers.0.mlp.linear_fc2.weight"].std().item()
    assert residual == pytest.approx(cfg.language.init_method_std / (2 * cfg.language.num_layers) ** 0.5, rel=0.05)


def test_missing_fields_are_named(model: MM15Model, cfg: RunConfig) -> None:
    """A batch built for another stage is refused."""
    batch = batch_of_rows([row_of("one", cfg, seed=1)], cfg)
    with pytest.raises(DataError, match="tiles"):
        model(dataclasses.replace(batch, tiles_N3HW=None))
    with pytest.raises(DataError, match="tokens"):
        model(dataclasses.replace(batch, tokens_T=None))


def test_router_padding_for_quantization_changes_no_token(one_rank: Topology) -> None:
    """Experts get multiples of 16 tokens, also where rows hold padding; outputs and gradients stay."""
    cfg = debug_config("debug_moe")
    model = build(one_rank, cfg)
    batch = batch_of_rows([row_of("several", cfg, seed=3), row_of("padded", cfg, seed=4)], cfg)
    sparse = [layer.mlp for layer in model.language_model.decoder.layers if layer.is_moe_layer]
    counts: list[torch.Tensor] = []
    for block in sparse:
        block.experts.register_forward_pre_hook(lambda module, inputs: counts.append(torch.as_tensor(inputs[1])))
    results = []
    for padded in (False, True):
        for block in sparse:
            # megatron-core's own configuration takes the option with FP8 alone, and the dispatcher is all that reads it
            block.token_dispatcher.config = copy.copy(block.config)
            block.token_dispatcher.config.moe_router_padding_for_quantization = padded
        counts.clear()
        model.zero_grad(set_to_none=True)
        output = logits(model, batch)
        output[~batch.padding_mask_T].square().mean().backward()
        results.append((output.detach(), [p.grad.clone() for p in model.parameters()], [c % 16 for c in counts]))
    (plain, plain_grads, plain_rest), (filled, filled_grads, filled_rest) = results
    assert any(rest.any() for rest in plain_rest)
    assert not any(rest.any() for rest in filled_rest)
    real_T = ~batch.padding_mask_T
    torch.testing.assert_close(filled[real_T], plain[real_T], **FP32_SHAPES)
    for ours, reference in zip(filled_grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, reference, **FP32_SHAPES)


@pytest.mark.parametrize("fused", [True, False])
def test_padding_alone_sends_one_token_through_a_fused_permutation(one_rank: Topology, fused: bool) -> None:
    """Transformer Engine's kernel puts nothing back where nothing was sent; the token comes back with its gate, 0."""
    model = build(one_rank, debug_config("debug_moe"))
    dispatcher = model.language_model.decoder.layers[1].mlp.token_dispatcher
    dispatcher.config = copy.copy(dispatcher.config)
    dispatcher.config.moe_permute_fusion = fused
    for sent in (torch.zeros(8, 4, dtype=torch.bool), torch.eye(8, 4, dtype=torch.bool)):
        given = sent.clone()
        dispatcher.routing_map = given
        dispatcher.preprocess(given)
        assert torch.equal(given, sent), "the router's own map is counted elsewhere"
        expected = 4 if sent.any() else int(fused)
        assert int(dispatcher.num_out_tokens) == int(dispatcher.routing_map.sum()) == expected
