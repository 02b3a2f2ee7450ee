"""Options follow the fields of a reader: types, defaults, words, and what is inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mm15_megatron.data.formats.base import Found, Skipped, Text, Unit
from mm15_megatron.data.formats.image_store import ImageFolder, ImageSource
from mm15_megatron.data.preprocess.cli import build, cores, field_helps, parser_of, run_tool, workers_of
from mm15_megatron.data.preprocess.ranks import Alone
from mm15_megatron.data.tokenizer import train_character_tokenizer
from mm15_megatron.errors import DataError


@dataclass(frozen=True)
class Sides:
    """Limits.

    Attributes:
        least: pixels of the shorter side,
            at least.
        most: pixels of the longer side.
    """

    least: int = 10
    most: int | None = 100


@dataclass(frozen=True)
class Table:
    """A table on disk.

    Attributes:
        path: where it lies.
    """

    path: Path


@dataclass(frozen=True)
class Words:
    """A reader of the tests.

    Attributes:
        paths: files.
        images: where images are.
        words: what is left out, 5 % of it.
        strict: whether mistakes are errors.
        share: a share.
        limits: limits of images.
        sides: of every image.
        table: of frequent images.
        unit_bytes: nobody's business.
    """

    paths: tuple[Path, ...]
    images: ImageSource | None = None
    words: tuple[str, ...] = ("a", "b")
    strict: bool = False
    share: float | None = None
    limits: Sides | None = None
    sides: Sides = field(default_factory=Sides)
    table: Table | None = None
    unit_bytes: int = 7

    def __post_init__(self) -> None:
        if self.share == 0:
            raise DataError("share is 0", fix="use more")

    @property
    def kind(self) -> str:
        return "text"

    def units(self) -> tuple[Unit, ...]:
        return tuple(map(Unit, self.paths))

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        yield Found(Text(unit.path.read_text()), unit.path.name)


SHARED = ["--output", "out", "--tokenizer", "tok"]


def made(*words: str) -> Words:
    given = parser_of("a tool", {"words": Words}).parse_args(["words", "in.txt", *words, *SHARED])
    found = build(Words, vars(given))
    assert isinstance(found, Words)
    return found


def test_what_is_not_given_keeps_its_default() -> None:
    assert made() == Words((Path("in.txt"),))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--words", "x,y"], {"words": ("x", "y")}),
        (["--words", ""], {"words": ()}),
        (["--strict"], {"strict": True}),
        (["--no-strict"], {"strict": False}),
        (["--share", "0.5"], {"share": 0.5}),
        (["--share", "none"], {"share": None}),
        (["--limits"], {"limits": Sides()}),
        (["--limits-least", "3"], {"limits": Sides(least=3)}),
        (["--limits-most", "None"], {"limits": Sides(most=None)}),
        (["--sides-most", "7"], {"sides": Sides(most=7)}),
        (["--table-path", "t.npy"], {"table": Table(Path("t.npy"))}),
    ],
)
def test_each_type_has_its_form(words: list[str], expected: dict[str, object]) -> None:
    assert made(*words) == Words((Path("in.txt"),), **expected)


def test_images_come_from_a_folder_or_an_index(tmp_path: Path) -> None:
    assert made("--image-folder", str(tmp_path)).images == ImageFolder(tmp_path)
    with pytest.raises(DataError, match="build the index"):
        made("--image-index", str(tmp_path / "none"))
    with pytest.raises(SystemExit):
        made("--image-index", "x", "--image-folder", "y")


def test_help_is_that_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert field_helps(Sides)["least"] == "pixels of the shorter side, at least"
    with pytest.raises(SystemExit):
        parser_of("a tool", {"words": Words}).parse_args(["words", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--words A,B what is left out, 5 % of it [a,b]" in text
    assert "--sides-least N pixels of the shorter side, at least [10]" in text
    assert "unit-bytes" not in text
    assert "--table-path PATH" in text


def test_a_tool_says_what_it_made_or_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_character_tokenizer(list("abc"), tmp_path / "tok.json")
    (tmp_path / "in.txt").write_text("abc")
    words = ["words", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), "--workers", "0"]
    words += ["--tokenizer", str(tmp_path / "tok.json")]
    assert run_tool("a tool", {"words": Words}, words) == 0
    said = capsys.readouterr()
    assert "1 documents read, 1 kept" in said.out
    assert f"{tmp_path / 'out'}: 1 documents, 4 tokens, 0 images" in said.out
    assert "unit 1/1 | 1 documents read, 1 kept" in said.err
    assert run_tool("a tool", {"words": Words}, words) == 2
    assert "already holds a dataset" in capsys.readouterr().err
    for option, value, message in (
        ("--share", "0", "share is 0"),
        ("--document-timeout", "-1", "document_seconds is -1.0"),
        ("--max-lost", "-1", "lost_documents is -1"),
        ("--workers", "-1", "-1 workers"),
    ):
        assert run_tool("a tool", {"words": Words}, [*words, option, value]) == 2
        assert message in capsys.readouterr().err


def test_ranks_have_one_worker_each_unless_told() -> None:
    assert workers_of(None, Alone()) == cores()
    assert workers_of(None, Alone(rank=1, size=4)) == 1
    assert workers_of(3, Alone(rank=1, size=4)) == 3
    assert workers_of(0, Alone()) == 0
