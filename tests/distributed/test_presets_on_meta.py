"""Presets in their reference layouts for 64 and 512 GPUs: each distinct rank is built, and together they are whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch

from mm15_megatron.accounting import memory_estimate, model_parameters
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import ParallelConfig, RunConfig
from mm15_megatron.errors import ConfigError
from mm15_megatron.models.build import build_chunks
from mm15_megatron.models.global_parameters import global_parameters
from mm15_megatron.parallel.fake_cluster import Coordinates, coordinates, distinct_ranks, fake_rank
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.presets import REGISTRY, resolve
from mm15_megatron.presets.reference_layouts import at_reference_layout, layouts_of

# Transformer Engine, which the presets ask for, cannot be imported without CUDA; the parameters are the same.
BUILDABLE = ["kernels.transformer_impl=local"]
WORLDS = (64, 512)
SHAPES = (
    "mm1_3b mm1_7b mm1_30b mm1_3b_moe mm1_7b_moe mm15_1b mm1_ablation_base mm1_lr_9m mm1_encoder_aim_3b "
    "mm1_connector_attention_pool_336_144"
).split()
NON_EMBEDDING_BILLIONS = {
    "mm1_3b": 2.914,
    "mm1_7b": 6.476,
    "mm1_30b": 29.68,
    "mm1_3b_moe": 63.78,
    "mm1_7b_moe": 45.38,
    "mm1_ablation_base": 1.233,
}
"""What MM1's published counts and the dimensions chosen for them come to."""


@dataclass
class Whole:
    """A model put together from the ranks of a layout.

    Attributes:
        sizes: parameters of each whole tensor by global name.
        slices: parameters of each slice that was found, by global name and (index, count).
        held: parameters of each rank that was built.
        misplaced: ranks whose groups disagree with ``coordinates``.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    slices: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    misplaced: list[int] = field(default_factory=list)

    def total(self, prefix: str = "") -> int:
        return sum(size for name, size in self.sizes.items() if name.startswith(prefix))

    @property
    def embeddings(self) -> int:
        words = ("language_model.embedding.", "language_model.output_layer.")
        return sum(size for name, size in self.sizes.items() if name.startswith(words))

    @property
    def incomplete(self) -> list[str]:
        """Tensors whose slices do not make up the whole."""
        return [
            name
            for name, found in self.slices.items()
            if len({count for _, count in found}) != 1
            or {index for index, _ in found} != set(range(next(iter(found))[1]))
            or sum(found.values()) != self.sizes[name]
        ]


def build(cfg: RunConfig, *, ranks: Iterable[int], world_size: int) -> Whole:
    """Build ranks of a layout, one after another in this process."""
    whole, parallel = Whole(), cfg.parallel
    for rank in ranks:
        with fake_rank(parallel, rank=rank, world_size=world_size) as topology:
            seed_everything(cfg.train.seed, topology=topology)
            chunks = build_chunks(cfg, stages=topology.stages)
            groups = topology.groups
            found = Coordinates(groups.pp.rank(), groups.tp.rank(), groups.ep.rank(), groups.expt_tp.rank())
            if found != coordinates(rank, parallel, world_size=world_size):
                whole.misplaced.append(rank)
            whole.held[rank] = 0
            for item in global_parameters(chunks):
                assert item.parameter.is_meta
                whole.held[rank] += item.parameter.numel()
                if not item.tied_copy:
                    size = torch.Size(item.global_shape).numel()
                    assert whole.sizes.setdefault(item.name, size) == size
                    place = (item.shard_index, item.shards)
                    whole.slices.setdefault(item.name, {})[place] = item.parameter.numel()
    return whole


def survey(cases: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Whole]:
    """Build several presets; runs in a process of its own, which leaves its job of one rank first."""
    torch.distributed.destroy_process_group()
    found = {}
    for name, gpus in cases:
        cfg = apply_overrides(at_reference_layout(name, gpus=gpus), BUILDABLE)
        ranks = distinct_ranks(cfg.parallel, world_size=gpus)
        found[name, gpus] = build(cfg, ranks=ranks, world_size=gpus)
    return found


def without_last_expert_rank() -> list[str]:
    """Tensors that are missing or incomplete when the last of debug_moe's four distinct ranks is absent."""
    torch.distributed.destroy_process_group()
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"]
    cfg = apply_overrides(resolve("debug_moe"), layout)
    ranks = distinct_ranks(cfg.parallel, world_size=4)
    all_of_it, most = (build(cfg, ranks=some, world_size=4) for some in (ranks, ranks[:-1]))
    assert (len(ranks), all_of_it.incomplete) == (4, [])
    return sorted({*most.incomplete, *(all_of_it.sizes.keys() - most.sizes.keys())})


def check(name: str, gpus: int, whole: Whole) -> None:
    cfg = at_reference_layout(name, gpus=gpus)
    counted = model_parameters(cfg)
    assert whole.misplaced == []
    assert whole.incomplete == []
    assert whole.total() == counted.total
    assert whole.total("vision_encoder.") == counted.vision
    assert whole.total("connector.") == counted.connector
    assert whole.total("language_model.") - whole.embeddings == counted.language.non_embedding
    for rank, held in whole.held.items():
        stage = coordinates(rank, cfg.parallel, world_size=gpus).pipeline
        estimate = memory_estimate(cfg, world_size=gpus, stage=stage)
        assert held * 2 == estimate.parameters, f"rank {rank}: bf16 parameters"


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, int], Whole]:
    """Presets of most shapes, in both layouts."""
    cases = [(name, gpus) for name in SHAPES for gpus in WORLDS]
    return run_on_ranks(survey, 1, cases=cases)[0]


@pytest.mark.parametrize("gpus", WORLDS)
@pytest.mark.parametrize("name", SHAPES)
def test_ranks_of_a_layout_hold_the_whole_model(
    name: str, gpus: int, built: dict[tuple[str, int], Whole], table: dict[str, list[str]]
) -> None:
    """Every slice of every parameter is on some rank, and nothing else."""
    whole = built[name, gpus]
    check(name, gpus, whole)
    if name in NON_EMBEDDING_BILLIONS:
        billions = (whole.total("language_model.") - whole.embeddings) / 1e9
        assert billions == pytest.approx(NON_EMBEDDING_BILLIONS[name], abs=0.005)
    sizes = [held / 1e9 for held in whole.held.values()]
    table.setdefault("reference layouts, built rank by rank without memory", []).append(
        f"{name:38} {gpus:3} GPUs: {len(sizes):3} distinct ranks of {min(sizes):.2f} to {max(sizes):.2f} B parameters, "
        f"{whole.total() / 1e9:.2f} B together"
    )


def test_a_missing_rank_is_noticed() -> None:
    """The slices of the experts that it alone holds, and nothing else."""
    (missing,) = run_on_ranks(without_last_expert_rank, 1)
    assert missing
    assert all(".mlp.experts." in name for name in missing)


@pytest.mark.soak
def test_every_preset_of_the_family() -> None:
    """The others, later stages included."""
    cases = [(name, gpus) for name in REGISTRY for gpus in layouts_of(name) if name not in SHAPES]
    for (name, gpus), whole in run_on_ranks(survey, 1, cases=cases, timeout=1200)[0].items():
        check(name, gpus, whole)


def leave_and_return() -> list[int]:
    """Ranks of a real job before and after a fake one, in the same process."""
    real = torch.distributed.get_world_size()
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with pytest.raises(ConfigError, match="part of a job"), fake_rank(parallel, rank=0, world_size=4):
        pass
    torch.distributed.destroy_process_group()
    before = torch.cuda.current_device, torch.distributed.new_group
    with fake_rank(parallel, rank=3, world_size=4) as topology:
        inside = [topology.data_rank, topology.tensor_rank, torch.empty(1).is_meta, torch.tensor([7]).item()]
    with pytest.raises(ZeroDivisionError), fake_rank(parallel, rank=0, world_size=4):
        1 / 0  # noqa: B018
    assert not torch.distributed.is_initialized()
    assert torch.distributed.new_group is before[1]
    assert torch.empty(1).device == torch.zeros(1).device == torch.device("cpu")
    assert torch.cuda.current_device() == torch.device("cpu")
    return [real, *inside]


def test_nothing_is_left_of_a_fake_cluster() -> None:
    """Groups, patches and the default device are as before, also after an error inside."""
    assert run_on_ranks(leave_and_return, 1) == [[1, 1, 1, True, 7]]


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 4 is not one of 4"), fake_rank(ParallelConfig(), rank=4, world_size=4):
        pass


def test_distinct_ranks() -> None:
    """Two stages of eight: tensor pairs; experts spread over four ranks repeat after four."""
    plain = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert distinct_ranks(plain, world_size=16) == (0, 1, 8, 9)
    sparse = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1)
    assert distinct_ranks(sparse, world_size=16) == (0, 1, 2, 3)
    split = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=4)
    assert distinct_ranks(split, world_size=16) == tuple(range(8))
