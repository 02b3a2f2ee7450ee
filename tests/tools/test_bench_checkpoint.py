"""The benchmark of checkpoints: every way writes the same bytes, and every round is counted."""

from __future__ import annotations

from pathlib import Path

from mm15_megatron.bench.checkpoint import DISK, FORMATS, TORCH_SAVE, Measured, figures_of, report_lines
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import rank_place, run_on_ranks

from ..helpers.layouts import debug_config
from ..helpers.tools import load_tool

ROUNDS = 2


def _measure(cfg: RunConfig, folder: str) -> Measured:
    tool = load_tool("bench_checkpoint")
    return tool.measure(cfg, place=rank_place(), rounds=ROUNDS, base=Path(folder))


def test_every_way_writes_the_same_bytes(tmp_path: Path) -> None:
    """Two ranks, both formats, and the peers; nothing stays behind."""
    cfg = parse_layout("tp2").apply(debug_config())
    measured, other = run_on_ranks(_measure, 2, cfg=cfg, folder=str(tmp_path), timeout=600)
    assert list(tmp_path.iterdir()) == []
    assert measured.ways.keys() == {DISK, TORCH_SAVE, *FORMATS, *(f"{name}, async" for name in FORMATS)}
    assert all(len(way.seconds) == len(way.blocked) == ROUNDS for way in measured.ways.values())
    assert measured == other, "the slowest rank counts, on every rank"
    for fmt in FORMATS:
        way = measured.ways[fmt]
        assert list(way.phases) == ["snapshot", "begin", "exchange", "tensors", "proof", "publish"]
        for number, seconds in enumerate(way.seconds):
            assert sum(phase[number] for phase in way.phases.values()) >= 0.99 * seconds
        assert len(way.load) == ROUNDS
        beside = measured.ways[f"{fmt}, async"]
        assert all(blocked < seconds for blocked, seconds in zip(beside.blocked, beside.seconds, strict=True))
    text = "\n".join(report_lines(measured, ranks=2))
    assert f"{measured.num_bytes / 1e6:,.0f} MB of weights, masters and moments from 2 ranks" in text
    assert figures_of(measured)["bytes"] == measured.num_bytes
