"""CLIP's and AIM's vision transformers on megatron-core's transformer block (MM1 section 3.1).

N: tiles; H, W: sides of a tile in pixels; P: patches of a tile in row-major order; S: tokens of a tile, P plus the
class token; D: width of the encoder; G: tokens of a position table.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn
from torch.nn import functional as F

from mm15_megatron.config.rules_precision import fp8_alignment
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError
from mm15_megatron.models.attention import packed_rows
from mm15_megatron.models.backend import Backend
from mm15_megatron.models.layer_specs import block_spec, dense_layer_spec
from mm15_megatron.models.transformer_config import vision_transformer_config


def interpolate_positions(
    table_GD: torch.Tensor, *, source_grid: int, target_grid: int, prefix_tokens: int
) -> torch.Tensor:
    """Resize a learned position table to another square grid (bicubic, half-pixel centres, no antialiasing).

    Args:
        table_GD: [prefix_tokens + source_grid ** 2, D], any floating dtype; patches in row-major order.
        source_grid: patches along one side of the stored grid.
        target_grid: patches along one side of the wanted grid.
        prefix_tokens: rows at the front that belong to no patch (the class token's) and are kept as they are.

    Returns:
        [prefix_tokens + target_grid ** 2, D] in the dtype of ``table_GD``, computed in fp32; the table itself if the
        grids are equal.

    Raises:
        ConfigError: if the table does not have the rows that the grid and the prefix say.
    """
    expected = prefix_tokens + source_grid**2
    if table_GD.shape[0] != expected:
        raise ConfigError(
            f"a position table of {table_GD.shape[0]} rows is not a grid of {source_grid} x {source_grid} patches "
            f"after {prefix_tokens} other tokens ({expected} rows)",
            fix="set vision.image_size, vision.position_grid_size and vision.class_token to those of the weights",
        )
    if source_grid == target_grid:
        return table_GD
    prefix, patches = table_GD.split([prefix_tokens, source_grid**2])
    grid_1DHW = patches.float().unflatten(0, (source_grid, source_grid)).permute(2, 0, 1)[None]
    resized_1DHW = F.interpolate(grid_1DHW, size=(target_grid, target_grid), mode="bicubic", align_corners=False)
    return torch.cat((prefix, resized_1DHW.flatten(2)[0].T.to(table_GD.dtype)))


def sincos_positions(grid: int, width: int, *, device: torch.device) -> torch.Tensor:
    """Compute AIM's fixed positions of a square grid of patches.

    A quarter of the channels each: sine and cosine of the column, sine and cosine of the row; channel i of a quarter
    has the frequency 10000 ** (-4 i / width) (as apple/ml-aim, after MAE).

    Args:
        grid: patches along one side.
        width: D, a multiple of four.
        device: where the table is computed.

    Returns:
        [grid ** 2, D] fp32, patches in row-major order.
    """
    frequency_F = 10000.0 ** -(torch.arange(width // 4, device=device) / (width / 4))
    angle_GF = torch.arange(grid, device=device)[:, None] * frequency_F
    axis_GE = torch.cat((angle_GF.sin(), angle_GF.cos()), dim=1)
    column_YXE = axis_GE[None].expand(grid, -1, -1)
    row_YXE = axis_GE[:, None].expand(-1, grid, -1)
    return torch.cat((column_YXE, row_YXE), dim=-1).flatten(0, 1)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product.

    A module of its own because megatron-core gathers parameters just before the module that holds them runs: a weight
    read from outside its module would be the one before the last update.

    Args:
        width: D, width of the encoder.
        patch: side of a patch, pixels.
        bias: whether a bias [D] is added.
        dtype: of the weight [D, 3, patch, patch] and of the bias.
        device: where they live.
    """

    def __init__(self, width: int, patch: int, *, bias: bool, dtype: torch.dtype, device: torch.device | int) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(width, dtype=dtype, device=device)) if bias else None

    def forward(self, tiles_N3HW: torch.Tensor) -> torch.Tensor:
        """Embed the patches of every tile, row-major: [P, N, D] in the dtype of the weight.

        Raises:
            ConfigError: if the tiles are not square or not a whole number of patches.
        """
        tiles, channels, height, width = tiles_N3HW.shape
        patch = self.patch
        if height != width or height % patch:
            raise ConfigError(
                f"a tile of {height} x {width} pixels is not a square of {patch}-pixel patches",
                fix=f"make vision.image_size a multiple of vision.patch_size ({patch})",
            )
        grid = height // patch
        pixels = tiles_N3HW.to(self.weight.dtype)
        pixels = pixels.reshape(tiles, channels, grid, patch, grid, patch).permute(2, 4, 0, 1, 3, 5)
        return F.linear(pixels.reshape(grid * grid, tiles, -1), self.weight.flatten(1), self.bias)


class VisionEncoder(MegatronModule):
    """A ViT: patches, class token and positions, a LayerNorm before the blocks, pre-norm blocks.

    The defaults of ``vision`` are CLIP's; ``position_embedding``, ``pre_layernorm``, ``patch_bias``, ``class_token``
    and ``add_bias_linear`` make it AIM. Sin-cos positions are computed for the grid at hand: they are no parameter,
    stand in no checkpoint and are never interpolated; a class token's are zero. The blocks after
    ``vision.feature_layer`` are not built. ``vision.post_layernorm`` adds a LayerNorm on the features. Parameters are
    left for ``initialise.py`` to fill.

    Args:
        cfg: the run.
        backend: the classes its layers are made of.
        groups: process groups of the encoder: of size one for a data-parallel encoder, with the real tensor-parallel
            group for a tensor-parallel one. It is never pipelined.
    """

    def __init__(self, cfg: RunConfig, *, backend: Backend, groups: ProcessGroupCollection) -> None:
        config = vision_transformer_config(cfg)
        super().__init__(config)
        vision = cfg.vision
        width, patch = vision.hidden_size, vision.patch_size
        self.patch_size = patch
        self.stored_grid = vision.stored_grid_size
        self.prefix_tokens = int(vision.class_token)
        placement = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.patch_embedding = PatchEmbedding(width, patch, bias=vision.patch_bias, **placement)
        self.class_token = nn.Parameter(torch.zeros(width, **placement)) if vision.class_token else None
        learned = vision.position_embedding == "learned"
        table_shape = (self.prefix_tokens + self.stored_grid**2, width)
        self.position_embedding = nn.Parameter(torch.zeros(table_shape, **placement)) if learned else None
        self.normalises_patches = vision.pre_layernorm == "patches"
        self.pre_layernorm = backend.norm(config, width, config.layernorm_epsilon)
        fp8 = cfg.precision.fp8 is not None and cfg.precision.fp8_vision
        self.row_multiple = fp8_alignment(cfg.precision.fp8_recipe) if fp8 else None
        self.blocks = TransformerBlock(
            config=config,
            spec=block_spec(backend, [dense_layer_spec(backend, mask=AttnMaskType.no_mask)] * config.num_layers),
            post_layer_norm=vision.post_layernorm,
            pg_collection=groups,
        )

    def forward(self, tiles_N3HW: torch.Tensor) -> torch.Tensor:
        """Encode tiles.

        Args:
            tiles_N3HW: [N, 3, H, H], normalised pixels of any floating dtype; H is any multiple of the patch size.

        Returns:
            [N, P, D] in the dtype of the parameters; the class token is dropped.

        Raises:
            ConfigError: if the tiles are not square or not a whole number of patches.
        """
        x_SND = self.patch_embedding(tiles_N3HW)
        if self.normalises_patches:
            x_SND = self.pre_layernorm(x_SND)
        if self.class_token is not None:
            x_SND = torch.cat((self.class_token.expand(1, x_SND.shape[1], -1), x_SND))
        x_SND = x_SND + self._positions(tiles_N3HW.shape[-1] // self.patch_size, like=x_SND)[:, None]
        if not self.normalises_patches:
            x_SND = self.pre_layernorm(x_SND)
        if self.row_multiple is None:
            x_SND = self.blocks(x_SND, attention_mask=None)
        else:
            x_SND = self._in_one_row(x_SND, multiple=self.row_multiple)
        return x_SND[self.prefix_tokens :].transpose(0, 1)

    def _in_one_row(self, x_SND: torch.Tensor, *, multiple: int) -> torch.Tensor:
        """Run the blocks on all tiles end to end, padded to a multiple of tokens: a tile has 729 or 730, and FP8
        quantises 16 or 32 rows at a time. The padding is a segment of its own, so no tile sees it.
        """
        tokens, tiles, _ = x_SND.shape
        length = tokens * tiles
        padding = -length % multiple
        bounds = torch.arange(0, length + 1, tokens, dtype=torch.int32, device=x_SND.device)
        if padding:
            bounds = F.pad(bounds, (0, 1), value=length + padding)
        row_T1D = F.pad(x_SND.transpose(0, 1).flatten(0, 1), (0, 0, 0, padding))[:, None]
        rows = packed_rows(bounds, max_segment=max(tokens, padding), rotary=None)
        row_T1D = self.blocks(row_T1D, attention_mask=None, packed_seq_params=rows)
        return row_T1D[:length, 0].unflatten(0, (tiles, tokens)).transpose(0, 1)

    def _positions(self, grid: int, *, like: torch.Tensor) -> torch.Tensor:
        """Return what is added to the tokens of a tile of ``grid`` x ``grid`` patches, [S, D], dtype as ``like``."""
        if self.position_embedding is not None:
            return interpolate_positions(
                self.position_embedding,
                source_grid=self.stored_grid,
                target_grid=grid,
                prefix_tokens=self.prefix_tokens,
            )
        table_PD = sincos_positions(grid, like.shape[-1], device=like.device).to(like.dtype)
        return F.pad(table_PD, (0, 0, self.prefix_tokens, 0))
