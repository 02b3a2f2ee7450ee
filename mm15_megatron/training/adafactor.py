"""AdaFactor over sharded matrices: every rank's update is the one that a single rank would compute.

The second moment of a matrix is kept as the means of its rows and columns. Means, their normalisation and the clip of
the update cover the whole matrix, whichever ranks hold its parts: they are sums over the tensor-parallel group of the
parameter, three collectives a step for all parameters together. What a matrix is, is said by ``models/matrices.py``.

For a matrix with gradient g in step t (from 1), b = 1 - t ** -decay_rate:

    row    <- b row    + (1 - b) mean over columns of (g ** 2 + eps)
    column <- b column + (1 - b) mean over rows of (g ** 2 + eps)
    u = g / sqrt(row / mean(row)) / sqrt(column)
    u <- u / max(1, RMS(u) / clip_threshold)
    m <- beta1 m + (1 - beta1) lr u
    w <- w - lr weight_decay w - m

A vector keeps its full second moment instead. Sources: Shazeer and Stern 2018 (arXiv 1804.04235); order and defaults
are AXLearn's public language-model configuration, without scaling by the parameter's RMS, so that the learning rate is
absolute (MM1.5's flags are unpublished). On whole matrices transformers' Adafactor computes the same with
``scale_parameter=False, relative_step=False``.

R, C: rows and columns of the local tensor; M: matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import ProcessGroup

from mm15_megatron.checkpoint.optimizer_state import StateTensor
from mm15_megatron.config.schema import OptimizerConfig
from mm15_megatron.models.matrices import PADDING, MatrixShard


class _Rows:
    """Sums over, and values of, the rows of a shard by matrix.

    Args:
        shard: the shard.
        device: of the parameter.
    """

    def __init__(self, shard: MatrixShard, device: torch.device) -> None:
        matrix_R = shard.matrix_R.to(device)
        count = len(shard.rows_M)
        self._many = count > 1 or bool((shard.matrix_R == PADDING).any())
        self._matrix_R = matrix_R.clamp(min=0)
        # summed by a product with ones and zeros: adding by index is not deterministic on a GPU
        self._of_matrix_MR = (matrix_R == torch.arange(count, device=device)[:, None]).float()
        self.rows_M = torch.tensor(shard.rows_M, dtype=torch.float32, device=device)

    def sums(self, values_RC: torch.Tensor) -> torch.Tensor:
        """Sum the rows of each matrix: [R, C] -> [M, C]; padding is left out."""
        return self._of_matrix_MR @ values_RC if self._many else values_RC.sum(0, keepdim=True)

    def spread(self, values_MC: torch.Tensor) -> torch.Tensor:
        """Give each row the value of its matrix: [M, C] -> [R, C] or [1, C]."""
        return values_MC[self._matrix_R] if self._many else values_MC


@dataclass(frozen=True)
class _Work:
    """One parameter in a step.

    Attributes:
        shard: what it is a part of.
        rows: its rows.
        parameter_RC: the fp32 parameter.
        gradient_RC: its gradient, fp32.
        state: its state.
        group: its parameter group.
    """

    shard: MatrixShard
    rows: _Rows
    parameter_RC: torch.Tensor
    gradient_RC: torch.Tensor
    state: dict[str, torch.Tensor]
    group: Mapping[str, Any]

    def direction(self, row_means_M: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient over the root of its second moment, [R, C], before the clip."""
        if row_means_M is None:
            return self.gradient_RC * self.state["exp_avg_sq"].view(-1, 1).rsqrt()
        row_R1 = self.state["row"].view(-1, 1) / self.rows.spread(row_means_M[:, None])
        return self.gradient_RC * row_R1.rsqrt() * self.rows.spread(self.state["column"].rsqrt())


class AdaFactor(torch.optim.Optimizer):
    """AdaFactor for parameters that may be shards of larger matrices.

    Parameters, gradients and state are fp32. All ranks of ``group`` must step together, with the same parameters.

    Args:
        param_groups: with ``params`` and, in the same order, ``shards`` (:class:`MatrixShard`); ``lr`` and
            ``weight_decay`` are set by the schedule before a step.
        settings: the optimizer's options.
        group: the ranks that the matrices are split over.
    """

    def __init__(
        self, param_groups: Sequence[dict[str, Any]], settings: OptimizerConfig, *, group: ProcessGroup
    ) -> None:
        super().__init__(param_groups, {"lr": 0.0, "weight_decay": 0.0, "step": 0})
        self._settings = settings
        self._group = group
        self._rows: dict[str, _Rows] = {}

    def create_states(self) -> None:
        """Create the state of every parameter that has none yet, as zeros."""
        for parameter, shard, _ in self._members():
            state = self.state[parameter]
            if state:
                continue
            if self._settings.adafactor_beta1 is not None:
                state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            shards = shard.item.shards
            for kind, tensor in self._shapes(shard).items():
                state[kind] = torch.zeros(tensor.local_shape(shards), dtype=torch.float32, device=parameter.device)
            if shard.is_vector:
                state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)

    def state_shapes(self, parameter: torch.Tensor) -> Mapping[str, StateTensor]:
        """Return the whole shapes of a parameter's state, by kind, where they are not the parameter's."""
        return next(self._shapes(shard) for member, shard, _ in self._members() if member is parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "the gradients are ready"
        self.create_states()
        for group in self.param_groups:
            group["step"] += 1
        works = list(self._works())
        self._update_moments(works)
        row_means = self._row_means(works)
        clips = self._clips(works, row_means)
        for work, means_M, clip_M in zip(works, row_means, clips, strict=True):
            self._apply(work, means_M, clip_M)

    def _members(self) -> Iterator[tuple[torch.Tensor, MatrixShard, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter, shard in zip(group["params"], group["shards"], strict=True):
                yield parameter, shard, group

    def _shapes(self, shard: MatrixShard) -> dict[str, StateTensor]:
        """Shapes of the moments that have another than the parameter's."""
        if shard.is_vector:
            return {}
        item, row_dims, matrices = shard.item, 1 + shard.item.gated, len(shard.rows_M)
        row = StateTensor(item.global_shape[:row_dims], split_dim=item.split_dim if shard.splits_rows else None)
        column = StateTensor((matrices, shard.columns), split_dim=1 if shard.splits_columns else None)
        return {"row": row, "column": column}

    def _works(self) -> Iterator[_Work]:
        for parameter, shard, group in self._members():
            if parameter.grad is None:
                continue
            name = shard.item.name
            if name not in self._rows:
                self._rows[name] = _Rows(shard, parameter.device)
            gradient_RC = shard.view(parameter.grad)
            yield _Work(shard, self._rows[name], shard.view(parameter), gradient_RC, self.state[parameter], group)

    def _update_moments(self, works: Sequence[_Work]) -> None:
        """Move the second moments on."""
        squares: list[dict[str, torch.Tensor]] = []
        partial = []
        for work in works:
            square_RC = work.gradient_RC.square() + self._settings.adafactor_eps
            if work.shard.is_vector:
                squares.append({"exp_avg_sq": square_RC.flatten()})
                continue
            sums = {"row": square_RC.sum(1), "column": work.rows.sums(square_RC)}
            if work.shard.splits_columns:
                partial.append(sums["row"])
            elif work.shard.splits_rows:
                partial.append(sums["column"])
            squares.append(sums)
        self._add_up(partial)
        for work, sums in zip(works, squares, strict=True):
            beta2 = 1.0 - work.group["step"] ** -self._settings.adafactor_decay_rate
            if "row" in sums:
                sums["row"] /= work.shard.columns
                sums["column"] /= work.rows.rows_M[:, None]
            for kind, value in sums.items():
                work.state[kind].lerp_(value.view_as(work.state[kind]), 1.0 - beta2)

    def _row_means(self, works: Sequence[_Work]) -> list[torch.Tensor | None]:
        """Mean of the rows' moments of each matrix, [M]; None for a vector."""
        means = [None if w.shard.is_vector else w.rows.sums(w.state["row"].view(-1, 1))[:, 0] for w in works]
        self._add_up([m for m, w in zip(means, works, strict=True) if m is not None and w.shard.splits_rows])
        return [None if m is None else m / w.rows.rows_M for m, w in zip(means, works, strict=True)]

    def _clips(self, works: Sequence[_Work], row_means: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """By what the direction of each matrix is divided, [M]."""
        squares = [
            work.rows.sums(work.direction(means_M).square().sum(1, keepdim=True))[:, 0]
            for work, means_M in zip(works, row_means, strict=True)
        ]
        self._add_up([square for square, work in zip(squares, works, strict=True) if work.shard.item.shards > 1])
        threshold = self._settings.adafactor_clip_threshold
        return [
            (square_M / (work.rows.rows_M * work.shard.columns)).sqrt().div(threshold).clamp(min=1.0)
            for square_M, work in zip(squares, works, strict=True)
        ]

    def _apply(self, work: _Work, means_M: torch.Tensor | None, clip_M: torch.Tensor) -> None:
        lr, decay = work.group["lr"], work.group["weight_decay"]
        # the direction is computed a second time: keeping it would cost another copy of the parameters
        update_RC = work.direction(means_M) * (lr / work.rows.spread(clip_M[:, None]))
        beta1 = self._settings.adafactor_beta1
        if beta1 is not None:
            update_RC = work.shard.view(work.state["exp_avg"]).lerp_(update_RC, 1.0 - beta1)
        if decay:
            work.parameter_RC.mul_(1.0 - lr * decay)
        work.parameter_RC.sub_(update_RC)

    def _add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors over the group, in place, in one collective."""
        if not tensors:
            return
        flat = _flatten_dense_tensors(tensors)
        torch.distributed.all_reduce(flat, group=self._group)
        for tensor, total in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
            tensor.copy_(total)
