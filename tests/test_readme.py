"""What README shows works: its Python runs, its command lines parse, its files and targets exist."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from mm15_megatron.config.parse import parse_run
from mm15_megatron.config.validate import check_data
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.preprocess.cli import parser_of
from mm15_megatron.data.tokenizer import Tokenizer, train_character_tokenizer
from mm15_megatron.presets import REGISTRY

from .data.images import photo
from .helpers.tools import load_tool

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", README, flags=re.MULTILINE)]


def block_with(text: str) -> str:
    """Return the one indented block that holds ``text``."""
    (block,) = (block for block in BLOCKS if text in block)
    return block


def test_python_example_builds_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as written, beside a tokenizer.json and with real image bytes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    tokenizer = train_character_tokenizer([*map(chr, range(32, 127)), "\n"], tmp_path / "tokenizer.json")
    names = {"jpeg_bytes": photo(40, 30, seed=1, form="JPEG"), "png_bytes": photo(30, 40, seed=2, form="PNG")}
    exec(compile(block_with("build_captions("), "README.md", "exec"), names)
    assert isinstance(names["tokenizer"], Tokenizer)
    for name in ("pairs", "talk"):
        source = IndexedSource(Path("data") / name, name=name, tokenizer_digest=tokenizer.digest)
        assert source.num_documents == 1


def test_training_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command line of the trainer is understood, with the yaml that README shows as my.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(block_with("data/talk, "), encoding="utf-8")
    (block,) = (block for block in BLOCKS if "sbatch" in block)
    commands = [re.split(r"mm15_megatron\.train |train\.sbatch ", line)[1] for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        parsed = parse_run(shlex.split(command), presets=REGISTRY)
        if "my.yaml" in command:
            assert [source.prefix for source in parsed.config.data.sources] == ["data/pairs", "data/talk"]
        else:
            assert parsed.output is not None
            assert "language.num_layers" in parsed.output


def test_the_mixture_of_readme_is_one(tmp_path: Path) -> None:
    """The options are those of the trainer, and its rules let them pass."""
    path = tmp_path / "data.yaml"
    path.write_text(block_with("mixture_unit: row"))
    cfg = parse_run(["--preset", "mm15_3b", "--config", str(path), "data.tokenizer=t.json"], presets=REGISTRY).config
    check_data(cfg)
    assert [(s.weight, len(s.changes)) for s in cfg.data.sources] == [(0.45, 0), (0.45, 1), (0.1, 0)]


def test_preprocessing_commands_parse() -> None:
    """Every format and option that README names is one of its tool."""
    lines = [
        line.split("tools/")[1] for line in block_with("preprocess_captions.py").splitlines() if "preprocess_" in line
    ]
    assert len(lines) == 4
    for line in lines:
        tool, *words = shlex.split(line)
        readers = load_tool(tool.removesuffix(".py")).READERS
        assert parser_of("", readers).parse_args(words).format in readers


def test_inspection_commands_parse() -> None:
    """The options are those of the tool, and the run is one of the trainer's."""
    tool = load_tool("inspect_dataset")
    lines = [line for line in block_with("preprocess_captions.py").splitlines() if "inspect_dataset.py" in line]
    given = [tool.arguments().parse_intermixed_args(shlex.split(line.split(".py ")[1])) for line in lines]
    assert [(one.check, one.html is not None) for one in given] == [(True, False), (False, True)]
    assert tool.run_of(given[1]).config.tiling.mode == "dynamic"


def test_make_targets_and_links_exist() -> None:
    """`make X` names targets, and relative links name files."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|    )make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / link).exists(), link
