"""Dealing: which data-parallel rank takes which row of a global batch, and in which of its micro-batches.

On the stage-0 critical path a row costs a constant (it has a constant length) plus a price for each of its tiles. Every
rank takes equally many rows, so constant and price cancel: tile counts alone decide, whatever the model and its layout.

Two sums say how long ranks wait for each other. The gradient synchronisation at the end of the step waits for the rank
with the largest *total*. Experts spread over data-parallel ranks make the ranks meet in every layer, so each k-th
micro-batch takes as long as the slowest of them: the sum over k of the *worst*.

Legend: R rows of the step, D data-parallel ranks, K micro-batches of a rank, M rows of a micro-batch (R = D * K * M).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]

_MOST_SWAPS: Final = 256  # a bound on time; few are ever needed


def deal_in_order(rows: int, *, data_size: int, micro_batch_size: int) -> Int64:
    """Deal rows to ranks in turn, a micro-batch at a time: the k-th micro-batches of all ranks are consecutive rows.

    Returns:
        int64 [D, K, M]: row (0 to R - 1) at each place of each micro-batch of each rank.

    Raises:
        DataError: if the rows cannot be shared equally.
    """
    unit = data_size * micro_batch_size
    if unit < 1 or rows < 1 or rows % unit:
        raise DataError(
            f"{rows} rows cannot be dealt to {data_size} data-parallel ranks in micro-batches of {micro_batch_size}",
            fix="use a multiple of ranks x rows of a micro-batch",
        )
    return np.arange(rows).reshape(-1, data_size, micro_batch_size).swapaxes(0, 1)


def deal_evenly(tiles_R: Int64, *, data_size: int, micro_batch_size: int) -> Int64:
    """Deal the rows of a step so that ranks wait for each other as little as possible.

    Rows become micro-batches as even as they can be; micro-batches, sorted by their tiles, are cut into K slabs of D,
    and each rank takes one of each slab. With one row a micro-batch no other dealing has a smaller sum of the worst.
    Inside a slab the micro-batches go to the ranks so that the totals even out, and are swapped while that lowers the
    largest total. Slabs with many and with few tiles take turns, so that workers that decode ahead see an even load.

    A pure function: every rank computes it for itself. One rank has nobody to wait for, and takes its rows in order.

    Args:
        tiles_R: int64 [R], tiles of each row.
        data_size: D.
        micro_batch_size: M.

    Returns:
        int64 [D, K, M], as :func:`deal_in_order`; a permutation of the rows, ascending inside a micro-batch.

    Raises:
        DataError: if the rows cannot be shared equally.
    """
    in_order_DKM = deal_in_order(len(tiles_R), data_size=data_size, micro_batch_size=micro_batch_size)
    if data_size == 1:
        return in_order_DKM
    batches_BM = np.sort(_even_bins(tiles_R, bins=len(tiles_R) // micro_batch_size), axis=1)
    tiles_B = tiles_R[batches_BM].sum(axis=1)
    picked_DK = _even_bins(tiles_B, bins=data_size)
    _swap_inside_slabs(picked_DK, tiles_B)
    return batches_BM[picked_DK[:, _turns(picked_DK.shape[1])]]


def _even_bins(tiles_N: Int64, *, bins: int) -> Int64:
    """Sort items by tiles, cut them into slabs, and give each bin one item of each slab: the most to who has least.

    Returns:
        int64 [bins, slabs]: item of each slab in each bin; slabs with most tiles first, ties by index.
    """
    slabs_KD = np.argsort(-tiles_N, kind="stable").reshape(-1, bins)
    picked_DK = np.empty(slabs_KD.shape[::-1], np.int64)
    total_D = np.zeros(bins, np.int64)
    for k, slab_D in enumerate(slabs_KD):
        poorest_D = np.argsort(total_D, kind="stable")
        picked_DK[poorest_D, k] = slab_D
        total_D[poorest_D] += tiles_N[slab_D]
    return picked_DK


def _swap_inside_slabs(picked_DK: Int64, tiles_B: Int64) -> None:
    """Swap micro-batches of one slab between the rank with the largest total and another while that lowers it."""
    tiles_DK = tiles_B[picked_DK]
    total_D = tiles_DK.sum(axis=1)
    for _ in range(_MOST_SWAPS):
        top = int(total_D.argmax())
        moved_DK = tiles_DK[top] - tiles_DK
        larger_DK = np.maximum(total_D[top] - moved_DK, total_D[:, None] + moved_DK)
        rank, k = divmod(int(larger_DK.argmin()), tiles_DK.shape[1])
        if larger_DK[rank, k] >= total_D[top]:
            return
        total_D[top] -= moved_DK[rank, k]
        total_D[rank] += moved_DK[rank, k]
        for array in (picked_DK, tiles_DK):
            array[[top, rank], k] = array[[rank, top], k]


def _turns(slabs: int) -> list[int]:
    """Return 0, K - 1, 1, K - 2, ..."""
    return [k // 2 if k % 2 == 0 else slabs - 1 - k // 2 for k in range(slabs)]
