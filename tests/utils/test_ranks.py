"""Actions that rank 0 takes for all."""

from __future__ import annotations

import pytest
import torch

from mm15_megatron.errors import CheckpointError
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.utils.ranks import launched_rank, on_rank_zero


def _results() -> tuple[int, str, str]:
    value = on_rank_zero(lambda: torch.distributed.get_rank() + 5)

    def refuse() -> int:
        raise CheckpointError("wrong", fix="mend it")

    def fail() -> int:
        raise FileNotFoundError(2, "no such file", "x")

    with pytest.raises(CheckpointError) as refused:
        on_rank_zero(refuse)
    with pytest.raises(FileNotFoundError) as failed:
        on_rank_zero(fail)
    return value, str(refused.value), str(failed.value)


def test_result_and_errors_reach_every_rank() -> None:
    """Rank 0 acts; the value and the errors are the same everywhere."""
    assert run_on_ranks(_results, 2) == [(5, "wrong\n  fix: mend it", "[Errno 2] no such file: 'x'")] * 2


def test_launched_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's word, torchrun's before mpiexec's before srun's; nonsense is passed over."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert launched_rank() == 3
    monkeypatch.setenv("PMI_RANK", "7")
    assert launched_rank() == 7
    monkeypatch.setenv("RANK", "1")
    assert launched_rank() == 1
    monkeypatch.setenv("RANK", "one")
    assert launched_rank() == 7
