"""Overlapped tensor parallelism: the buffers Transformer Engine is asked for, and the layers that use them.

Buffers need two GPUs that reach each other's memory; here their description is checked against Transformer Engine's own
function, and layers are constructed, not run.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.models.backend import (
    TensorParallelBuffers,
    open_tensor_parallel_buffers,
    resolve_backend,
    tensor_parallel_buffers,
    transformer_engine_problem,
)
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.models.transformer_config import language_transformer_config, vision_transformer_config
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology, close_topology
from mm15_megatron.parity.ranks import rank_place, run_on_ranks
from mm15_megatron.presets import resolve

PROBLEM = transformer_engine_problem()
needs_transformer_engine = pytest.mark.skipif(PROBLEM is not None, reason=f"Transformer Engine: {PROBLEM}")
OVERLAP = (
    "parallel.tp_comm_overlap=true",
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "kernels.transformer_impl=transformer_engine",
    "kernels.params_dtype=bf16",
)


def configured(*options: str, preset: str = "debug_dense") -> RunConfig:
    return apply_overrides(resolve(preset), [*OVERLAP, *options])


@pytest.mark.parametrize(
    ("options", "tokens", "kinds"),
    [
        ((), 256, ("none",)),
        (("parallel.context_parallel_size=2", "train.micro_batch_size=4"), 256, ("none",)),
        (("precision.fp8=hybrid",), 256, ("fp8",)),
        (("precision.fp8=hybrid", "precision.first_last_layers_bf16=true"), 256, ("fp8", "none")),
    ],
)
def test_buffers_hold_the_tokens_of_a_group(options: tuple[str, ...], tokens: int, kinds: tuple[str, ...]) -> None:
    assert tensor_parallel_buffers(configured(*options)) == TensorParallelBuffers((tokens, 64), 2, kinds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_buffers_without_a_device_are_refused() -> None:
    with pytest.raises(BackendError, match="parallel.tp_comm_overlap takes Transformer Engine's buffers.*here: ."):
        open_tensor_parallel_buffers(configured())


def test_the_decoder_alone_overlaps() -> None:
    cfg = configured("parallel.encoder_parallel=tensor")
    assert language_transformer_config(cfg).tp_comm_overlap
    assert not vision_transformer_config(cfg).tp_comm_overlap


@needs_transformer_engine
def test_transformer_engine_takes_what_it_is_given() -> None:
    from transformer_engine.pytorch import initialize_ub
    from transformer_engine.pytorch.module import UserBufferQuantizationMode

    names = inspect.signature(initialize_ub).parameters
    assert {"shape", "tp_size", "quantization_modes", "dtype", "bootstrap_backend"} <= set(names)
    assert [UserBufferQuantizationMode(kind).name for kind in ("fp8", "none")] == ["FP8", "NONE"]


def overlapping_layers(cfg: RunConfig) -> dict[str, str]:
    """Buffer names of the linear layers that overlap, by module name (on one rank)."""
    topology = build_topology(cfg.parallel, place=rank_place())
    seed_everything(cfg.train.seed, topology=topology)
    # What Transformer Engine's constructors ask of a device.
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    model = MM15Model(cfg, backend=resolve_backend(cfg.kernels), stage=topology.stages[0])
    found = {
        name: module.ub_name
        for name, module in model.named_modules()
        if any(getattr(module, f"ub_{what}", False) for what in ("overlap_ag_fprop", "overlap_rs_fprop"))
    }
    close_topology()
    return found


@needs_transformer_engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_layers_name_their_buffers() -> None:
    """Attention and dense feed-forward blocks of the decoder overlap; experts and the encoder do not."""
    cfg = configured("language.num_layers=2", preset="debug_moe")
    for found in run_on_ranks(overlapping_layers, 2, cfg=cfg):
        assert found == {
            f"language_model.decoder.layers.{layer}.{part}": name
            for layer, parts in {
                0: {
                    "self_attention.linear_proj": "proj",
                    "self_attention.linear_qkv": "qkv",
                    "mlp.linear_fc1": "fc1",
                    "mlp.linear_fc2": "fc2",
                },
                1: {"self_attention.linear_proj": "proj", "self_attention.linear_qkv": "qkv"},
            }.items()
            for part, name in parts.items()
        }
