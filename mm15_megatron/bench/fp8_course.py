"""The course of an FP8 sweep: product after product, recipe after recipe. What fails is recorded, and the rest goes on.

Who measures is given: ``fp8_sweep`` on a GPU. Torch-free.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from mm15_megatron.accounting.matrix_products import MatrixProduct
from mm15_megatron.bench.fp8_advice import Plan
from mm15_megatron.bench.fp8_record import ATTENTION, BF16, Failed, Measured, Sweep, Timing

T = TypeVar("T")
PROBLEM_LENGTH = 600
"""Characters of an error that a record keeps; the whole of it is written when it happens."""
DEAD = "not tried: the device did not answer any more"


@dataclass(frozen=True)
class Instruments:
    """Who measures.

    Attributes:
        attention: returns the milliseconds of core attention in one micro-batch.
        opened: takes a product and returns what times it in a recipe (None: bf16, which is asked for first).
        recover: called after a failure: frees what it left, and says why the device does not work any more (an illegal
            access poisons every later call) or returns None.
    """

    attention: Callable[[], float]
    opened: Callable[[MatrixProduct], Callable[[str | None], Timing]]
    recover: Callable[[], str | None]


def run_course(
    begun: Sweep,
    chosen: Plan,
    *,
    instruments: Instruments,
    keep: Callable[[Sweep], None],
    write: Callable[[str], None],
) -> Sweep:
    """Measure attention and every product of ``chosen``.

    A recipe that raises for a product is recorded with its error, and so is a product that cannot even be computed in
    bf16; both are left out and the others are measured. Once the device does not answer any more, the course ends.

    Args:
        begun: the record so far, with everything but the measurements.
        chosen: what to measure.
        instruments: who measures.
        keep: takes the record after attention and after every product.
        write: takes progress, and the traceback of a failure.

    Returns:
        The whole record.
    """
    course = _Course(replace(begun, unmeasured=tuple(p.name for p in chosen.products)), instruments, write)
    milliseconds = course.tried(ATTENTION, BF16, instruments.attention)
    if milliseconds is not None:
        course.sweep = replace(course.sweep, attention_ms=milliseconds)
        write(f"attention {milliseconds:.2f} ms a micro-batch")
    keep(course.sweep)
    for product in chosen.products:
        if course.sweep.stopped:
            break
        course.measure(product, chosen.recipes_of(product))
        keep(course.sweep)
    return course.sweep


@dataclass
class _Course:
    """The record as it grows."""

    sweep: Sweep
    instruments: Instruments
    write: Callable[[str], None]

    def measure(self, product: MatrixProduct, recipes: tuple[str, ...]) -> None:
        """Time one product in bf16 and in each recipe."""
        timed = self.instruments.opened(product)
        bf16 = self.tried(product.name, BF16, lambda: timed(None))
        if bf16 is None:
            return  # nothing to compare the recipes with
        times = {BF16: bf16}
        for recipe in recipes:
            if self.sweep.stopped:
                self._failed(product.name, recipe, DEAD)
                continue
            timing = self.tried(product.name, recipe, lambda recipe=recipe: timed(recipe))  # type: ignore[misc]
            if timing is not None:
                times[recipe] = timing
        self.sweep = replace(
            self.sweep,
            measured=(*self.sweep.measured, Measured(product, times)),
            unmeasured=tuple(name for name in self.sweep.unmeasured if name != product.name),
        )
        shown = ", ".join(f"{name} {timing.forward_ms + timing.backward_ms:.3f}" for name, timing in times.items())
        self.write(f"{product.name}: milliseconds forward and backward: {shown}")

    def tried(self, product: str, recipe: str, work: Callable[[], T]) -> T | None:
        """Return what ``work`` does; None if it raised, which is recorded then."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, it goes into the record
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"[:PROBLEM_LENGTH]
            self.write(traceback.format_exc())
        # The traceback held the layer and its data until here.
        self._failed(product, recipe, problem)
        dead = self.instruments.recover()
        if dead is not None:
            again = "" if recipe == BF16 else f"; leave {recipe} out of --recipes to measure the others"
            stopped = f"after {product} in {recipe} failed, the device did not answer any more ({dead}){again}"
            self.sweep = replace(self.sweep, stopped=stopped)
            self.write(stopped)
        return None

    def _failed(self, product: str, recipe: str, problem: str) -> None:
        self.write(f"{product} in {recipe} failed: {problem}")
        self.sweep = replace(self.sweep, failed=(*self.sweep.failed, Failed(product, recipe, problem)))
