"""Rows through the real loader: however they are dealt, a step has the same loss and the same gradients."""

from __future__ import annotations

import pytest
import torch

from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.loader import build_loader
from mm15_megatron.data.sft import Conversation, Turn, build_conversations
from mm15_megatron.data.tokenizer import train_character_tokenizer
from mm15_megatron.parallel.topology import close_topology
from mm15_megatron.parity.compare import FP32_REDUCTION, FP32_SCALAR, SMALLEST_GRADIENT
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.parity.trace import build_parts, gathered_gradients
from mm15_megatron.presets import resolve
from mm15_megatron.training.step import LossSums, accumulate_gradients

from ..data.images import photo


@pytest.fixture(scope="module")
def data_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Forty conversations of 0 to 3 images and answers of 4 to 60 tokens."""
    folder = tmp_path_factory.mktemp("dealt")
    tokenizer = train_character_tokenizer([*map(chr, range(32, 127)), "\n"], folder / "tokenizer.json")
    talks = []
    for i in range(40):
        images = tuple(photo(40 + i, 60, seed=4 * i + k) for k in range(i % 4))
        turns = (Turn("user", "<image>" * len(images) + f"Q{i}"), Turn("assistant", "A" * (4 + 7 * i % 57)))
        talks.append(Conversation(turns, images))
    build_conversations(folder / "talks", talks, tokenizer)
    return [
        f"data.tokenizer={folder / 'tokenizer.json'}",
        f"data.sources=[{{prefix: {folder / 'talks'}}}]",
        "data.decoder=pil",
        "data.num_workers=0",
        "train.loss_normalisation=sqrt",
    ]


def one_step(cfg: RunConfig) -> tuple[LossSums, list[int], dict[str, torch.Tensor]]:
    """Losses of the first step, the rows this rank took, and the gradients."""
    parts = build_parts(cfg)
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    rows: list[int] = []

    def noted():  # type: ignore[no-untyped-def]
        for batch in loader:
            rows.extend(record.row for record in batch.rows)
            yield batch

    with build_loader(cfg, view=parts.topology.view) as loader:
        sums = accumulate_gradients(parts, noted(), num_microbatches=loader.step(0).micro_batches)
    gradients = gathered_gradients(parts)
    close_topology()
    return sums, rows, gradients


@pytest.mark.parametrize("preset", ["debug_dense", "debug_moe"])
def test_a_step_is_the_same_however_its_rows_are_dealt(preset: str, data_options: list[str]) -> None:
    cfg = apply_overrides(resolve(preset), [*data_options, "train.micro_batch_size=1"])
    ((sums, rows, reference),) = run_on_ranks(one_step, 1, cfg=cfg)
    assert rows == list(range(8))
    taken = {}
    for dealing in ("balanced", "round_robin"):
        results = run_on_ranks(one_step, 2, cfg=apply_overrides(cfg, [f"data.row_dealing={dealing}"]))
        taken[dealing] = [mine for _, mine, _ in results]
        assert sorted(taken[dealing][0] + taken[dealing][1]) == rows
        found, _, gradients = results[0]
        assert found.loss == pytest.approx(sums.loss, abs=FP32_SCALAR)
        for mine, alone in zip(found.router, sums.router, strict=True):
            assert (mine.balance, mine.z) == pytest.approx((alone.balance, alone.z), rel=FP32_SCALAR)
        for name, whole in reference.items():
            largest = max(whole.abs().max().item(), SMALLEST_GRADIENT)
            assert (gradients[name] - whole).abs().max() <= FP32_REDUCTION * largest, (dealing, name)
    assert taken["round_robin"] == [rows[0::2], rows[1::2]] != taken["balanced"]
