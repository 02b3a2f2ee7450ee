"""The rule of shrinking: structure stays, sizes fall, and every preset fits every default layout afterwards."""

from __future__ import annotations

import pytest

from mm15_megatron.accounting import sparse_layers
from mm15_megatron.config.schema import SourceConfig
from mm15_megatron.config.tree import flatten
from mm15_megatron.config.validate import validate
from mm15_megatron.errors import ConfigError
from mm15_megatron.parity.layouts import default_layouts, parse_layout, parse_layouts
from mm15_megatron.parity.shrink import Machine, Prepared, prepare_config, shrink
from mm15_megatron.presets import REGISTRY, resolve

from ..helpers.layouts import change, debug_config

LAPTOP = Machine("cpu", memory=8 * 2**30, cores=2)
STRUCTURE = (
    "language.activation language.qk_layernorm language.share_embeddings_and_output_weights language.z_loss_coeff "
    "moe.moe_layer_period moe.moe_router_topk moe.moe_aux_loss_coeff moe.moe_z_loss_coeff "
    "moe.moe_expert_capacity_factor vision.class_token vision.feature_layer vision.activation vision.patch_size "
    "connector.kind connector.mlp_depth "
    "freeze.vision train.loss_normalisation optimizer.name optimizer.clip_grad"
).split()


def prepared(name: str, layouts: str = "", **options: object) -> Prepared:
    cfg = resolve(name)
    chosen = parse_layouts(layouts or default_layouts(cfg))
    arguments = {"machine": LAPTOP, "steps": 5, "dtype": "fp32", "keep_size": False} | options
    return prepare_config(cfg, chosen, **arguments)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_preset_becomes_small_and_keeps_its_structure(name: str) -> None:
    before, found = resolve(name), prepared(name)
    after = found.config
    was, now = flatten(before), flatten(after)
    assert [path for path in STRUCTURE if was[path] != now[path]] == []
    sizes = {change.path for change in found.shrunk}
    grown = [path for path in sizes - {"vision.position_grid_size"} if now[path] > was[path]]
    assert grown == []
    if name.startswith("debug"):
        assert found.shrunk == ()
        return
    assert after.language.hidden_size == 64
    ratio = before.language.num_attention_heads // before.language.num_query_groups
    assert after.language.num_attention_heads == ratio * after.language.num_query_groups
    assert any(sparse_layers(after)) == any(sparse_layers(before))
    interpolated = before.vision.stored_grid_size != before.vision.grid_size
    assert (after.vision.stored_grid_size != after.vision.grid_size) == interpolated


def test_layouts_decide_how_small() -> None:
    found = prepared("mm15_3b_moe", "tp4sp,pp2vpp3,ep16,mbs3").config
    assert found.language.num_query_groups == 4
    assert found.language.num_layers == 6
    assert found.moe.num_moe_experts == 16
    assert found.train.global_batch_size % 16 == found.train.global_batch_size % 3 == 0


def test_padded_vocabulary_stays_padded() -> None:
    cfg = change(resolve("mm1_3b"), language={"vocab_size": 50_000})
    assert shrink(cfg, [parse_layout("tp2")]).language.vocab_size == 250
    assert shrink(resolve("mm1_3b"), [parse_layout("tp2")]).language.vocab_size == 256


def test_what_fits_is_left_alone() -> None:
    cfg = change(debug_config(), parallel={"tensor_model_parallel_size": 2}, kernels={"recompute_vision": True})
    arguments = {"machine": LAPTOP, "steps": 5, "dtype": "fp32", "keep_size": True}
    found = prepare_config(cfg, parse_layouts("tp2"), **arguments)
    assert found.shrunk == ()
    assert {change.path for change in found.replaced} == {
        "parallel.tensor_model_parallel_size",
        "kernels.recompute_vision",
    }


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Machine("cpu", memory=2**20, cores=2), "GiB are free"),
        (Machine("cpu", memory=2**50, cores=2), "minutes of arithmetic"),
        (Machine("cuda", memory=2**35, cores=2, devices=2), "GiB are free"),
    ],
)
def test_keep_size_refuses(machine: Machine, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        prepared("mm1_30b", "tp2", machine=machine, keep_size=True)


def test_more_ranks_than_gpus_are_refused() -> None:
    """Saving layouts count too; the fix names those that fit."""
    machine = Machine("cuda", memory=2**50, cores=2, devices=1)
    with pytest.raises(ConfigError, match=r"2 layouts .* this machine's 1 GPU.*: tp2, resume:dp2>one") as refused:
        prepared("debug_dense", "accum4,tp2,resume:dp2>one,packed", machine=machine)
    assert "use --layouts accum4,packed" in str(refused.value)
    assert prepared("debug_dense", "accum4,packed", machine=machine).config.parallel.device == "cuda"
    with pytest.raises(ConfigError, match="or --device cpu"):
        prepared("debug_dense", "tp2", machine=machine)


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ("sp", "layout sp: parallel.sequence_parallel has no effect"),
        ("dp3", "layout dp3: train.global_batch_size = 8 is not divisible"),
        ("pp8", "layout pp8: language.num_layers = 4"),
        ("tp2,resume:tp2>tp3", "layout resume:tp2>tp3: language.num_attention_heads = 4"),
    ],
)
def test_impossible_layouts_are_named(layouts: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared("debug_dense", layouts)


def test_the_reference_is_one_trainable_rank() -> None:
    cfg = prepared("mm1_30b", "tp2").config
    sources = (SourceConfig(prefix="stream"),)
    validate(change(cfg, data={"sources": sources, "tokenizer": "none"}), world_size=1)
