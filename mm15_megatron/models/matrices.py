"""Which whole matrices a local parameter is a part of, for optimizers that look at matrices.

A parameter is not always one matrix. [gate; up] of a gated MLP are two; a fused QKV projection is three, its rows
interleaved by query group; and the padding of the vocabulary is no row of the embedding. Each row of the local tensor
therefore carries the number of its matrix. The kernels of a convolution are the matrix [first dimension, all others];
a vector is a column.

R, C: rows and columns of the local tensor; M: matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.global_parameters import GlobalParameter

PADDING = -1
"""The number that rows of padding carry instead of a matrix's."""

_QKV = ".self_attention.linear_qkv."
_VOCABULARY = (".word_embeddings.weight", ".output_layer.weight")


@dataclass(frozen=True)
class MatrixShard:
    """This rank's part of the whole matrices that a parameter consists of.

    Attributes:
        item: the parameter.
        matrix_R: int64 on the CPU, the matrix that each local row belongs to, or PADDING.
        rows_M: rows of each matrix, those of other ranks included.
        columns: columns of each matrix, those of other ranks included; 1 for a vector.
    """

    item: GlobalParameter
    matrix_R: torch.Tensor
    rows_M: tuple[int, ...]
    columns: int

    @property
    def is_vector(self) -> bool:
        """Whether there are no columns."""
        return self.item.parameter.dim() <= 1

    @property
    def splits_columns(self) -> bool:
        """Whether other ranks of ``item.tensor_group`` hold other columns."""
        return self.item.shards > 1 and self.item.split_dim == 1 + self.item.gated

    @property
    def splits_rows(self) -> bool:
        """Whether other ranks of ``item.tensor_group`` hold other rows."""
        return self.item.shards > 1 and not self.splits_columns

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a tensor of the parameter's shape as [R, C]."""
        return tensor.view(len(self.matrix_R), -1)


def matrix_shard(item: GlobalParameter, cfg: RunConfig) -> MatrixShard:
    """Describe one parameter of a model that was built from ``cfg``."""
    row_dims = 1 + item.gated  # of the whole, as GlobalParameter.global_shape shows it
    whole = _matrix_of_rows(item.name, item.global_shape[:row_dims], cfg)
    local = whole
    if item.split_dim is not None and item.split_dim < row_dims:
        local = whole.chunk(item.shards, dim=item.split_dim)[item.shard_index]
    rows = torch.bincount(whole[whole != PADDING])
    return MatrixShard(item, local.flatten(), tuple(rows.tolist()), math.prod(item.global_shape[row_dims:]))


def _matrix_of_rows(name: str, shape: tuple[int, ...], cfg: RunConfig) -> torch.Tensor:
    """Return the matrix that each row of a whole parameter belongs to, int64 of ``shape``."""
    if len(shape) == 2:  # [gate; up]
        return torch.arange(2)[:, None].expand(shape)
    if _QKV in name:
        vision = name.startswith("vision_encoder.")
        heads = cfg.vision.num_attention_heads if vision else cfg.language.num_attention_heads
        groups = heads if vision else cfg.language.num_query_groups
        heads_of_group = torch.tensor([0] * (heads // groups) + [1, 2])
        head_size = shape[0] // (groups * len(heads_of_group))
        return heads_of_group.repeat_interleave(head_size).repeat(groups)
    matrix_R = torch.zeros(shape, dtype=torch.int64)
    if name.endswith(_VOCABULARY):
        matrix_R[cfg.language.vocab_size :] = PADDING
    return matrix_R
