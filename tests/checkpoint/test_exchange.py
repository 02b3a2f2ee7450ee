"""Ranges that go from the ranks that hold them to those that write them."""

from __future__ import annotations

import os

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from mm15_megatron.checkpoint.exchange import Scattered, Share, assembled
from mm15_megatron.checkpoint.optimizer_state import pieces
from mm15_megatron.checkpoint.schema import optimizer_key, state_to_save
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.global_parameters import global_parameters
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.trace import build_parts
from mm15_megatron.utils.ranks import gathered_objects

from ..helpers.layouts import debug_config
from ..helpers.steps import train_steps

BOUNDS = {"a": (0, 5, 5, 12), "b": (0, 0, 12, 12), "c": (0, 0, 0, 12), "d": (0, 4, 8, 12)}
"""By tensor: where the range of each of three ranks begins; some hold nothing of it."""
WRITERS = {"a": 2, "b": 0, "c": 2, "d": 1}


def _content(key: str) -> torch.Tensor:
    return 100.0 * sorted(BOUNDS).index(key) + torch.arange(12.0)


def _assemble(*, dies: int | None = None) -> dict[str, list[list[float]]]:
    me = torch.distributed.get_rank()
    scattered, held = {}, {}
    for key in sorted(BOUNDS, reverse=me == 1):  # ranks may list them in any order
        cuts = zip(range(3), BOUNDS[key], BOUNDS[key][1:], strict=False)
        shares = tuple(Share(*cut) for cut in cuts if cut[1] < cut[2])
        mine = [_content(key)[share.start : share.stop] for share in shares if share.rank == me]
        if mine:
            held[key] = mine[0]
        if mine or me == WRITERS[key]:
            whole = ShardedTensor.from_rank_offsets(key, torch.empty(3, 4, device="meta"), replica_id=0)
            scattered[key] = Scattered(whole.without_data(), WRITERS[key], shares)
    if me == dies:
        os._exit(9)
    return {key: one.data.tolist() for key, one in assembled(scattered, held).items()}


def test_each_writer_gets_its_tensors_whole() -> None:
    """Ranges may be empty, a writer may hold nothing or all, and ranks list tensors in any order."""
    found = run_on_ranks(_assemble, 3)
    assert found == [{key: _content(key).view(3, 4).tolist() for key in keys} for keys in ("b", "d", "ac")]


def test_a_rank_that_is_gone_is_an_error() -> None:
    """Those that wait for its ranges are told, soon."""
    with pytest.raises(RankFailure, match=r"(?s)rank 0 ---.*the process died.*rank 1 ---.*RuntimeError"):
        run_on_ranks(_assemble, 3, dies=0)


def _compare_with_live(cfg: RunConfig) -> tuple[int, int]:
    """Every element of the optimizer's state of this rank beside what its writer got; elements compared, received."""
    parts = build_parts(cfg)
    train_steps(parts, 0, 1)
    items = {item.parameter: item for item in global_parameters([chunk.module for chunk in parts.chunks])}
    state = state_to_save(parts.chunks, parts.optimizer)
    got = assembled(state.scattered, state.held)
    everywhere = {
        (key, tuple(one.global_offset)): one.data for share in gathered_objects(got) for key, one in share.items()
    }
    compared = 0
    for piece in pieces(parts.optimizer):
        item = items[piece.parameter]
        if item.tied_copy:
            continue
        for kind, live in piece.tensors.items():
            offset = [0] * len(item.global_shape)
            if item.split_dim is not None:
                offset[item.split_dim] = item.global_shape[item.split_dim] // item.shards * item.shard_index
            whole = everywhere[optimizer_key(item.name, kind), tuple(offset)]
            assert torch.equal(whole.reshape(-1)[piece.start : piece.stop], live.detach().reshape(-1))
            compared += live.numel()
    close_topology()
    return compared, sum(one.data.numel() for one in got.values())


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("debug_dense", "tp2dp2-distopt"),
        ("debug_dense", "pp2dp2-distopt-gradoverlap-buckets20000"),
        ("debug_moe", "tp2sp-ep2-etp1-distopt"),
    ],
)
def test_writers_get_what_the_optimizer_holds(preset: str, layout: str) -> None:
    """Bitwise, with parameters cut by buckets, and with experts, whose data group is another one."""
    chosen = parse_layout(layout)
    found = run_on_ranks(_compare_with_live, chosen.world_size, cfg=chosen.apply(debug_config(preset)))
    compared, received = map(sum, zip(*found, strict=True))
    assert compared >= received > 0
