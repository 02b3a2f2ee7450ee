"""Ranges that go from the ranks that hold them to those that write them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from mm15_megatron.checkpoint import exchange
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

from ..helpers.layouts import change, debug_config
from ..helpers.steps import train_steps

BOUNDS = {"a": (0, 5, 5, 12), "b": (0, 0, 12, 12), "c": (0, 0, 0, 12), "d": (0, 4, 8, 12)}
"""By tensor: where the range of each of three ranks begins; some hold nothing of it."""
WRITERS = {"a": 2, "b": 0, "c": 2, "d": 1}


def _content(key: str) -> torch.Tensor:
    return 100.0 * sorted(BOUNDS).index(key) + torch.arange(12.0)


def _assemble(*, dies_at: int = -1) -> dict[str, list[list[float]]]:
    """What this rank gets; rank 0 dies where it would begin its n-th transfer."""
    me, begun = torch.distributed.get_rank(), {"count": 0}

    def counted(name: str, real: Callable[..., Any]) -> None:
        def dying(*arguments: Any) -> Any:
            if begun["count"] == dies_at and me == 0:
                os._exit(9)
            begun["count"] += 1
            return real(*arguments)

        setattr(exchange, name, dying)

    counted("_sent", exchange._sent)
    counted("_received", exchange._received)
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
    found = assembled(scattered, held)
    assert all(one.data.data_ptr() == held[key].data_ptr() for key, one in found.items() if key == "c"), "not copied"
    return {key: one.data.tolist() for key, one in found.items()}


def test_each_writer_gets_its_tensors_whole() -> None:
    """Ranges may be empty, a writer may hold nothing or all, and ranks list tensors in any order."""
    found = run_on_ranks(_assemble, 3)
    assert found == [{key: _content(key).view(3, 4).tolist() for key in keys} for keys in ("b", "d", "ac")]


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_a_rank_that_is_gone_is_an_error(begun: int) -> None:
    """Whoever waits for its ranges is told, soon, before its first transfer and between two."""
    with pytest.raises(RankFailure, match=r"(?s)rank 0 ---.*the process died.*rank 1 ---.*RuntimeError"):
        run_on_ranks(_assemble, 3, dies_at=begun)


def _without_room() -> None:
    whole = ShardedTensor.from_rank_offsets("x", torch.empty(1 << 50, device="meta"), replica_id=0).without_data()
    shares = (Share(0, 0, 1 << 49), Share(1, 1 << 49, 1 << 50))
    assembled({"x": Scattered(whole, 1, shares)}, {"x": torch.empty(0)})


def test_no_room_for_what_is_gathered_is_an_error_of_every_rank() -> None:
    """No rank is left waiting for the one that cannot take part."""
    expected = r"(?s)rank 0 ---.*CheckpointError: rank 1: no memory for 4,294,967,296.0 MiB.*rank 1 ---.*no memory for"
    with pytest.raises(RankFailure, match=expected):
        run_on_ranks(_without_room, 2)


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
    ("preset", "layout", "frozen"),
    [
        ("debug_dense", "tp2dp2-distopt", None),
        ("debug_dense", "pp2dp2-distopt-gradoverlap-buckets20000", None),
        ("debug_dense", "cp2dp2-distopt", None),
        ("debug_dense", "dp2-distopt", "vision"),
        ("debug_moe", "ep2dp4-distopt", None),
        ("debug_moe", "tp2sp-ep2-etp1-distopt", None),
    ],
)
def test_writers_get_what_the_optimizer_holds(preset: str, layout: str, frozen: str | None) -> None:
    """Bitwise: parameters cut by buckets, some of them frozen, and experts, whose data group is another one."""
    chosen = parse_layout(layout)
    cfg = change(debug_config(preset), freeze={} if frozen is None else {frozen: True})
    found = run_on_ranks(_compare_with_live, chosen.world_size, cfg=chosen.apply(cfg))
    compared, received = map(sum, zip(*found, strict=True))
    assert compared >= received > 0
