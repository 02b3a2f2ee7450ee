"""Report what this machine has for training on GPUs, which tests will run here, and the commands to run.

    python tools/gpu_environment.py [--json] [--tests PATH ...]

Every library is tried in a process of its own: one that aborts or hangs costs a line, not the report. Which tests skip
is asked of the tests themselves (pytest collects them and their skip marks are read); what a test or a fixture decides
only when it runs is named so. Exit codes: 0 a report was given; 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ANSWER = "gpu_environment answers: "
PROBE_SECONDS, COLLECTION_SECONDS = 180, 300
GIB = 2**30
Facts = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What one probe found.

    Attributes:
        facts: what it said; empty if it failed.
        problem: why it failed, or why what it tried is not usable; None = usable.
    """

    facts: Facts
    problem: str | None


# ---- probes: each runs in a process of its own, returns facts, and raises or sets "problem" if something is unusable


def probe_torch() -> Facts:
    """Build of torch, its CUDA libraries and the devices it can use."""
    import torch

    usable = torch.cuda.is_available()
    facts: Facts = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if usable else None,
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if usable else [],
    }
    if not torch.version.cuda:
        facts["problem"] = f"torch {torch.__version__} is built without CUDA"
    elif not usable:
        facts["problem"] = f"torch {torch.__version__} finds no CUDA device"
    return facts


def _device(index: int) -> Facts:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    others = (other for other in range(torch.cuda.device_count()) if other != index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(total / GIB, 1),
        "free_gib": round(free / GIB, 1),
        "peers": [other for other in others if torch.cuda.can_device_access_peer(index, other)],
    }


def probe_driver() -> Facts:
    """The driver's version, the newest CUDA it serves, and how GPUs are linked."""
    library = ctypes.CDLL("libcuda.so.1")  # OSError: no driver
    number = ctypes.c_int()
    failed = library.cuDriverGetVersion(ctypes.byref(number))
    facts: Facts = {"cuda": f"{number.value // 1000}.{number.value % 1000 // 10}", "version": None, "links": []}
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return facts | {"problem": f"cuDriverGetVersion returned {failed}" if failed else None}
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    facts["version"] = asked.stdout.split("\n")[0].strip() or None
    topology = subprocess.run([smi, "topo", "-m"], capture_output=True, text=True, check=False, timeout=60)
    facts["links"] = [line for line in topology.stdout.splitlines() if line.startswith("GPU")]
    facts["problem"] = asked.stderr.strip() or asked.stdout.strip() if asked.returncode else None
    return facts


def probe_megatron() -> Facts:
    """megatron-core, as this project imports it."""
    from importlib.metadata import version

    import megatron.core.models.gpt  # noqa: F401

    return {"version": version("megatron-core")}


def probe_transformer_engine() -> Facts:
    """Transformer Engine and why a recipe cannot be used."""
    from importlib.metadata import PackageNotFoundError, version

    from mm15_megatron.bench.fp8_record import RECIPES
    from mm15_megatron.config.schema import PrecisionConfig
    from mm15_megatron.models.backend import fp8_problem, transformer_engine_problem

    try:
        installed = version("transformer-engine")
    except PackageNotFoundError:
        installed = None
    recipes = {name: fp8_problem(PrecisionConfig(fp8="hybrid", fp8_recipe=name)) for name in RECIPES}
    return {"version": installed, "recipes": recipes, "problem": transformer_engine_problem()}


def probe_apex() -> Facts:
    """The parts of apex that this project can use."""
    from mm15_megatron.models.backend import APEX_WGRAD, apex_problem

    extensions = {name: apex_problem(name) for name in (APEX_WGRAD, "amp_C", "fused_layer_norm_cuda")}
    missing = [f"{name}: {problem}" for name, problem in extensions.items() if problem is not None]
    return {"extensions": extensions, "problem": missing[0] if len(missing) == len(extensions) else None}


def probe_dali() -> Facts:
    """DALI's CPU decoder (a small picture is decoded) and whether its GPU decoder exists here."""
    from importlib.metadata import distributions

    import numpy as np
    import torch
    from PIL import Image

    from mm15_megatron.data.image.decode_dali import build_codec

    png = io.BytesIO()
    Image.new("RGB", (5, 3), (1, 2, 3)).save(png, format="PNG")
    (pixels,) = build_codec(threads=1).decode([np.frombuffer(png.getvalue(), np.uint8)])
    names = {d.metadata["Name"]: d.version for d in distributions() if "nvidia-dali" in str(d.metadata["Name"])}
    mixed = None if torch.cuda.is_available() else "no CUDA device"
    wrong = None if tuple(pixels.shape) == (3, 5, 3) else f"decoded to {tuple(pixels.shape)}, not (3, 5, 3)"
    return {"version": ", ".join(f"{k} {v}" for k, v in names.items()), "mixed_decoder": mixed, "problem": wrong}


def probe_mpi() -> Facts:
    """mpi4py and the library it loads; MPI is not initialised."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    return {"version": mpi4py.__version__, "library": MPI.Get_library_version().split("\n")[0].strip(" \0")}


def probe_slurm() -> Facts:
    """Slurm's client."""
    srun = shutil.which("srun")
    if srun is None:
        return {"problem": "srun is not on the path"}
    asked = subprocess.run([srun, "--version"], capture_output=True, text=True, check=False, timeout=60)
    return {"version": asked.stdout.strip(), "problem": asked.stderr.strip() if asked.returncode else None}


def probe_parity() -> Facts:
    """Whether a rank of ``tools/check_parity.py --device cuda`` can start and use the device."""
    from mm15_megatron.errors import BackendError
    from mm15_megatron.parity.check import this_machine
    from mm15_megatron.parity.ranks import run_on_ranks

    try:
        machine = this_machine("cuda")
    except BackendError as error:
        return {"problem": error.problem}
    (name,) = run_on_ranks(_name_of_device, 1, device="cuda", timeout=PROBE_SECONDS / 2)
    return {"machine": str(machine), "device": name}


def _name_of_device() -> str:
    import torch

    torch.cuda.init()
    return torch.cuda.get_device_name()


PROBES: Mapping[str, Callable[[], Facts]] = {
    "torch": probe_torch,
    "driver": probe_driver,
    "megatron-core": probe_megatron,
    "transformer-engine": probe_transformer_engine,
    "apex": probe_apex,
    "dali": probe_dali,
    "mpi": probe_mpi,
    "slurm": probe_slurm,
    "parity on cuda": probe_parity,
}


# ---- tests: pytest collects them in a process of its own, and their marks say which skip


class Collector:
    """A pytest plugin that notes every test and why its marks skip it."""

    def __init__(self) -> None:
        self.tests: list[Facts] = []
        self.failures: list[Facts] = []

    def pytest_collectreport(self, report: Any) -> None:
        """Note files that do not import, or that skip as a whole."""
        if report.outcome == "skipped":
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            self.tests.append({"id": report.nodeid, "reasons": [reason], "gpu": False, "soak": False, "late": False})
        elif report.outcome == "failed":
            lines = str(report.longrepr).strip().splitlines()
            self.failures.append({"id": report.nodeid or "tests", "reason": lines[-1] if lines else "unknown"})

    def pytest_collection_finish(self, session: Any) -> None:
        """Note the tests."""
        for item in session.items:
            marks = {mark.name for mark in item.iter_markers()}
            self.tests.append(
                {
                    "id": item.nodeid,
                    "reasons": list(dict.fromkeys(skip_reasons(item))),
                    "gpu": "gpu" in marks,
                    "soak": "soak" in marks,
                    "late": decides_late(item),
                }
            )


def skip_reasons(item: Any) -> Iterator[str]:
    """Yield why the marks of a test skip it; nothing if they do not."""
    for mark in item.iter_markers("skip"):
        yield str(mark.kwargs.get("reason") or (mark.args[0] if mark.args else "skipped"))
    for mark in item.iter_markers("skipif"):
        if any(condition is True for condition in (*mark.args, mark.kwargs.get("condition"))):
            yield str(mark.kwargs.get("reason", "its condition holds"))


def decides_late(item: Any) -> bool:
    """Whether a test may skip itself while it runs: it, or a function of its file that it calls, says so."""
    own = vars(item.module)
    called = (own.get(name) for name in item.function.__code__.co_names)
    functions = [item.function, *(function for function in called if inspect.isfunction(function))]
    return any({"pytest", "skip"} <= set(function.__code__.co_names) for function in functions)


def collect(paths: Sequence[str]) -> Facts:
    """Collect the tests below ``paths`` in this process."""
    import pytest

    collector, said = Collector(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = pytest.main(["--collect-only", "-q", "-q", "-p", "no:cacheprovider", *paths], plugins=[collector])
    if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) or collector.failures:
        return {"tests": collector.tests, "failures": collector.failures}
    problem = f"pytest ended with {pytest.ExitCode(code).name}: {_last_line(said.getvalue())}"
    return {"tests": [], "failures": [], "problem": problem}


# ---- the parent


def child(name: str, paths: Sequence[str] = ()) -> list[str]:
    """Return the command that runs one probe."""
    return [sys.executable, str(Path(__file__).resolve()), "--probe", name, "--tests", *paths]


def ask(command: Sequence[str], *, seconds: float) -> Answer:
    """Run a probe and read its answer, whatever it does."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), environment.get("PYTHONPATH", "")) if p)
    environment["PYTHONWARNINGS"] = "ignore"
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Answer({}, f"gave no answer in {seconds:g} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(ANSWER):
            facts: Facts = json.loads(line.removeprefix(ANSWER))
            return Answer(facts, facts.pop("problem", None))
    if done.returncode < 0:
        return Answer({}, f"ended by {signal.Signals(-done.returncode).name}: {_last_line(done.stderr)}")
    return Answer({}, _last_line(done.stderr) or f"ended with exit code {done.returncode} and no word")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def survey(paths: Sequence[str]) -> dict[str, Answer]:
    """Run every probe and the collection, two at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        tests = pool.submit(ask, child("tests", paths), seconds=COLLECTION_SECONDS)
        answers = {name: pool.submit(ask, child(name), seconds=PROBE_SECONDS) for name in PROBES}
        return {name: answer.result() for name, answer in answers.items()} | {"tests": tests.result()}


@dataclass(frozen=True)
class Group:
    """Tests of one file, or those of one recipe: how many run, how many skip and why."""

    name: str
    runs: int
    skips: int
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """What happens to them."""
        counted = f"{self.runs} run" if self.runs else "none runs"
        skipping = f", {self.skips} skip: {'; '.join(self.reasons)}" if self.skips else ""
        return counted + skipping + "".join(f" ({note})" for note in self.notes)


def group(name: str, tests: Sequence[Facts], *, late_reason: str | None = None) -> Group:
    """Count tests; ``late_reason``: why those that decide late will skip, where it is known."""
    skipped = [test for test in tests if test["reasons"]]
    reasons = Counter(reason for test in skipped for reason in test["reasons"])
    late = sum(1 for test in tests if test["late"] and not test["reasons"])
    known = late if late_reason is not None else 0
    notes = [f"{late} may skip when they run"] if late > known else []
    reasons.update([late_reason] if known and late_reason is not None else [])
    return Group(name, len(tests) - len(skipped) - known, len(skipped) + known, tuple(reasons), tuple(notes))


def groups_of(tests: Sequence[Facts], *, recipes: Mapping[str, str | None]) -> list[Group]:
    """Return files that need a device or a launcher or skip something, each recipe's GPU tests, and all the rest.

    Args:
        tests: from :func:`collect`.
        recipes: why an FP8 recipe cannot be used, by recipe; None = it can.
    """
    by_file: dict[str, list[Facts]] = {}
    for test in tests:
        by_file.setdefault(test["id"].partition("::")[0], []).append(test)
    shown = {
        file: found
        for file, found in by_file.items()
        if "launcher" in file or any(test["gpu"] or test["reasons"] for test in found)
    }
    rest = [test for file, found in by_file.items() if file not in shown for test in found]
    found = [group(file, tests_of_file) for file, tests_of_file in sorted(shown.items())]
    for recipe, problem in recipes.items():
        of_recipe = [test for test in tests if test["gpu"] and recipe in test["id"]]
        if of_recipe:
            found.append(group(f"GPU tests of the FP8 recipe {recipe}", of_recipe, late_reason=problem))
    return [*found, group("all other files", rest)] if rest else found


def python_command() -> str:
    """Return how a Python of this machine finds the package from the root of the checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("mm15-megatron")
    except PackageNotFoundError:
        return "PYTHONPATH=.:$PYTHONPATH python"
    return "python"


def commands(answers: Mapping[str, Answer]) -> list[tuple[str, str | None]]:
    """Return the project's commands for such a machine, and why one cannot run here (None: it can).

    GPU tests run file by file: an error that leaves the device unusable ends those of its own process alone.
    """
    gpu, engine = answers["torch"].problem, answers["transformer-engine"].problem
    recipes = answers["transformer-engine"].facts.get("recipes", {})
    usable = [name for name, problem in recipes.items() if problem is None]
    gpus = max(1, len(answers["torch"].facts.get("devices", [])))
    no_recipe = None if usable else next(iter(recipes.values()), engine)
    python = python_command()
    files = sorted({test["id"].partition("::")[0] for test in answers["tests"].facts.get("tests", []) if test["gpu"]})
    train = "-m mm15_megatron.train --preset mm15_3b --config my.yaml train.run_dir=runs/mine"
    return [
        (f'CUDA_VISIBLE_DEVICES= {python} -m pytest -m "not gpu and not soak"', None),
        *((f"{python} -m pytest {file} -v --durations=20", gpu) for file in files),
        (
            f"{python} tools/check_parity.py --preset debug_moe --device cuda --dtype bf16 --layouts packed,accum2",
            answers["parity on cuda"].problem,
        ),
        (f"{python} tools/bench_gpu.py", gpu),
        (f"{python} tools/advise_fp8.py --preset mm1_30b --record numbers.json", gpu or engine or no_recipe),
        (f"{python} tools/bench_step.py kernels.params_dtype=bf16 parallel.device=cuda", gpu),
        (f"{python} tools/bench_checkpoint.py parallel.device=cuda", gpu),
        (f"torchrun --nproc-per-node {gpus} {train}", gpu),
        ("sbatch --nodes=1 --gpus-per-node=1 slurm/train.sbatch --preset mm15_3b", gpu or answers["slurm"].problem),
    ]


def report(answers: Mapping[str, Answer]) -> Facts:
    """Return everything as plain values."""
    recipes = answers["transformer-engine"].facts.get("recipes", {})
    tests = answers["tests"].facts.get("tests", [])
    return {
        "machine": {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()},
        "found": {name: asdict(answer) for name, answer in answers.items() if name != "tests"},
        "tests": [asdict(found) for found in groups_of(tests, recipes=recipes)],
        "tests_problem": answers["tests"].problem,
        "tests_broken": answers["tests"].facts.get("failures", []),
        "commands": [{"command": command, "problem": problem} for command, problem in commands(answers)],
    }


def _value_text(value: Any) -> str:
    if isinstance(value, dict) and len(value) > 1 and len(set(map(str, value.values()))) == 1:
        (same,) = set(map(str, value.values()))
        return f"{', '.join(value)}: {'usable' if same == 'None' else same}"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {'usable' if item is None else item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def text_of(facts: Facts) -> str:
    """Lay the report out for a reader."""
    machine = facts["machine"]
    lines = [f"{machine['system']}, Python {machine['python']}, {machine['cores']} cores", ""]
    for name, answer in facts["found"].items():
        lines.append(f"{name}: {'usable' if answer['problem'] is None else 'not usable: ' + answer['problem']}")
        for key, value in answer["facts"].items():
            if key == "devices":
                lines += [f"    GPU {index}: {_value_text(device)}" for index, device in enumerate(value)]
            elif value not in (None, [], {}) or key == "mixed_decoder":
                lines.append(f"    {key}: {'usable' if value is None else _value_text(value)}")
    lines += ["", "tests"]
    lines += [f"    could not be collected: {facts['tests_problem']}"] if facts["tests_problem"] else []
    lines += [f"    broken: {failure['id']}: {failure['reason']}" for failure in facts["tests_broken"]]
    lines += [f"    {found['name']}: {Group(**found).verdict}" for found in facts["tests"]]
    lines += ["", "commands"]
    for command in facts["commands"]:
        why = "" if command["problem"] is None else f"    # not here: {command['problem']}"
        lines.append(f"    {command['command']}{why}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print the report for machines")
    parser.add_argument("--tests", nargs="*", default=["tests"], metavar="PATH", help="tests to ask about [tests]")
    parser.add_argument("--probe", choices=[*PROBES, "tests"], help=argparse.SUPPRESS)
    wanted = parser.parse_args(argv)
    if wanted.probe is not None:
        found = collect(wanted.tests) if wanted.probe == "tests" else PROBES[wanted.probe]()
        print(f"\n{ANSWER}{json.dumps(found)}", flush=True)
        return 0
    absent = [path for path in wanted.tests if not (ROOT / path.partition("::")[0]).exists()]
    if absent:
        parser.error(f"--tests: there is no {', '.join(absent)} in {ROOT}")
    facts = report(survey(wanted.tests))
    print(json.dumps(facts, indent=2) if wanted.json else text_of(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
