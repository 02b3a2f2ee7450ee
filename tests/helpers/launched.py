"""The real command under real launchers: a run on captioned images, its losses, and patience."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mm15_megatron.data.captions import build_captions
from mm15_megatron.data.tokenizer import train_character_tokenizer

from ..data.images import photo

ROOT = Path(__file__).resolve().parents[2]
# Long enough for a signal to arrive in the middle of a run on a fast machine.
STEPS = 60
# fp32 sums in another order, fed back through sixty updates.
FP32_DRIFT = 2e-4
TRAIN = ["-m", "mm15_megatron.train"]


def run_options(folder: Path) -> list[str]:
    """A debug_dense run on forty captioned images, decoded by DALI in a worker process."""
    tokenizer = train_character_tokenizer([*map(chr, range(32, 127)), "\n"], folder / "tokenizer.json")
    pairs = [(photo(30 + i, 40, seed=i), f"caption number {i} " * (1 + i % 4)) for i in range(40)]
    build_captions(folder / "train", pairs, tokenizer)
    return [
        "--preset=debug_dense",
        f"data.tokenizer={folder / 'tokenizer.json'}",
        f"data.sources=[{{prefix: {folder / 'train'}}}]",
        f"train.steps={STEPS}",
        "train.threads_per_rank=1",
        "checkpoint.save_interval=0",
        "optimizer.adam_eps=1e-5",
    ]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher sets."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MM15_PARITY_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(command: list[str], env: dict[str, str], *, timeout: float = 240) -> str:
    """Run a command to its end and return what it printed; its output is in the failure."""
    done = subprocess.run(
        command,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def losses(run_dir: Path) -> list[float]:
    """Loss of every step, as the run wrote them."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["train/loss"] for record in records]


def torchrun(arguments: list[str], run_dir: Path, *layout: str, agent: tuple[str, ...] = ()) -> list[str]:
    """The torchrun command of a two-rank run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [sys.executable, *launcher, *agent, *TRAIN, *arguments, f"train.run_dir={run_dir}", *layout]


def wait_for(ready: Callable[[], bool], *, seconds: float, what: str, log: Path) -> None:
    """Poll until something has happened."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen in {seconds} s\n{log.read_text()[-4000:] if log.exists() else ''}")
        time.sleep(0.2)
