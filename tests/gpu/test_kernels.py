"""Optional kernels take effect and train like the ones that they replace, in bf16 on Transformer Engine's layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.parity.stream import Row, rank_batches, row_of
from mm15_megatron.training.step import StepParts, train_step
from tests.helpers.layouts import change

from .evidence import weights_of
from .marks import NEEDS_TE
from .models import Runs, engine_config, losses, model_of, parts_of
from .tolerances import BF16_STEPS, assert_repeats

pytestmark = NEEDS_TE
FEW_STEPS = 10
PERMUTATIONS = ("fused_permute", "fused_permute_with_probs", "fused_unpermute")
"""Transformer Engine's kernels, as megatron-core's dispatcher calls them."""


def compare(topology: Topology, preset: str, kernels: dict[str, object], runs: Runs) -> StepParts:
    """Ten steps with other kernels beside two runs without; the parts of the former."""
    parts = parts_of(topology, change(engine_config(None, preset), kernels=kernels))
    reference, repeated = (run[:FEW_STEPS] for run in runs)
    assert_repeats(losses(parts, FEW_STEPS), reference, repeated, floor=BF16_STEPS)
    return parts


def added_by_their_product(parts: StepParts) -> dict[str, bool]:
    """Whether the last backward pass added a weight's gradient to the buffer inside the matrix product, by name."""
    layers = {name: layer for name, layer in model_of(parts).named_modules() if weights_of(layer)}
    assert layers
    return {
        f"{name}.{index}": weight.grad_added_to_main_grad
        for name, layer in layers.items()
        for index, weight in enumerate(weights_of(layer))
        if weight.requires_grad
    }


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
def test_fused_accumulation_trains_alike(cuda_rank: Topology, bf16_runs: Callable[[str], Runs], preset: str) -> None:
    """Every weight of Transformer Engine's layers, and none without the option."""
    plain = parts_of(cuda_rank, engine_config(None, preset))
    losses(plain, 1)
    fused = compare(cuda_rank, preset, {"gradient_accumulation_fusion": True}, bf16_runs(preset))
    assert not any(added_by_their_product(plain).values())
    added = added_by_their_product(fused)
    assert all(added.values()), [name for name, inside in added.items() if not inside]


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
def test_torchs_adamw_trains_alike(cuda_rank: Topology, bf16_runs: Callable[[str], Runs], preset: str) -> None:
    """torch's fused AdamW in place of Transformer Engine's."""
    theirs = parts_of(cuda_rank, engine_config(None, preset))
    ours = compare(cuda_rank, preset, {"optimizer_impl": "torch"}, bf16_runs(preset))
    used = {type(part.optimizer).__module__.partition(".")[0] for part in theirs.optimizer.chained_optimizers}
    assert used == {"transformer_engine"}
    for part in ours.optimizer.chained_optimizers:
        assert type(part.optimizer) is torch.optim.AdamW
        assert all(group["fused"] for group in part.optimizer.param_groups)


def test_fused_permutation_trains_alike(
    cuda_rank: Topology, bf16_runs: Callable[[str], Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's kernels sort the tokens in every pass of a sparse layer, and in none without the option."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., object]:
        kernel = vars(moe_utils)[name]

        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return kernel(*args, **kwargs)

        return call

    runs = bf16_runs("debug_moe")
    for name in PERMUTATIONS:
        monkeypatch.setattr(moe_utils, name, counted(name))
    plain = parts_of(cuda_rank, engine_config(None, "debug_moe"))
    losses(plain, 1)
    assert not calls
    fused = compare(cuda_rank, "debug_moe", {"moe_permute_fusion": True}, runs)
    layers = [layer.mlp for layer in model_of(fused).language_model.decoder.layers[1::2]]
    passes = FEW_STEPS * len(layers)
    assert min(calls["fused_permute_with_probs"], calls["fused_unpermute"]) >= passes, calls


def test_fused_permutation_of_padding_alone(cuda_rank: Topology) -> None:
    """The second micro-batch holds no token; the kernel would put nothing back into its place."""
    found = {}
    for fused in (False, True):
        cfg = change(engine_config(None, "debug_moe"), kernels={"moe_permute_fusion": fused})
        rows = [Row(row_of("several", cfg, seed=3), 3), *(Row([], number) for number in range(3))]
        parts = parts_of(cuda_rank, change(cfg, train={"global_batch_size": 4, "micro_batch_size": 2}))
        wholes = rank_batches(rows, parts.cfg, data_rank=0, data_size=1)
        batches = [local_batch(whole, topology=cuda_rank, image_size=cfg.vision.image_size) for whole in wholes]
        assert [bool(batch.padding_mask_T.all()) for batch in batches] == [False, True]
        found[fused] = [train_step(parts, iter(batches), num_microbatches=2).loss for _ in range(FEW_STEPS)]
    assert found[True] == pytest.approx(found[False], abs=BF16_STEPS * found[False][0])
