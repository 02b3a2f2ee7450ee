"""The command line that every preprocessing tool shares: a subcommand a format, an option for each field of its reader.

The options of a reader are the fields of its dataclass, with the types and defaults that stand there and the words of
its docstring, so that a tool cannot lag behind its readers.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from mm15_megatron.data.build import BuildOptions
from mm15_megatron.data.formats.base import Format
from mm15_megatron.data.formats.image_store import ImageFolder, ImageSource, UrlStore
from mm15_megatron.data.preprocess.deaths import Limits
from mm15_megatron.data.preprocess.driver import Account, Job, manifests, run_job
from mm15_megatron.data.preprocess.ranks import Ranks, discover
from mm15_megatron.errors import DataError, MM15Error
from mm15_megatron.utils.progress import Progress

EXIT_BAD_INPUT: Final = 2
_SEEN_BY_NO_ONE: Final = ("unit_bytes",)


def run_tool(description: str, readers: Mapping[str, type], argv: Sequence[str] | None = None) -> int:
    """Run a tool.

    Args:
        description: the tool's docstring.
        readers: reader class of each subcommand.
        argv: the command line; None = the process's.

    Returns:
        Exit code: 0 written, 2 something in the input is wrong.
    """
    given = parser_of(description, readers).parse_args(argv)
    try:
        job = Job(
            format=typing.cast(Format, build(readers[given.format], vars(given))),
            prefix=given.output,
            tokenizer=given.tokenizer,
            options=BuildOptions(
                on_bad_image=given.on_bad_image,
                decode_images=given.decode_images,
                max_image_pixels=given.max_image_pixels,
                overwrite=given.overwrite,
            ),
            validation_share=given.validation_share,
        )
        limits = Limits(given.document_timeout, given.max_lost)
        ranks = discover()
        with_progress = _Told(enabled=ranks.rank == 0)
        whole = run_job(job, workers=workers_of(given.workers, ranks), tell=with_progress, ranks=ranks, limits=limits)
        with_progress.close()
    except MM15Error as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return EXIT_BAD_INPUT
    if ranks.rank == 0:
        sys.stdout.write(f"{whole}\n")
        for ending, found in manifests(job).items():
            sizes = f"{found.documents:,} documents, {found.tokens:,} tokens, {found.images:,} images"
            sys.stdout.write(f"{job.prefix}{ending}: {sizes}\n")
    return 0


class _Told:
    """Shows units as they are finished."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int, account: Account) -> None:
        if self._progress is None:
            # units of an earlier run come first, together
            self._progress = Progress(total, done=done - 1, noun="unit", enabled=self._enabled, stream=sys.stderr)
        self._progress.update(done, f"{account.read:,} documents read, {sum(account.kept.values()):,} kept")

    def close(self) -> None:
        """End the line."""
        if self._progress is not None:
            self._progress.close()


Adder = Callable[[argparse.ArgumentParser], None]
"""Adds what every format of a tool has besides the options of its reader."""


def parser_of(description: str, readers: Mapping[str, type], *, shared: Adder | None = None) -> argparse.ArgumentParser:
    """Return the parser of a tool; ``shared`` None: the options of a dataset that is made."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, reader in readers.items():
        summary = (reader.__doc__ or "").strip().splitlines()[0]
        sub = formats.add_parser(name, help=summary, description=sys.modules[reader.__module__].__doc__)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        add_fields(sub, reader)
        (shared or _add_shared)(sub)
    return parser


def cores() -> int:
    """Return how many this process may use."""
    return len(os.sched_getaffinity(0))


def workers_of(asked: int | None, ranks: Ranks) -> int:
    """Return how many processes each rank reads with: what was asked for, else all cores of one rank or one of many.

    Raises:
        DataError: fewer than none.
    """
    if asked is not None and asked < 0:
        raise DataError(f"{asked} workers", fix="ask for one or more, or for none with 0")
    if asked is not None:
        return asked
    return cores() if ranks.size == 1 else 1


def _add_shared(parser: argparse.ArgumentParser) -> None:
    shared = parser.add_argument_group("the dataset")
    shared.add_argument("--output", type=Path, required=True, help="path prefix of the dataset")
    shared.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or a SentencePiece .model")
    shared.add_argument(
        "--workers",
        type=int,
        help="processes of this rank that read; 0 = itself, which a document that kills its reader then ends"
        f" [{cores()}, under MPI 1]",
    )
    shared.add_argument(
        "--document-timeout",
        type=float,
        default=Limits.document_seconds,
        help="seconds; a document that takes longer is tried once more, then left out and counted, as one that kills"
        f" its reader; 0 = no limit [{Limits.document_seconds}]",
    )
    shared.add_argument(
        "--max-lost",
        type=int,
        default=Limits.lost_documents,
        help=f"such documents in one unit of the input before the job ends [{Limits.lost_documents}]",
    )
    shared.add_argument(
        "--validation-share", type=float, default=0.0, help="documents, chosen by content, for OUTPUT-validation [0]"
    )
    shared.add_argument(
        "--on-bad-image", choices=("raise", "drop"), default="drop", help="drop leaves the document out, counted [drop]"
    )
    shared.add_argument(
        "--decode-images", action=argparse.BooleanOptionalAction, default=True, help="or look at headers alone [yes]"
    )
    shared.add_argument("--max-image-pixels", type=int, default=64_000_000, help="larger images are bad [64000000]")
    shared.add_argument("--overwrite", action="store_true", help="replace a finished dataset of that prefix")


# --- From the fields of a dataclass to options and back


def add_fields(parser: argparse.ArgumentParser, cls: type, *, prefix: str = "", optional: bool = False) -> None:
    """Add an option for each field of ``cls``; ``paths`` becomes the positional arguments.

    A field that holds another dataclass gives an option for each field of that one, and one of its own where it may be
    None: with it, or with any of the others, there is one.
    """
    hints, helps = typing.get_type_hints(cls), field_helps(cls)
    for one in _options(cls):
        kind, name = hints[one.name], f"{prefix}{one.name}"
        if one.name == "paths" and not prefix:
            parser.add_argument("paths", type=Path, nargs="+", metavar="INPUT", help="files, or folders of them")
        elif _holds_images(kind):
            _add_images(parser, required=one.default is MISSING)
        elif (inner := _inner(kind)) is not None:
            absent = optional or one.default is None
            if one.default is None and all(_has_default(part) for part in _options(inner)):
                text = helps.get(one.name, "")
                parser.add_argument(_flag(name), action="store_true", default=argparse.SUPPRESS, help=text)
            add_fields(parser, inner, prefix=f"{name}_", optional=absent)
        else:
            _add_option(parser, one, kind, flag=_flag(name), text=helps.get(one.name, ""), optional=optional)


def _options(cls: type) -> list[Field[Any]]:
    assert is_dataclass(cls)
    return [one for one in fields(cls) if one.init and one.name not in _SEEN_BY_NO_ONE]


def _has_default(one: Field[Any]) -> bool:
    return one.default is not MISSING or one.default_factory is not MISSING


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_option(
    parser: argparse.ArgumentParser, one: Field[Any], hint: Any, *, flag: str, text: str, optional: bool
) -> None:
    kind = _plain(hint)
    default = one.default_factory() if one.default is MISSING and one.default_factory is not MISSING else one.default
    shown = f"{text} [{_shown(default)}]" if default is not MISSING and default is not None else text
    settings: dict[str, Any] = {"help": shown.replace("%", "%%"), "default": argparse.SUPPRESS}
    if default is MISSING and not optional:
        settings["required"] = True
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
    else:
        parser.add_argument(flag, type=_converter(kind, none=kind is not hint), metavar=_metavar(kind), **settings)


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _converter(kind: Any, *, none: bool) -> Callable[[str], Any]:
    """What makes a value of an option's text; ``none`` stands for None where that is a value."""
    convert = _tuple_converter(kind)

    def converted(text: str) -> Any:
        return None if none and text.lower() == "none" else convert(text)

    converted.__name__ = _metavar(kind)  # argparse names it in its errors
    return converted


def _tuple_converter(kind: Any) -> Callable[[str], Any]:
    if typing.get_origin(kind) is tuple:
        (item, *_) = typing.get_args(kind)
        return lambda text: tuple(item(part) for part in text.split(",") if part)
    converter: Callable[[str], Any] = kind
    return converter


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "A,B"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _plain(kind: Any) -> Any:
    """The type without ``| None``."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def _inner(kind: Any) -> type | None:
    """The dataclass that a field holds, if it holds one."""
    found = _plain(kind)
    return found if isinstance(found, type) and is_dataclass(found) else None


def _holds_images(kind: Any) -> bool:
    return _plain(kind) is ImageSource


def _add_images(parser: argparse.ArgumentParser, *, required: bool) -> None:
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--image-folder", type=Path, help="images by their path below this folder")
    group.add_argument("--image-index", type=Path, help="images by URL: an index that tools/index_images.py wrote")


def field_helps(cls: type) -> dict[str, str]:
    """Return what the docstring of ``cls``, and of its bases, says about each field, in one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for match in re.finditer(r"^ +(\w+): (.+(?:\n +(?!\w+: )\S.*)*)", base.__doc__ or "", flags=re.MULTILINE):
            found[match.group(1)] = " ".join(match.group(2).replace("``", "").split()).rstrip(".")
    return found


def build(cls: type, given: Mapping[str, Any], *, prefix: str = "") -> Any:
    """Make a ``cls`` from parsed options; what was not given keeps its default.

    Raises:
        DataError: as the class does.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for one in _options(cls):
        kind, name = hints[one.name], f"{prefix}{one.name}"
        if one.name == "paths" and not prefix:
            values["paths"] = tuple(given["paths"])
        elif _holds_images(kind):
            if (images := _images(given)) is not None:
                values[one.name] = images
        elif (inner := _inner(kind)) is not None:
            if name in given or any(key.startswith(f"{name}_") for key in given):
                values[one.name] = build(inner, given, prefix=f"{name}_")
        elif name in given:
            values[one.name] = given[name]
    return cls(**values)


def _images(given: Mapping[str, Any]) -> ImageSource | None:
    if given.get("image_folder") is not None:
        return ImageFolder(given["image_folder"])
    return UrlStore(given["image_index"]) if given.get("image_index") is not None else None
