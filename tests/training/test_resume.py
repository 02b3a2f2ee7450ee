"""The decision between starting and going on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm15_megatron.checkpoint.start import ResizedTable, Start
from mm15_megatron.checkpoint.store import open_latest
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.ledger import Ledger
from mm15_megatron.errors import CheckpointError
from mm15_megatron.training.resume import check_same_data, choose_checkpoint, choose_start, resume_block
from mm15_megatron.training.state import TrainState

from ..checkpoint.test_store import published_checkpoint
from ..data.rows import RULES, row_order, text_source
from ..helpers.layouts import change, debug_config

LEDGER = Ledger.empty(["pairs"], ["captions"], ["c0"])
LAYOUT = {"world_size": 8, "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1}


def _config(run_dir: Path, resume: str = "auto") -> RunConfig:
    return change(debug_config(), train={"run_dir": str(run_dir)}, checkpoint={"resume": resume})


def test_fresh(tmp_path: Path) -> None:
    """Without checkpoints a run starts, unless it must not."""
    assert choose_checkpoint(_config(tmp_path)) is None
    assert choose_checkpoint(_config(tmp_path, "never")) is None
    assert "fresh start" in resume_block(_config(tmp_path), None, state=TrainState.start(LEDGER))
    with pytest.raises(CheckpointError, match="resume = 'required', but .* holds no checkpoint"):
        choose_checkpoint(_config(tmp_path, "required"))


def test_going_on(tmp_path: Path) -> None:
    """With a checkpoint a run goes on, and says from where and what has changed since."""
    cfg = _config(tmp_path)
    published_checkpoint(tmp_path, cfg, layout=LAYOUT, versions={"torch": "2.13"})
    assert choose_checkpoint(_config(tmp_path, "required")) is not None
    found = choose_checkpoint(cfg)
    assert found is not None
    block = resume_block(
        change(cfg, train={"steps": 21}), found, state=TrainState(7, 56, 1, LEDGER), checked=9, ranks=2
    )
    assert "go on from step_00000007" in block
    assert "files              9 checked: size and SHA-256" in block
    assert "step 7, 56 rows consumed, 6 updates applied" in block
    assert "written by         torch 2.13\n" in block
    assert "layout             8 ranks, tensor 4; now 2 ranks\n" in block
    assert "train.steps: 20 -> 21" in block


def test_refused(tmp_path: Path) -> None:
    """No fresh start beside checkpoints, tracked or not; no other model."""
    cfg = _config(tmp_path)
    published_checkpoint(tmp_path, cfg)
    with pytest.raises(CheckpointError, match="resume = 'never', but .* holds 1 checkpoints up to step_00000007"):
        choose_checkpoint(_config(tmp_path, "never"))
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        choose_checkpoint(change(cfg, vision={"num_layers": 4}))
    (tmp_path / "checkpoints" / "latest").unlink()
    with pytest.raises(CheckpointError, match="no tracker file"):
        choose_checkpoint(cfg)


def test_other_data(tmp_path: Path) -> None:
    """A changed order is refused with the options and the sources that changed it."""
    cfg = _config(tmp_path)
    reader = text_source(tmp_path / "books", [5, 6])
    order = row_order([reader], [1.0])
    ledger = Ledger.empty(["books"], ["text"], [reader.manifest.digest])
    published_checkpoint(tmp_path, cfg, data_digest=order.digest, progress=TrainState.start(ledger).as_dict())
    found = open_latest(tmp_path)
    assert found is not None
    check_same_data(found, cfg, order=order)
    longer = row_order([reader], [1.0], replace(RULES, seq_length=64))
    with pytest.raises(CheckpointError, match=r"(?s)is not the checkpoint's .*\n +data.seq_length: 128 -> 256"):
        check_same_data(found, change(cfg, data={"seq_length": 256}), order=longer)
    rebuilt = row_order([text_source(tmp_path / "more", [5, 6, 7])], [1.0])
    with pytest.raises(CheckpointError, match=r"(?s)source books is not there any more\n +source more is new, or its"):
        check_same_data(found, cfg, order=rebuilt)


def test_state_round_trip() -> None:
    """Counters survive, and damaged ones are refused."""
    ledger = LEDGER.after(np.ones_like(LEDGER.counts), loss=np.array([[1.5, 2.0]]))
    state = TrainState(step=3, consumed=24, skipped_steps=1, ledger=ledger)
    assert TrainState.from_dict(state.as_dict()).as_dict() == state.as_dict()
    with pytest.raises(CheckpointError, match="the run's counters are"):
        TrainState.from_dict({"step": 3})
    with pytest.raises(CheckpointError, match="the run's counters are"):
        TrainState.from_dict({**state.as_dict(), "step": "3"})


def test_start_from_another_run(tmp_path: Path) -> None:
    """A fresh start says which weights it took; a resumed one, that the option had no part; a wrong path is found."""
    cfg = _config(tmp_path / "run")
    assert choose_start(cfg, None) is None
    assert "weights            random, seed 1234" in resume_block(cfg, None, state=TrainState.start(LEDGER))
    folder = published_checkpoint(tmp_path / "base", cfg, layout=LAYOUT, versions={"torch": "2.13"})
    asked = change(cfg, checkpoint={"init_from": str(tmp_path / "base")})
    found = choose_start(asked, None)
    assert found is not None
    assert found.folder == folder
    table = ResizedTable("connector.position_embedding", stored_grid=4, grid=8, prefix_tokens=0, width=32)
    block = resume_block(asked, None, state=TrainState.start(LEDGER), start=Start(found, (table,)))
    assert f"weights            of {folder}, step 7, named by the tracker\n" in block
    assert "written by         8 ranks, tensor 4, torch 2.13\n" in block
    assert "interpolated       connector.position_embedding 4 x 4 -> 8 x 8\n" in block
    named = change(cfg, checkpoint={"init_from": str(folder)})
    block = resume_block(named, None, state=TrainState.start(LEDGER), start=Start(found, ()))
    assert f"of {folder}, step 7\n" in block
    assert "interpolated       nothing\n" in block
    with pytest.raises(CheckpointError, match="init_from = .*absent does not exist"):
        choose_start(change(cfg, checkpoint={"init_from": str(tmp_path / "absent")}), None)


def test_resuming_wins_over_another_run(tmp_path: Path) -> None:
    """The option may stay, and what it names may be gone."""
    cfg = change(_config(tmp_path), checkpoint={"init_from": "absent"})
    published_checkpoint(tmp_path, cfg, layout=LAYOUT)
    found = choose_checkpoint(cfg)
    assert choose_start(cfg, found) is None
    block = resume_block(cfg, found, state=TrainState(7, 56, 0, LEDGER))
    assert "weights            of this checkpoint; checkpoint.init_from = absent had no part in it" in block
