"""Connectors against plain implementations: NCHW convolutions, pooling by windows, torch's own attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, floor
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mm15_megatron.config.schema import ConnectorConfig, KernelConfig, LanguageConfig, RunConfig, VisionConfig
from mm15_megatron.errors import ConfigError
from mm15_megatron.models.connector import build_connector

pytestmark = pytest.mark.usefixtures("one_rank")

# Same fp32 arithmetic in another order (channels-last products against NCHW convolutions), eight layers deep.
FP32_REORDERED = {"rtol": 1e-4, "atol": 1e-5}


def small_config(
    *,
    width: int = 40,
    grid: int = 27,
    stored_grid: int = 0,
    tokens: int = 144,
    decoder: int = 48,
    dtype: str = "fp32",
    **connector: object,
) -> RunConfig:
    return RunConfig(
        vision=VisionConfig(hidden_size=width, image_size=14 * grid, position_grid_size=stored_grid),
        language=LanguageConfig(hidden_size=decoder),
        connector=replace(ConnectorConfig(num_tokens=tokens, hidden_size=24, depth=2), **connector),
        kernels=KernelConfig(params_dtype=dtype),
    )


def pool_windows(x_NCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Adaptive average pooling from its definition, window by window."""

    def window(i: int, size: int) -> slice:
        return slice(floor(i * size / side), ceil((i + 1) * size / side))

    height, width = x_NCHW.shape[2:]
    rows = [
        torch.stack([x_NCHW[:, :, window(i, height), window(j, width)].mean(dim=(2, 3)) for j in range(side)], dim=-1)
        for i in range(side)
    ]
    return torch.stack(rows, dim=-2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every pixel of an NCHW grid."""

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        mean = x_NCHW.mean(dim=1, keepdim=True)
        variance = (x_NCHW - mean).square().mean(dim=1, keepdim=True)
        normal = (x_NCHW - mean) / (variance + self.eps).sqrt()
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class PlainBlock(nn.Module):
    """The residual block of MM1 section 3.2 with the operations it names."""

    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        r = round(0.25 * c_in)
        self.expand = nn.Conv2d(c_in, c, 1, bias=False)
        self.expand_norm = ChannelNorm(c, eps=1e-5)
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False)
        self.depthwise_norm = ChannelNorm(c, eps=1e-5)
        self.squeeze = nn.Conv2d(c, r, 1)
        self.excite = nn.Conv2d(r, c, 1)
        self.project = nn.Conv2d(c, c, 1, bias=False)
        self.project_norm = ChannelNorm(c, eps=1e-5)
        if c_in != c:
            self.shortcut = nn.Conv2d(c_in, c, 1, bias=False)
            self.shortcut_norm = ChannelNorm(c, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.expand_norm(self.expand(x)))
        y = F.silu(self.depthwise_norm(self.depthwise(y)))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = self.project_norm(self.project(y))
        return F.silu(y + (self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x))


class PlainAbstractor(nn.Module):
    """C-Abstractor on NCHW grids; ``positions`` says whether there is a table, ``grid`` its side."""

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__()
        connector, width = cfg.connector, cfg.vision.hidden_size
        c, h = connector.hidden_size, cfg.language.hidden_size
        self.side, self.grid = connector.output_grid_size, cfg.vision.stored_grid_size
        self.positions = connector.position_embedding
        if self.positions:
            self.position_embedding = nn.Parameter(torch.zeros(self.grid**2, width))
        self.before_pool = nn.ModuleList([PlainBlock(width if i == 0 else c, c) for i in range(connector.depth)])
        self.after_pool = nn.ModuleList([PlainBlock(c, c) for _ in range(connector.depth)])
        self.mlp = nn.ModuleDict({str(2 * i): nn.Linear(h if i else c, h) for i in range(connector.mlp_depth)})

    def forward(self, x_NPD: torch.Tensor) -> torch.Tensor:
        n, p, d = x_NPD.shape
        side = int(p**0.5)
        x = x_NPD.transpose(1, 2).reshape(n, d, side, side)
        if self.positions:
            table = self.position_embedding.T.reshape(1, d, self.grid, self.grid)
            x = x + F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
        for block in self.before_pool:
            x = block(x)
        x = pool_windows(x, self.side)
        for block in self.after_pool:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)
        for i, layer in enumerate(self.mlp.values()):
            x = layer(F.silu(x) if i else x)
        return x


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if "norm.weight" in name:
                parameter.add_(1.0)


def assert_same_module(
    ours: nn.Module,
    plain: nn.Module,
    cfg: RunConfig,
    generator: torch.Generator,
    *,
    plain_names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Outputs, the gradient of the input and every parameter's gradient; names that differ are in ``plain_names``."""
    features = torch.randn(2, cfg.vision.grid_size**2, cfg.vision.hidden_size, generator=generator)
    inputs = [features.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((ours, plain), inputs, strict=True)]
    assert outputs[0].shape == (2, cfg.connector.num_tokens, cfg.language.hidden_size)
    torch.testing.assert_close(*outputs, **FP32_REORDERED)

    upstream = torch.randn(outputs[0].shape, generator=generator) / outputs[0].numel() ** 0.5
    for output in outputs:
        output.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **FP32_REORDERED)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = expected[plain_names.get(name, name)].view_as(parameter)
        torch.testing.assert_close(parameter.grad, wanted, **FP32_REORDERED, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {},  # the projected shortcut; 27 -> 12, overlapping windows
        {"width": 24, "grid": 24, "mlp_depth": 1},  # identity shortcuts; 24 -> 12, disjoint windows
        {"grid": 16, "tokens": 81, "position_embedding": False, "depth": 1, "mlp_depth": 3},
        {"grid": 6, "stored_grid": 4, "tokens": 9},  # the position table is interpolated
    ],
)
def test_c_abstractor_equals_plain_convolutions(settings: dict, generator: torch.Generator) -> None:
    cfg = small_config(**settings)
    ours, plain = build_connector(cfg), PlainAbstractor(cfg)
    randomise(ours, generator)
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    plain.load_state_dict({name: p.detach().reshape(shapes[name]) for name, p in ours.named_parameters()})

    assert_same_module(ours, plain, cfg, generator)


@pytest.mark.parametrize(("grid", "tokens"), [(24, 144), (16, 144), (27, 64)])
def test_average_pooling_equals_its_definition(grid: int, tokens: int, generator: torch.Generator) -> None:
    cfg = small_config(grid=grid, tokens=tokens, kind="average_pool")
    ours = build_connector(cfg)
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == {
        "projection.weight": (48, 40),
        "projection.bias": (48,),
    }
    randomise(ours, generator)
    plain = nn.Linear(40, 48)
    plain.load_state_dict(ours.projection.state_dict())

    features = torch.randn(2, grid**2, 40, generator=generator)
    inputs = [features.clone().requires_grad_() for _ in range(2)]
    pooled = pool_windows(inputs[1].transpose(1, 2).reshape(2, 40, grid, grid), cfg.connector.output_grid_size)
    outputs = ours(inputs[0]), plain(pooled.flatten(2).transpose(1, 2))
    torch.testing.assert_close(*outputs, **FP32_REORDERED)
    upstream = torch.randn(outputs[0].shape, generator=generator) / outputs[0].numel() ** 0.5
    for output in outputs:
        output.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **FP32_REORDERED)
    torch.testing.assert_close(ours.projection.weight.grad, plain.weight.grad, **FP32_REORDERED)
    torch.testing.assert_close(ours.projection.bias.grad, plain.bias.grad, **FP32_REORDERED)


class PlainAttentionPool(nn.Module):
    """Normalised queries attend to normalised patches by torch's own multi-head attention; then a linear layer."""

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__()
        connector, d = cfg.connector, cfg.vision.hidden_size
        c, self.grid = connector.hidden_size, cfg.vision.stored_grid_size
        self.positions = connector.position_embedding
        if self.positions:
            self.position_embedding = nn.Parameter(torch.zeros(self.grid**2, d))
        self.query_embedding = nn.Parameter(torch.zeros(connector.num_tokens, c))
        self.query_norm, self.feature_norm = nn.LayerNorm(c), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(
            c, connector.num_attention_heads, bias=False, kdim=d, vdim=d, batch_first=True
        )
        self.attention.out_proj.weight = nn.Parameter(torch.eye(c), requires_grad=False)
        self.projection = nn.Linear(c, cfg.language.hidden_size)

    def forward(self, x_NPD: torch.Tensor) -> torch.Tensor:
        side = int(x_NPD.shape[1] ** 0.5)
        if self.positions:
            table = self.position_embedding.T.reshape(1, -1, self.grid, self.grid)
            table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
            x_NPD = x_NPD + table.flatten(2).transpose(1, 2)
        x_NPD = self.feature_norm(x_NPD)
        queries = self.query_norm(self.query_embedding).expand(len(x_NPD), -1, -1)
        return self.projection(self.attention(queries, x_NPD, x_NPD, need_weights=False)[0])


PLAIN_NAMES = {
    f"{projection}.weight": f"attention.{projection[0]}_proj_weight" for projection in ("query", "key", "value")
}


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 144, "num_attention_heads": 4},
        {"tokens": 7, "num_attention_heads": 1, "position_embedding": False},  # any number of tokens
        {"grid": 6, "stored_grid": 4, "tokens": 50, "num_attention_heads": 8},  # more tokens than patches
    ],
)
def test_attention_pooling_equals_torchs_attention(settings: dict, generator: torch.Generator) -> None:
    cfg = small_config(kind="attention_pool", **settings)
    ours, plain = build_connector(cfg), PlainAttentionPool(cfg)
    randomise(ours, generator)
    state = {PLAIN_NAMES.get(name, name): p.detach() for name, p in ours.named_parameters()}
    plain.load_state_dict(state | {"attention.out_proj.weight": plain.attention.out_proj.weight})

    assert_same_module(ours, plain, cfg, generator, plain_names=PLAIN_NAMES)


def test_attention_pooling_sees_places_by_its_table_alone(generator: torch.Generator) -> None:
    features = torch.randn(1, 36, 40, generator=generator)
    moved = features[:, torch.randperm(36, generator=generator)]
    for table in (True, False):
        cfg = small_config(grid=6, tokens=5, kind="attention_pool", num_attention_heads=2, position_embedding=table)
        connector = build_connector(cfg)
        randomise(connector, generator)
        assert torch.allclose(connector(features), connector(moved), **FP32_REORDERED) == (not table)


@pytest.mark.parametrize(
    ("width", "image_size", "decoder", "millions"),
    [
        (1280, 378, 2048, 24.76),
        (1280, 378, 3072, 31.06),
        (1280, 378, 4096, 39.45),
        (1280, 378, 7168, 77.20),
        (1280, 336, 2048, 24.57),
        (1024, 336, 2048, 22.71),
        (1024, 336, 3072, 29.01),
    ],
)
def test_released_sizes_have_the_documented_parameters(
    width: int, image_size: int, decoder: int, millions: float
) -> None:
    cfg = RunConfig(
        vision=VisionConfig(hidden_size=width, image_size=image_size),
        language=LanguageConfig(hidden_size=decoder),
        kernels=KernelConfig(params_dtype="bf16"),
    )
    count = sum(p.numel() for p in build_connector(cfg).parameters())
    assert round(count / 1e6, 2) == millions


def test_first_block_squeezes_by_its_own_input_width() -> None:
    connector = build_connector(small_config(width=40))
    assert [block.squeeze.out_features for block in connector.before_pool] == [10, 6]
    assert [block.squeeze.out_features for block in connector.after_pool] == [6, 6]


@pytest.mark.parametrize("kind", ["c_abstractor", "average_pool", "attention_pool"])
def test_bf16_parameters_give_bf16_tokens(kind: str, generator: torch.Generator) -> None:
    cfg = small_config(grid=6, stored_grid=4, tokens=9, dtype="bf16", kind=kind, num_attention_heads=3)
    connector = build_connector(cfg)
    assert {p.dtype for p in connector.parameters()} == {torch.bfloat16}
    features = torch.randn(1, 36, 40, generator=generator).bfloat16()
    assert connector(features).dtype == torch.bfloat16


def test_number_of_tokens_must_be_a_square() -> None:
    with pytest.raises(ConfigError, match=r"num_tokens = 100000001 is not a perfect square"):
        build_connector(small_config(tokens=100_000_001))


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="'resampler' is not a connector"):
        build_connector(small_config(kind="resampler"))
