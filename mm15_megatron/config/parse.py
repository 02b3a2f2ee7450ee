"""Command line and files to RunConfig: preset < YAML files, in order < overrides and flags of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mm15_megatron.config.coerce import coerce, scalar_type
from mm15_megatron.config.dump import dump_flat, value_text
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS, SECTIONS, Option, option_at, with_values
from mm15_megatron.config.yaml_text import parse_yaml, read_yaml
from mm15_megatron.errors import ConfigError, did_you_mean

_COMMANDS = {
    "preset": "NAME: start from this preset",
    "config": "FILE: YAML sections of options, and optionally `preset: NAME`; may be repeated, later files win",
    "print-config": "print every option with its value and where it came from, then stop",
    "list-presets": "print the presets, then stop",
    "plan": "pack an epoch of every source, print rows, epochs, shares and disk, keep the tables, then stop",
    "help": "or -h: print this text, then stop",
}


class PresetLike(Protocol):
    """What the parser needs of a preset; the registry is handed in, so that config imports nothing above itself."""

    @property
    def description(self) -> str:
        """One line about the preset."""
        ...

    def build(self) -> RunConfig:
        """Return the resolved configuration."""
        ...

    def sources(self) -> Mapping[str, str]:
        """Return, by path, where each value that the preset sets comes from."""
        ...


@dataclass(frozen=True)
class ParsedRun:
    """What a command line asks for.

    Attributes:
        config: the resolved configuration, types and choices checked; see ``validate`` for the rest.
        origins: by path, where the value came from: ``default``, ``preset NAME: source``, ``file PATH`` or
            ``command line: ARGUMENT``.
        output: text to write instead of running (``--help``, ``--list-presets``, ``--print-config``); None = run.
        plans: plan the data instead of running (``--plan``).
    """

    config: RunConfig
    origins: Mapping[str, str]
    output: str | None = None
    plans: bool = False


@dataclass
class _CommandLine:
    """The arguments, sorted by kind but not yet interpreted."""

    preset: str | None = None
    files: list[Path] = field(default_factory=list)
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    commands: set[str] = field(default_factory=set)

    def put(self, path: str, value: Any, *, argument: str) -> None:
        if path in self.values:
            raise ConfigError(
                f"{path} is set by {self.values[path][1]!r} and again by {argument!r}", fix="give it once"
            )
        self.values[path] = (value, argument)


def flag_table() -> dict[str, Option]:
    """Return the option behind each flag (without the dashes); booleans also answer to ``no-<flag>``."""
    return {option.flag: option for option in OPTIONS.values() if option.flag}


def parse_run(argv: Sequence[str], *, presets: Mapping[str, PresetLike]) -> ParsedRun:
    """Interpret a command line.

    Args:
        argv: the arguments behind the program's name.
        presets: the registry of presets by name.

    Raises:
        ConfigError: an unknown flag, option or preset; a malformed value; an option given twice.
    """
    line = _read_arguments(argv)
    if "help" in line.commands:
        return ParsedRun(config=RunConfig(), origins={}, output=help_text())
    if "list-presets" in line.commands:
        return ParsedRun(config=RunConfig(), origins={}, output=_preset_list(presets))
    contents = [(path, read_yaml(path)) for path in line.files]
    config, origins = _start(line.preset, contents, presets)
    for path, sections in contents:
        values = _file_values(sections, name=str(path))
        config = with_values(config, values)
        origins |= dict.fromkeys(values, f"file {path}")
    typed = {path: coerce(option_at(path), value, origin=arg) for path, (value, arg) in line.values.items()}
    config = with_values(config, typed)
    origins |= {path: f"command line: {argument}" for path, (_, argument) in line.values.items()}
    output = dump_flat(config, notes=origins) if "print-config" in line.commands else None
    return ParsedRun(config=config, origins=origins, output=output, plans="plan" in line.commands)


def parse(argv: Sequence[str], *, presets: Mapping[str, PresetLike]) -> RunConfig:
    """Return only the configuration of :func:`parse_run`."""
    return parse_run(argv, presets=presets).config


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Return ``config`` changed by ``section.field=value`` texts, as the command line would.

    Raises:
        ConfigError: as :func:`parse_run`.
    """
    line = _CommandLine()
    for text in overrides:
        _read_override(text, line)
    typed = {path: coerce(option_at(path), value, origin=arg) for path, (value, arg) in line.values.items()}
    return with_values(config, typed)


def help_text() -> str:
    """Return the help of the command line, made from the options' metadata."""
    lines = ["usage: [--preset NAME] [--config FILE ...] [--flag VALUE ...] [section.field=value ...]", ""]
    lines += [f"  --{name:<38} {doc}" for name, doc in _COMMANDS.items()]
    for section in SECTIONS:
        lines += ["", f"{section}:"]
        for option in OPTIONS.values():
            if option.path.startswith(f"{section}."):
                lines.append(_help_line(option))
    return "\n".join(lines) + "\n"


def _help_line(option: Option) -> str:
    name = (
        option.path if not option.flag else f"--[no-]{option.flag}" if option.annotation is bool else f"--{option.flag}"
    )
    choices = " {" + ", ".join("null" if c is None else str(c) for c in option.choices) + "}" if option.choices else ""
    return f"  {name:<40} {option.doc}{choices} [{value_text(option.default)}]"


def _preset_list(presets: Mapping[str, PresetLike]) -> str:
    width = max((len(name) for name in presets), default=0)
    return "".join(f"{name:<{width}}  {preset.description}\n" for name, preset in presets.items())


def _read_arguments(argv: Sequence[str]) -> _CommandLine:
    line = _CommandLine()
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        if argument == "-h":
            argument = "--help"
        if not argument.startswith("-"):
            _read_override(argument, line)
            continue
        if not argument.startswith("--"):
            raise ConfigError(
                f"unknown argument {argument!r}", fix="write flags with two dashes, values as --flag=value"
            )
        name, equals, inline = argument[2:].partition("=")
        value = inline if equals else None
        if name in _COMMANDS:
            _read_command(name, value, waiting, line)
        else:
            _read_flag(name, value, waiting, line)
    return line


def _read_command(name: str, value: str | None, waiting: list[str], line: _CommandLine) -> None:
    if name in ("preset", "config"):
        word = _word_of(name, value, waiting)
        if name == "config":
            line.files.append(Path(word))
        elif line.preset is None:
            line.preset = word
        else:
            raise ConfigError(f"--preset is given twice: {line.preset!r} and {word!r}", fix="keep one of them")
    elif value is None:
        line.commands.add(name)
    else:
        raise ConfigError(f"--{name} takes no value, got {value!r}", fix=f"write --{name} alone")


def _read_flag(name: str, value: str | None, waiting: list[str], line: _CommandLine) -> None:
    flags = flag_table()
    negated = flags.get(name.removeprefix("no-")) if name.startswith("no-") else None
    option = flags.get(name)
    if option is None and negated is not None and negated.annotation is bool:
        if value is not None:
            raise ConfigError(
                f"--{name} takes no value, got {value!r}", fix=f"write --{name} or --{negated.flag}={value}"
            )
        line.put(negated.path, False, argument=f"--{name}")
        return
    if option is None:
        raise ConfigError(f"unknown flag --{name}", fix=did_you_mean(name, [*flags, *_COMMANDS]))
    if option.annotation is bool and value is None:
        line.put(option.path, True, argument=f"--{name}")
        return
    word = _word_of(name, value, waiting)
    line.put(option.path, _value_of(option, word), argument=f"--{name}={word}")


def _word_of(name: str, value: str | None, waiting: list[str]) -> str:
    """Return the value of ``--name``: what follows ``=``, or the next argument (which may be a negative number)."""
    if value is not None:
        return value
    if not waiting or waiting[0].startswith("--"):
        raise ConfigError(f"--{name} needs a value", fix=f"write --{name}=VALUE")
    return waiting.pop(0)


def _read_override(text: str, line: _CommandLine) -> None:
    path, equals, word = text.partition("=")
    if not equals:
        raise ConfigError(
            f"unknown argument {text!r}", fix="write section.field=value, or a flag such as --train-iters 100"
        )
    if path == "preset":
        raise ConfigError(f"{text!r} does not choose a preset", fix=f"write --preset {word}")
    line.put(path, _value_of(option_at(path), word), argument=text)


def _value_of(option: Option, word: str) -> Any:
    """Read one word of the command line: text stays as typed, everything else is YAML."""
    if scalar_type(option.annotation) is str:
        return None if option.annotation is not str and word == "null" else word
    return parse_yaml(word, name=option.path)


def _start(
    chosen: str | None, contents: Sequence[tuple[Path, dict[str, Any]]], presets: Mapping[str, PresetLike]
) -> tuple[RunConfig, dict[str, str]]:
    """Return the configuration before files and overrides, and where its values come from."""
    in_files = [(str(path), sections["preset"]) for path, sections in contents if "preset" in sections]
    name, where = (
        (chosen, "command line") if chosen is not None else (in_files[-1][1], in_files[-1][0]) if in_files else ("", "")
    )
    origins = dict.fromkeys(OPTIONS, "default")
    if not where:
        return RunConfig(), origins
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r} ({where})", fix=did_you_mean(str(name), presets))
    origins |= {path: f"preset {name}: {source}" for path, source in presets[name].sources().items()}
    origins["preset"] = where
    return presets[name].build(), origins


def _file_values(sections: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    values = {}
    for section, content in sections.items():
        if section == "preset":
            continue
        if section not in SECTIONS:
            raise ConfigError(
                f"unknown section {section!r} in {name}", fix=did_you_mean(section, [*SECTIONS, "preset"])
            )
        if content is not None and not isinstance(content, dict):
            raise ConfigError(
                f"section {section!r} in {name} is {content!r}", fix="indent its `field: value` lines below it"
            )
        for key, value in (content or {}).items():
            option = option_at(f"{section}.{key}")
            values[option.path] = coerce(option, value, origin=f"file {name}")
    return values
