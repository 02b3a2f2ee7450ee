"""AdaFactor: the formula, whole matrices against transformers, and who keeps which state."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.distributed import group
from transformers.optimization import Adafactor as Reference

from mm15_megatron.checkpoint.optimizer_state import pieces
from mm15_megatron.config.schema import OptimizerConfig, RunConfig
from mm15_megatron.models.global_parameters import global_parameters, module_of, spread_by_size
from mm15_megatron.models.matrices import PADDING, MatrixShard, matrix_shard
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.parity.trace import build_parts, gathered, run_step
from mm15_megatron.training.adafactor import AdaFactor
from mm15_megatron.training.optimizer import learning_rates
from mm15_megatron.training.step import apply_gradients

from ..helpers.layouts import debug_config

STEPS = 5
SETTINGS = {
    "name": "adafactor",
    "weight_decay": 1e-3,
    "adafactor_clip_threshold": 0.5,  # so that most updates are clipped
    "adafactor_eps": 1e-10,
    "clip_grad": 0.0,
}
# fp32 sums in another order, five updates of at most lr each
UPDATE_SHARE = 1e-4


def _config(**sections: dict[str, object]) -> RunConfig:
    return debug_config("debug_moe", **{"optimizer": SETTINGS, "language": {"vocab_size": 250}} | sections)


# --- The formula


def _shard(parameter: torch.nn.Parameter, cfg: RunConfig) -> MatrixShard:
    """The shard of a plain matrix or vector on one rank."""
    items = list(global_parameters([_Chunk(parameter)]))
    return matrix_shard(items[0], cfg)


class _Chunk(torch.nn.Module):
    """As much of a model chunk as a description of its parameters asks for."""

    share_embeddings_and_output_weights = False
    pre_process = True
    first_layer = first_expert = 0

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        super().__init__()
        self.connector = torch.nn.ParameterDict({"weight": parameter})
        self.stage = _Stage()
        self.config = _Stage()


class _Stage:
    encoder_shares_tiles = True
    gated_linear_unit = False

    @property
    def groups(self) -> _Stage:
        return self

    tp = expt_tp = dp_cp = expt_dp = property(lambda self: group.WORLD)


def _steps(gradients: list[torch.Tensor], **options: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Update zeros with a rate of one; the parameter and its state."""
    settings = OptimizerConfig(**{"adafactor_clip_threshold": 1e9, "adafactor_beta1": None} | options)
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    shard = _shard(parameter, RunConfig())
    optimizer = AdaFactor([{"params": [parameter], "shards": [shard], "lr": 1.0}], settings, group=group.WORLD)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def _check_formula() -> None:
    torch.manual_seed(1)
    first, second = torch.randn(2, 3, 4).unbind()
    # beta2 is 0 in the first step and 1 - 2 ** -0.8 in the second
    _, state = _steps([first])
    torch.testing.assert_close(state["row"], first.square().mean(1))
    torch.testing.assert_close(state["column"], first.square().mean(0)[None])
    _, state = _steps([first, second])
    beta2 = 1 - 2**-0.8
    assert beta2 == pytest.approx(0.4257, abs=5e-5)
    torch.testing.assert_close(state["row"], beta2 * first.square().mean(1) + (1 - beta2) * second.square().mean(1))
    # where g ** 2 has rank one nothing is lost by factoring: the update is that of the full second moment
    rank_one = torch.randn(3, 1) * torch.randn(1, 4)
    matrix, _ = _steps([rank_one, 2 * rank_one])
    vector, state = _steps([rank_one.flatten(), 2 * rank_one.flatten()])
    assert state.keys() == {"exp_avg_sq"}
    torch.testing.assert_close(matrix.flatten(), vector)
    # the update is clipped by its root mean square over the whole matrix
    clipped, _ = _steps([first], adafactor_clip_threshold=0.25)
    assert clipped.square().mean().sqrt().item() == pytest.approx(0.25)
    # momentum without correction of its bias
    with_momentum, state = _steps([first], adafactor_beta1=0.9)
    torch.testing.assert_close(with_momentum, 0.1 * _steps([first])[0])
    assert state.keys() == {"exp_avg", "row", "column"}


def test_formula() -> None:
    run_on_ranks(_check_formula, 1)


# --- Whole matrices


def _matrices(name: str, whole: torch.Tensor, cfg: RunConfig) -> list[torch.Tensor]:
    """The matrices that a whole parameter consists of, as other libraries keep them."""
    language, vision = cfg.language, cfg.vision
    if ".linear_qkv." in name:
        heads, groups = language.num_attention_heads, language.num_query_groups
        if name.startswith("vision"):
            heads = groups = vision.num_attention_heads
        of_group = whole.view(groups, heads // groups + 2, -1, *whole.shape[1:])
        parts = of_group[:, :-2], of_group[:, -2], of_group[:, -1]
        return [part.reshape(-1, *whole.shape[1:]) for part in parts]
    if name.startswith("language") and name.endswith("linear_fc1.weight"):
        return list(whole.unbind())
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        return [whole[: language.vocab_size]]
    return [whole.flatten(1) if whole.dim() > 2 else whole]


def _train_beside_reference(cfg: RunConfig) -> float:
    """Take some steps with ours and with transformers' on the same gradients; the largest difference of a weight."""
    parts = build_parts(cfg)
    rates = learning_rates(cfg)
    begun = gathered(parts, lambda item: item.parameter.data)
    theirs = {
        name: [torch.nn.Parameter(matrix.clone()) for matrix in _matrices(name, whole, cfg)]
        for name, whole in begun.items()
    }
    unused = {"params": [torch.nn.Parameter(torch.zeros(1))]}  # most ranks keep no whole parameter
    reference = Reference(
        [
            unused,
            *(
                {"params": whole, "lr": rates[module_of(name)], "weight_decay": 1e-3 if begun[name].dim() > 1 else 0.0}
                for name, whole in theirs.items()
            ),
        ],
        eps=(cfg.optimizer.adafactor_eps, 1e-3),
        clip_threshold=cfg.optimizer.adafactor_clip_threshold,
        beta1=0.9,
        scale_parameter=False,
        relative_step=False,
    )
    for step in range(STEPS):
        run_step(parts, step=step)
        for name, whole in gathered(parts, lambda item: item.parameter.main_grad).items():
            for matrix, gradient in zip(theirs[name], _matrices(name, whole, cfg), strict=True):
                matrix.grad = gradient.clone()
        assert apply_gradients(parts.optimizer)[1]
        reference.step()
    apart = 0.0
    for name, whole in gathered(parts, lambda item: item.parameter.data).items():
        for ours, other in zip(_matrices(name, whole, cfg), theirs[name], strict=True):
            moved = rates[module_of(name)] * STEPS
            apart = max(apart, (ours - other.detach()).abs().max().item() / moved)
    close_topology()
    return apart


@pytest.mark.parametrize("layout", ["one", "tp2sp-dp2-ep2-etp1"])
def test_updates_are_those_of_transformers_on_whole_matrices(layout: str) -> None:
    cfg, ranks = _config(), 1
    if layout != "one":
        cfg, ranks = parse_layout(layout).apply(cfg), parse_layout(layout).world_size
    assert max(run_on_ranks(_train_beside_reference, ranks, cfg=cfg)) <= UPDATE_SHARE


def _rows(cfg: RunConfig) -> dict[str, tuple[dict[int, int], tuple[int, ...], int]]:
    parts = build_parts(cfg)
    shards = [matrix_shard(item, cfg) for item in global_parameters([chunk.module for chunk in parts.chunks])]
    found = {s.item.name: (dict(Counter(s.matrix_R.tolist())), s.rows_M, s.columns) for s in shards}
    close_topology()
    return found


def test_rows_of_a_shard_know_their_matrices() -> None:
    """Local rows of each matrix, whole rows of each, whole columns; on the second of two ranks."""
    cfg = _config()
    language = cfg.language
    found = run_on_ranks(_rows, 2, cfg=parse_layout("tp2").apply(cfg))[1]
    width, ffn, head = language.hidden_size, language.ffn_hidden_size, language.kv_channels
    q, kv = language.num_attention_heads * head, language.num_query_groups * head
    layer = "language_model.decoder.layers.0"
    qkv = {0: q // 2, 1: kv // 2, 2: kv // 2}
    assert found[f"{layer}.self_attention.linear_qkv.weight"] == (qkv, (q, kv, kv), width)
    assert found[f"{layer}.self_attention.linear_proj.weight"] == ({0: width}, (width,), q)
    assert found[f"{layer}.mlp.linear_fc1.weight"] == ({0: ffn // 2, 1: ffn // 2}, (ffn, ffn), width)
    assert found[f"{layer}.mlp.linear_fc2.weight"] == ({0: width}, (width,), ffn)
    assert found[f"{layer}.input_layernorm.weight"] == ({0: width}, (width,), 1)
    assert found["language_model.output_layer.weight"] == ({0: 122, PADDING: 6}, (250,), width)
    patches = cfg.vision.hidden_size, 3 * cfg.vision.patch_size**2
    assert found["vision_encoder.patch_embedding.weight"] == ({0: patches[0]}, patches[:1], patches[1])


# --- Whose state it is


def _state_sizes(cfg: RunConfig) -> tuple[dict[str, int], int]:
    """Numbers of state by parameter on this rank, masters left out; and the largest parameter."""
    parts = build_parts(cfg)
    items = {item.parameter: item.name for item in global_parameters([chunk.module for chunk in parts.chunks])}
    found = {
        items[piece.parameter]: sum(tensor.numel() for kind, tensor in piece.tensors.items() if kind != "master")
        for piece in pieces(parts.optimizer)
    }
    largest = max(parameter.numel() for parameter in items)
    close_topology()
    return found, largest


def test_state_is_spread_over_data_parallel_ranks() -> None:
    """Each parameter's state is on one rank, and every rank has about its share."""
    cfg = debug_config(optimizer=SETTINGS)
    alone, largest = run_on_ranks(_state_sizes, 1, cfg=cfg)[0]
    layout = parse_layout("dp4")
    shares = [found for found, _ in run_on_ranks(_state_sizes, 4, cfg=layout.apply(cfg))]
    assert sum(map(len, shares)) == len(alone)
    assert {name: size for share in shares for name, size in share.items()} == alone
    assert max(sum(share.values()) for share in shares) <= sum(alone.values()) / 4 + 1.1 * largest


def _owners(cfg: RunConfig) -> dict[str, int]:
    parts = build_parts(cfg)
    items = list(global_parameters([chunk.module for chunk in parts.chunks]))
    owners = spread_by_size(items)
    close_topology()
    return {item.name: owners[item.parameter] for item in items if item.parameter.requires_grad}


def test_tensor_parallel_neighbours_update_the_same_parameters() -> None:
    cfg = parse_layout("tp2dp2").apply(debug_config(optimizer=SETTINGS))
    found = run_on_ranks(_owners, 4, cfg=cfg)
    assert all(owners == found[0] for owners in found)
    frozen = run_on_ranks(_owners, 4, cfg=parse_layout("tp2dp2").apply(_frozen()))[0]
    counts = Counter(frozen.values())
    assert counts[0], counts[1]


def _frozen() -> RunConfig:
    return debug_config(optimizer=SETTINGS, freeze={"vision": True})
