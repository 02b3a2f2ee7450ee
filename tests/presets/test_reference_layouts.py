"""The layouts for 64 and 512 GPUs obey every rule and fit; they say where they come from."""

from __future__ import annotations

import pytest

from mm15_megatron.accounting import memory_estimate
from mm15_megatron.config.dump import diff
from mm15_megatron.config.validate import LEFT_TO_THE_USER, RULES
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import REGISTRY, resolve
from mm15_megatron.presets.recipe import FITS_80_GB
from mm15_megatron.presets.reference_layouts import CLASSES, at_reference_layout, layouts_of

WORLDS = (64, 512)
DEVICE_BYTES = 80 * 10**9
FAMILY = [name for name in REGISTRY if not name.startswith("debug_")]
CASES = [(name, gpus) for name in FAMILY for gpus in WORLDS]


@pytest.mark.parametrize("name", FAMILY)
def test_every_preset_has_layouts(name):
    assert tuple(layouts_of(name)) == WORLDS


@pytest.mark.parametrize(("name", "gpus"), CASES)
def test_layouts_pass_every_rule(name, gpus):
    cfg = at_reference_layout(name, gpus=gpus)
    for rule in RULES:
        if rule not in LEFT_TO_THE_USER:
            rule(cfg, gpus)
    assert {change.path.split(".")[0] for change in diff(resolve(name), cfg)} <= {"parallel"}


@pytest.mark.parametrize(("name", "gpus"), CASES)
def test_layouts_fit(name, gpus):
    cfg = at_reference_layout(name, gpus=gpus)
    stages = range(cfg.parallel.pipeline_model_parallel_size)
    estimates = [memory_estimate(cfg, world_size=gpus, stage=stage) for stage in stages]
    assert max(estimate.total for estimate in estimates) < DEVICE_BYTES


def test_layouts_are_ours():
    sources = {setting.source for c in CLASSES for layout in c.layouts.values() for setting in layout}
    assert all(source.startswith(FITS_80_GB) for source in sources)


def test_no_layout():
    with pytest.raises(ConfigError, match=r"for 100 GPUs\n.*one of \[64, 512\] GPUs"):
        at_reference_layout("mm1_3b", gpus=100)
    with pytest.raises(ConfigError, match=r"'debug_dense' has no reference layout for 64 GPUs\n.*preset of the family"):
        at_reference_layout("debug_dense", gpus=64)
    with pytest.raises(ConfigError, match="unknown preset"):
        at_reference_layout("mm1_4b", gpus=64)
