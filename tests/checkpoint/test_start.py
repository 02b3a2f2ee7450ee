"""A run that starts from another's weights: what is taken, in which layouts and dtypes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mm15_megatron.checkpoint.optimizer_state import get_step
from mm15_megatron.checkpoint.proof import Proof, digest_of_file
from mm15_megatron.checkpoint.publish import checkpoints_folder
from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.checkpoint.schema import OPTIMIZER_PREFIX, state_to_save
from mm15_megatron.checkpoint.start import MAY_DIFFER, find_start, start_from
from mm15_megatron.checkpoint.store import model_differences
from mm15_megatron.config.dump import dump_flat
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import Layout, parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.trace import build_parts, gathered, micro_batches
from mm15_megatron.presets import resolve
from mm15_megatron.training.step import StepParts, train_step
from mm15_megatron.utils.ranks import gathered_objects

from ..helpers.layouts import LAYOUTS, change, debug_config
from .test_store import published_checkpoint

ONE = Layout(1, {})
STEPS = 2
VISION, CONNECTOR = "vision_encoder.position_embedding", "connector.position_embedding"

Whole = dict[str, torch.Tensor]


# --- Which checkpoint


def test_a_folder_or_the_tracker_of_a_run(tmp_path: Path) -> None:
    """A run directory means what its tracker names, not its newest folder."""
    folder = published_checkpoint(tmp_path, debug_config())
    newer = folder.with_name("step_00000009")
    newer.mkdir()
    assert find_start(str(tmp_path)).folder == folder
    assert find_start(str(folder)).folder == folder
    with pytest.raises(CheckpointError, match="step_00000009 is not a complete checkpoint"):
        find_start(str(newer))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """A path that is not there, a folder without checkpoints, a step that was not saved."""
    with pytest.raises(CheckpointError, match=r"init_from = .*absent does not exist\n +fix: name a run directory"):
        find_start(str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"init_from = .* holds no checkpoint\n +fix: name a run directory"):
        find_start(str(tmp_path))
    step = checkpoints_folder(tmp_path) / "step_00000003"
    with pytest.raises(CheckpointError, match=r"step_00000003 does not exist\n +fix: name a folder"):
        find_start(str(step))
    published_checkpoint(tmp_path, debug_config())
    with pytest.raises(CheckpointError, match=r"step_00000003 does not exist\n +fix: name one of step_00000007"):
        find_start(str(step))
    (checkpoints_folder(tmp_path) / "latest").unlink()
    with pytest.raises(CheckpointError, match="no tracker file"):
        find_start(str(tmp_path))


# --- What is taken


def _train_and_save(cfg: RunConfig) -> Whole:
    """Train a little, so that no parameter is its initial value, and save; returns the whole parameters."""
    parts = build_parts(cfg)
    rounds = cfg.train.global_batch_size // cfg.train.micro_batch_size // parts.topology.data_size
    for step in range(STEPS):
        assert train_step(parts, micro_batches(cfg, parts.topology, step=step), num_microbatches=rounds).applied
    save_checkpoint(
        cfg, parts.chunks, parts.optimizer, topology=parts.topology, step=STEPS, data_digest="d", progress={"step": 2}
    )
    weights = gathered(parts, lambda item: item.parameter.data)
    close_topology()
    return weights


def _states(parts: StepParts) -> dict[str, Whole]:
    """Whole masters and moments by kind and name."""
    assert parts.optimizer is not None
    written = state_to_save(parts.chunks, parts.optimizer).to_write()
    mine = {key: (one.global_shape, one.global_offset, one.data) for key, one in written.items()}
    found: dict[str, Whole] = {}
    for share in gathered_objects(mine):
        for key, (shape, offset, part) in share.items():
            if not key.startswith(OPTIMIZER_PREFIX):
                continue
            name, _, kind = key.removeprefix(OPTIMIZER_PREFIX).rpartition(".")
            whole = found.setdefault(kind, {}).setdefault(name, torch.full(shape, torch.nan))
            whole[tuple(slice(at, at + n) for at, n in zip(offset, part.shape, strict=True))] = part
    return found


def _start(cfg: RunConfig, place: str) -> tuple[Whole, dict[str, Whole], list[str], int]:
    """Build a model and start it: whole parameters, whole optimizer state, what was interpolated, updates counted."""
    parts = build_parts(cfg)
    assert parts.optimizer is not None
    start = start_from(find_start(place), cfg, parts.chunks, parts.optimizer)
    steps = get_step(parts.optimizer)
    result = gathered(parts, lambda item: item.parameter.data), _states(parts), list(map(str, start.resized)), steps
    close_topology()
    return result


def _merged(results: list[tuple[Whole, dict[str, Whole], list[str], int]]) -> tuple[Whole, dict[str, Whole]]:
    weights = {name: tensor for one, *_ in results for name, tensor in one.items()}
    states: dict[str, Whole] = {}
    for _, one, *_ in results:
        for kind, tensors in one.items():
            states.setdefault(kind, {}).update(tensors)
    return weights, states


def _run(
    run_dir: Path, layout: Layout = ONE, *, preset: str = "debug_dense", **sections: dict[str, object]
) -> RunConfig:
    return change(layout.apply(change(debug_config(preset), train={"run_dir": str(run_dir)})), **sections)


def _saved(run_dir: Path, layout: Layout = ONE, **options: object) -> Whole:
    cfg = _run(run_dir, layout, **options)  # type: ignore[arg-type]
    results = run_on_ranks(_train_and_save, layout.world_size, cfg=cfg)
    return {name: tensor for one in results for name, tensor in one.items()}


def _equal(left: Whole, right: Whole) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("preset", "source", "layout"),
    [
        ("debug_dense", "tp2", "pp2"),
        ("debug_dense", "one", "dp2-overlap"),
        ("debug_dense", "dp2-distopt", "tp2sp"),
        ("debug_moe", "tp2sp-pp2ep2-distopt", "one"),
        ("debug_moe", "one", "ep2-distopt"),
        ("debug_moe", "tp2sp-etp1", "vpp2"),
    ],
)
def test_weights_and_masters_are_the_checkpoints(preset: str, source: str, layout: str, tmp_path: Path) -> None:
    """Bitwise, in another layout and with another seed; moments and the count of updates are zero."""
    first, second = (ONE if name == "one" else parse_layout(name) for name in (source, layout))
    saved = _saved(tmp_path / "source", first, preset=preset)
    cfg = _run(tmp_path / "run", second, preset=preset)
    cfg = change(cfg, train={"seed": 99})
    results = run_on_ranks(_start, second.world_size, cfg=cfg, place=str(tmp_path / "source"))
    weights, states = _merged(results)
    assert _equal(weights, saved)
    assert _equal(states["master"], saved)
    assert not any(tensor.any() for kind in ("exp_avg", "exp_avg_sq") for tensor in states[kind].values())
    assert {(tuple(resized), steps) for _, _, resized, steps in results} == {((), 0)}


@pytest.mark.parametrize("distopt", [False, True], ids=["dp2", "dp2-distopt"])
@pytest.mark.parametrize(("stored", "wanted"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_masters_keep_the_stored_precision(stored: str, wanted: str, distopt: bool, tmp_path: Path) -> None:
    """Of fp32 weights the masters of a bf16 run are the weights, its parameters their rounding."""
    layout = LAYOUTS["dp2-dist-opt" if distopt else "dp2"]
    saved = _saved(tmp_path / "source", layout, kernels={"params_dtype": stored})
    cfg = change(_run(tmp_path / "run", layout, kernels={"params_dtype": wanted}), train={"seed": 99})
    weights, states = _merged(run_on_ranks(_start, 2, cfg=cfg, place=str(tmp_path / "source")))
    assert _equal(states["master"], {name: tensor.float() for name, tensor in saved.items()})
    dtype = torch.bfloat16 if wanted == "bf16" else torch.float32
    assert _equal(weights, {name: tensor.to(dtype) for name, tensor in saved.items()})


def test_frozen_modules_are_taken_too(tmp_path: Path) -> None:
    """What this run does not train, and what the other one did not."""
    saved = _saved(tmp_path / "source", freeze={"connector": True})
    cfg = change(_run(tmp_path / "run", LAYOUTS["tp2"], freeze={"vision": True}), train={"seed": 99})
    weights, states = _merged(run_on_ranks(_start, 2, cfg=cfg, place=str(tmp_path / "source")))
    assert _equal(weights, saved)
    assert _equal(states["master"], {n: w for n, w in saved.items() if not n.startswith("vision_encoder.")})


# --- Another size of the image


def _by_torch(table_GD: torch.Tensor, grid: int, side: int, *, prefix: int) -> torch.Tensor:
    """The patches of a table, resized by torch channel by channel; the rows before them as they are."""
    columns = []
    for channel in table_GD[prefix:].unbind(1):
        image_11HW = channel.reshape(1, 1, grid, grid)
        resized = F.interpolate(image_11HW, size=(side, side), mode="bicubic", align_corners=False, antialias=False)
        columns.append(resized.flatten())
    return torch.cat((table_GD[:prefix], torch.stack(columns, dim=1)))


@pytest.mark.parametrize(
    ("size", "kind", "layout"),
    [(112, "c_abstractor", "tp2"), (42, "c_abstractor", "dp2-dist-opt"), (70, "attention_pool", "one")],
)
def test_position_tables_are_interpolated(size: int, kind: str, layout: str, tmp_path: Path) -> None:
    """To a finer or a coarser grid, encoder and connector; every other parameter is the stored one."""
    place = LAYOUTS.get(layout, ONE)
    saved = _saved(tmp_path / "source", connector={"kind": kind})
    sections = {"connector": {"kind": kind}, "vision": {"image_size": size}}
    cfg = change(_run(tmp_path / "run", place, **sections), train={"seed": 99})
    results = run_on_ranks(_start, place.world_size, cfg=cfg, place=str(tmp_path / "source"))
    weights, states = _merged(results)
    grid = size // 14
    assert weights[VISION].shape == (1 + grid**2, 32)
    expected = {
        **saved,
        VISION: _by_torch(saved[VISION], 4, grid, prefix=1),
        CONNECTOR: _by_torch(saved[CONNECTOR], 4, grid, prefix=0),
    }
    assert _equal(weights, expected)
    assert _equal(states["master"], expected)
    text = [f"{CONNECTOR} 4 x 4 -> {grid} x {grid}", f"{VISION} 4 x 4 -> {grid} x {grid}"]
    assert [resized for _, _, resized, _ in results] == [text] * place.world_size


def test_a_table_that_keeps_its_grid_is_taken_as_it_is(tmp_path: Path) -> None:
    """``position_grid_size`` holds the old table at a larger image: the forward pass interpolates it."""
    saved = _saved(tmp_path / "source")
    cfg = change(_run(tmp_path / "run"), vision={"image_size": 112, "position_grid_size": 4})
    ((weights, _, resized, _),) = run_on_ranks(_start, 1, cfg=cfg, place=str(tmp_path / "source"))
    assert _equal(weights, saved)
    assert resized == []


def test_stages_of_the_family_start_from_each_other() -> None:
    """Nothing in which a preset's next stage differs is refused."""
    for size in ("1b", "3b", "7b", "30b", "1b_moe", "3b_moe"):
        stages = [resolve(f"mm15_{size}{stage}") for stage in ("", "_continual", "_sft")]
        for before, after in zip(stages, stages[1:], strict=False):
            assert {change.path for change in model_differences(before, after)} <= MAY_DIFFER


# --- Refused


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of debug_dense."""
    run_dir = tmp_path_factory.mktemp("source")
    _saved(run_dir)
    return run_dir


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"connector": {"hidden_size": 32}},
            r"tensors of another shape \(model\.connector\..* \[16\], here \[32\].*"
            r"options that differ:\n +connector\.hidden_size: 16 in the checkpoint, 32 here",
        ),
        (
            {"language": {"num_layers": 5}},
            r"6 tensors missing in the checkpoint \(model\.language_model\.decoder\.layers\.4\.",
        ),
        (
            {"language": {"num_layers": 3}},
            r"tensors unknown to this model \(model\.language_model\.decoder\.layers\.3\.",
        ),
        ({"vision": {"patch_size": 7}}, r"model\.vision_encoder\.patch_embedding\.weight \[32, 3, 14, 14\], here"),
        (
            {"vision": {"class_token": False}},
            r"1 tensors unknown to this model \(model\.vision_encoder\.class_token\); 1 tensors of another shape "
            r"\(model\.vision_encoder\.position_embedding \[17, 32\], here \[16, 32\]\)",
        ),
        (
            {"language": {"rotary_base": 500000.0}},
            r"the same names and shapes; options that differ:\n +language\.rotary_base: 10000\.0 in the checkpoint",
        ),
        ({"moe": {"num_moe_experts": 4}}, r"missing in the checkpoint .*\n +moe\.num_moe_experts: 0 in the checkpoint"),
    ],
    ids=["width", "more-layers", "fewer-layers", "patch", "class-token", "option-alone", "experts"],
)
def test_another_model_is_refused(sections: dict[str, dict[str, object]], message: str, source: Path) -> None:
    """By name of its parameters, and of the options in which it differs, on every rank."""
    cfg = change(_run(source.with_name("other"), LAYOUTS["tp2"]), **sections)
    with pytest.raises(RankFailure, match=rf"(?s)rank 0.*CheckpointError: .*{message}.*rank 1.*CheckpointError"):
        run_on_ranks(_start, 2, cfg=cfg, place=str(source))


def test_what_training_alone_reads_may_differ(source: Path) -> None:
    """Coefficients of losses, and how initial weights would have been drawn."""
    cfg = change(_run(source.with_name("other")), language={"z_loss_coeff": 1e-4, "init_method_std": 0.5})
    (result,) = run_on_ranks(_start, 1, cfg=cfg, place=str(source))
    assert result[2:] == ([], 0)


def test_tensors_that_are_not_those_of_the_stated_options_are_refused(tmp_path: Path) -> None:
    """The table beside a configuration that was changed by hand has no grid to be resized from."""
    _saved(tmp_path / "source")
    (folder,) = checkpoints_folder(tmp_path / "source").glob("step_*")
    cfg = _run(tmp_path / "run", vision={"image_size": 112})
    (folder / "config.txt").write_text(dump_flat(replace(cfg, vision=replace(cfg.vision, image_size=70))))
    proof = Proof.read(folder)
    files = {**proof.files, "config.txt": digest_of_file(folder / "config.txt")}
    (folder / "proof.json").write_text(replace(proof, files=files).to_json())
    with pytest.raises(RankFailure, match=r"(?s)position_embedding \[16, 32\], here \[64, 32\].*no option differs"):
        run_on_ranks(_start, 1, cfg=cfg, place=str(folder))


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    """A file that ends early, and one that is gone."""
    _saved(tmp_path / "source")
    (file,) = checkpoints_folder(tmp_path / "source").glob("step_*/tensors/__0_0.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RankFailure, match=r"is damaged: tensors/__0_0\.distcp has 1000 bytes instead of"):
        run_on_ranks(_start, 1, cfg=_run(tmp_path / "run"), place=str(tmp_path / "source"))
    (file.parent / ".metadata").unlink()
    with pytest.raises(RankFailure, match=r"is damaged: .*tensors/\.metadata is missing"):
        run_on_ranks(_start, 1, cfg=_run(tmp_path / "run"), place=str(tmp_path / "source"))
