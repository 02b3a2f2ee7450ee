"""What a sweep does when something fails: the rest is measured, and the record tells all of it.

The numbers are those of real products on the CPU: operands rounded to FP8 and multiplied by torch. One of the "kernels"
raises, as a real one would.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm15_megatron.accounting.matrix_products import MatrixProduct
from mm15_megatron.bench.fp8_advice import Plan, advise
from mm15_megatron.bench.fp8_course import DEAD, PROBLEM_LENGTH, Instruments, run_course
from mm15_megatron.bench.fp8_record import ATTENTION, Failed, Sweep, Timing, read_sweep, sweep_to_json
from mm15_megatron.bench.fp8_sweep import recover
from mm15_megatron.bench.fp8_text import advice_text, headline
from mm15_megatron.errors import BackendError
from mm15_megatron.parity.ranks import run_on_ranks

QKV = MatrixProduct("decoder.qkv", "decoder", rows=32, in_features=64, out_features=96)
FC1 = replace(QKV, name="decoder.fc1", out_features=128)
VISION = replace(QKV, name="vision.fc1", fp8="vision")
LOGITS = replace(QKV, name="output.logits", fp8="never")
PRODUCTS = (VISION, QKV, FC1, LOGITS)
PLAN = Plan(PRODUCTS, ("tensorwise", "delayed"), refused={"mxfp8": "needs Blackwell"}, refused_vision={})
BEGUN = Sweep(
    source="a test",
    date="2000-01-01T00:00:00+00:00",
    device="a CPU",
    versions={},
    preset="",
    fp8_format="hybrid",
    keeps_edges=False,
    micro_batches=1,
    attention_ms=None,
    refused=PLAN.refused,
    refused_vision={},
)
Kernel = Callable[[MatrixProduct, str | None], Timing]


def multiplied(product: MatrixProduct, recipe: str | None) -> Timing:
    """One product on the CPU in fp32, its operands rounded to E4M3 in a recipe."""
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(product.rows, product.in_features, generator=generator)
    w_OI = torch.randn(product.out_features, product.in_features, generator=generator)
    operands = (x_RI, w_OI) if recipe is None else (x.to(torch.float8_e4m3fn).float() for x in (x_RI, w_OI))
    begun = time.perf_counter()
    left, right = operands
    found = left @ right.T
    spent = 1e3 * (time.perf_counter() - begun)
    exact = x_RI @ w_OI.T
    return Timing(spent, 2 * spent, spent, output_error=float((found - exact).norm() / exact.norm()))


def failing(*where: tuple[str, str | None], error: Exception) -> Kernel:
    """The same, but it raises at those products in those recipes."""

    def kernel(product: MatrixProduct, recipe: str | None) -> Timing:
        if (product.name, recipe) in where:
            raise error
        return multiplied(product, recipe)

    return kernel


def alive() -> None:
    return None


def course(
    kernel: Kernel, *, attention: Callable[[], float] = lambda: 1.0, recover: Callable[[], str | None] = alive
) -> tuple[Sweep, list[Sweep], str]:
    """The record, what was kept of it on the way, and what was written."""
    kept: list[Sweep] = []
    lines: list[str] = []
    instruments = Instruments(attention, lambda product: lambda recipe: kernel(product, recipe), recover)
    sweep = run_course(BEGUN, PLAN, instruments=instruments, keep=kept.append, write=lines.append)
    return sweep, kept, "\n".join(lines)


def test_nothing_fails() -> None:
    sweep, kept, said = course(multiplied)
    assert {m.product.name: sorted(m.times) for m in sweep.measured} == {
        "vision.fc1": ["bf16", "delayed", "tensorwise"],
        "decoder.qkv": ["bf16", "delayed", "tensorwise"],
        "decoder.fc1": ["bf16", "delayed", "tensorwise"],
        "output.logits": ["bf16"],
    }
    assert (sweep.failed, sweep.unmeasured, sweep.stopped, sweep.attention_ms) == ((), (), "", 1.0)
    assert "output.logits: milliseconds forward and backward: bf16 " in said
    assert [len(record.measured) for record in kept] == [0, 1, 2, 3, 4]
    assert kept[2].unmeasured == ("decoder.fc1", "output.logits")
    assert advise(sweep).missing == ""


def test_a_recipe_that_raises_is_recorded_and_the_rest_is_measured() -> None:
    error = RuntimeError("cublaslt_gemm.cu:123:\n  no algorithm" + " x" * PROBLEM_LENGTH)
    sweep, kept, said = course(failing(("decoder.qkv", "tensorwise"), ("decoder.fc1", "tensorwise"), error=error))
    assert {m.product.name: sorted(m.times) for m in sweep.measured} == {
        "vision.fc1": ["bf16", "delayed", "tensorwise"],
        "decoder.qkv": ["bf16", "delayed"],
        "decoder.fc1": ["bf16", "delayed"],
        "output.logits": ["bf16"],
    }
    assert [(f.product, f.recipe) for f in sweep.failed] == [
        ("decoder.qkv", "tensorwise"),
        ("decoder.fc1", "tensorwise"),
    ]
    assert sweep.failed[0].problem.startswith("RuntimeError: cublaslt_gemm.cu:123: no algorithm x")
    assert len(sweep.failed[0].problem) == PROBLEM_LENGTH
    assert sweep.unmeasured == ()
    assert "Traceback" in said
    assert kept[-1] == sweep
    assert "tensorwise failed at decoder.qkv, decoder.fc1: RuntimeError" in advice_text(sweep, advise(sweep))
    assert headline(advise(sweep)).endswith("no verdict on tensorwise: failed")


def test_a_product_that_fails_in_bf16_leaves_a_gap() -> None:
    error = BackendError("decoder.fc1 does not fit into this GPU's memory", fix="spread it over more ranks")
    sweep, _, _ = course(failing(("decoder.fc1", None), error=error))
    assert [m.product.name for m in sweep.measured] == ["vision.fc1", "decoder.qkv", "output.logits"]
    assert sweep.unmeasured == ("decoder.fc1",)
    (failure,) = sweep.failed
    assert (failure.product, failure.recipe) == ("decoder.fc1", "bf16")
    assert "spread it over more ranks" in failure.problem
    assert headline(advise(sweep)) == "no advice: decoder.fc1 has no time in bf16: see what failed"


def test_attention_that_fails_is_recorded() -> None:
    def attention() -> float:
        raise RuntimeError("no kernel")

    sweep, kept, _ = course(multiplied, attention=attention)
    assert sweep.failed == (Failed(ATTENTION, "bf16", "RuntimeError: no kernel"),)
    assert kept[0].failed == sweep.failed
    assert len(sweep.measured) == len(PRODUCTS)
    assert headline(advise(sweep)) == "no advice: attention has no time in bf16: see what failed"


def test_a_device_that_answers_no_more_ends_the_sweep(tmp_path: Path) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    kernel = failing(("decoder.qkv", "tensorwise"), error=error)
    sweep, kept, said = course(kernel, recover=lambda: "AcceleratorError: an illegal memory access")
    assert [m.product.name for m in sweep.measured] == ["vision.fc1", "decoder.qkv"]
    assert sorted(sweep.measured[-1].times) == ["bf16"]
    assert sweep.failed[-1] == Failed("decoder.qkv", "delayed", DEAD)
    assert sweep.unmeasured == ("decoder.fc1", "output.logits")
    assert "after decoder.qkv in tensorwise failed, the device did not answer any more (AcceleratorError" in said
    assert "leave tensorwise out of --recipes" in sweep.stopped
    assert kept[-1] == sweep
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps(sweep_to_json(sweep)), encoding="utf-8")
    assert read_sweep(path) == sweep
    assert headline(advise(sweep)) == f"no advice: decoder.fc1, output.logits have no time in bf16: {sweep.stopped}"


def test_the_last_product_is_no_excuse_for_recipes_that_were_not_tried() -> None:
    instruments = Instruments(
        lambda: 1.0,
        lambda product: lambda recipe: failing(("decoder.fc1", "tensorwise"), error=RuntimeError("x"))(product, recipe),
        lambda: "gone",
    )
    chosen = replace(PLAN, products=(QKV, FC1))
    sweep = run_course(BEGUN, chosen, instruments=instruments, keep=lambda _: None, write=lambda _: None)
    assert sweep.unmeasured == ()
    advice = advise(sweep)
    assert advice.failed == ("tensorwise", "delayed")
    assert advice.options == ("precision.fp8=null",)


def test_what_is_no_error_is_not_recorded() -> None:
    def interrupted(product: MatrixProduct, recipe: str | None) -> Timing:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        course(interrupted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which answers")
def test_a_device_that_is_not_there_does_not_answer() -> None:
    (problem,) = run_on_ranks(recover, 1)  # a fresh process: in this one the CPU may stand in for CUDA
    assert problem is not None
    assert "\n" not in problem
