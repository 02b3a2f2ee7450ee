"""Connectors from patch features to language tokens: C-Abstractor, average and attention pooling (MM1 section 3).

The grids stay channels-last, so that a 1x1 convolution is a linear layer and its norm is over the last dimension.

N: tiles; P: patches of a tile in row-major order; D: width of the encoder; Y, X: rows and columns of a grid;
C: channels of the C-Abstractor or of attention pooling; K: queries, one a token; A: heads; E: channels of a head;
H: width of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError
from mm15_megatron.models.transformer_config import DTYPES
from mm15_megatron.models.vision_encoder import interpolate_positions

Linear = Callable[..., nn.Module]
"""A linear layer, called like ``torch.nn.Linear``."""


def build_connector(cfg: RunConfig, *, linear: Linear = nn.Linear) -> nn.Module:
    """Build the connector that ``connector.kind`` names: features [N, P, D] -> tokens [N, connector.num_tokens, H].

    Its parameters are replicated over tensor-parallel ranks and left for ``initialise.py`` to fill.

    Args:
        cfg: the run's configuration.
        linear: the class of its linear layers (``models/backend.py``).

    Raises:
        ConfigError: if the kind is unknown, or pools a grid to a number of tokens that is no perfect square.
    """
    connector = cfg.connector
    if connector.pools_grid and connector.output_grid_size**2 != connector.num_tokens:
        raise ConfigError(
            f"connector.num_tokens = {connector.num_tokens} is not a perfect square", fix="use 64, 81 or 144"
        )
    if connector.kind == "c_abstractor":
        return CAbstractor(cfg, linear=linear)
    if connector.kind == "average_pool":
        return AveragePoolConnector(cfg, linear=linear)
    if connector.kind == "attention_pool":
        return AttentionPoolConnector(cfg, linear=linear)
    raise ConfigError(
        f"connector.kind = {connector.kind!r} is not a connector",
        fix="use c_abstractor, average_pool or attention_pool",
    )


class AveragePoolConnector(nn.Module):
    """Adaptive average pooling to the output grid, then one linear layer."""

    def __init__(self, cfg: RunConfig, *, linear: Linear) -> None:
        super().__init__()
        self.output_grid = cfg.connector.output_grid_size
        self.projection = linear(cfg.vision.hidden_size, cfg.language.hidden_size, **_placement(cfg))

    def forward(self, features_NPD: torch.Tensor) -> torch.Tensor:
        """Pool and project [N, P, D] -> [N, num_tokens, H]."""
        return self.projection(_pool(_as_grid(features_NPD), self.output_grid).flatten(1, 2))


class AttentionPoolConnector(nn.Module):
    """Learned queries attend once to the normalised patches; a linear layer takes the heads to the decoder's width.

    MM1 names attention pooling with learnable queries; depth, heads and norms are unpublished. Our default is one layer
    and a norm on the queries too, so that the first scores have unit variance and the queries differ from the start.
    The projections have no biases: a key's would add the same to every score of a query.
    """

    def __init__(self, cfg: RunConfig, *, linear: Linear) -> None:
        super().__init__()
        connector, width = cfg.connector, cfg.vision.hidden_size
        placement = _placement(cfg)
        channels, eps = connector.hidden_size, connector.norm_epsilon
        self.heads = connector.num_attention_heads
        self.stored_grid = cfg.vision.stored_grid_size
        self.query_embedding = nn.Parameter(torch.zeros(connector.num_tokens, channels, **placement))
        self.position_embedding = _position_table(cfg)
        self.query_norm = nn.LayerNorm(channels, eps, **placement)
        self.feature_norm = nn.LayerNorm(width, eps, **placement)
        self.query = linear(channels, channels, bias=False, **placement)
        self.key = linear(width, channels, bias=False, **placement)
        self.value = linear(width, channels, bias=False, **placement)
        self.projection = linear(channels, cfg.language.hidden_size, **placement)

    def forward(self, features_NPD: torch.Tensor) -> torch.Tensor:
        """Pool [N, P, D] -> [N, num_tokens, H]."""
        x_NPD = self.feature_norm(_with_positions(features_NPD, self.position_embedding, stored_grid=self.stored_grid))
        query_1KC = self.query(self.query_norm(self.query_embedding))[None]
        query_NAKE = self._by_head(query_1KC).expand(x_NPD.shape[0], -1, -1, -1)
        pooled_NAKE = F.scaled_dot_product_attention(
            query_NAKE, self._by_head(self.key(x_NPD)), self._by_head(self.value(x_NPD))
        )
        return self.projection(pooled_NAKE.transpose(1, 2).flatten(2))

    def _by_head(self, x_NKC: torch.Tensor) -> torch.Tensor:
        return x_NKC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CAbstractor(nn.Module):
    """Residual blocks, adaptive average pooling, residual blocks, MLP (Honeybee's C-Abstractor; MM1 section 3.2)."""

    def __init__(self, cfg: RunConfig, *, linear: Linear) -> None:
        super().__init__()
        connector, width = cfg.connector, cfg.vision.hidden_size
        placement = _placement(cfg)
        self.output_grid = connector.output_grid_size
        self.stored_grid = cfg.vision.stored_grid_size
        self.position_embedding = _position_table(cfg)
        channels, eps = connector.hidden_size, connector.norm_epsilon
        before = [width] + [channels] * (connector.depth - 1)
        self.before_pool = nn.Sequential(
            *(ResidualBlock(c, channels, eps=eps, linear=linear, **placement) for c in before)
        )
        self.after_pool = nn.Sequential(
            *(ResidualBlock(channels, channels, eps=eps, linear=linear, **placement) for _ in range(connector.depth))
        )
        layers: list[nn.Module] = [linear(channels, cfg.language.hidden_size, **placement)]
        for _ in range(connector.mlp_depth - 1):
            layers += [nn.SiLU(), linear(cfg.language.hidden_size, cfg.language.hidden_size, **placement)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, features_NPD: torch.Tensor) -> torch.Tensor:
        """Abstract [N, P, D] -> [N, num_tokens, H]."""
        x_NYXD = _as_grid(_with_positions(features_NPD, self.position_embedding, stored_grid=self.stored_grid))
        x_NYXC = self.after_pool(_pool(self.before_pool(x_NYXD), self.output_grid))
        return self.mlp(x_NYXC.flatten(1, 2))


class ResidualBlock(nn.Module):
    """RegNet bottleneck on a channels-last grid: 1x1, depthwise 3x3, squeeze-excite, 1x1, shortcut, SiLU.

    Args:
        channels_in: channels of the input.
        channels: channels of the output; the shortcut is projected if they differ.
        eps: epsilon of the per-pixel LayerNorms.
        linear: the class of the 1x1 convolutions.
        dtype: dtype of the parameters.
        device: where they lie.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        *,
        eps: float,
        linear: Linear,
        dtype: torch.dtype,
        device: torch.device | int,
    ) -> None:
        super().__init__()
        placement: dict[str, Any] = {"dtype": dtype, "device": device}
        squeezed = round(0.25 * channels_in)
        self.expand = linear(channels_in, channels, bias=False, **placement)
        self.expand_norm = nn.LayerNorm(channels, eps, **placement)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False, **placement)
        self.depthwise_norm = nn.LayerNorm(channels, eps, **placement)
        self.squeeze = linear(channels, squeezed, **placement)
        self.excite = linear(squeezed, channels, **placement)
        self.project = linear(channels, channels, bias=False, **placement)
        self.project_norm = nn.LayerNorm(channels, eps, **placement)
        projected = channels_in != channels
        self.shortcut = linear(channels_in, channels, bias=False, **placement) if projected else nn.Identity()
        self.shortcut_norm = nn.LayerNorm(channels, eps, **placement) if projected else nn.Identity()

    def forward(self, x_NYXC: torch.Tensor) -> torch.Tensor:
        """Transform a grid [N, Y, X, channels_in] -> [N, Y, X, channels]."""
        main = F.silu(self.expand_norm(self.expand(x_NYXC)))
        # A permuted channels-last view is what the convolution calls channels_last memory: nothing is copied.
        main = self.depthwise(main.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        main = F.silu(self.depthwise_norm(main))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(main.mean(dim=(1, 2), keepdim=True)))))
        main = self.project_norm(self.project(main * gate))
        return F.silu(main + self.shortcut_norm(self.shortcut(x_NYXC)))


def _placement(cfg: RunConfig) -> dict[str, Any]:
    return {"dtype": DTYPES[cfg.kernels.params_dtype], "device": torch.cuda.current_device()}


def _position_table(cfg: RunConfig) -> nn.Parameter | None:
    """Return the table [G, D] of ``connector.position_embedding`` for the stored grid, or None without one."""
    shape = (cfg.vision.stored_grid_size**2, cfg.vision.hidden_size)
    return nn.Parameter(torch.zeros(shape, **_placement(cfg))) if cfg.connector.position_embedding else None


def _with_positions(features_NPD: torch.Tensor, table_GD: torch.Tensor | None, *, stored_grid: int) -> torch.Tensor:
    """Add a position table, interpolated to the grid of the features; the features themselves without a table."""
    if table_GD is None:
        return features_NPD
    grid = _side(features_NPD)
    return features_NPD + interpolate_positions(table_GD, source_grid=stored_grid, target_grid=grid, prefix_tokens=0)


def _side(x_NPD: torch.Tensor) -> int:
    """Patches along one side of a square tile."""
    return round(x_NPD.shape[1] ** 0.5)


def _as_grid(x_NPD: torch.Tensor) -> torch.Tensor:
    """View row-major patches [N, P, D] as a square grid [N, Y, X, D]."""
    side = _side(x_NPD)
    return x_NPD.unflatten(1, (side, side))


def _pool(x_NYXC: torch.Tensor, side: int) -> torch.Tensor:
    """Average over windows [floor(i Y / side), ceil((i + 1) Y / side)); they overlap if ``side`` does not divide Y."""
    return F.adaptive_avg_pool2d(x_NYXC.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
