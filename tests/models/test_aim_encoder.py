"""The encoder with AIM's options against blocks written by hand from apple/ml-aim's description."""

from __future__ import annotations

from dataclasses import replace
from math import cos, sin

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mm15_megatron.config.schema import KernelConfig, RunConfig, VisionConfig
from mm15_megatron.models.backend import resolve_backend
from mm15_megatron.models.vision_encoder import VisionEncoder, sincos_positions
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.presets import resolve

# Same fp32 arithmetic in another order (fused qkv, fused attention, patches by a product instead of a convolution).
FP32_REORDERED = {"rtol": 1e-4, "atol": 1e-5}
# fp32 angles up to 47 radians against double precision.
FP32_ANGLES = {"rtol": 0, "atol": 1e-5}

# A narrow AIM: heads of 16 channels instead of 128.
AIM = replace(
    resolve("mm1_encoder_aim_600m").vision,
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=256,
    image_size=70,
)


def build(vision: VisionConfig, topology: Topology, dtype: str = "fp32") -> VisionEncoder:
    cfg = RunConfig(vision=vision, kernels=KernelConfig(params_dtype=dtype))
    return VisionEncoder(cfg, backend=resolve_backend(cfg.kernels), groups=topology.encoder_groups)


def positions_by_hand(grid: int, width: int) -> torch.Tensor:
    """Sine and cosine of the column, then of the row, a quarter of the channels each, one number at a time."""
    frequencies = [10000.0 ** (-i / (width / 4)) for i in range(width // 4)]
    rows = []
    for row in range(grid):
        for column in range(grid):
            rows.append([f(at * w) for at in (column, row) for f in (sin, cos) for w in frequencies])
    return torch.tensor(rows, dtype=torch.float64)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm_2(x))))


class PlainAim(nn.Module):
    """Patches with a bias, a norm, sin-cos positions, blocks without biases, a norm."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        width = vision.hidden_size
        self.patches = nn.Conv2d(3, width, vision.patch_size, stride=vision.patch_size)
        self.first_norm = nn.LayerNorm(width, 1e-6)
        self.blocks = nn.ModuleList(
            PlainBlock(width, vision.num_attention_heads, vision.ffn_hidden_size) for _ in range(vision.num_layers)
        )
        self.last_norm = nn.LayerNorm(width, 1e-6)

    def forward(self, tiles: torch.Tensor, *, layers: int, post_layernorm: bool) -> torch.Tensor:
        embedded = self.patches(tiles)
        x = self.first_norm(embedded.flatten(2).transpose(1, 2))
        x = x + positions_by_hand(embedded.shape[-1], x.shape[-1]).float()
        for block in self.blocks[:layers]:
            x = block(x)
        return self.last_norm(x) if post_layernorm else x


def fuse_heads(stacked: torch.Tensor, heads: int) -> torch.Tensor:
    """From [all queries; all keys; all values] to the query, key and value rows of one head, then of the next."""
    return stacked.view(3, heads, -1, stacked.shape[-1]).transpose(0, 1).flatten(0, 2)


def as_ours(
    values: dict[str, torch.Tensor], *, layers: int, heads: int, post_layernorm: bool
) -> dict[str, torch.Tensor]:
    """The plain model's parameters or gradients under the encoder's names and in its layout."""
    names = {"patches": "patch_embedding", "first_norm": "pre_layernorm"}
    if post_layernorm:
        names["last_norm"] = "blocks.final_layernorm"
    found = {
        f"{ours}.{kind}": values[f"{plain}.{kind}"] for plain, ours in names.items() for kind in ("weight", "bias")
    }
    for i in range(layers):
        at, of = f"blocks.layers.{i}", f"blocks.{i}"
        for plain, ours in (("norm_1", "input_layernorm"), ("norm_2", "pre_mlp_layernorm")):
            found |= {f"{at}.{ours}.{kind}": values[f"{of}.{plain}.{kind}"] for kind in ("weight", "bias")}
        found[f"{at}.self_attention.linear_qkv.weight"] = fuse_heads(values[f"{of}.attention.in_proj_weight"], heads)
        found[f"{at}.self_attention.linear_proj.weight"] = values[f"{of}.attention.out_proj.weight"]
        found[f"{at}.mlp.linear_fc1.weight"] = values[f"{of}.fc1.weight"]
        found[f"{at}.mlp.linear_fc2.weight"] = values[f"{of}.fc2.weight"]
    return found


@pytest.mark.parametrize(("feature_layer", "post_layernorm"), [(-1, True), (-2, True), (-1, False)])
def test_encoder_equals_hand_written_aim(
    feature_layer: int, post_layernorm: bool, one_rank: Topology, generator: torch.Generator
) -> None:
    """Features of two tiles and the gradient of every parameter; no parameter is left over on either side."""
    vision = replace(AIM, feature_layer=feature_layer, post_layernorm=post_layernorm)
    plain, encoder = PlainAim(vision), build(vision, one_rank)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    layout = {
        "layers": vision.num_layers + 1 + feature_layer,
        "heads": vision.num_attention_heads,
        "post_layernorm": post_layernorm,
    }
    weights = as_ours({name: p.detach() for name, p in plain.named_parameters()}, **layout)
    assert weights.keys() == dict(encoder.named_parameters()).keys()
    encoder.load_state_dict(weights, strict=False)

    tiles = torch.randn(2, 3, 70, 70, generator=generator)
    features, wanted = encoder(tiles), plain(tiles, layers=layout["layers"], post_layernorm=post_layernorm)
    torch.testing.assert_close(features, wanted, **FP32_REORDERED)
    upstream = torch.randn(features.shape, generator=generator) / features.numel() ** 0.5
    features.backward(upstream)
    wanted.backward(upstream)
    expected = as_ours({name: p.grad for name, p in plain.named_parameters()}, **layout)
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **FP32_REORDERED, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("grid", "width"), [(16, 1536), (3, 8), (48, 64)])
def test_sincos_positions_equal_their_definition(grid: int, width: int) -> None:
    table = sincos_positions(grid, width, device=torch.device("cpu"))
    torch.testing.assert_close(table.double(), positions_by_hand(grid, width), **FP32_ANGLES)


def test_sincos_positions_are_stored_nowhere_and_serve_every_grid(
    one_rank: Topology, generator: torch.Generator
) -> None:
    encoder = build(AIM, one_rank)
    assert not any("position" in name for name in encoder.state_dict())
    for size in (70, 42):
        tiles = torch.randn(1, 3, size, size, generator=generator)
        assert encoder(tiles).shape == (1, (size // 14) ** 2, 64)


def test_a_class_token_has_no_sincos_position(one_rank: Topology, generator: torch.Generator) -> None:
    """The class token joins behind the norm of the patches, gets no position and is dropped from the features."""
    encoder = build(replace(AIM, class_token=True), one_rank, dtype="bf16")
    with torch.no_grad():
        encoder.class_token.fill_(3.0)
    seen = []
    encoder.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features = encoder(torch.randn(2, 3, 70, 70, generator=generator))
    assert features.shape == (2, 25, 64)
    assert features.dtype == torch.bfloat16
    assert torch.equal(seen[0][0], torch.full((2, 64), 3.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(("name", "billions"), [("600m", 0.68), ("1b", 1.21), ("3b", 2.72)])
def test_aim_has_the_published_parameters(name: str, billions: float, one_rank: Topology) -> None:
    """One block is built and counted for all; the published totals have two decimals."""
    vision = resolve(f"mm1_encoder_aim_{name}").vision
    encoder = build(replace(vision, num_layers=1), one_rank, dtype="bf16")
    block = sum(p.numel() for p in encoder.blocks.layers[0].parameters())
    total = sum(p.numel() for p in encoder.parameters()) + (vision.num_layers - 1) * block
    assert round(total / 1e9, 2) == billions
