"""Names of layouts: ``tp2sp-pp2-distopt`` -> ranks and options. Torch-free.

A name is a string of tokens, with or without hyphens between them (``TOKENS``). Two tokens stand for a way to run:
``packed`` (every segment in a row of its own) and ``resume`` (save, rebuild, load, go on). ``resume:A>B`` saves in
layout A and loads in layout B; ``one`` is one rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import with_values
from mm15_megatron.errors import ConfigError, did_you_mean

TOKENS: Mapping[str, str] = {
    "tpN": "tensor-parallel size",
    "sp": "sequence parallelism (also tpNsp)",
    "ppN": "pipeline stages",
    "vppN": "interleaving: model chunks a stage holds; 2 stages if no ppN is given",
    "dpN": "data-parallel size; default 1, or the expert-parallel size",
    "cpN": "context-parallel size",
    "epN": "ranks the experts are spread over",
    "etpN": "ranks an expert is split over; default tpN",
    "firstN": "decoder layers on stage 0",
    "enctp": "the encoder is tensor-parallel instead of sharing the tiles",
    "distopt": "distributed optimizer",
    "gradoverlap": "overlapped gradient reduction",
    "overlap": "distributed optimizer, overlapped gradient reduction and parameter gather",
    "epoverlap": "the experts' all-to-all runs beside another micro-batch's computation (needs bf16)",
    "bucketsN": "gradient buckets of N parameters (with an overlap)",
    "recompute": "every decoder layer and encoder block is recomputed",
    "recompute-selective": "core attention is recomputed",
    "recompute-mlp": "dense feed-forward blocks are recomputed",
    "recompute-moe": "core attention and sparse feed-forward blocks are recomputed",
    "mbsN": "rows of a micro-batch",
    "accumN": "micro-batches of a step on each data-parallel rank",
    "packed": "each segment in a row of its own, against the packed rows",
    "resume": "save after some steps, rebuild, load and go on, against the straight run",
}
"""Every token and what it sets."""

_SPELLINGS = {"distopt": "dist-?opt", "gradoverlap": "grad-?overlap"}
_PATTERNS = {
    name: re.compile(_SPELLINGS.get(name, name.replace("N", r"(\d+)")))
    # the longer of two names with one beginning is read first
    for name in sorted(TOKENS, key=len, reverse=True)
}
_OVERLAP_GRADIENTS = {"parallel.overlap_grad_reduce": True}
_DISTRIBUTED = {"parallel.use_distributed_optimizer": True}
_SELECTIVE = {"kernels.recompute_granularity": "selective"}
_SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "sp": {"parallel.sequence_parallel": True},
    "enctp": {"parallel.encoder_parallel": "tensor"},
    "distopt": _DISTRIBUTED,
    "gradoverlap": _OVERLAP_GRADIENTS,
    "overlap": _DISTRIBUTED | _OVERLAP_GRADIENTS | {"parallel.overlap_param_gather": True},
    "epoverlap": {"parallel.overlap_moe_expert_parallel_comm": True},
    "recompute": {"kernels.recompute_granularity": "full", "kernels.recompute_vision": True},
    "recompute-selective": _SELECTIVE,
    "recompute-mlp": _SELECTIVE | {"kernels.recompute_modules": ("mlp",)},
    "recompute-moe": _SELECTIVE | {"kernels.recompute_modules": ("core_attn", "moe")},
}
_NUMBERS: Mapping[str, str] = {
    "tpN": "parallel.tensor_model_parallel_size",
    "ppN": "parallel.pipeline_model_parallel_size",
    "vppN": "parallel.virtual_pipeline_model_parallel_size",
    "cpN": "parallel.context_parallel_size",
    "epN": "parallel.expert_model_parallel_size",
    "etpN": "parallel.expert_tensor_parallel_size",
    "firstN": "parallel.num_layers_in_first_pipeline_stage",
    "bucketsN": "parallel.ddp_bucket_size",
    "mbsN": "train.micro_batch_size",
}


@dataclass(frozen=True)
class Layout:
    """A way to run the same job.

    Attributes:
        world_size: ranks.
        settings: options by path, on top of the reference configuration.
        name: as the user wrote it.
        data_size: data-parallel ranks.
        accumulation: micro-batches of a step on each data-parallel rank; None = as ``train.micro_batch_size`` says.
        alone: every segment has a row of its own.
        resumes: half-way the run is saved, rebuilt and loaded.
        saved_in: the layout that saves, when another one loads.
    """

    world_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "one rank"
    data_size: int = 1
    accumulation: int | None = None
    alone: bool = False
    resumes: bool = False
    saved_in: Layout | None = None

    def size(self, what: str) -> int:
        """Return a parallel size such as ``tensor_model_parallel``; 1 where it is not set."""
        return int(self.settings.get(f"parallel.{what}_size") or 1)

    @property
    def chunks(self) -> int:
        """Model chunks over all pipeline stages."""
        return self.size("pipeline_model_parallel") * self.size("virtual_pipeline_model_parallel")

    def apply(self, cfg: RunConfig) -> RunConfig:
        """Return the configuration in this layout.

        Raises:
            ConfigError: the batch cannot be accumulated in that many micro-batches.
        """
        changed = with_values(cfg, self.settings)
        if self.accumulation is None:
            return changed
        rows, parts = cfg.train.global_batch_size, self.accumulation * self.data_size
        if rows % parts:
            raise ConfigError(
                f"layout {self.name}: train.global_batch_size = {rows} is not {self.accumulation} micro-batches on "
                f"each of {self.data_size} data-parallel ranks",
                fix=f"set train.global_batch_size to a multiple of {parts}",
            )
        return with_values(changed, {"train.micro_batch_size": rows // parts})


def parse_layouts(text: str) -> list[Layout]:
    """Read names separated by commas.

    Raises:
        ConfigError: as :func:`parse_layout`; or there is no name, or one is given twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"--layouts {text!r} names no layout, or one twice", fix="write for example --layouts tp2,dp2"
        )
    return [parse_layout(name) for name in names]


def parse_layout(name: str) -> Layout:
    """Read one name.

    Raises:
        ConfigError: a token is unknown, repeated or without effect.
    """
    if name.startswith("resume:"):
        saved, arrow, loaded = name.removeprefix("resume:").partition(">")
        if not (arrow and saved and loaded):
            raise ConfigError(f"layout {name!r} does not say two layouts", fix="write resume:tp2>pp2, in quotes")
        first, second = (Layout(1) if part == "one" else parse_layout(part) for part in (saved, loaded))
        if any(part.alone or part.resumes for part in (first, second)):
            raise ConfigError(f"layout {name!r} resumes twice, or packed rows", fix="write plain layouts around the >")
        return replace(second, name=name, resumes=True, saved_in=first)
    tokens = _tokens_of(name)
    _check_effect(name, tokens)
    settings: dict[str, Any] = {}
    for token, number in tokens.items():
        settings |= {_NUMBERS[token]: number} if token in _NUMBERS else _SWITCHES.get(token, {})
    if "vppN" in tokens and "ppN" not in tokens:
        settings["parallel.pipeline_model_parallel_size"] = tokens["ppN"] = 2
    data_size = tokens.get("dpN", tokens.get("epN", 1))
    return Layout(
        world_size=math.prod((tokens.get("tpN", 1), tokens.get("ppN", 1), tokens.get("cpN", 1), data_size)),
        settings=settings,
        name=name,
        data_size=data_size,
        accumulation=tokens.get("accumN"),
        alone="packed" in tokens,
        resumes="resume" in tokens,
    )


def _tokens_of(name: str) -> dict[str, int]:
    """Return the number behind each token of a name (0 for those without one)."""
    found: dict[str, int] = {}
    rest = name
    while rest := rest.lstrip("-"):
        matches = ((token, pattern.match(rest)) for token, pattern in _PATTERNS.items())
        token, match = next(((token, match) for token, match in matches if match), ("", None))
        if match is None:
            word = re.sub(r"\d+", "N", rest.partition("-")[0])
            raise ConfigError(f"layout {name!r}: {rest!r} is no token", fix=did_you_mean(word, [*TOKENS, "tpNsp"]))
        if token in found:
            raise ConfigError(f"layout {name!r} says {token} twice", fix="keep one of them")
        found[token] = int(match.group(1)) if match.groups() else 0
        if match.groups() and found[token] < 1:
            raise ConfigError(f"layout {name!r}: {match.group()!r} is no size", fix="use a number above 0")
        rest = rest[match.end() :]
    if not found:
        raise ConfigError(f"layout {name!r} has no token", fix="write for example tp2")
    return found


def _check_effect(name: str, tokens: Mapping[str, int]) -> None:
    """Refuse tokens that would change nothing, or that exclude one another."""
    if "bucketsN" in tokens and not tokens.keys() & {"overlap", "gradoverlap"}:
        raise ConfigError(f"layout {name!r}: buckets have no effect without an overlap", fix="add overlap")
    if "packed" in tokens and tokens.keys() & {"resume", "accumN", "mbsN"}:
        raise ConfigError(f"layout {name!r}: packed chooses its own rows and runs once", fix="check them one by one")
    if "mbsN" in tokens and "accumN" in tokens:
        raise ConfigError(f"layout {name!r}: mbsN and accumN both set the micro-batch", fix="keep one of them")


_DENSE = (
    "tp2",
    "tp2sp",
    "tp2sp-enctp",
    "pp2",
    "vpp2",
    "cp2",
    "dp2",
    "dp2-distopt",
    "dp2-overlap-buckets20000",
    "tp2sp-dp2-overlap-buckets20000",
    "pp2dp2-distopt-gradoverlap",
    "tp2pp2",
    "tp2sp-vpp2",
    "mbs1",
    "accum1",
    "recompute",
    "recompute-selective",
    "recompute-mlp-tp2sp",
    "packed",
    "dp2-overlap-resume",
    "resume:tp2>pp2",
)
_EXPERTS = (
    "ep2",
    "ep2-distopt",
    "tp2sp-etp1",
    "ep2dp4-overlap",
    "tp2sp-ep2-etp1",
    "tp2pp2ep2",
    "vpp2-ep2",
    "cp2-ep2",
    "ep2-recompute-moe",
    "ep2-resume",
    "resume:ep2>tp2",
)


_WHOLE_PARAMETERS = (
    "dp4",
    "dp2-gradoverlap-buckets20000",
    "tp2sp-enctp-dp2",
    "pp2dp2",
    "dp2-resume",
    "resume:tp2dp2>pp2",
)
_WHOLE_EXPERTS = ("ep2dp4", "tp2sp-ep2-etp1-resume")


def default_layouts(cfg: RunConfig) -> str:
    """Return the layouts of a model: with experts, also those that spread and split them.

    AdaFactor has no distributed optimizer; it spreads whole parameters over data-parallel ranks instead.
    """
    names = _DENSE + (_EXPERTS if cfg.moe.num_moe_experts else ())
    if cfg.optimizer.name == "adafactor":
        sharded = [name for name in names if parse_layout(name).settings.get("parallel.use_distributed_optimizer")]
        names = tuple(name for name in names if name not in sharded) + _WHOLE_PARAMETERS
        names += _WHOLE_EXPERTS if cfg.moe.num_moe_experts else ()
    return ",".join(names)
