"""The device itself: what it is, what its libraries can do, and how fast its largest bf16 matrix products are."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional as F

from mm15_megatron.accounting import padded_vocab_size
from mm15_megatron.bench.cases import Device
from mm15_megatron.config.schema import PrecisionConfig, RunConfig
from mm15_megatron.errors import BackendError
from mm15_megatron.evaluation.report import machine_facts
from mm15_megatron.models.backend import fp8_problem, transformer_engine_problem

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
SQUARE = {"cuda": 8192, "cpu": 256}
SECONDS_A_PRODUCT = {"cuda": 0.5, "cpu": 0.02}
_WARM_UP, _LEAST_RUNS = 3, 5


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] x [k, n] in bf16, and how fast it was.

    Attributes:
        name: where it comes from.
        m: rows.
        n: columns.
        k: inner size.
        tflops: rate of the median run, TFLOP/s; 0 = not measured.
        runs: timed runs.
    """

    name: str
    m: int
    n: int
    k: int
    tflops: float = 0.0
    runs: int = 0


def products_of(cfg: RunConfig, *, square: int) -> list[Product]:
    """Return a large square product and those of one decoder layer of ``cfg`` and of its output layer, forward."""
    language, tokens = cfg.language, cfg.data.seq_length * cfg.train.micro_batch_size
    h, q = language.hidden_size, language.num_attention_heads * language.kv_channels
    kv, f = language.num_query_groups * language.kv_channels, language.ffn_hidden_size
    branches = 2 if language.activation == "swiglu" else 1
    return [
        Product(f"{square} cubed", square, square, square),
        Product("query, key and value", tokens, q + 2 * kv, h),
        Product("attention output", tokens, h, q),
        Product("feed-forward in", tokens, branches * f, h),
        Product("feed-forward out", tokens, h, f),
        Product("output layer", tokens, padded_vocab_size(cfg), h),
    ]


def measure(products: Sequence[Product], *, device: str, seconds: float) -> list[Product]:
    """Time each product on random data for about ``seconds`` after a warm-up."""
    return [_measured(product, device=device, seconds=seconds) for product in products]


def _measured(product: Product, *, device: str, seconds: float) -> Product:
    generator = torch.Generator(device=device).manual_seed(0)
    # a linear layer's product: both operands run along the inner size
    left_MK = torch.randn(product.m, product.k, device=device, dtype=torch.bfloat16, generator=generator)
    right_NK = torch.randn(product.n, product.k, device=device, dtype=torch.bfloat16, generator=generator)
    timed = _timed_on_gpu if device == "cuda" else _timed_on_host

    def run() -> None:
        torch.mm(left_MK, right_NK.t())

    once = [timed(run) for _ in range(_WARM_UP)][-1]
    runs = max(_LEAST_RUNS, int(seconds / max(once, 1e-6)))
    median = statistics.median(timed(run) for _ in range(runs))
    return replace(product, tflops=2e-12 * product.m * product.n * product.k / median, runs=runs)


def _timed_on_gpu(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _timed_on_host(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def look_at(kind: str) -> Device:
    """Find out what the device is and which libraries can be used on it.

    Raises:
        BackendError: cuda was asked for and is absent.
    """
    if kind == "cpu":
        return Device("cpu", str(machine_facts()["processor"]), float(psutil.virtual_memory().available))
    if not torch.cuda.is_available():
        raise BackendError(
            f"--device cuda, but torch {torch.__version__} finds no usable CUDA device",
            fix="run it on a machine with a GPU, or give --device cpu to try the tool on small models",
        )
    major, minor = torch.cuda.get_device_capability()
    found = {recipe: fp8_problem(PrecisionConfig(fp8="hybrid", fp8_recipe=recipe)) for recipe in RECIPES}
    return Device(
        kind="cuda",
        name=torch.cuda.get_device_name(),
        memory=float(torch.cuda.mem_get_info()[0]),
        driver=driver_version(),
        capability=f"{major}.{minor}",
        cuda=str(torch.version.cuda),
        transformer_engine_problem=transformer_engine_problem(),
        fp8_problems={recipe: problem for recipe, problem in found.items() if problem is not None},
        compile_problem=_compile_problem(),
    )


def driver_version() -> str:
    """Return the version of the GPU driver as the kernel tells it, or nvidia-smi; empty if neither does."""
    path = Path("/proc/driver/nvidia/version")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", text)
    if match:
        return match.group(1)
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ""
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return ""
    return asked.stdout.split("\n")[0].strip() if asked.returncode == 0 else ""


def _compile_problem() -> str | None:
    """Why torch.compile gives no kernel here (no C compiler, no Triton), or None if it does."""
    x = torch.randn(64, 64, device="cuda")
    try:
        torch.compile(lambda value: F.silu(value) * value)(x)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises, it goes into the report
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def survey(kind: str, cfg: RunConfig, *, say: Callable[[str], None]) -> tuple[Device, list[dict[str, Any]]]:
    """Look at the device and measure the products of ``cfg``, as plain values: the fastest one is the measured peak.

    Raises:
        BackendError: as :func:`look_at`.
    """
    device = look_at(kind)
    say(f"{device.name}: {device.memory / 2**30:.1f} GiB free")
    products = measure(products_of(cfg, square=SQUARE[kind]), device=kind, seconds=SECONDS_A_PRODUCT[kind])
    return device, [asdict(product) for product in products]
