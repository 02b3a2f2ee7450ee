"""Prove one configuration in many layouts: trace the reference and every layout, compare, tell."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch

from mm15_megatron.config.dump import value_text
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import with_values
from mm15_megatron.errors import BackendError, ConfigError
from mm15_megatron.parity import report
from mm15_megatron.parity.compare import BF16, BITWISE, FP32, Difference, Tolerances, compare, not_finite
from mm15_megatron.parity.fingerprints import forward_position
from mm15_megatron.parity.layouts import Layout
from mm15_megatron.parity.ranks import RankFailure
from mm15_megatron.parity.shrink import Machine, Prepared, prepare_config
from mm15_megatron.parity.stream import check_stream, global_batch, one_segment_a_row
from mm15_megatron.parity.trace import Plan, Prepare, Trace, trace
from mm15_megatron.training.optimizer import learning_rates

Write = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one layout.

    Attributes:
        layout: the layout.
        difference: how far it is from the reference; None if its ranks failed.
        failure: what the ranks said; empty if they ran.
    """

    layout: Layout
    difference: Difference | None
    failure: str = ""

    @property
    def passes(self) -> bool:
        """Whether it ran and equals the reference."""
        return self.difference is not None and self.difference.passes


def this_machine(device: str) -> Machine:
    """Measure what a check may use here.

    Raises:
        BackendError: cuda was asked for and is absent.
    """
    cores = len(os.sched_getaffinity(0))
    if device == "cpu":
        return Machine(device, psutil.virtual_memory().available, cores)
    if not torch.cuda.is_available():
        raise BackendError(
            f"--device cuda, but torch {torch.__version__} finds no usable CUDA device", fix="use --device cpu"
        )
    return Machine(device, torch.cuda.mem_get_info()[0], cores, devices=torch.cuda.device_count())


def check_parity(
    cfg: RunConfig,
    layouts: Sequence[Layout],
    *,
    write: Write,
    steps: int = 5,
    device: str = "cpu",
    dtype: str = "fp32",
    keep_size: bool = False,
    prepare: Prepare | None = None,
) -> list[Outcome]:
    """Compare every layout of ``cfg`` with one rank.

    Args:
        cfg: the user's configuration.
        layouts: what to compare, in order.
        write: takes each finished line of the report.
        steps: optimizer steps of every run.
        device: cpu or cuda.
        dtype: dtype of parameters and activations.
        keep_size: refuse to shrink.
        prepare: called on every rank of the layouts, not of the reference (a way to plant faults).

    Raises:
        ConfigError: the configuration or a layout cannot be trained, or does not fit.
        BackendError: the device is not usable.
    """
    if steps < (2 if any(layout.resumes for layout in layouts) else 1):
        raise ConfigError(f"--steps {steps} leaves nothing to compare", fix="use at least 1, and 2 to resume")
    machine = this_machine(device)
    prepared = prepare_config(cfg, layouts, machine=machine, steps=steps, dtype=dtype, keep_size=keep_size)
    check_stream(prepared.config)
    _tell_config(prepared, write)
    write(report.HEADER)
    checker = _Checker(prepared.config, steps, FP32 if dtype == "fp32" else BF16, prepare)
    outcomes = []
    for layout in layouts:
        start = time.monotonic()
        outcome = checker.outcome(layout)
        outcomes.append(outcome)
        write(_line(outcome, time.monotonic() - start))
    differing = [outcome.layout.name for outcome in outcomes if not outcome.passes]
    write(
        f"{len(differing)} of {len(outcomes)} layouts differ: {', '.join(differing)}"
        if differing
        else f"all {len(outcomes)} layouts compute what one rank computes"
    )
    return outcomes


def _tell_config(prepared: Prepared, write: Write) -> None:
    for title, changes in (("set for the comparison", prepared.replaced), ("shrunk to fit", prepared.shrunk)):
        if changes:
            write(f"{title}:")
            for change in changes:
                write(f"  {change.path}: {value_text(change.left)} -> {value_text(change.right)}")


@dataclass
class _Checker:
    """The reference configuration and the references that were traced for it."""

    cfg: RunConfig
    steps: int
    tolerances: Tolerances
    prepare: Prepare | None
    references: dict[str, Trace] = field(default_factory=dict)

    def outcome(self, layout: Layout) -> Outcome:
        try:
            return Outcome(layout, self._difference(layout))
        except RankFailure as failure:
            if failure.bad_input is not None:
                raise failure.bad_input from failure
            return Outcome(layout, None, failure=str(failure))

    def _difference(self, layout: Layout) -> Difference:
        if layout.resumes:
            return self._resumed(layout)
        if layout.alone:
            return self._alone(layout)
        found = self._run(layout, layout.apply(self.cfg), Plan(self.steps))
        return self._compare(self._reference("rows", self.cfg), found)

    def _compare(self, reference: Trace, found: Trace, *, exact: bool = False, padding: bool = True) -> Difference:
        tolerances = BITWISE if exact else self.tolerances
        if tolerances is BF16:
            reference, found = _before_experts(reference), _before_experts(found)
        return compare(reference, found, rates=learning_rates(self.cfg), tolerances=tolerances, padding=padding)

    def _reference(self, name: str, cfg: RunConfig) -> Trace:
        """The trace of one rank, taken once."""
        if name not in self.references:
            self.references[name] = found = trace(cfg, world_size=1, plan=Plan(self.steps))
            if place := not_finite(found):
                raise ConfigError(
                    f"one rank alone computes values that are not finite, first at {place}",
                    fix="lower optimizer.lr or language.init_method_std; there is nothing to compare with",
                )
        return self.references[name]

    def _run(self, layout: Layout, cfg: RunConfig, plan: Plan) -> Trace:
        return trace(cfg, world_size=layout.world_size, plan=plan, prepare=self.prepare)

    def _alone(self, layout: Layout) -> Difference:
        """Segments alone against the same segments packed.

        The balance loss is a statistic of rows and capacity one of groups of rows, so both are off on either side.
        """
        cfg = with_values(self.cfg, {"moe.moe_aux_loss_coeff": 0.0, "moe.moe_expert_capacity_factor": None})
        packed = cfg.train.global_batch_size
        # interleaving asks for whole rounds of its stages
        multiple = layout.data_size * layout.chunks
        rows = len(one_segment_a_row(global_batch(cfg, step=0), multiple=multiple))
        alone = with_values(layout.apply(cfg), {"train.global_batch_size": rows, "train.micro_batch_size": 1})
        found = self._run(layout, alone, Plan(self.steps, alone=packed))
        reference = self._reference("rows" if cfg == self.cfg else "rows without balance", cfg)
        return self._compare(_without_row_statistics(reference), _without_row_statistics(found), padding=False)

    def _resumed(self, layout: Layout) -> Difference:
        """A run that was saved and loaded: bitwise the straight run of its own layout, else one rank's."""
        half = self.steps - self.steps // 2
        with tempfile.TemporaryDirectory(prefix="parity") as folder:
            cfg = with_values(self.cfg, {"train.run_dir": folder})
            saver = layout.saved_in or layout
            goes_on = self.steps if layout.saved_in is None else half
            straight = self._run(saver, saver.apply(cfg), Plan(goes_on, save_at=half, fingerprints=False))
            resumed = self._run(layout, layout.apply(cfg), Plan(self.steps, load=True, fingerprints=False))
        if layout.saved_in is not None:
            return self._compare(self._reference("rows", self.cfg), resumed)
        return self._compare(straight, resumed, exact=self.cfg.parallel.device == "cpu")


def _before_experts(found: Trace) -> Trace:
    """Drop the outputs of modules from the first sparse layer on: rounding moves a few tokens to other experts."""
    sparse = [forward_position(name.removesuffix(".router")) for step in found.router[:1] for name in step]
    if not sparse:
        return found
    kept = {name: owned for name, owned in found.fingerprints.items() if forward_position(name) < min(sparse)}
    return replace(found, fingerprints=kept)


def _without_row_statistics(found: Trace) -> Trace:
    """Drop balance loss and load, keeping z loss and dropped share."""
    router = [{name: figures[1:3] for name, figures in step.items()} for step in found.router]
    return replace(found, router=router)


def _line(outcome: Outcome, seconds: float) -> str:
    return report.layout_lines(outcome.layout, seconds=seconds, difference=outcome.difference, failure=outcome.failure)
