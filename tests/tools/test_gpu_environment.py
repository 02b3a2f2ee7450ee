"""The report about a machine: probes that crash cost a line, tests are asked about themselves, and it always ends."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from ..helpers.tools import load_tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = load_tool("gpu_environment")
SECONDS = 120.0
USABLE = TOOL.Answer({}, None)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os.abort()", "ended by SIGABRT: "),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("raise RuntimeError('libcuda is absent')", "RuntimeError: libcuda is absent"),
        ("raise SystemExit(3)", "ended with exit code 3 and no word"),
        ("print('nothing of use')", "ended with exit code 0 and no word"),
    ],
)
def test_a_probe_that_fails_says_how(code: str, problem: str) -> None:
    assert TOOL.ask(python(code), seconds=SECONDS) == TOOL.Answer({}, problem)


def test_a_probe_that_hangs_is_given_up() -> None:
    answer = TOOL.ask(python("import time; time.sleep(600)"), seconds=0.5)
    assert answer == TOOL.Answer({}, "gave no answer in 0.5 s")


def test_an_answer_is_found_among_what_libraries_print() -> None:
    said = json.dumps({"version": "1.0", "problem": "half of it"})
    code = f"print('hello'); print({TOOL.ANSWER!r} + {said!r}); print('good-bye'); import os; os.abort()"
    assert TOOL.ask(python(code), seconds=SECONDS) == TOOL.Answer({"version": "1.0"}, "half of it")


@pytest.mark.parametrize("fault", ["raise RuntimeError('built for another torch')", "import os; os.abort()"])
def test_a_broken_library_costs_its_own_line(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine beside a torch without CUDA raises RuntimeError where ImportError is expected, or aborts."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(fault + "\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = TOOL.ask(TOOL.child("transformer-engine"), seconds=SECONDS)
    assert answer.problem is not None
    assert "built for another torch" in answer.problem or "SIGABRT" in answer.problem


def test_torch_is_described() -> None:
    torch = pytest.importorskip("torch")
    answer = TOOL.ask(TOOL.child("torch"), seconds=SECONDS)
    assert answer.facts["version"] == torch.__version__
    assert (answer.problem is None) == torch.cuda.is_available()
    assert len(answer.facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_what_the_tests_marks_say_is_reported(tmp_path: Path) -> None:
    (tmp_path / "test_marked.py").write_text(
        """
import pytest

def late():
    pytest.skip("found out")

@pytest.mark.skipif(True, reason="no such device")
def test_a(): ...

@pytest.mark.skipif(False, reason="never")
def test_b(): ...

@pytest.mark.skip(reason="broken")
@pytest.mark.skipif(1 > 0, reason="no such device")
def test_c(): ...

def test_d(): late()

@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_e(recipe): pytest.skip(recipe)
""",
        encoding="utf-8",
    )
    (tmp_path / "test_absent.py").write_text("import pytest\npytest.importorskip('nowhere_at_all')\n", encoding="utf-8")
    answer = TOOL.ask(TOOL.child("tests", [str(tmp_path)]), seconds=SECONDS)
    assert answer.problem is None
    found = {test["id"].rpartition("::")[2]: test for test in answer.facts["tests"]}
    reasons = {name: test["reasons"] for name, test in found.items() if "absent" not in name}
    assert reasons["test_a"] == ["no such device"]
    assert sorted(reasons["test_c"]) == ["broken", "no such device"]
    assert reasons["test_b"] == reasons["test_d"] == reasons["test_e[mxfp8]"] == []
    assert {name for name, test in found.items() if test["late"]} == {"test_d", "test_e[tensorwise]", "test_e[mxfp8]"}
    (absent,) = (test for name, test in found.items() if "test_absent" in name)
    assert "nowhere_at_all" in absent["reasons"][0]


def test_a_test_file_that_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nowhere_at_all\n", encoding="utf-8")
    (tmp_path / "test_sound.py").write_text("def test_a(): ...\n", encoding="utf-8")
    answer = TOOL.ask(TOOL.child("tests", [str(tmp_path)]), seconds=SECONDS)
    (failure,) = answer.facts["failures"]
    assert "test_broken" in failure["id"]
    assert "nowhere_at_all" in failure["reason"]
    assert "broken: " in TOOL.text_of(TOOL.report(answers(tests=answer)))


def a_test(identity: str, *reasons: str, gpu: bool = False, late: bool = False) -> dict[str, object]:
    return {"id": identity, "reasons": list(reasons), "gpu": gpu, "soak": False, "late": late}


def answers(**given: object) -> dict[str, object]:
    empty = {name: USABLE for name in TOOL.PROBES} | {"tests": TOOL.Answer({"tests": [], "failures": []}, None)}
    return empty | {name.replace("_", "-"): answer for name, answer in given.items()}


def test_groups_show_what_skips_what_needs_a_gpu_and_each_recipe() -> None:
    tests = [
        a_test("tests/gpu/test_fp8.py::test_loss[tensorwise]", gpu=True, late=True),
        a_test("tests/gpu/test_fp8.py::test_loss[mxfp8]", gpu=True, late=True),
        a_test("tests/gpu/test_fp8.py::test_refused", gpu=True),
        a_test("tests/distributed/test_launchers.py::test_a"),
        a_test("tests/distributed/test_launchers.py::test_b", "no Slurm"),
        a_test("tests/test_batch.py::test_a"),
        a_test("tests/test_batch.py::test_b", late=True),
    ]
    found = {g.name: g for g in TOOL.groups_of(tests, recipes={"tensorwise": None, "mxfp8": "needs Blackwell"})}
    verdicts = {name: group.verdict for name, group in found.items()}
    assert verdicts == {
        "tests/distributed/test_launchers.py": "1 run, 1 skip: no Slurm",
        "tests/gpu/test_fp8.py": "3 run (2 may skip when they run)",
        "GPU tests of the FP8 recipe tensorwise": "1 run (1 may skip when they run)",
        "GPU tests of the FP8 recipe mxfp8": "none runs, 1 skip: needs Blackwell",
        "all other files": "2 run (1 may skip when they run)",
    }


def test_a_hopper_is_reported_as_one() -> None:
    device = {"name": "some Hopper", "capability": "9.0", "memory_gib": 139.8, "free_gib": 139.0, "peers": []}
    recipes = {"tensorwise": None, "delayed": None, "blockwise": None, "mxfp8": "needs capability 10.0"}
    report = TOOL.report(
        answers(
            torch=TOOL.Answer({"version": "2.11", "devices": [device]}, None),
            transformer_engine=TOOL.Answer({"version": "2.11.0", "recipes": recipes}, None),
            slurm=TOOL.Answer({}, "srun is not on the path"),
        )
    )
    text = TOOL.text_of(report)
    assert "GPU 0: name: some Hopper; capability: 9.0" in text
    assert "tensorwise: usable; delayed: usable; blockwise: usable; mxfp8: needs capability 10.0" in text
    blocked = {command["command"].split()[0] for command in report["commands"] if command["problem"] is not None}
    assert blocked == {"sbatch"}
    assert json.loads(json.dumps(report)) == report


def test_without_a_usable_recipe_the_advisor_is_not_offered() -> None:
    recipes = dict.fromkeys(("tensorwise", "delayed", "blockwise", "mxfp8"), "needs capability 8.9")
    report = TOOL.report(answers(transformer_engine=TOOL.Answer({"recipes": recipes}, None)))
    named = {re.search(r"tools/\w+\.py", c["command"]): c["problem"] for c in report["commands"]}
    problems = {match.group(): problem for match, problem in named.items() if match is not None}
    assert problems["tools/advise_fp8.py"] == "needs capability 8.9"
    assert problems["tools/bench_gpu.py"] is None


def test_gpu_tests_run_file_by_file_and_the_others_without_a_gpu() -> None:
    """An unusable device ends the tests of one process; devices that are emulated cannot be beside a real one."""
    tests = [a_test(f"tests/gpu/test_{name}.py::test_it", gpu=True) for name in ("b", "a", "a")]
    found = [command for command, _ in TOOL.commands(answers(tests=TOOL.Answer({"tests": tests}, None)))]
    python = TOOL.python_command()
    assert found[0] == f'CUDA_VISIBLE_DEVICES= {python} -m pytest -m "not gpu and not soak"'
    assert [c.split()[-3] for c in found if "--durations" in c] == ["tests/gpu/test_a.py", "tests/gpu/test_b.py"]


def test_the_commands_name_files_that_exist() -> None:
    named = [word for command, _ in TOOL.commands(answers()) for word in re.findall(r"\S+\.(?:py|sbatch)", command)]
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("argv", [("--tests", "tests/nowhere"), ("--unknown",), ("--probe", "nothing")])
def test_wrong_arguments_end_with_2(argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        TOOL.main(argv)
    assert ended.value.code == 2


@pytest.mark.soak
def test_the_whole_report_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert TOOL.main(["--json", "--tests", "tests/gpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["found"]) == set(TOOL.PROBES)
    assert report["found"]["megatron-core"]["problem"] is None
    assert report["tests_problem"] is None
    assert any(group["name"].startswith("tests/gpu/") for group in report["tests"])
