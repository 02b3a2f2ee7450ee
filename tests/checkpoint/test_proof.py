"""A published checkpoint is what the run held, and a damaged one is named and not loaded."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mm15_megatron.checkpoint import save, schema, torch_dist
from mm15_megatron.checkpoint.proof import Proof, Samples, StoredFile, digest_of_file, is_stale, take_samples
from mm15_megatron.checkpoint.publish import checkpoints_folder
from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.checkpoint.store import check_files, load_training, load_weights, open_checkpoint
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.trace import build_parts, micro_batches
from mm15_megatron.training.step import StepParts, train_step

from ..helpers.layouts import change, debug_config

TP2DP2 = parse_layout("tp2dp2-distopt")


def _config(run_dir: Path) -> RunConfig:
    return change(debug_config(), train={"run_dir": str(run_dir)})


def _train(parts: StepParts, step: int) -> None:
    train = parts.cfg.train
    rounds = train.global_batch_size // train.micro_batch_size // parts.topology.data_size
    assert train_step(parts, micro_batches(parts.cfg, parts.topology, step=step), num_microbatches=rounds).applied


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
        _train(parts, step - 1)
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
    assert len([name for name in files if name.endswith(".distcp")]) == 4
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
    name: str, kind: str, damaged: Path, fault_matrix: Callable[[str, str, str], None]
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


@pytest.mark.parametrize("content", [None, "{", '{"files": 3, "optimizer_step": 1, "moments": {}}'])
def test_the_proof_itself_is_damaged(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "proof.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"proof\.json cannot be read"):
        Proof.read(tmp_path)


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


@pytest.mark.parametrize(
    ("fault", "said"),
    [
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


def _sampled(cfg: RunConfig, *, rounds: int) -> tuple[set[str], list[list[str]]]:
    """Keys read back over some saves, and the names of the moments of each."""
    parts = build_parts(cfg)
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


def _expected(cfg: RunConfig) -> list[str]:
    parts = build_parts(cfg)
    wanted = schema.training_to_load(parts.chunks, parts.optimizer, optimizer_step=0)
    keys = list(schema.expected_shapes(parts.chunks, wanted.tensors))
    close_topology()
    return keys


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
def test_a_full_disk_costs_no_checkpoint(
    kind: str, small_disk: Path, fault_matrix: Callable[[str, str, str], None]
) -> None:
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
    _train(parts, 0)
    samples = take_samples(parts.chunks, parts.optimizer, round_number=0).read_back
    before = [sample.values.clone() for sample in samples]
    _train(parts, 1)
    close_topology()
    return all(torch.equal(sample.values, values) for sample, values in zip(samples, before, strict=True))
