"""Actions that rank 0 takes for all."""

from __future__ import annotations

import pytest
import torch

from mm15_megatron.errors import CheckpointError
from mm15_megatron.parity.ranks import run_on_ranks
from mm15_megatron.utils.ranks import launched_rank, on_every_rank, on_rank_zero


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


def _one_of_three(kind: str) -> list[str]:
    rank = torch.distributed.get_rank()

    def act() -> int:
        if rank > 0 and kind == "refusal":
            raise CheckpointError("wrong", fix="mend it")
        if rank > 0 and kind == "system":
            raise PermissionError(13, "denied", "x")
        return rank

    said = []
    for _ in range(2):  # nobody is left behind in a collective of the first time
        try:
            said.append(str(on_every_rank(act)))
        except (CheckpointError, OSError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("none", None),
        ("refusal", "CheckpointError: rank 1: wrong\n  fix: mend it"),
        ("system", "OSError: rank 1: PermissionError: [Errno 13] denied: 'x'"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(kind: str, said: str | None) -> None:
    """Each rank keeps its own value; the lowest rank's error is everybody's."""
    expected = [[said or str(rank)] * 2 for rank in range(3)]
    assert run_on_ranks(_one_of_three, 3, kind=kind) == expected


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
