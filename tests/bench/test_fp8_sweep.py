"""What the FP8 sweep times is one micro-batch of the layer, checked with the local layers on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mm15_megatron.accounting.matrix_products import MatrixProduct
from mm15_megatron.bench.fp8_advice import as_trained, plan
from mm15_megatron.bench.fp8_record import RECIPES, usual_format
from mm15_megatron.bench.fp8_sweep import (
    Effort,
    SharedParts,
    Trial,
    build_layer,
    check_rounded,
    recipes_unusable_here,
)
from mm15_megatron.config.schema import ParallelConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.models.backend import resolve_backend, transformer_engine_problem
from mm15_megatron.models.transformer_config import language_transformer_config
from mm15_megatron.parallel.rendezvous import Rendezvous, discover
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import Topology, build_topology, close_topology
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.presets import resolve

BF16 = 2e-2  # eight bits of mantissa, sums of a few dozen terms

COLUMN = MatrixProduct("decoder.fc1", "decoder", rows=24, in_features=64, out_features=48, split="column")
ROW = MatrixProduct("decoder.fc2", "decoder", rows=24, in_features=48, out_features=64, split="row")
PLAIN = MatrixProduct("output.logits", "never", rows=24, in_features=64, out_features=32)
FROZEN = replace(COLUMN, weight_gradient=False, input_gradient=False)
INPUT_ONLY = replace(COLUMN, weight_gradient=False)


def one_trial(product: MatrixProduct, *, rows: int) -> dict[str, Any]:
    with ExitStack() as stack:
        stack.callback(close_topology)
        topology = build_topology(ParallelConfig(device="cpu"), place=discover())
        seed_everything(1, topology=topology)
        cfg = resolve("debug_dense")
        cfg = replace(cfg, kernels=replace(cfg.kernels, params_dtype="bf16"))
        config = language_transformer_config(cfg)
        layer = build_layer(product, config=config, backend=resolve_backend(cfg.kernels), groups=topology.groups)
        trial = Trial(product, layer=layer, config=config, padding=None, rows=rows, std=0.1, seed=3)
        results = trial.results()
        trial.micro_batch(first=False, backward=True)
        (weight,) = layer.parameters()
        return {
            "x": trial.x_RI.detach(),
            "gradient": trial.gradient_RO,
            "weight": weight.detach(),
            "after_two": weight.main_grad,
            "output": results.outputs[0],
            "input_gradients": results.input_gradients,
            "weight_gradients": len(results.weight_gradients),
            "self_error": results.errors(results),
        }


def measured(product: MatrixProduct, *, rows: int = 24) -> dict[str, Any]:
    (found,) = run_on_ranks(one_trial, 1, product=product, rows=rows)
    return found


def close(value: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((value.float() - reference).norm() <= BF16 * reference.norm())


@pytest.mark.parametrize("product", [COLUMN, ROW, PLAIN], ids=lambda p: p.name)
def test_a_micro_batch_is_forward_backward_and_accumulation(product: MatrixProduct) -> None:
    found = measured(product)
    x, weight, gradient = (found[name].float() for name in ("x", "weight", "gradient"))
    assert x.shape == (product.rows, product.in_features)
    assert close(found["output"], x @ weight.T)
    assert close(found["input_gradients"][0], gradient @ weight)
    assert close(found["after_two"], 2 * gradient.T @ x)
    assert found["self_error"] == (0.0, 0.0)


def test_rows_that_fill_up_a_block_are_zero_and_not_compared() -> None:
    found = measured(COLUMN, rows=32)
    assert found["x"].shape[0] == found["gradient"].shape[0] == 32
    assert not found["x"][24:].any()
    assert not found["gradient"][24:].any()
    assert found["output"].shape[0] == found["input_gradients"][0].shape[0] == 24
    exact = measured(COLUMN)
    assert torch.equal(found["x"][:24], exact["x"])
    assert torch.equal(found["weight"], exact["weight"])
    assert close(found["after_two"], exact["after_two"])


def test_what_is_frozen_is_not_timed() -> None:
    frozen, input_only = measured(FROZEN), measured(INPUT_ONLY)
    assert (frozen["input_gradients"], frozen["weight_gradients"]) == ([], 0)
    assert not frozen["after_two"].any()
    assert (len(input_only["input_gradients"]), input_only["weight_gradients"]) == (1, 0)
    assert not input_only["after_two"].any()


def test_a_recipe_that_rounds_nothing_was_not_used() -> None:
    check_rounded(COLUMN, "delayed", output_error=0.04)
    with pytest.raises(BackendError, match=r"decoder.fc1 in delayed gave bf16's output bit by bit"):
        check_rounded(COLUMN, "delayed", output_error=0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_nothing_to_measure() -> None:
    with pytest.raises(BackendError, match="finds no CUDA device"):
        recipes_unusable_here(resolve("mm1_30b"))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Topology]:
    """One rank, and answers to what Transformer Engine's constructors ask of a device."""
    topology = build_topology(ParallelConfig(device="cpu"), place=Rendezvous("single", 0, 1, 0, 1, ""))
    seed_everything(1, topology=topology)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield topology
    close_topology()


PROBLEM = transformer_engine_problem()


@pytest.mark.skipif(PROBLEM is not None, reason=f"Transformer Engine: {PROBLEM}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: the advisor itself runs these layers")
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_the_layers_are_transformer_engines_with_the_ranks_widths(hopper: Topology, recipe: str | None) -> None:
    """Constructed, not run."""
    cfg = resolve("mm1_3b_moe")
    cfg = replace(cfg, precision=replace(cfg.precision, fp8_margin=1, fp8_amax_history_len=16))
    backend = resolve_backend(as_trained(cfg, None).kernels)
    parts = SharedParts(cfg, backend, hopper.groups, Effort())
    for product in plan(cfg, unusable={}).products:
        if product.fp8 == "never":
            continue
        config = parts.config(product, recipe)
        assert (config.fp8, config.tensor_model_parallel_size) == (usual_format(recipe) if recipe else None, 1)
        assert config.fp8_recipe == (recipe or config.fp8_recipe)
        config.init_model_with_meta_device, config.perform_initialization = True, False
        layer = build_layer(product, config=config, backend=backend, groups=hopper.groups)
        matrices = [tuple(p.shape) for p in layer.parameters() if p.dim() > 1]
        assert matrices == [(product.out_features, product.in_features)] * product.groups, product.name
        assert type(layer).__name__.startswith("TE")
