"""The house rules that a machine can hold: sizes, import directions, and words that must not appear."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mm15_megatron"
FOLDERS = ("mm15_megatron", "tests", "tools", "examples", "slurm", "benchmarks", ".ci")

FILE_LINES, MEDIAN_FILE_LINES = 500, 200
FUNCTION_LINES, NINTH_DECILE_FUNCTION_LINES = 80, 40


def repository_files() -> list[Path]:
    """Every file of the repository proper: the root's own and those of its folders."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.suffix != ".whl" and path.name != ".git"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sorted(found)


def python_files(*folders: str) -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_stay_small():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*FOLDERS)}
    assert [f"{p.relative_to(ROOT)}: {n}" for p, n in sizes.items() if n >= FILE_LINES] == []
    of_package = [n for path, n in sizes.items() if PACKAGE in path.parents and path.name != "__init__.py"]
    assert statistics.median(of_package) <= MEDIAN_FILE_LINES


def test_functions_stay_small():
    sizes = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": length(node)
        for path in python_files("mm15_megatron", "tools", "examples", "benchmarks")
        for node in functions_of(tree_of(path))
    }
    assert {name: n for name, n in sizes.items() if n >= FUNCTION_LINES} == {}
    assert statistics.quantiles(sizes.values(), n=10)[8] <= NINTH_DECILE_FUNCTION_LINES


def public_functions_of(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods that do not begin with an underscore, nor lie in something that does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_") and not child.name.endswith("__"):
                continue
            if not isinstance(child, ast.ClassDef):
                yield child
        yield from public_functions_of(child)


def test_every_public_argument_and_result_is_annotated():
    bare = []
    for path in python_files("mm15_megatron", "tools"):
        for node in public_functions_of(tree_of(path)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            unnamed = [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            missing = [a.arg for a in arguments + unnamed if a.annotation is None and a.arg not in ("self", "cls")]
            if missing or node.returns is None:
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {missing}")
    assert bare == []


@pytest.mark.parametrize(
    "module",
    [
        "mm15_megatron.config.parse",
        "mm15_megatron.config.validate",
        "mm15_megatron.presets",
        "mm15_megatron.accounting",
        "mm15_megatron.errors",
    ],
)
def test_imports_without_torch(module):
    heavy = "{'torch', 'megatron', 'numpy', 'transformers'}"
    code = f"import sys, {module}; found = {heavy} & set(sys.modules); assert not found, found"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_forbidden_modules_are_never_imported():
    forbidden = ("torchvision", "megatron.training", "unittest.mock")
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files(*FOLDERS)
        for name in imported_modules(tree_of(path))
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    ]
    assert found == []


def test_no_soft_attribute_reads():
    # megatron-core and the CPU emulation mark parameters and modules with optional attributes
    marked = ("parameter", "torch.cuda")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files("mm15_megatron", "tools")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
        if len(node.args) == 3 and ast.unparse(node.args[0]) not in marked
    ]
    assert found == []


def test_nothing_is_left_for_later():
    unfinished = re.compile(
        "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error", "Magic" + "Mock"))
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files(*FOLDERS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if unfinished.search(line)
    ]
    assert found == []


def test_no_file_names_a_machine_or_a_package_index():
    # written with one-letter classes so that this file does not match itself
    places = r"(?<![\w.])/(?:wor[k]|roo[t]|hom[e])/\w"
    hosts = r"pyp[i]\.org|pythonhoste[d]|download\.pytorc[h]\.org|--(?:extra-)?index-ur[l]|ngc\.nvidi[a]"
    named = re.compile(f"{places}|{hosts}")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or another binary
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(text.splitlines(), start=1)
            if named.search(line)
        ]
    assert found == []


def test_import_contracts_hold():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_sibling_rooms_and_layers_are_all_under_contract():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("layers = [")[1].split("]")[0]
    assert rooms <= set(re.findall(r"\w+", declared))
