"""The command line and YAML files: precedence, types, flags and every refusal."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from mm15_megatron.config.parse import apply_overrides, flag_table, help_text, parse, parse_run
from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.config.tree import OPTIONS, option_at, with_values
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import REGISTRY


def run(*argv: str) -> RunConfig:
    return parse(argv, presets=REGISTRY)


def write(tmp_path, text: str, name: str = "run.yaml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_arguments_is_the_schema():
    assert run() == RunConfig()


def test_precedence_preset_file_override(tmp_path):
    first = write(tmp_path, "preset: debug_dense\ntrain: {steps: 7, seed: 8}\noptimizer: {lr: 1e-4}\n", "a.yaml")
    second = write(tmp_path, "train:\n  seed: 9\n", "b.yaml")
    cfg = run("--config", first, f"--config={second}", "optimizer.lr=3e-4")
    assert cfg.preset == "debug_dense"
    assert cfg.language.hidden_size == 64
    assert (cfg.train.steps, cfg.train.seed, cfg.optimizer.lr) == (7, 9, 3e-4)


def test_preset_of_the_command_line_wins_over_the_files(tmp_path):
    assert run("--preset", "debug_vision", "--config", write(tmp_path, "preset: debug_dense")).preset == "debug_vision"


def test_origins_name_where_a_value_came_from(tmp_path):
    path = write(tmp_path, "train: {seed: 5}\n")
    parsed = parse_run(["--preset", "mm1_3b", "--config", path, "--lr", "1e-4"], presets=REGISTRY)
    assert parsed.origins["train.seed"] == f"file {path}"
    assert parsed.origins["optimizer.lr"] == "command line: --lr=1e-4"
    assert parsed.origins["train.steps"].startswith("preset mm1_3b: published")
    assert parsed.origins["checkpoint.keep"] == "default"
    assert parsed.output is None
    assert set(parsed.origins) == set(OPTIONS)


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--num-layers", "3"], "language.num_layers", 3),
        (["--vision-num-layers=3"], "vision.num_layers", 3),
        (["--connector-num-tokens", "64"], "connector.num_tokens", 64),
        (["--train-iters", "5"], "train.steps", 5),
        (["--num-experts", "8"], "moe.num_moe_experts", 8),
        (["--sequence-parallel"], "parallel.sequence_parallel", True),
        (["--no-tensorboard"], "logging.tensorboard", False),
        (["--freeze-vision=true"], "freeze.vision", True),
        (["--vision-feature-layer", "-2"], "vision.feature_layer", -2),
        (["--rampup-batch-size", "[2, 2, 100]"], "train.rampup_batch_size", (2, 2, 100)),
        (["train.run_dir=2024"], "train.run_dir", "2024"),
        (["train.run_dir=a=b"], "train.run_dir", "a=b"),
        (["data.shuffle=none"], "data.shuffle", "none"),
        (["data.tokenizer=no"], "data.tokenizer", "no"),
        (["optimizer.lr=null"], "optimizer.lr", None),
        (["optimizer.lr=1"], "optimizer.lr", 1.0),
        (["optimizer.lr=1e-4"], "optimizer.lr", 1e-4),
        (["kernels.recompute_granularity=full"], "kernels.recompute_granularity", "full"),
        (["kernels.recompute_granularity=null"], "kernels.recompute_granularity", None),
        (["kernels.recompute_granularity=none"], "kernels.recompute_granularity", None),
        (["tiling.mode=none"], "tiling.mode", "none"),
        (["vision.image_mean=[0, 0.5, 1]"], "vision.image_mean", (0.0, 0.5, 1.0)),
        (["data.sources=[{prefix: a, weight: 2}]"], "data.sources", (SourceConfig(prefix="a", weight=2.0),)),
        (["data.max_image_pixels=64_000_000"], "data.max_image_pixels", 64_000_000),
    ],
)
def test_values_and_flags(argv, path, value):
    changed = run(*argv)
    assert changed == with_values(RunConfig(), {path: value})
    section, name = path.split(".")
    assert type(getattr(getattr(changed, section), name)) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["language.hiden_size=3"], "did you mean 'hidden_size'"),
        (["langauge.hidden_size=3"], "did you mean 'language'"),
        (["hidden_size=3"], "'language.hidden_size' or 'vision.hidden_size'"),
        (["--hiden-size", "3"], "did you mean 'hidden-size'"),
        (["--no-hidden-size"], "unknown flag"),
        (["-x"], "two dashes"),
        (["train"], "write section.field=value"),
        (["--train-iters"], "needs a value"),
        (["--train-iters", "--lr"], "needs a value"),
        (["--no-tensorboard=3"], "takes no value"),
        (["--help=3"], "takes no value"),
        (["--train-iters", "5", "train.steps=6"], "is set by '--train-iters=5' and again by 'train.steps=6'"),
        (["--preset", "a", "--preset", "b"], "--preset is given twice"),
        (["--preset", "mm1_3x"], "did you mean 'mm1_3b'"),
        (["preset=mm1_3b"], "write --preset mm1_3b"),
        (["train.steps=many"], r"train.steps = 'many' \(train.steps=many\) has the wrong type"),
        (["train.steps=2.0"], "give a whole number"),
        (["train.steps=true"], "give a whole number"),
        (["train.steps=null"], "give a whole number"),
        (["train.steps=010"], "give a whole number"),
        (["freeze.vision=1"], "give true or false"),
        (["freeze.vision=yes"], "give true or false"),
        (["optimizer.lr=true"], "give a finite number or null"),
        (["optimizer.lr=nan"], "give a finite number or null"),
        (["optimizer.lr=.inf"], "give a finite number or null"),
        (["vision.image_mean=[0, 1]"], "a list of 3 values"),
        (["vision.image_mean=[0, 1, x]"], r"vision.image_mean\[2\] = 'x'"),
        (["data.sources=3"], "a list of a mapping with the keys prefix, weight, changes, epochs, name"),
        (["data.sources=[3]"], r"data.sources\[0\] = 3"),
        (["data.sources=[{prefx: a}]"], "did you mean 'prefix'"),
        (["data.sources=[{prefix: a, prefix: b}]"], "given twice"),
        (["data.sources=[{prefix: 3}]"], "put it in quotes"),
        (["data.sources=[{"], "not well-formed YAML"),
        (["data.shuffle=true"], "choose from: full, blocks, none"),
        (["tiling.mode=dynamik"], "choose from: none, static, dynamic"),
        (["kernels.recompute_granularity=half"], "choose from: null, selective, full"),
    ],
)
def test_refusals(argv, message):
    with pytest.raises(ConfigError, match=message):
        run(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", "did you mean 'train'"),
        ("train: {step: 3}", "did you mean 'steps'"),
        ("train.steps: 3", "unknown section 'train.steps'"),
        ("train: 3", "indent its"),
        ("train: {steps: 3}\ntrain: {seed: 3}", "line 2"),
        ("train:\n  steps: 3\n  steps: 4\n", "'steps' is given twice"),
        ("3: 4", "is not text"),
        ("- a\n- b\n", "holds a list, not sections"),
        ("train: [", "not well-formed"),
        ("train: {run_dir: 2024}", "put it in quotes"),
        ("preset: mm1_3x", "did you mean 'mm1_3b'"),
    ],
)
def test_file_refusals(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        run("--config", write(tmp_path, text))


def test_missing_file():
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        run("--config", "nowhere.yaml")


def test_binary_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        run("--config", str(path))


def test_empty_file_and_empty_section_change_nothing(tmp_path):
    assert run("--config", write(tmp_path, "")) == RunConfig()
    assert run("--config", write(tmp_path, "train:\n")) == RunConfig()


def test_flags_are_unique_and_free_of_commands():
    flags = [option.flag for option in OPTIONS.values() if option.flag]
    negated = [f"no-{option.flag}" for option in OPTIONS.values() if option.flag and option.annotation is bool]
    commands = ["preset", "config", "print-config", "list-presets", "help"]
    assert [name for name, count in Counter(flags + negated + commands).items() if count > 1] == []
    assert len(flag_table()) == len(flags)


def test_every_option_is_documented_and_its_default_is_valid():
    from mm15_megatron.config.coerce import coerce

    for option in OPTIONS.values():
        assert option.doc, option.path
        assert coerce(option, option.default) == option.default


def test_help_names_every_option():
    text = help_text()
    for option in OPTIONS.values():
        if option.path != "preset":
            assert (
                f"--{option.flag}" if option.flag and option.annotation is not bool else option.flag or option.path
            ) in text
    assert parse_run(["--help"], presets=REGISTRY).output == text
    assert parse_run(["--preset", "debug_dense", "-h"], presets=REGISTRY).output == text


@pytest.mark.parametrize(
    ("flag", "source"),
    [("seq-length", "MM1: 4096"), ("connector-lr", "MM1: 8e-5"), ("tiling-indicator", "MM1.5: index")],
)
def test_help_shows_where_a_value_is_published(flag, source):
    (line,) = (line for line in help_text().splitlines() if line.startswith(f"  --{flag} "))
    assert f"({source})" in line


def test_list_presets():
    output = parse_run(["--list-presets"], presets=REGISTRY).output
    assert output is not None
    assert [line.split()[0] for line in output.splitlines()] == list(REGISTRY)


def test_print_config_shows_origins():
    parsed = parse_run(["--preset", "debug_dense", "--print-config", "train.steps=3"], presets=REGISTRY)
    assert parsed.output is not None
    assert "train.steps = 3  # command line: train.steps=3\n" in parsed.output
    assert parsed.config.train.steps == 3


def test_apply_overrides():
    base = RunConfig()
    assert apply_overrides(base, ["train.steps=3"]) == replace(base, train=replace(base.train, steps=3))
    assert apply_overrides(base, []) == base
    with pytest.raises(ConfigError, match="did you mean"):
        apply_overrides(base, ["train.stepz=3"])


def test_option_at_lists_sections():
    with pytest.raises(ConfigError, match="valid choices"):
        option_at("qqqq")
