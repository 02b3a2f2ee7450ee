"""What is measured, in which order, with which settings; and why a case is not run. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mm15_megatron.accounting import planned_tiles_per_row, step_flops
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import with_values
from mm15_megatron.config.validate import LEFT_TO_THE_USER, RULES
from mm15_megatron.errors import ConfigError, did_you_mean

FAMILIES = ("dense", "moe")
DEFAULT_PRESETS = {
    "cuda": {"dense": "mm1_30b", "moe": "mm1_3b_moe"},
    "cpu": {"dense": "debug_dense", "moe": "debug_moe"},
}
BLOCKS = ("blockwise", "mxfp8")
WARM_UP_STEPS, PROFILED_STEPS = 3, 2
# Before anything was measured: processes, model and warm-up of the kernels; and a rate that every case should reach.
FIRST_GUESS_SECONDS, FIRST_GUESS_SHARE_OF_PEAK = 20.0, 0.3
# A case takes about as long as the last one of its family before it; the first one also fills compilers' caches.
SAFETY = 1.15


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        family: dense or moe.
        recipe: FP8 recipe; None = bf16.
        local: local layers instead of Transformer Engine's.
        fp8_vision: the encoder in FP8 too.
        graphs: dense feed-forward blocks are replayed as CUDA graphs.
    """

    family: str
    recipe: str | None = None
    local: bool = False
    fp8_vision: bool = False
    graphs: bool = False

    @property
    def name(self) -> str:
        """What ``--cases`` calls it."""
        precision = f"fp8-{self.recipe}" if self.recipe else "bf16"
        marks = [word for word in ("local", "vision", "graphs") if self.has(word)]
        return "-".join([self.family, precision, *marks])

    def has(self, word: str) -> bool:
        """Whether a word of ``name`` applies."""
        return {"local": self.local, "vision": self.fp8_vision, "graphs": self.graphs}[word]

    @property
    def beside_bare(self) -> bool:
        """Whether a bare megatron-core loop is timed on the same model: the plain bf16 case of each family."""
        return self.recipe is None and not self.local and not self.graphs

    @property
    def precision(self) -> str:
        """The precision in words."""
        words = f"FP8 {self.recipe}" if self.recipe else "bf16"
        marks = {"vision": "encoder too", "local": "local layers", "graphs": "CUDA graphs"}
        return ", ".join([words, *(text for word, text in marks.items() if self.has(word))])


CASES: tuple[Case, ...] = (
    Case("dense", "tensorwise", fp8_vision=True),
    Case("dense"),
    Case("dense", "tensorwise"),
    Case("moe", "tensorwise", fp8_vision=True),
    Case("moe"),
    Case("dense", "delayed"),
    Case("dense", "blockwise"),
    Case("moe", "tensorwise"),
    Case("dense", local=True),
    Case("moe", "delayed"),
    Case("moe", "blockwise"),
    Case("moe", local=True),
    Case("dense", graphs=True),
    Case("dense", "tensorwise", graphs=True),
    Case("dense", "mxfp8"),
    Case("moe", "mxfp8"),
)
"""What decides a target comes first: where the time runs out, the last ones are left out. The case of each family that
takes most memory leads, so that a slice that is too large is cut before anything was measured on it."""


@dataclass(frozen=True)
class Device:
    """What the device and its libraries can do.

    Attributes:
        kind: cpu or cuda.
        name: the device's own name.
        memory: free bytes before anything was built.
        driver: version of the GPU driver; empty on a CPU.
        capability: compute capability, such as 9.0; empty on a CPU.
        cuda: CUDA version of torch; empty without.
        transformer_engine_problem: why its layers cannot be used; None = they can.
        fp8_problems: why a recipe cannot be used, by recipe; a recipe that is not named can.
        compile_problem: why torch.compile cannot be used; None = it can.
    """

    kind: str
    name: str
    memory: float
    driver: str = ""
    capability: str = ""
    cuda: str = ""
    transformer_engine_problem: str | None = None
    fp8_problems: dict[str, str] = field(default_factory=dict)
    compile_problem: str | None = None


def choose_cases(names: str | None) -> tuple[Case, ...]:
    """Return the cases called ``names`` (separated by commas) in the order of ``CASES``; None = all.

    Raises:
        ConfigError: a name is unknown, or none is given.
    """
    if names is None:
        return CASES
    known = {case.name: case for case in CASES}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--cases: {name!r} is no case", fix=did_you_mean(name, known))
    if not wanted:
        raise ConfigError("--cases names no case", fix="choose from " + ", ".join(known))
    return tuple(case for case in CASES if case.name in wanted)


def why_not_run(case: Case, device: Device) -> str | None:
    """Return why ``case`` cannot run on ``device``, or None if it can."""
    if case.local:
        return None
    if device.kind != "cuda":
        return "Transformer Engine layers need a CUDA device"
    if device.transformer_engine_problem is not None:
        return f"Transformer Engine is not usable here: {device.transformer_engine_problem}"
    problem = device.fp8_problems.get(case.recipe or "")
    if problem is None:
        return None
    return f"needs Blackwell: {problem}" if case.recipe == "mxfp8" else f"no FP8 {case.recipe} here: {problem}"


def case_config(case: Case, sliced: RunConfig, *, device: Device, options: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of ``case``: the slice with the fastest sensible kernels for it.

    The encoder and the connector stay in bf16 unless the case says otherwise, router and output layer always.

    Args:
        case: what is measured.
        sliced: configuration of the slice.
        device: what the device can do.
        options: ``section.field=value`` texts that have the last word.

    Raises:
        ConfigError: an option is wrong, or the result cannot be trained.
    """
    compiles = device.kind == "cuda" and device.compile_problem is None
    values = {
        "kernels.transformer_impl": "local" if case.local else "transformer_engine",
        "kernels.gradient_accumulation_fusion": not case.local,
        # Transformer Engine's permutation is a Triton kernel too
        "kernels.moe_permute_fusion": compiles and not case.local and sliced.moe.num_moe_experts > 0,
        "kernels.compile_fusions": compiles,
        "kernels.cuda_graph_scope": ("mlp",) if case.graphs else (),
        # blocks keep the range of gradients, so they need no second format (Transformer Engine's own defaults)
        "precision.fp8": None if case.recipe is None else "e4m3" if case.recipe in BLOCKS else "hybrid",
        "precision.fp8_vision": case.fp8_vision,
    }
    if case.recipe is not None:
        values["precision.fp8_recipe"] = case.recipe
    cfg = apply_overrides(with_values(sliced, values), options)
    for rule in RULES:
        if rule not in LEFT_TO_THE_USER:
            rule(cfg, 1)
    return cfg


@dataclass
class Budget:
    """Seconds that may be spent, and what the cases so far took.

    Attributes:
        seconds: all of them.
        measured: wall seconds of each finished case, by family.
    """

    seconds: float
    measured: dict[str, list[float]] = field(default_factory=dict)

    def note(self, case: Case, seconds: float) -> None:
        """Remember what a case took."""
        self.measured.setdefault(case.family, []).append(seconds)

    def expected(self, case: Case, cfg: RunConfig, *, steps: int, peak_tflops: float) -> float:
        """Return how long ``case`` will take: as its family so far, else by its model FLOPs.

        Args:
            case: what comes next.
            cfg: its configuration.
            steps: timed steps.
            peak_tflops: the device's measured peak.
        """
        before = self.measured.get(case.family)
        if before:
            return SAFETY * before[-1]
        rows = cfg.train.global_batch_size
        flops = step_flops(cfg, rows=rows, tiles=rows * planned_tiles_per_row(cfg)).total
        all_steps = WARM_UP_STEPS + steps + PROFILED_STEPS
        return FIRST_GUESS_SECONDS + all_steps * flops / (FIRST_GUESS_SHARE_OF_PEAK * peak_tflops * 1e12)

    def refusal(self, expected: float, *, spent: float) -> str | None:
        """Return why a case of ``expected`` seconds is not started after ``spent`` ones; None = it is."""
        left = self.seconds - spent
        if expected <= left:
            return None
        return f"out of time: about {expected:.0f} s needed, {max(0.0, left):.0f} s of {self.seconds:.0f} s left"
