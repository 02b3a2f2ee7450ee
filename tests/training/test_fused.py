"""The loss and the rotation fused by torch.compile: equal to eager, in place, compiled a bounded number of times."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from mm15_megatron.models.rope import RotaryTable, apply_rotary, rotary_table, rotation
from mm15_megatron.parity.layouts import parse_layout
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.training import losses

from ..helpers.inductor import use_cache, why_not
from ..helpers.layouts import Layout, change, debug_config
from ..helpers.parity import compare, trace

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

# The same sums in another order; logits of a few units, so a squared logsumexp of some tens.
FP32_REDUCTION = {"rtol": 5e-6, "atol": 5e-6}
# One rounding to 8 bits of mantissa of values that differ in the last bit of fp32.
BF16 = {"rtol": 2**-7, "atol": 1e-5}
TP2, ALONE = "fp32 over two shards", "bf16 over one"
VOCAB, PADDED, CHUNK, Z = 50, 64, 16, 0.3
PASSES, ROTARY_GRAPHS = 2, 6

Losses = list[torch.Tensor]


@dataclass(frozen=True)
class Found:
    """What the ranks saw. Each compiles something else beside their common work, as they have a core each.

    Attributes:
        eager: losses of each token and the gradient, by case.
        fused: the same.
        graphs: how many were compiled after each case, and after the first once more.
        rotated: queries and keys and their gradients, eager and fused; on rank 1.
        rotary_graphs: graphs compiled for those and for rows of many lengths.
        chunk_buffers: allocations of a whole chunk in the code of the two passes; on rank 0.
    """

    eager: dict[str, Losses]
    fused: dict[str, Losses]
    graphs: list[int]
    rotated: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    rotary_graphs: int = 0
    chunk_buffers: tuple[str, ...] = ()


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _losses(
    kernels: losses.LossKernels, *, group: torch.distributed.ProcessGroup, dtype: torch.dtype, tokens: int
) -> Losses:
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(tokens, PADDED, generator=g) * 3).to(dtype)
    labels, weights = torch.randint(0, VOCAB, (tokens,), generator=g), torch.rand(tokens, generator=g)
    mine = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    shard = losses.vocabulary_shard(vocab_size=VOCAB, padded_size=PADDED, group=group)
    result = losses.target_losses(mine * 1.0, labels, weights, shard=shard, kernels=kernels, z_loss_coeff=Z)
    result.total.backward()
    return [result.total.detach(), result.cross_entropy_T, result.squared_lse_T, mine.grad]


def _rotated(compiled: bool) -> list[torch.Tensor]:
    table = rotary_table(torch.arange(9), head_dim=8, base=100.0, rotation=rotation(compiled=compiled))
    g, answers = torch.Generator().manual_seed(1), []
    for heads in (4, 2):
        x = torch.randn(9, heads, 8, generator=g, requires_grad=True)
        y = apply_rotary(x, table)
        answers += [y.detach(), torch.autograd.grad((y * torch.randn(y.shape, generator=g)).sum(), x)[0]]
    return answers


def _rotate_many_lengths() -> None:
    """Queries and keys of answers of growing length."""
    with torch.no_grad():
        for tokens in range(5, 15):
            plain = rotary_table(torch.arange(tokens), head_dim=8, base=100.0)
            table = RotaryTable(plain.cos_T1K, plain.sin_T1K, rotation(compiled=True))
            for heads in (4, 2):
                x = torch.randn(tokens, heads, 8)
                torch.testing.assert_close(apply_rotary(x, table), apply_rotary(x, plain), **FP32_REDUCTION)


def _chunk_buffers(kernels: losses.LossKernels) -> tuple[str, ...]:
    from torch._inductor.utils import run_and_get_code

    logits, labels = torch.randn(CHUNK, PADDED).bfloat16(), torch.randint(0, VOCAB, (CHUNK,))
    (peak, total, _, kept), code = run_and_get_code(kernels.statistics, logits, labels, 0, VOCAB)
    assert kept is None
    ones = torch.ones(CHUNK)
    arguments = (logits, None, labels, peak, peak + total.log(), ones, ones, 0, VOCAB)
    _, more = run_and_get_code(kernels.write_gradient, *arguments)
    lines = [line for text in code + more for line in text.splitlines()]
    assert any(f"({CHUNK}, ), (1, )" in line for line in lines)
    return tuple(line for line in lines if "empty_strided" in line and f"({CHUNK}, {PADDED})" in line)


def _on_rank(folder: str) -> Found:
    use_cache(folder)
    losses.CHUNK_TOKENS = CHUNK
    rank = torch.distributed.get_rank()
    cases = {TP2: {"group": torch.distributed.group.WORLD, "dtype": torch.float32, "tokens": 2 * CHUNK + 5}}
    alone = torch.distributed.new_group([rank], use_local_synchronization=True)
    if rank == 0:
        cases[ALONE] = {"group": alone, "dtype": torch.bfloat16, "tokens": 2 * CHUNK}
    eager, fused = losses.loss_kernels(compiled=False), losses.loss_kernels(compiled=True)
    answers, graphs = {}, []
    for name in (*cases, TP2):
        answers[name] = _losses(fused, **cases[name])
        graphs.append(_graphs())
    reference = {name: _losses(eager, **case) for name, case in cases.items()}
    if rank == 0:
        return Found(reference, answers, graphs, chunk_buffers=_chunk_buffers(fused))
    rotated = (_rotated(False), _rotated(True))
    _rotate_many_lengths()
    return Found(reference, answers, graphs, rotated, rotary_graphs=_graphs() - graphs[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """Both ranks' answers: they compile once for all tests."""
    return run_on_ranks(_on_rank, 2, folder=str(tmp_path_factory.mktemp("inductor")))


@pytest.mark.parametrize(
    ("case", "rank", "tolerance"), [(TP2, 0, FP32_REDUCTION), (TP2, 1, FP32_REDUCTION), (ALONE, 0, BF16)]
)
def test_fused_loss_equals_eager(found: list[Found], case: str, rank: int, tolerance: dict[str, float]) -> None:
    """Total, losses of every token and gradients; fp32 over two shards, one of them with padding, and bf16 over one."""
    fused, eager = found[rank].fused[case], found[rank].eager[case]
    for mine, reference in zip(fused[:3], eager[:3], strict=True):
        torch.testing.assert_close(mine, reference, **FP32_REDUCTION)
    torch.testing.assert_close(fused[3], eager[3], **tolerance)


def test_fused_rotation_equals_eager(found: list[Found]) -> None:
    """Queries, keys and both gradients."""
    eager, fused = found[1].rotated
    assert len(eager) == 4
    for mine, reference in zip(fused, eager, strict=True):
        torch.testing.assert_close(mine, reference, **FP32_REDUCTION)


def test_number_of_compilations_is_bounded(found: list[Found]) -> None:
    """Each pass once for a whole chunk and once for the shorter last one, whatever the number of rows and steps."""
    ragged, even = PASSES * 2, PASSES
    assert found[0].graphs == [ragged, ragged + even, ragged + even]
    assert found[1].graphs == [ragged, ragged]
    assert 0 < found[1].rotary_graphs <= ROTARY_GRAPHS


def test_fused_passes_keep_nothing_of_a_chunk(found: list[Found]) -> None:
    """No buffer of a chunk's size: the gradient is written over the logits, in their dtype."""
    assert found[0].chunk_buffers == ()


@pytest.mark.soak
def test_fused_training_equals_eager(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Five steps of the whole model with every fusion, in one process and with tensor parallelism."""
    prepare = partial(use_cache, str(tmp_path_factory.mktemp("inductor")))
    cfg = debug_config()
    fused = change(cfg, kernels={"compile_fusions": True})
    reference = trace(cfg, world_size=1)
    for layout in (Layout(1, {}), parse_layout("tp2sp")):
        run = trace(layout.apply(fused), world_size=layout.world_size, prepare=prepare)
        difference = compare(reference, run, learning_rate=cfg.optimizer.lr or 0)
        assert difference.passes, difference
