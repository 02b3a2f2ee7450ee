"""Presets: golden texts, sources, and the published values that must not move."""

from __future__ import annotations

import re

import pytest

from mm15_megatron.accounting import memory_estimate, model_parameters
from mm15_megatron.config.dump import diff, load_flat
from mm15_megatron.config.parse import apply_overrides, parse_run
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS
from mm15_megatron.config.validate import LEFT_TO_THE_USER, RULES, validate
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import REGISTRY, resolve
from mm15_megatron.presets.recipe import FITS_80_GB
from tests.golden.update_presets import FOLDER, stale_presets, update

EXPECTED_MODELS = (
    "mm1_3b mm1_7b mm1_30b mm1_3b_moe mm1_7b_moe mm15_1b mm15_3b mm15_7b mm15_30b mm15_1b_moe mm15_3b_moe "
    "mm1_ablation_base mm1_lr_9m mm1_lr_85m mm1_lr_302m debug_dense debug_moe debug_vision"
).split()


ENCODERS = "vit_l_224 vit_l_336 vit_h_224 vit_h_336 vit_h_378 aim_600m aim_1b aim_3b".split()
CONNECTORS = ("average_pool", "attention_pool", "c_abstractor")
CONNECTOR_POINTS = ((224, 64), (336, 64), (336, 144))


def test_every_model_of_the_family_is_there():
    assert set(EXPECTED_MODELS) <= set(REGISTRY)


def test_encoder_ablations_change_the_encoder_alone():
    names = [f"mm1_encoder_{name}" for name in ENCODERS]
    assert [name for name in REGISTRY if name.startswith("mm1_encoder_")] == names
    base = resolve(names[0])
    assert model_parameters(base).language.non_embedding == pytest.approx(2.9e9, rel=1e-2)
    assert (base.connector.kind, base.connector.num_tokens) == ("c_abstractor", 144)
    for name in names[1:]:
        changed = {d.path.split(".")[0] for d in diff(base, resolve(name))}
        assert changed == {"preset", "train", "vision"}, name


def test_connector_ablations_are_the_points_of_the_figure():
    base = resolve("mm1_ablation_base")
    for kind in CONNECTORS:
        for image, tokens in CONNECTOR_POINTS:
            cfg = resolve(f"mm1_connector_{kind}_{image}_{tokens}")
            assert (cfg.connector.kind, cfg.vision.image_size, cfg.connector.num_tokens) == (kind, image, tokens)
            changed = {d.path for d in diff(base, cfg)}
            assert changed <= {
                "preset",
                "train.run_dir",
                "vision.image_size",
                "connector.kind",
                "connector.num_tokens",
            }
    assert len([name for name in REGISTRY if name.startswith("mm1_connector_")]) == 9


def test_golden_texts_are_todays_presets():
    assert stale_presets(FOLDER) == []


def test_update_writes_and_prunes(tmp_path):
    (tmp_path / "gone.txt").write_text("x")
    assert "gone" in stale_presets(tmp_path)
    update(tmp_path)
    assert stale_presets(tmp_path) == []


@pytest.mark.parametrize("name", REGISTRY)
def test_golden_text_loads_back(name):
    assert diff(load_flat(REGISTRY[name].text()), resolve(name)) == []


@pytest.mark.parametrize("name", REGISTRY)
def test_every_difference_from_the_defaults_has_a_source(name):
    sources = REGISTRY[name].sources()
    changed = {d.path for d in diff(RunConfig(), resolve(name))} - {"preset"}
    assert changed <= set(sources)
    assert set(sources) <= set(OPTIONS)
    assert all(source.split(":")[0] in ("published", "derived", "ours") for source in sources.values())


@pytest.mark.parametrize("name", REGISTRY)
def test_presets_pass_every_rule_of_shape(name):
    cfg = resolve(name)
    world = 1 if cfg.parallel.device == "cpu" else 64
    for rule in RULES:
        if rule not in LEFT_TO_THE_USER:
            rule(cfg, world)


@pytest.mark.parametrize(
    "name",
    ["debug_dense", "debug_vision", "debug_moe", "mm1_3b", "mm1_3b_moe", "mm1_7b_moe", "mm15_30b", "mm15_1b_moe"]
    + ["mm1_ablation_base", "mm1_encoder_aim_3b", "mm1_3b_moe_sft", "mm15_3b_sft", "mm15_30b_continual"],
)
def test_presets_can_be_trained(name):
    cfg = apply_overrides(resolve(name), ["data.sources=[{prefix: a}]", "data.tokenizer=tokenizer.json"])
    validate(cfg, world_size=1 if cfg.parallel.device == "cpu" else 64)


@pytest.mark.parametrize(("name", "rate"), [("mm1_3b", 6e-5), ("mm1_7b", 4e-5), ("mm1_30b", 2e-5), ("mm15_1b", 8.6e-5)])
def test_pretraining_recipe(name, rate):
    cfg = resolve(name)
    assert cfg.optimizer.lr == rate
    assert cfg.optimizer.connector_lr == 8e-5
    assert (cfg.train.steps, cfg.train.global_batch_size, cfg.data.seq_length) == (200_000, 512, 4096)
    assert (cfg.schedule.warmup_steps, cfg.schedule.min_lr_ratio, cfg.optimizer.clip_grad) == (2000, 0.1, 1.0)
    assert cfg.train.steps * cfg.train.global_batch_size * cfg.data.seq_length == pytest.approx(419.4e9, rel=1e-3)
    assert cfg.language.z_loss_coeff == (1e-4 if "30b" in name else 0.0)


@pytest.mark.parametrize("size", ["1b", "3b", "7b", "30b", "1b_moe", "3b_moe"])
def test_mm15_stages(size):
    continual, sft = resolve(f"mm15_{size}_continual"), resolve(f"mm15_{size}_sft")
    assert (continual.train.steps, sft.train.steps) == (30_000, 23_000)
    assert (continual.optimizer.lr, sft.optimizer.lr) == (1e-5, 2e-5)
    for cfg in (continual, sft):
        assert cfg.optimizer.name == "adafactor"
        assert cfg.schedule.min_lr_ratio == 0.0
        assert cfg.train.global_batch_size == 256
        assert (cfg.vision.image_size, cfg.vision.grid_size, cfg.vision.stored_grid_size) == (672, 48, 27)
        assert (cfg.tiling.mode, cfg.tiling.min_tiles, cfg.tiling.max_tiles) == ("dynamic", 4, 9)
        assert (cfg.tiling.overview, cfg.tiling.indicator) == ("after", "index")
        assert cfg.data.batch_unit == "samples"
    assert continual.train.steps * 256 == 7_680_000
    assert sft.train.steps * 256 == 5_888_000


def test_stages_keep_the_model():
    base, sft = resolve("mm15_3b"), resolve("mm15_3b_sft")
    assert base.language == sft.language
    assert base.connector == sft.connector
    assert base.train.run_dir != sft.train.run_dir


def test_mm1_sft():
    cfg = resolve("mm1_30b_sft")
    assert (cfg.optimizer.lr, cfg.train.steps, cfg.train.global_batch_size, cfg.data.seq_length) == (
        1e-5,
        10_000,
        256,
        2048,
    )
    assert (cfg.tiling.mode, cfg.tiling.overview, cfg.tiling.indicator) == ("static", "before", "none")
    assert cfg.data.batch_unit == "samples"


@pytest.mark.parametrize("name", [n for n, preset in REGISTRY.items() if FITS_80_GB in preset.sources().values()])
def test_layouts_that_fit_80_gb_do(name):
    cfg = resolve(name)
    stages = cfg.parallel.pipeline_model_parallel_size
    world = 64 * cfg.parallel.tensor_model_parallel_size * stages
    for stage in range(stages):
        assert memory_estimate(cfg, world_size=world, stage=stage).total < 80 * 2**30


def test_descriptions_count_the_parameters_of_our_dimensions():
    counted = {
        name: float(found[1])
        for name, preset in REGISTRY.items()
        if (found := re.search(r"([\d.]+)B parameters", preset.description))
    }
    assert {"mm1_3b_moe", "mm1_7b_moe"} <= set(counted)
    assert counted == {name: round(model_parameters(resolve(name)).total / 1e9, 1) for name in counted}


@pytest.mark.parametrize(
    ("name", "path", "source"),
    [
        ("mm1_3b_sft", "vision.image_size", "published: MM1 section 5"),
        ("mm15_3b_sft", "vision.image_size", "published: MM1.5 section 4"),
        ("mm1_ablation_base", "optimizer.lr", "published: MM1 appendix"),
        ("mm15_1b", "optimizer.lr", "derived: MM1's law"),
        ("mm15_1b_moe", "optimizer.lr", "derived: MM1's law"),
        ("mm15_3b_sft", "optimizer.clip_grad", "ours"),
        ("mm15_3b", "optimizer.clip_grad", "published"),
        ("mm15_3b_continual", "data.max_images", "ours"),
        ("mm15_30b", "language.z_loss_coeff", "published"),
        ("mm15_30b_sft", "language.z_loss_coeff", "ours"),
        ("mm1_7b_sft", "tiling.max_split_images", "ours"),
        ("mm1_ablation_base", "vision.activation", "ours"),
        ("mm1_3b", "vision.activation", "derived"),
        ("mm1_encoder_aim_1b", "vision.image_size", "published: MM1 section 3.2, Table 1"),
        ("mm1_encoder_aim_1b", "vision.position_embedding", "derived: the public v1 models of apple/ml-aim"),
        ("mm1_encoder_vit_l_224", "optimizer.lr", "published: MM1 appendix"),
        ("mm1_connector_attention_pool_336_64", "connector.num_tokens", "published: MM1 section 3.2, Fig. 4"),
        ("mm1_connector_attention_pool_336_64", "connector.num_attention_heads", "ours"),
    ],
)
def test_provenance_of_a_stage(name, path, source):
    assert REGISTRY[name].sources()[path].startswith(source)


def test_z_loss_is_for_pretraining_alone():
    assert resolve("mm15_30b").language.z_loss_coeff == 1e-4
    assert resolve("mm15_30b_sft").language.z_loss_coeff == 0.0


def test_mixtures_are_listed():
    text = parse_run(["--list-presets"], presets=REGISTRY).output or ""
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "captions : interleaved : text 45:45:10" in lines["mm1_3b"]
    assert "captions : interleaved : text 50:10:40" in lines["mm15_3b_moe"]
    assert "80:10:10" in lines["mm15_30b_sft"]


def test_unknown_preset_suggests():
    with pytest.raises(ConfigError, match="did you mean 'debug_dense'"):
        resolve("debug_dens")
