"""A checkpoint of any layout resumes in any other: the next five losses and norms are those of the straight run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mm15_megatron.checkpoint import schema
from mm15_megatron.checkpoint.optimizer_state import Piece, get_step
from mm15_megatron.checkpoint.publish import checkpoints_folder
from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.checkpoint.store import load_training, load_weights, open_checkpoint, open_latest
from mm15_megatron.checkpoint.torch_dist import load_tensors, stored_shapes
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.compare import FP32_SCALAR
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import RankFailure, run_on_ranks
from mm15_megatron.parity.shrink import ADAFACTOR_EPS
from mm15_megatron.parity.trace import build_parts, micro_batches
from mm15_megatron.training.step import StepParts, evaluate_step

from ..helpers.layouts import LAYOUTS, Layout, change, debug_config
from ..helpers.steps import train_steps

BEFORE, AFTER = 3, 5
TITLE = "resume across layouts (next five losses and gradient norms against the straight run of one rank)"
DENSE, SPARSE, FACTORED = "debug_dense", "debug_moe", "debug_moe with AdaFactor"
OPTIMIZER = {
    DENSE: {},
    SPARSE: {},
    FACTORED: {"name": "adafactor", "adafactor_eps": ADAFACTOR_EPS},
}

ONE = Layout(1, {})
OVERLAP = "dp2-overlap-many-buckets"
MATRIX = {
    "one": ONE,
    **{name: LAYOUTS[name] for name in ("tp2", "tp2sp", "pp2", "dp2", "dp2-dist-opt", OVERLAP, "tp2pp2")},
}
SPARSE_MATRIX = {
    "one": ONE,
    **{
        name: parse_layout(name)
        for name in ("dp2", "tp2sp-pp2", "tp2sp-pp2ep2-distopt", "tp2sp-etp1", "ep2-distopt", "vpp2")
    },
}
FACTORED_MATRIX = {
    "one": ONE,
    **{name: parse_layout(name) for name in ("dp2", "tp2sp-pp2", "tp2sp-pp2ep2", "tp2sp-dp2-ep2-etp1", "ep2")},
}
MATRICES = {DENSE: MATRIX, SPARSE: SPARSE_MATRIX, FACTORED: FACTORED_MATRIX}
IN_BOTH_FORMATS = ("one", "dp2", "tp2sp-pp2", "tp2sp-pp2ep2-distopt", "tp2sp-pp2ep2")
FEW = {
    DENSE: ("one", "dp2-dist-opt", OVERLAP, "tp2pp2"),
    SPARSE: ("one", "tp2sp-pp2ep2-distopt"),
    FACTORED: ("one", "dp2", "tp2sp-dp2-ep2-etp1"),
}
"""What is resumed in each other in every run of the tests; the whole matrices, in both formats, with the soak tests."""

Figures = list[tuple[float, float]]
SavedRuns = Callable[[str, str], tuple[str, Figures]]


def _save(parts: StepParts, *, step: int, fmt: str) -> None:
    cfg = parts.cfg
    save_checkpoint(
        change(cfg, train={"run_dir": run_dir_of(cfg.train.run_dir, fmt)}, checkpoint={"format": fmt}),
        parts.chunks,
        parts.optimizer,
        topology=parts.topology,
        step=step,
        data_digest="stream",
        progress={"consumed": step * cfg.train.global_batch_size},
    )


def run_dir_of(run_dir: str, fmt: str) -> str:
    """Where a run's checkpoints of a format lie."""
    return run_dir if fmt == "torch_dist" else f"{run_dir}.{fmt}"


def _train_and_save(cfg: RunConfig, formats: tuple[str, ...] = ("torch_dist",)) -> Figures:
    """Three steps, a checkpoint, and the five steps that follow without any interruption."""
    parts = build_parts(cfg)
    train_steps(parts, 0, BEFORE)
    for fmt in formats:
        _save(parts, step=BEFORE, fmt=fmt)
    figures = train_steps(parts, BEFORE, AFTER)
    close_topology()
    return figures


def _resume(cfg: RunConfig, run_dirs: dict[str, str]) -> dict[str, Figures]:
    """Five steps from each checkpoint, one after the other in one process: a load must overwrite everything."""
    parts = build_parts(cfg)
    found = {}
    for name, run_dir in run_dirs.items():
        checkpoint = open_latest(run_dir)
        assert checkpoint is not None
        load_training(checkpoint, cfg, parts.chunks, parts.optimizer)
        assert get_step(parts.optimizer) == BEFORE
        found[name] = train_steps(parts, BEFORE, AFTER)
    close_topology()
    return found


def _in(run_dir: Path, layout: Layout, *, model: str = DENSE, **sections: dict[str, object]) -> RunConfig:
    cfg = change(debug_config(model.partition(" ")[0]), train={"run_dir": str(run_dir)}, optimizer=OPTIMIZER[model])
    return change(layout.apply(cfg), **sections)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> SavedRuns:
    """By model and layout: a run directory, and what its uninterrupted run shows after the checkpoint."""

    @functools.cache
    def save(model: str, name: str) -> tuple[str, Figures]:
        run_dir, layout = tmp_path_factory.mktemp(name), MATRICES[model][name]
        cfg = _in(run_dir, layout, model=model)
        formats = ("torch_dist", "zarr") if name in IN_BOTH_FORMATS and model != DENSE else ("torch_dist",)
        return str(run_dir), run_on_ranks(_train_and_save, layout.world_size, cfg=cfg, formats=formats)[0]

    return save


def _sources(model: str, names: Sequence[str], saved_run: SavedRuns) -> dict[str, str]:
    """Run directories of the checkpoints of these layouts, in each format that was written."""
    found = {}
    for name in names:
        run_dir = saved_run(model, name)[0]
        found[name] = run_dir
        if Path(run_dir_of(run_dir, "zarr")).exists():
            found[f"{name} (zarr)"] = run_dir_of(run_dir, "zarr")
    return found


def _distance(left: Figures, right: Figures) -> float:
    """Largest absolute difference of a loss or relative difference of a norm."""
    pairs = zip(left, right, strict=True)
    return max(max(abs(a[0] - b[0]), abs(a[1] - b[1]) / b[1]) for a, b in pairs)


CASES = [
    *(pytest.param(model, into, FEW[model], id=f"{model}-{into}") for model, names in FEW.items() for into in names),
    *(
        pytest.param(model, into, tuple(matrix), id=f"{model}-{into}-from-all", marks=pytest.mark.soak)
        for model, matrix in MATRICES.items()
        for into in matrix
    ),
]


@pytest.mark.parametrize(("model", "into", "names"), CASES)
def test_resume_in_layout(
    model: str, into: str, names: tuple[str, ...], saved_run: SavedRuns, table: dict[str, list[str]]
) -> None:
    """Every layout's checkpoint continues here, whatever its format; bitwise when this layout saved it."""
    layout, straight = MATRICES[model][into], saved_run(model, "one")[1]
    # its own checkpoints last: all foreign ones were loaded into the same process before them
    sources = _sources(model, [*(name for name in names if name != into), into], saved_run)
    cfg = _in(Path(saved_run(model, into)[0]), layout, model=model)
    found = run_on_ranks(_resume, layout.world_size, cfg=cfg, run_dirs=sources, timeout=600)[0]
    lines = table.setdefault(f"{TITLE}, {model}", [])
    for name in sorted(sources):
        lines.append(f"{name:>30} -> {into:30} {_distance(found[name], straight):.1e}")
    for name in sources:
        if name.partition(" ")[0] == into:
            assert found[name] == saved_run(model, into)[1], "resuming in the same layout is not bitwise"
    assert max(_distance(figures, straight) for figures in found.values()) <= FP32_SCALAR


# bf16 keeps 8 bits: weights rounded to it and their fp32 masters differ by half a unit in the last place.
BF16 = 2e-2


@pytest.mark.parametrize("dist_opt", [False, True], ids=["dp2", "dp2-dist-opt"])
def test_precision_can_change(dist_opt: bool, tmp_path: Path) -> None:
    """bf16 and fp32 runs read each other's masters: the fp32 masters are bitwise what the bf16 run held."""
    fp32 = _in(tmp_path / "fp32", LAYOUTS["dp2-dist-opt" if dist_opt else "dp2"])
    bf16 = change(fp32, train={"run_dir": str(tmp_path / "bf16")}, kernels={"params_dtype": "bf16"})
    straight = {kind: run_on_ranks(_train_and_save, 2, cfg=cfg)[0] for kind, cfg in (("fp32", fp32), ("bf16", bf16))}
    dirs = {"bf16": bf16.train.run_dir, "fp32": fp32.train.run_dir}
    into_fp32 = run_on_ranks(_resume, 2, cfg=fp32, run_dirs=dirs)[0]
    into_bf16 = run_on_ranks(_resume, 2, cfg=bf16, run_dirs=dirs)[0]
    assert into_fp32["fp32"] == straight["fp32"]
    assert into_bf16["bf16"] == straight["bf16"]
    assert abs(into_fp32["bf16"][0][0] - straight["bf16"][0][0]) < BF16
    assert abs(into_bf16["fp32"][0][0] - straight["fp32"][0][0]) < BF16


def _evaluate_weights(cfg: RunConfig, run_dir: str) -> float:
    """Forward-only loss of the weights alone, on the batch of the next training step."""
    parts = build_parts(cfg)
    checkpoint = open_latest(run_dir)
    assert checkpoint is not None
    load_weights(checkpoint, cfg, parts.chunks)
    rounds = cfg.train.global_batch_size // cfg.train.micro_batch_size // parts.topology.data_size
    sums = evaluate_step(parts, micro_batches(cfg, parts.topology, step=BEFORE), num_microbatches=rounds)
    close_topology()
    return sums.loss


def test_weights_alone(saved_run: SavedRuns) -> None:
    """Evaluation reads the parameters of a checkpoint without its optimizer, in another layout."""
    _, straight = saved_run(DENSE, "one")
    for source, layout in (("dp2-dist-opt", MATRIX["tp2pp2"]), ("tp2pp2", ONE), (OVERLAP, ONE)):
        run_dir, _ = saved_run(DENSE, source)
        cfg = _in(Path(run_dir), layout)
        loss = run_on_ranks(_evaluate_weights, layout.world_size, cfg=cfg, run_dir=run_dir)[0]
        assert abs(loss - straight[0][0]) <= FP32_SCALAR


def test_frozen_and_tied(tmp_path: Path) -> None:
    """A frozen encoder has no optimizer state, a tied embedding is stored once, and both reshard over the pipeline."""
    sections = {"freeze": {"vision": True}, "language": {"share_embeddings_and_output_weights": True}}
    straight = run_on_ranks(_train_and_save, 1, cfg=_in(tmp_path, ONE, **sections))[0]
    for name in ("pp2", "tp2pp2", "dp2-dist-opt"):
        layout = MATRIX[name]
        cfg = _in(tmp_path, layout, **sections)
        found = run_on_ranks(_resume, layout.world_size, cfg=cfg, run_dirs={"one": str(tmp_path)})[0]["one"]
        assert _distance(found, straight) <= FP32_SCALAR, name


def test_another_optimizer_is_refused(saved_run: SavedRuns) -> None:
    """Its state is not in the checkpoint; weights alone would be."""
    run_dir, _ = saved_run(SPARSE, "one")
    cfg = _in(Path(run_dir), ONE, model=FACTORED)
    with pytest.raises(RankFailure, match=r"holds the moments of adamw, and this run is adafactor with") as failed:
        run_on_ranks(_resume, 1, cfg=cfg, run_dirs={"one": run_dir})
    assert "checkpoint.init_from" in str(failed.value)


def test_training_what_was_frozen_is_refused(tmp_path: Path) -> None:
    """State that the checkpoint does not hold is named, on every rank."""
    run_on_ranks(_train_and_save, 1, cfg=_in(tmp_path, ONE, freeze={"vision": True}))
    with pytest.raises(RankFailure, match=r"CheckpointError.*missing in the checkpoint.*optimizer\.vision_encoder\."):
        run_on_ranks(_resume, 2, cfg=_in(tmp_path, MATRIX["tp2"]), run_dirs={"one": str(tmp_path)})


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    """A truncated tensor file is an error that names the folder, not a model with wrong weights."""
    run_on_ranks(_train_and_save, 1, cfg=_in(tmp_path, ONE))
    (file,) = checkpoints_folder(tmp_path).glob("step_*/tensors/__0_0.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        RankFailure, match=r"CheckpointError: .* is damaged: tensors/__0_0\.distcp has \d+ bytes instead"
    ):
        run_on_ranks(_resume, 2, cfg=_in(tmp_path, MATRIX["dp2"]), run_dirs={"one": str(tmp_path)})


def _keys(cfg: RunConfig) -> list[str]:
    latest = open_latest(cfg.train.run_dir)
    assert latest is not None
    return sorted(stored_shapes(latest.folder / "tensors"))


def test_stored_names_do_not_depend_on_the_layout(saved_run: SavedRuns) -> None:
    """Every layout writes the same keys and shapes, without prefixes of optimizers or stages."""
    run_dirs = {name: saved_run(DENSE, name)[0] for name in FEW[DENSE]}
    keys = {name: run_on_ranks(_keys, 1, cfg=_in(Path(run_dir), ONE))[0] for name, run_dir in run_dirs.items()}
    assert all(found == keys["one"] for found in keys.values())
    assert {key.split(".")[0] for key in keys["one"]} == {"model", "optimizer"}
    assert open_checkpoint(checkpoints_folder(run_dirs["tp2pp2"]) / "step_00000003").layout["world_size"] == 4


def _forget_step(optimizer: object, step: int) -> None:
    """A fault: the step count is left at zero."""


def _resume_with_fault(cfg: RunConfig, run_dirs: dict[str, str], fault: str) -> dict[str, Figures]:
    if fault == "step":
        schema.set_step = _forget_step
    else:
        write = Piece.write
        Piece.write = lambda piece, kind, whole: None if kind == fault else write(piece, kind, whole)
    parts = build_parts(cfg)
    checkpoint = open_latest(run_dirs["one"])
    assert checkpoint is not None
    wanted = schema.training_to_load(parts.chunks, parts.optimizer, optimizer_step=checkpoint.optimizer_step)
    wanted.restore(load_tensors(wanted.tensors, checkpoint.folder / "tensors"))
    figures = train_steps(parts, BEFORE, AFTER)
    close_topology()
    return {"one": figures}


FAULTS = [(DENSE, fault) for fault in ("step", "master", "exp_avg", "exp_avg_sq")]
FAULTS += [(FACTORED, fault) for fault in ("step", "master", "exp_avg", "exp_avg_sq", "row", "column")]


@pytest.mark.parametrize(("model", "fault"), FAULTS)
def test_planted_fault_is_found(model: str, fault: str, saved_run: SavedRuns) -> None:
    """The comparison fails when any one part is not restored (the first loss alone would miss all but the master)."""
    run_dir, straight = saved_run(model, "one")
    layout = MATRICES[model]["dp2" if model == FACTORED else "dp2-dist-opt"]
    cfg = _in(Path(run_dir), layout, model=model)
    found = run_on_ranks(_resume_with_fault, 2, cfg=cfg, run_dirs={"one": run_dir}, fault=fault)[0]["one"]
    assert _distance(found, straight) > 10 * FP32_SCALAR
    assert (_distance(found[:1], straight[:1]) <= FP32_SCALAR) == (fault != "master")
