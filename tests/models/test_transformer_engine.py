"""Transformer Engine's layers hold the local backend's parameters, and their FP8 state is named and restored.

Modules are constructed, not run: this needs Transformer Engine, which imports beside a CUDA build of torch alone, but
no GPU; with one, ``tests/gpu`` runs them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mm15_megatron.checkpoint.schema import amax_to_load
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.errors import BackendError
from mm15_megatron.models.backend import resolve_backend, transformer_engine_problem
from mm15_megatron.models.fp8_state import amax_states, open_tables
from mm15_megatron.models.global_parameters import global_parameters
from mm15_megatron.models.initialise import initialise
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.presets import resolve
from mm15_megatron.training.cuda_graphs import LayerGraphs
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks

PROBLEM = transformer_engine_problem()
pytestmark = [
    pytest.mark.skipif(PROBLEM is not None, reason=f"Transformer Engine: {PROBLEM}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: tests/gpu runs these layers"),
]
HISTORY = 4
DELAYED = (
    "precision.fp8=hybrid",
    "precision.fp8_recipe=delayed",
    f"precision.fp8_amax_history_len={HISTORY}",
    "precision.fp8_vision=true",
)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer what Transformer Engine's constructors ask of a device."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def built(topology: Topology, preset: str, implementation: str, *options: str) -> MM15Model:
    options = (f"kernels.transformer_impl={implementation}", "kernels.params_dtype=bf16", *options)
    cfg = apply_overrides(resolve(preset), list(options))
    model = MM15Model(cfg, backend=resolve_backend(cfg.kernels), stage=topology.stages[0])
    initialise([model], cfg)
    return model


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
def test_parameters_are_those_of_local_layers(one_rank: Topology, preset: str) -> None:
    """Same global names, shapes, splits and initial values; norms are fused into the layer behind them."""
    local, fused = (
        {item.name: item for item in global_parameters([built(one_rank, preset, name)])}
        for name in ("local", "transformer_engine")
    )
    assert local.keys() == fused.keys()
    for name, item in local.items():
        assert (fused[name].split_dim, fused[name].gated) == (item.split_dim, item.gated), name
        assert fused[name].global_shape == item.global_shape, name
        assert torch.equal(fused[name].parameter, item.parameter), name


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("fused", [True, False])
def test_weight_gradients_are_accumulated_where_asked(one_rank: Topology, fused: bool) -> None:
    """By every linear layer of Transformer Engine; the output layer, megatron-core's own, would need apex."""
    model = built(one_rank, "debug_moe", "transformer_engine", f"kernels.gradient_accumulation_fusion={fused}")
    layers = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    # four in each layer of decoder and encoder; the connector's, whose first block also projects its shortcut
    assert len(layers) == 4 * (4 + 3) + (5 + 4 + 2)
    assert all(layer.fuse_wgrad_accumulation == fused for layer in layers)
    assert not model.language_model.output_layer.gradient_accumulation_fusion


@pytest.mark.usefixtures("hopper")
def test_permutation_is_fused_where_asked(one_rank: Topology) -> None:
    model = built(one_rank, "debug_moe", "transformer_engine", "kernels.moe_permute_fusion=true")
    assert model.language_model.decoder.layers[1].mlp.token_dispatcher.config.moe_permute_fusion


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_recipes_without_history_have_no_state(one_rank: Topology, recipe: str) -> None:
    model = built(
        one_rank, "debug_dense", "transformer_engine", "precision.fp8=hybrid", f"precision.fp8_recipe={recipe}"
    )
    assert model.config.fp8_recipe == recipe
    open_tables([model])
    assert list(amax_states([model])) == []


@pytest.mark.usefixtures("hopper")
def test_amax_is_named_by_weight_and_restored(one_rank: Topology) -> None:
    """Every quantised product of a decoder with experts and of the encoder; written state comes back bitwise."""
    model = built(one_rank, "debug_moe", "transformer_engine", *DELAYED)
    assert list(amax_states([model])) == []  # nothing ran yet
    open_tables([model])
    states = {state.name: state for state in amax_states([model])}
    weights = {item.name for item in global_parameters([model])}
    assert {name.rpartition(".")[0] + ".weight" for name in states} <= weights
    layer = "language_model.decoder.layers.1"
    assert f"{layer}.self_attention.linear_qkv.scaling_fwd" in states
    assert f"{layer}.mlp.experts.3.linear_fc2.scaling_bwd" in states
    assert "vision_encoder.blocks.layers.0.mlp.linear_fc1.scaling_fwd" in states
    assert not any("connector" in name or "router" in name or "output_layer" in name for name in states)
    for number, state in enumerate(states.values()):
        state.scale_N.fill_(number + 1)
        state.history_LN.copy_(torch.arange(state.history_LN.numel()).view_as(state.history_LN) + 100 * number)
    saved = {name: (state.scale_N.clone(), state.history_LN.clone()) for name, state in states.items()}

    other = built(one_rank, "debug_moe", "transformer_engine", *DELAYED)
    stored = {f"fp8.{name}.scale": tuple(scale.shape) for name, (scale, _) in saved.items()}
    stored |= {f"fp8.{name}.history": tuple(history.shape) for name, (_, history) in saved.items()}
    wanted = amax_to_load([other], stored)
    assert wanted.tensors.keys() == stored.keys()
    pairs = {f"fp8.{name}.scale": scale for name, (scale, _) in saved.items()}
    wanted.restore(pairs | {f"fp8.{name}.history": history for name, (_, history) in saved.items()})
    for state in amax_states([other]):
        assert torch.equal(state.scale_N, saved[state.name][0])
        assert torch.equal(state.history_LN, saved[state.name][1])
    table = other.vision_encoder.blocks.layers[0].mlp.linear_fc1.fp8_meta["scaling_fwd"]
    assert table.scale[0] == saved["vision_encoder.blocks.layers.0.mlp.linear_fc1.scaling_fwd"][0][0]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("length", [2, HISTORY, 6])
def test_newest_steps_of_another_history_are_kept(one_rank: Topology, length: int) -> None:
    model = built(one_rank, "debug_dense", "transformer_engine", *DELAYED)
    open_tables([model])
    state = next(amax_states([model]))
    past = torch.arange(1.0, length)[:, None].expand(-1, 3)
    state.write(scale_N=torch.full((3,), 7.0), history_LN=torch.cat((torch.full((1, 3), 50.0), past)))
    kept = min(length, HISTORY) - 1
    assert torch.equal(state.scale_N, torch.full((3,), 7.0))
    assert torch.equal(state.history_LN[0], torch.full((3,), 50.0))
    assert torch.equal(state.history_LN[-kept:], past[-kept:])
    assert state.history_LN[1:-kept].eq(0).all()


@pytest.mark.usefixtures("hopper")
def test_a_checkpoint_without_amax_starts_afresh(one_rank: Topology) -> None:
    model = built(one_rank, "debug_dense", "transformer_engine", *DELAYED)
    assert amax_to_load([model], {"model.x": (1,)}).tensors == {}


@pytest.mark.usefixtures("hopper")
def test_graphs_hold_the_dense_layers(one_rank: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's capture finds them behind our wrappers; a sparse layer's shapes are not static."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    options = ("kernels.cuda_graph_scope=[mlp]", "kernels.transformer_impl=transformer_engine")
    cfg = apply_overrides(resolve("debug_moe"), [*options, "kernels.params_dtype=bf16"])
    chunks = wrap_chunks(cfg, [built(one_rank, "debug_moe", "transformer_engine", options[0])])
    graphs = LayerGraphs(cfg, chunks, build_optimizer(cfg, chunks))
    decoder = chunks[0].module.language_model.decoder.layers
    assert graphs.helper.flattened_callables == [decoder[0], decoder[2]]
    assert graphs.helper.seq_length == cfg.data.seq_length * cfg.train.micro_batch_size
    static = decoder[0].get_layer_static_inputs(graphs.helper.seq_length, 1)
    assert list(static) == ["hidden_states"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(BackendError, match="set NCCL_GRAPH_REGISTER=0"):
        LayerGraphs(cfg, chunks, graphs.helper.optimizers[0])
