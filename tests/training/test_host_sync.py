"""Every read of the device in a training step, counted: none between the first forward and the last backward pass.

``PLACES`` names all the reads that the CPU shows, with how often each happens and whether a GPU would wait there too.
The counts must fit exactly, so an entry hides nothing: one read more at the same place is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from mm15_megatron.accounting import sparse_layers
from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.models import mm_model
from mm15_megatron.models.rope import rotary_table
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.parity.trace import build_parts, micro_batches
from mm15_megatron.training.step import train_step

from ..helpers.host_sync import Read, host_reads
from ..helpers.layouts import Layout, change, debug_config
from ..helpers.sources import with_sources


@dataclass(frozen=True)
class Place:
    """Where the host reads.

    Attributes:
        what: as ``Read.what``.
        where: as ``Read.where``.
        unit: what it happens once (or ``times``) for: a micro-batch; a pass of a sparse layer over one; a step.
        waits: whether the host would wait there on a GPU.
        why: why it waits, or why a GPU would not.
        times: reads in one unit; None = any number, outside the passes.
    """

    what: str
    where: str
    unit: str
    waits: bool
    why: str
    times: int | None = 1


DENSE = (
    Place("tolist", "attention.py:packed_rows", "micro-batch", False, "bounds are read if they lie on the CPU"),
    Place("tolist", "step.py:train_step", "step", True, "losses, router figures and gradient norm, in one tensor"),
    Place("copy", "reduce.py:squared_gradient_norm", "step", False, "torch brings norms to one device: all are", None),
    Place(
        "_local_scalar_dense",
        "optimizer.py:step_with_ready_grads",
        "step",
        False,
        "torch's AdamW keeps its step counters on the CPU",
        None,
    ),
)
SEQUENCE_PARALLEL = (
    Place(
        "_local_scalar_dense",
        "random.py:fork",
        "micro-batch",
        False,
        "megatron-core compares states of the CPU's generator, before and after the fork around the decoder",
        2,
    ),
)
SPARSE = (
    Place(
        "synchronize",
        "token_dispatcher.py:_maybe_dtoh_and_synchronize",
        "sparse pass",
        True,
        "dropless dispatch: token counts are split sizes of the all-to-all and of the grouped product, so the host "
        "waits for their copy",
    ),
    Place(
        "masked_select",
        "moe_utils.py:permute",
        "sparse pass",
        True,
        "tokens and gates are sorted by a mask whose count shapes the result; kernels.moe_permute_fusion replaces both",
        2,
    ),
    Place("copy", "router.py:gating", "sparse pass", False, "moves a weight that lies on the CPU"),
    Place("tolist", "experts.py:forward", "sparse pass", False, "counts that the dispatcher brought to the host"),
    Place("tolist", "moe_utils.py:sort_chunks_by_idxs", "sparse pass", False, "the same counts, and a constant", 6),
)
CAPACITY = (
    Place(
        "_local_scalar_dense",
        "router.py:within_capacity",
        "sparse pass",
        False,
        "one_hot checks the range of its input, on a CPU alone",
        2,
    ),
)
SPREAD = (
    Place("numpy", "cpu_emulation.py:move", "sparse pass", False, "stands for the copy that the one wait is for", 3),
)
WAITS_OF_A_SPARSE_PASS = 3


def _step(cfg: RunConfig, prepare: Callable[[], None] | None) -> list[Read]:
    """Reads of the second step of a run."""
    parts = build_parts(cfg)
    if prepare is not None:
        prepare()
    for step in range(2):
        batches = [with_sources(batch) for batch in micro_batches(cfg, parts.topology, step=step)]
        with host_reads() as reads:
            output = train_step(parts, iter(batches), num_microbatches=len(batches))
        assert output.applied
        weights = [weight for _, weight in output.by_source]
        assert min(weights) > 0
        assert sum(weights) == output.targets
    close_topology()
    return reads


def reads_of(
    preset: str, layout: str, *, prepare: Callable[[], None] | None = None, **sections: dict[str, object]
) -> tuple[list[Read], int]:
    """Reads of rank 0 and the number of its micro-batches."""
    chosen = Layout(1, {}) if layout == "one" else parse_layout(layout)
    two = (SourceConfig(prefix="a"), SourceConfig(prefix="b"))
    cfg = change(chosen.apply(debug_config(preset, **sections)), data={"sources": two})
    reads = run_on_ranks(_step, chosen.world_size, cfg=cfg, prepare=prepare)[0]
    data_size = chosen.world_size // cfg.parallel.tensor_model_parallel_size
    return reads, cfg.train.global_batch_size // cfg.train.micro_batch_size // data_size


def inside(read: Read) -> bool:
    """Whether it happened between the first forward pass and the end of the gradients' reduction."""
    return "step.py:_run_schedule" in read.path


def check(reads: list[Read], places: tuple[Place, ...], units: dict[str, int]) -> int:
    """Hold all reads against the table and return how many of those inside a GPU would wait for."""
    known = {(place.what, place.where): place for place in places}
    found = Counter((read.what, read.where) for read in reads)
    assert set(found) <= set(known), f"not in the table: {set(found) - set(known)}"
    for key, place in known.items():
        if place.times is not None:
            assert found[key] == place.times * units[place.unit], key
        else:
            assert not any(inside(read) for read in reads if (read.what, read.where) == key), key
    assert {read.caller for read in reads if read.where.endswith("step_with_ready_grads")} <= {
        "optimizer.py:_get_value"
    }
    return sum(known[read.what, read.where].waits for read in reads if inside(read))


@pytest.mark.parametrize(
    ("layout", "dtype", "places"),
    [
        ("one", "fp32", DENSE),
        ("one", "bf16", DENSE),
        ("accum1", "fp32", DENSE),
        ("tp2sp", "fp32", DENSE + SEQUENCE_PARALLEL),
        ("dp2-overlap", "fp32", DENSE),
    ],
)
def test_dense_step_reads_the_device_once(layout: str, dtype: str, places: tuple[Place, ...]) -> None:
    """Packed rows with and without images, in one micro-batch and in four: one read, after the gradients."""
    reads, micro = reads_of("debug_dense", layout, kernels={"params_dtype": dtype})
    assert check(reads, places, {"micro-batch": micro, "step": 1}) == 0


@pytest.mark.parametrize(
    ("layout", "capacity", "passes", "places"),
    [
        ("one", None, 1, DENSE + SPARSE),
        ("one", 1.0, 1, DENSE + SPARSE + CAPACITY),
        ("recompute", None, 2, DENSE + SPARSE),
        ("ep2", None, 1, DENSE + SPARSE + SPREAD),
    ],
)
def test_sparse_layers_wait_for_their_counts_alone(
    layout: str, capacity: float | None, passes: int, places: tuple[Place, ...]
) -> None:
    """Three waits a sparse layer and forward pass (recomputation runs it twice), none in a backward pass."""
    reads, micro = reads_of("debug_moe", layout, moe={"moe_expert_capacity_factor": capacity})
    sparse = sum(sparse_layers(debug_config("debug_moe"))) * micro * passes
    waits = check(reads, places, {"micro-batch": micro, "step": 1, "sparse pass": sparse})
    assert waits == WAITS_OF_A_SPARSE_PASS * sparse


def _ask_in_the_forward_pass() -> None:
    def asks(ids: torch.Tensor, **options: object):
        assert float(ids.max()) >= 0
        return rotary_table(ids, **options)

    mm_model.rotary_table = asks


def test_planted_read_in_a_step_is_found() -> None:
    """One value asked for in every forward pass: the table does not know it."""
    reads, micro = reads_of("debug_dense", "one", prepare=_ask_in_the_forward_pass)
    planted = [read for read in reads if read.what == "_local_scalar_dense" and inside(read)]
    assert [read.caller for read in planted] == ["test_host_sync.py:asks"] * micro
    with pytest.raises(AssertionError, match="not in the table"):
        check(reads, DENSE, {"micro-batch": micro, "step": 1})


class _AsksInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.sum().item()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (lambda x: x.sum().item(), ["_local_scalar_dense"]),
        (lambda x: bool((x > 0).any()), ["_local_scalar_dense"]),
        (lambda x: float(x.detach()[0]), ["_local_scalar_dense"]),
        (lambda x: range(int(x.sum())), ["_local_scalar_dense"]),
        (lambda x: x.tolist(), ["tolist"]),
        (lambda x: x.detach().cpu().numpy(), ["cpu", "numpy"]),
        (lambda x: x.nonzero(), ["nonzero"]),
        (lambda x: x[x > 0], ["index"]),
        (lambda x: x.masked_select(x > 0), ["masked_select"]),
        (lambda x: x.detach().index_put_((x > 0,), torch.ones(2)), ["index_put_"]),
        (lambda x: x.unique(), ["_unique2"]),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 0])), ["repeat_interleave"]),
        (lambda x: torch.equal(x, x), ["equal"]),
        (lambda x: torch.tensor([1.0], device="cpu"), ["copy"]),
        (lambda x: x.to("cpu"), ["copy"]),
        (lambda x: _AsksInBackward.apply(x).sum().backward(), ["_local_scalar_dense"]),
        (lambda x: x[x.detach() > 0].sum().backward(), ["index", "index_put"]),
        # What a GPU does without the host.
        (lambda x: x.masked_fill(x > 0, 0.0), []),
        (lambda x: x.detach().__setitem__(x > 0, 0.0), []),
        (lambda x: x[torch.tensor([0, 2])], []),
        (lambda x: x.repeat_interleave(2), []),
        (lambda x: x.to("cpu", non_blocking=True), []),
        (lambda x: torch.where(x > 0, x, 0.0).sum().backward(), []),
    ],
)
def test_counter_sees_each_kind_of_read(code: Callable[[torch.Tensor], object], expected: list[str]) -> None:
    """Forward and backward, operators and calls."""
    x = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    with host_reads() as reads:
        code(x)
    assert [read.what for read in reads if not read.where] == expected
