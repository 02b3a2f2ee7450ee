"""The encoder against transformers' CLIPVisionModel and torch's own transformer layers."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from mm15_megatron.config.schema import KernelConfig, RunConfig, VisionConfig
from mm15_megatron.errors import ConfigError
from mm15_megatron.models.backend import resolve_backend
from mm15_megatron.models.vision_encoder import VisionEncoder, interpolate_positions
from mm15_megatron.parallel.topology import Topology

# Same fp32 arithmetic in another order (fused qkv, fused attention, patches by a product instead of a convolution).
FP32_REORDERED = {"rtol": 1e-4, "atol": 1e-5}

Pick = Callable[[nn.Parameter], torch.Tensor]


def vision(**changes: object) -> VisionConfig:
    """A narrow encoder whose head dimension (80) is that of ViT-H."""
    small = {"num_layers": 3, "hidden_size": 160, "num_attention_heads": 2, "ffn_hidden_size": 192, "image_size": 42}
    return VisionConfig(**{**small, **changes})


def build(config: VisionConfig, topology: Topology, **kernels: object) -> VisionEncoder:
    cfg = RunConfig(vision=config, kernels=KernelConfig(**kernels))
    return VisionEncoder(cfg, backend=resolve_backend(cfg.kernels), groups=topology.encoder_groups)


def clip_model(config: VisionConfig) -> CLIPVisionModel:
    settings = CLIPVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        image_size=config.stored_grid_size * config.patch_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        layer_norm_eps=config.norm_epsilon,
        attn_implementation="eager",
    )
    return CLIPVisionModel(settings).eval()


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)


def fuse_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """megatron-core's order: the query, key and value rows of one head, then those of the next."""
    split = [x.view(heads, -1, *x.shape[1:]) for x in (query, key, value)]
    return torch.stack(split, dim=1).flatten(0, 2)


def as_ours(
    model: CLIPVisionModel, pick: Pick, *, layers: int, heads: int, post_layernorm: bool
) -> dict[str, torch.Tensor]:
    """CLIP's parameters, or what ``pick`` reads of each, under the encoder's names and in its layout."""
    found = {
        "class_token": pick(model.embeddings.class_embedding),
        "patch_embedding.weight": pick(model.embeddings.patch_embedding.weight),
        "position_embedding": pick(model.embeddings.position_embedding.weight),
    }
    modules = {"pre_layernorm": model.pre_layrnorm}
    if post_layernorm:
        modules["blocks.final_layernorm"] = model.post_layernorm
    for i, layer in enumerate(model.encoder.layers[:layers]):
        at = f"blocks.layers.{i}"
        modules |= {
            f"{at}.input_layernorm": layer.layer_norm1,
            f"{at}.self_attention.linear_proj": layer.self_attn.out_proj,
            f"{at}.pre_mlp_layernorm": layer.layer_norm2,
            f"{at}.mlp.linear_fc1": layer.mlp.fc1,
            f"{at}.mlp.linear_fc2": layer.mlp.fc2,
        }
        for kind in ("weight", "bias"):
            found[f"{at}.self_attention.linear_qkv.{kind}"] = fuse_heads(
                *(pick(getattr(getattr(layer.self_attn, f"{p}_proj"), kind)) for p in "qkv"), heads
            )
    for name, module in modules.items():
        found |= {f"{name}.weight": pick(module.weight), f"{name}.bias": pick(module.bias)}
    return found


def load(encoder: VisionEncoder, values: dict[str, torch.Tensor]) -> None:
    parameters = dict(encoder.named_parameters())
    assert parameters.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def check_against_clip(config: VisionConfig, topology: Topology, generator: torch.Generator) -> None:
    """Features of two tiles and the gradient of every parameter equal transformers' CLIP."""
    model, encoder = clip_model(config), build(config, topology)
    randomise(model, generator)
    layout = {
        "layers": config.num_layers + 1 + config.feature_layer,
        "heads": config.num_attention_heads,
        "post_layernorm": config.post_layernorm,
    }
    load(encoder, as_ours(model, lambda p: p.detach(), **layout))

    tiles = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
    features = encoder(tiles)
    states = model(
        tiles, output_hidden_states=True, interpolate_pos_encoding=config.grid_size != config.stored_grid_size
    ).hidden_states
    wanted = states[config.feature_layer]
    if config.post_layernorm:
        wanted = model.post_layernorm(wanted)
    wanted = wanted[:, 1:]
    assert features.shape == (2, config.grid_size**2, config.hidden_size)
    torch.testing.assert_close(features, wanted, **FP32_REORDERED)

    upstream = torch.randn(features.shape, generator=generator) / features.numel() ** 0.5
    features.backward(upstream)
    wanted.backward(upstream)
    expected = as_ours(model, lambda p: p.grad, **layout)
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **FP32_REORDERED, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("activation", "feature_layer", "post_layernorm"),
    [("gelu", -1, False), ("quick_gelu", -1, True), ("quick_gelu", -2, False), ("gelu", -2, True)],
)
def test_encoder_equals_clip(
    activation: str, feature_layer: int, post_layernorm: bool, one_rank: Topology, generator: torch.Generator
) -> None:
    config = vision(activation=activation, feature_layer=feature_layer, post_layernorm=post_layernorm)
    check_against_clip(config, one_rank, generator)


def test_interpolated_positions_equal_clips(one_rank: Topology, generator: torch.Generator) -> None:
    """Weights of 224 pixels (16 x 16 patches) used at 336 pixels (24 x 24)."""
    config = vision(num_layers=1, hidden_size=32, ffn_hidden_size=48, image_size=336, position_grid_size=16)
    check_against_clip(config, one_rank, generator)


def test_encoder_without_class_token_equals_torch_layers(one_rank: Topology, generator: torch.Generator) -> None:
    config = vision(num_layers=1, class_token=False, activation="gelu")
    encoder = build(config, one_rank)
    randomise(encoder, generator)
    layer = nn.TransformerEncoderLayer(160, 2, 192, dropout=0.0, activation=F.gelu, norm_first=True, batch_first=True)
    block = encoder.blocks.layers[0]
    query, key, value = block.self_attention.linear_qkv.weight.view(2, 3, 80, 160).unbind(1)
    query_bias, key_bias, value_bias = block.self_attention.linear_qkv.bias.view(2, 3, 80).unbind(1)
    values = {
        "self_attn.in_proj_weight": torch.cat((query, key, value)).flatten(0, 1),
        "self_attn.in_proj_bias": torch.cat((query_bias, key_bias, value_bias)).flatten(),
    }
    pairs = {
        "self_attn.out_proj": block.self_attention.linear_proj,
        "linear1": block.mlp.linear_fc1,
        "linear2": block.mlp.linear_fc2,
        "norm1": block.input_layernorm,
        "norm2": block.pre_mlp_layernorm,
    }
    values |= {f"{name}.{kind}": getattr(module, kind) for name, module in pairs.items() for kind in ("weight", "bias")}
    layer.load_state_dict(values)

    inputs = [torch.randn(2, 3, 42, 42, generator=generator.manual_seed(3)).requires_grad_() for _ in range(2)]
    embedded = F.conv2d(inputs[1], encoder.patch_embedding.weight, stride=14).flatten(2).transpose(1, 2)
    norm = encoder.pre_layernorm
    wanted = layer(F.layer_norm(embedded + encoder.position_embedding, (160,), norm.weight, norm.bias, 1e-5))
    features = encoder(inputs[0])
    torch.testing.assert_close(features, wanted, **FP32_REORDERED)
    upstream = torch.randn(features.shape, generator=generator) / features.numel() ** 0.5
    features.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **FP32_REORDERED)


def test_one_encoder_takes_tiles_of_several_sizes(one_rank: Topology, generator: torch.Generator) -> None:
    """The stored table serves its own grid as it is and other grids by interpolation."""
    stored, resized = build(vision(), one_rank), build(vision(image_size=70, position_grid_size=3), one_rank)
    randomise(stored, generator)
    resized.load_state_dict(stored.state_dict())
    for size in (42, 70):
        tiles = torch.randn(1, 3, size, size, generator=generator)
        torch.testing.assert_close(stored(tiles), resized(tiles), rtol=0, atol=0)
    assert stored(tiles).shape == (1, 25, 160)


def test_equal_grids_return_the_table_itself() -> None:
    table = torch.zeros(10, 4)
    assert interpolate_positions(table, source_grid=3, target_grid=3, prefix_tokens=1) is table


def bicubic_matrix(source: int, target: int) -> torch.Tensor:
    """Weights [target, source] of Keys' cubic kernel (a = -0.75) at half-pixel centres, the border repeated."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)

    weights = torch.zeros(target, source)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(floor(centre) - 1, floor(centre) + 3):
            weights[i, min(max(j, 0), source - 1)] += kernel(centre - j)
    return weights


@pytest.mark.parametrize(("source", "target", "prefix_tokens"), [(16, 24, 1), (27, 48, 0), (24, 16, 1)])
def test_interpolation_is_keys_bicubic(
    source: int, target: int, prefix_tokens: int, generator: torch.Generator
) -> None:
    table = torch.randn(prefix_tokens + source**2, 5, generator=generator)
    resized = interpolate_positions(table, source_grid=source, target_grid=target, prefix_tokens=prefix_tokens)
    weights = bicubic_matrix(source, target)
    grid = table[prefix_tokens:].view(source, source, 5)
    wanted = torch.einsum("yi,xj,ijd->yxd", weights, weights, grid).flatten(0, 1)
    torch.testing.assert_close(resized, torch.cat((table[:prefix_tokens], wanted)), **FP32_REORDERED)


def test_bf16_encoder_interpolates_in_fp32(one_rank: Topology, generator: torch.Generator) -> None:
    """A bf16 table interpolated in the forward pass equals one resized in fp32 and rounded once, bit by bit."""
    small = build(vision(image_size=70, position_grid_size=3), one_rank, params_dtype="bf16")
    randomise(small, generator)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    grid_1DHW = small.position_embedding[1:].detach().float().T.reshape(1, 160, 3, 3)
    rounded = F.interpolate(grid_1DHW, size=(5, 5), mode="bicubic").flatten(2)[0].T.bfloat16()
    exact = build(vision(image_size=70), one_rank, params_dtype="bf16")
    state = {name: p.detach() for name, p in small.named_parameters()}
    load(exact, state | {"position_embedding": torch.cat((small.position_embedding[:1].detach(), rounded))})

    tiles = torch.randn(1, 3, 70, 70, generator=generator)
    features = small(tiles)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features, exact(tiles), rtol=0, atol=0)


def test_recomputation_gives_the_same_gradients(one_rank: Topology, generator: torch.Generator) -> None:
    plain, recomputed = build(vision(), one_rank), build(vision(), one_rank, recompute_vision=True)
    randomise(plain, generator)
    recomputed.load_state_dict(plain.state_dict())
    tiles = torch.randn(2, 3, 42, 42, generator=generator)
    calls = []
    recomputed.blocks.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for encoder in (plain, recomputed):
        encoder.train()
        encoder(tiles).square().mean().backward()
    assert len(calls) == 2
    for (name, one), (_, other) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("config", "projection", "millions"),
    [
        (VisionConfig(), 1024, 632.68),
        (VisionConfig(image_size=224), 1024, 632.08),
        (VisionConfig(24, 1024, 16, 4096, image_size=224), 768, 303.97),
        (VisionConfig(24, 1024, 16, 4096, image_size=336), 768, 304.29),
    ],
)
def test_clip_towers_have_the_documented_parameters(
    config: VisionConfig, projection: int, millions: float, one_rank: Topology
) -> None:
    """One block is built and counted for all; CLIP's output norm and projection, which we do not build, are added."""
    encoder = build(VisionConfig(**{**vars(config), "num_layers": 1}), one_rank, params_dtype="bf16")
    block = sum(p.numel() for p in encoder.blocks.layers[0].parameters())
    ours = sum(p.numel() for p in encoder.parameters()) + (config.num_layers - 1) * block
    output_norm = 2 * config.hidden_size
    assert round((ours + output_norm + config.hidden_size * projection) / 1e6, 2) == millions


def test_tiles_must_be_whole_patches(one_rank: Topology) -> None:
    encoder = build(vision(), one_rank)
    for height, width in ((43, 43), (42, 56)):
        with pytest.raises(ConfigError, match=f"{height} x {width} pixels is not a square of 14-pixel patches"):
            encoder(torch.zeros(1, 3, height, width))


def test_a_table_of_another_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="a position table of 257 rows is not a grid of 24 x 24 patches"):
        interpolate_positions(torch.zeros(257, 8), source_grid=24, target_grid=27, prefix_tokens=1)


@pytest.mark.parametrize(("tiles", "multiple"), [(1, 16), (3, 16), (3, 32), (4, 8)])
def test_tiles_in_one_padded_row_are_the_same_tiles(
    one_rank: Topology, generator: torch.Generator, tiles: int, multiple: int
) -> None:
    """FP8 lays the tiles end to end and pads to a multiple of tokens: outputs and gradients stay those of a batch."""
    encoder = build(vision(), one_rank)
    randomise(encoder, generator)
    pixels = torch.randn(tiles, 3, 42, 42, generator=generator)
    results = []
    for encoder.row_multiple in (None, multiple):
        encoder.zero_grad(set_to_none=True)
        features = encoder(pixels)
        features.square().mean().backward()
        results.append((features.detach(), [p.grad for p in encoder.parameters()]))
    (batched, batched_grads), (in_row, row_grads) = results
    assert in_row.shape == batched.shape
    assert torch.allclose(in_row, batched, **FP32_REORDERED)
    for ours, reference in zip(row_grads, batched_grads, strict=True):
        assert torch.allclose(ours, reference, **FP32_REORDERED)


def test_the_padded_row_is_built_for_fp8_alone(one_rank: Topology) -> None:
    assert build(vision(), one_rank).row_multiple is None
