"""A published checkpoint is what the run held, and a damaged one is named and not loaded."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mm15_megatron.checkpoint import proof as proof_module
from mm15_megatron.checkpoint import save, schema, torch_dist
from mm15_megatron.checkpoint.proof import (
    Proof,
    Sample,
    Samples,
    StoredFile,
    damaged_files,
    differing,
    digest_of_file,
    is_stale,
    take_samples,
)
from mm15_megatron.checkpoint.publish import checkpoints_folder
from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.checkpoint.store import check_files, load_training, load_weights, open_checkpoint
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.stream import Row, rank_batches, row_of
from mm15_megatron.parity.trace import build_parts
from mm15_megatron.training.step import StepParts, train_step

from ..helpers.layouts import change, debug_config
from ..helpers.steps import train_steps
from ..helpers.tables import FaultMatrix

TP2DP2 = parse_layout("tp2dp2-distopt")


def _config(run_dir: Path) -> RunConfig:
    return change(debug_config(), train={"run_dir": str(run_dir)})


def _save(parts: StepParts, step: int) -> None:
    save_checkpoint(
        parts.cfg,
        parts.chunks,
        parts.optimizer,
        topology=parts.topology,
        step=step,
        data_digest="stream",
        progress={"step": step},
    )


def _train_and_save(cfg: RunConfig, *, steps: int, fault: Callable[[int], None] | None = None) -> None:
    parts = build_parts(cfg)
    for step in range(1, steps + 1):
        train_steps(parts, step - 1, 1)
        if fault is not None:
            fault(step)
        _save(parts, step)
    close_topology()


def _load(cfg: RunConfig, folder: str, *, weights: bool = False) -> None:
    parts = build_parts(cfg)
    checkpoint = open_checkpoint(Path(folder))
    if weights:
        load_weights(checkpoint, cfg, [chunk.module for chunk in parts.chunks])
    else:
        load_training(checkpoint, cfg, parts.chunks, parts.optimizer)
    check_files(checkpoint)
    close_topology()


def test_every_file_has_its_proof(tmp_path: Path) -> None:
    run_on_ranks(_train_and_save, 4, cfg=TP2DP2.apply(_config(tmp_path)), steps=1)
    folder = checkpoints_folder(tmp_path) / "step_00000001"
    proof = Proof.read(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(proof.files) == files - {"proof.json"}
    assert len([name for name in files if name.endswith(".distcp")]) == 2 * 4
    assert all(digest_of_file(folder / name) == one for name, one in proof.files.items())
    assert proof.optimizer_step == 1
    assert proof.moments


# --- Damage


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated": (_truncate, "bytes instead of"),
    "flipped": (_flip_a_bit, "has another SHA-256: its content changed"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    run_on_ranks(_train_and_save, 2, cfg=change(_config(run_dir), checkpoint={"keep": 0}), steps=2)
    return run_dir


@pytest.fixture
def damaged(two_checkpoints: Path) -> Iterator[Path]:
    """The newest checkpoint; put right afterwards."""
    folder = checkpoints_folder(two_checkpoints) / "step_00000002"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield folder
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["tensors/__1_0.distcp", "tensors/.metadata", "tensors/common.pt"])
def test_damage_is_named_and_the_checkpoint_before_it_offered(
    name: str, kind: str, damaged: Path, fault_matrix: FaultMatrix
) -> None:
    damage, said = DAMAGE[kind]
    damage(damaged / name)
    cfg = _config(damaged.parents[1])
    with pytest.raises(RankFailure) as failed:
        run_on_ranks(_load, 2, cfg=cfg, folder=str(damaged), weights=kind == "flipped")
    error = failed.value.bad_input
    assert isinstance(error, CheckpointError)
    assert f"{damaged} is damaged: {name} " in error.problem
    assert said in error.problem
    assert error.fix.startswith(f"write step_00000001 into {damaged.parent / 'latest'}")
    fault_matrix(f"{kind} {name}", "load", "named, step_00000001 offered")


def test_no_checkpoint_is_whole(damaged: Path) -> None:
    other = damaged.parent / "step_00000001" / "tensors" / "__0_0.distcp"
    content = other.read_bytes()
    _truncate(other)
    _truncate(damaged / "tensors" / "__0_0.distcp")
    try:
        with pytest.raises(RankFailure) as failed:
            run_on_ranks(_load, 1, cfg=_config(damaged.parents[1]), folder=str(damaged))
        assert isinstance(failed.value.bad_input, CheckpointError)
        assert failed.value.bad_input.fix == "no older checkpoint is whole: restore these files from a copy"
    finally:
        other.write_bytes(content)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk's error is damage like any other: the older checkpoint is offered for it."""
    (tmp_path / "shard").write_bytes(b"12")
    proof = Proof({"shard": StoredFile(2, "x")}, 1, {})

    def fail(path: Path) -> StoredFile:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(proof_module, "digest_of_file", fail)
    assert damaged_files(tmp_path, proof, names=["shard"]) == ["shard cannot be read: Input/output error"]


@pytest.mark.parametrize("content", [None, "{", '{"files": 3, "optimizer_step": 1, "moments": {}}'])
def test_the_proof_itself_is_damaged(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    if content is not None:
        (folder / "proof.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"proof\.json cannot be read") as failed:
        Proof.read(folder)
    assert failed.value.fix == "no older checkpoint is there: restore the file from a copy"
    (tmp_path / "step_00000002").mkdir()
    with pytest.raises(CheckpointError) as failed:
        Proof.read(folder)
    assert failed.value.fix.startswith(f"write step_00000002 into {tmp_path / 'latest'} to go on from the one before")


# --- Copies that are not the run's state


def _first_state_again(step: int) -> None:
    """A fault: what is written is a copy of the first state."""
    if step > 1:
        return
    describe, kept = schema.state_to_save, {}

    def stale(*arguments: object, **also: object) -> schema.StateToSave:
        found = describe(*arguments, **also)
        for key, tensor in found.tensors.items():
            tensor.data = kept.setdefault(key, tensor.data.clone())
        for key, part in found.held.items():
            found.held[key] = kept.setdefault(key, part.clone())
        return found

    schema.state_to_save = stale


def _first_state_and_samples_again(step: int) -> None:
    """A fault that a comparison with the copy alone would miss: the live tensors stand still too."""
    _first_state_again(step)
    if step > 1:
        return
    kept: list[Samples] = []

    def stale(*arguments: object, round_number: int) -> Samples:
        kept.append(take_samples(*arguments, round_number=0))
        return kept[0]

    save.take_samples = stale


def _one_wrong_value(step: int) -> None:
    """A fault: a value of every tensor is lost between the copy and the file."""
    write = torch_dist.save_tensors
    if step < 2:
        return

    def damaging(tensors: dict[str, object], folder: Path) -> list[Path]:
        for tensor in tensors.values():
            tensor.data = tensor.data.clone()
            tensor.data.view(-1)[-1] += 1
        return write(tensors, folder)

    torch_dist.save_tensors = damaging


def _zeros_on_disk(step: int) -> None:
    """A fault: a file has its length and none of its content."""
    write = torch_dist.save_tensors

    def losing(tensors: dict[str, object], folder: Path) -> list[Path]:
        written = write(tensors, folder)
        for path in written:
            if step == 2 and path.suffix == ".distcp":
                path.write_bytes(bytes(path.stat().st_size))
        return written

    torch_dist.save_tensors = losing


def _no_index_on_disk(step: int) -> None:
    """A fault: the index cannot even be opened."""
    write = torch_dist.save_tensors

    def losing(tensors: dict[str, object], folder: Path) -> list[Path]:
        written = write(tensors, folder)
        if step == 2:
            torch.distributed.barrier()
            (folder / ".metadata").write_bytes(bytes(100))
            torch.distributed.barrier()
        return written

    torch_dist.save_tensors = losing


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_zeros_on_disk, r"rank 0: \S+ \S+ \+ 0 cannot be read back: \w+Error"),
        (_no_index_on_disk, r"rank 0: \w+Error"),
        (_first_state_again, "is not what the run held: rank 0: model"),
        (_first_state_and_samples_again, "bitwise that of .*step_00000001, although updates were applied"),
        (_one_wrong_value, "differs from the live tensor in"),
    ],
)
@pytest.mark.parametrize("layout", ["one", "dp2", "tp2dp2-distopt"])
def test_what_is_not_the_runs_state_is_not_published(
    layout: str, fault: Callable[[int], None], said: str, tmp_path: Path
) -> None:
    cfg, ranks = _config(tmp_path), 1
    if layout != "one":
        cfg, ranks = parse_layout(layout).apply(cfg), parse_layout(layout).world_size
    with pytest.raises(RankFailure, match=said):
        run_on_ranks(_train_and_save, ranks, cfg=cfg, steps=2, fault=fault)
    folder = checkpoints_folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001"]
    assert (folder / "latest").read_text() == "step_00000001\n"
    run_on_ranks(_load, 1, cfg=_config(tmp_path), folder=str(folder / "step_00000001"))


def _train_on_text_and_save(cfg: RunConfig, *, steps: int) -> list[list[str]]:
    """Save steps whose rows hold no image; the moments that the saves compare."""
    parts, compared = build_parts(cfg), []
    data = {"data_rank": parts.topology.data_rank, "data_size": parts.topology.data_size}
    rounds = cfg.train.global_batch_size // cfg.train.micro_batch_size // parts.topology.data_size
    for step in range(1, steps + 1):
        rows = [Row(row_of("text", cfg, seed=100 * step + n), n) for n in range(cfg.train.global_batch_size)]
        batches = [
            local_batch(batch, topology=parts.topology, image_size=cfg.vision.image_size)
            for batch in rank_batches(rows, cfg, **data)
        ]
        assert train_step(parts, iter(batches), num_microbatches=rounds).applied
        _save(parts, step)
        samples = take_samples(parts.chunks, parts.optimizer, round_number=0).moments
        compared.append([sample.name for sample in samples])
    close_topology()
    return compared


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_moments_that_no_gradient_reached_are_no_stale_copy(optimizer: str, tmp_path: Path) -> None:
    """Rows without images leave the encoder's and the connector's where they began."""
    cfg = change(_config(tmp_path), optimizer={"name": optimizer})
    (first, second), _ = run_on_ranks(_train_on_text_and_save, 2, cfg=parse_layout("dp2").apply(cfg), steps=2)
    assert first == second
    assert first
    assert all(name.startswith("optimizer.language_model.") for name in first)
    assert (checkpoints_folder(tmp_path) / "latest").read_text() == "step_00000002\n"


def _sampled(cfg: RunConfig, *, rounds: int) -> tuple[set[str], list[list[str]]]:
    """Keys read back over some saves, and the names of the moments of each."""
    parts = build_parts(cfg)
    train_steps(parts, 0, 1)
    found = [take_samples(parts.chunks, parts.optimizer, round_number=number) for number in range(rounds)]
    close_topology()
    keys = {sample.key for samples in found for sample in samples.read_back}
    return keys, [[sample.name for sample in samples.moments] for samples in found]


def test_every_parameter_has_its_turn() -> None:
    cfg = debug_config()
    (keys, moments), *_ = run_on_ranks(_sampled, 1, cfg=cfg, rounds=60)
    expected = set(run_on_ranks(_expected, 1, cfg=cfg)[0])
    assert keys == expected
    assert all(names == moments[0] for names in moments)
    assert {name.split(".")[1] for name in moments[0]} == {"language_model", "connector", "vision_encoder"}


def _expected(cfg: RunConfig) -> list[str]:
    parts = build_parts(cfg)
    wanted = schema.training_to_load(parts.chunks, parts.optimizer, optimizer_step=0)
    keys = list(schema.expected_shapes(parts.chunks, wanted.tensors))
    close_topology()
    return keys


def test_what_is_read_back_has_the_shape_and_dtype_of_what_was_live() -> None:
    sample = Sample("weight", (0, 4), 0, torch.zeros(6))
    assert differing([sample], lambda key, offset: torch.zeros(2, 3)) == []
    for stored in (torch.zeros(5), torch.zeros(6, dtype=torch.bfloat16)):
        (problem,) = differing([sample], lambda key, offset, stored=stored: stored)
        assert problem == (
            f"weight [0, 4] + 0 is {stored.dtype} {list(stored.shape)} on disk, torch.float32 in the run"
        )


def _lose_the_proof_before(folder: str, step: int) -> None:
    """Somebody deletes the previous checkpoint's proof while the run goes on."""
    if step == 2 and torch.distributed.get_rank() == 0:
        Path(folder, "step_00000001", "proof.json").unlink()


def test_a_previous_checkpoint_that_cannot_be_compared_costs_no_save(tmp_path: Path) -> None:
    folder = checkpoints_folder(tmp_path)
    fault = functools.partial(_lose_the_proof_before, str(folder))
    run_on_ranks(_train_and_save, 1, cfg=_config(tmp_path), steps=2, fault=fault)
    assert (folder / "latest").read_text() == "step_00000002\n"


def test_stale_means_moments_that_stood_still_while_updates_were_applied() -> None:
    before = Proof({"a": StoredFile(1, "x")}, 3, {"m": "1", "n": "2"})
    assert is_stale(Proof({}, 4, {"m": "1", "n": "2"}), before)
    assert not is_stale(Proof({}, 3, {"m": "1", "n": "2"}), before), "every step since was skipped"
    assert not is_stale(Proof({}, 4, {"m": "1", "n": "3"}), before)
    assert not is_stale(Proof({}, 4, {"other layout": "1"}), before)


# --- A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of twelve MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["torch_dist", "zarr"])
def test_a_full_disk_costs_no_checkpoint(kind: str, small_disk: Path, fault_matrix: FaultMatrix) -> None:
    cfg = change(_config(small_disk), checkpoint={"keep": 0, "format": kind})
    with pytest.raises(RankFailure, match=r"step \d+ could not be saved: .*MiB are free there") as failed:
        run_on_ranks(_train_and_save, 2, cfg=cfg, steps=20)
    assert "check free space" in str(failed.value)
    folder = checkpoints_folder(small_disk)
    names = sorted(path.name for path in folder.iterdir())
    assert names[0] == "latest"
    assert names[-1] == (folder / "latest").read_text().strip()
    assert not [name for name in names if name.startswith(".")]
    run_on_ranks(_load, 1, cfg=cfg, folder=str(folder / names[-1]))
    fault_matrix(f"full disk, {kind}", f"save behind {names[-1]}", f"{names[-1]} is loaded, nothing else stays")


def test_samples_hold_copies(tmp_path: Path) -> None:
    """A sample does not move with the run."""
    assert run_on_ranks(_samples_after_a_step, 1, cfg=_config(tmp_path)) == [True]


def _samples_after_a_step(cfg: RunConfig) -> bool:
    parts = build_parts(cfg)
    train_steps(parts, 0, 1)
    samples = take_samples(parts.chunks, parts.optimizer, round_number=0).read_back
    before = [sample.values.clone() for sample in samples]
    train_steps(parts, 1, 1)
    close_topology()
    return all(torch.equal(sample.values, values) for sample, values in zip(samples, before, strict=True))
