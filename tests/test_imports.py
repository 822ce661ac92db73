"""Folders and who may import whom: imports go one way, and `import ebm_prior` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ebm_prior"

# From the mathematics to the command line: a module imports from its own folder and from those before it.
FOLDERS = (
    *("errors", "settings", "interfaces", "compute", "model", "training", "storage", "data", "pictures"),
    *("evaluation", "runs", "reports", "experiments", "cli"),
)
MATHEMATICS = ("compute", "model", "training")
FILES = {"pathlib", "os", "io", "shutil", "tempfile", "sys", "json"}
# What the mathematics knows of files: a signature, bytes to send, and where Linux says how much memory is free.
FILES_OF_THE_MATHEMATICS = {"backbone": {"pathlib"}, "parallel": {"io"}, "memory": {"os", "pathlib"}}


def dotted(path: Path) -> str:
    return ".".join(("ebm_prior", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Dotted names of what a module imports, at the top or within a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_modules(path: Path) -> set[str]:
    """The modules of the package that one imports."""
    names = {name for name in imports(path) if name.startswith("ebm_prior.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names}


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_lies_in_a_folder() -> None:
    assert {folder(module) for module in MODULES} == {*FOLDERS, "testing", "__main__", ""}


@pytest.mark.parametrize("name", FOLDERS)
def test_imports_go_one_way(name: str) -> None:
    allowed = {*FOLDERS[: FOLDERS.index(name) + 1], ""}
    for module, path in MODULES.items():
        if folder(module) == name:
            later = {other for other in own_modules(path) if folder(other) not in allowed}
            assert not later, f"{module} imports {', '.join(sorted(later))} of a later folder"


def test_no_modules_import_one_another() -> None:
    graph = {module: own_modules(path) - {"ebm_prior", module} for module, path in MODULES.items() if "." in module}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", [module for module in MODULES if folder(module) in MATHEMATICS])
def test_the_mathematics_knows_torch_and_numpy_only(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(MODULES[module])} - {"ebm_prior"}
    assert {name for name in outside if name not in sys.stdlib_module_names} <= {"torch", "numpy"}
    assert outside & FILES <= FILES_OF_THE_MATHEMATICS.get(module.rpartition(".")[2], set())


def test_click_is_the_command_lines_alone() -> None:
    users = {folder(module) for module, path in MODULES.items() if "click" in {n.split(".")[0] for n in imports(path)}}
    assert users == {"cli"}


def test_the_contract_kit_knows_the_contract_alone() -> None:
    for module, path in MODULES.items():
        if folder(module) == "testing":
            assert {folder(other) for other in own_modules(path)} <= {"testing", "errors", "compute", "model"}, module


def test_backbones_know_the_contract_and_no_energies() -> None:
    known = ("errors", "compute.", "model.backbone", "storage.weights", "backbones")
    for path in (ROOT / "backbones").rglob("*.py"):
        names = {name.removeprefix("ebm_prior.") for name in imports(path) if name.startswith("ebm_prior.")}
        assert all(name.startswith(known) for name in names), f"{path}: {names}"


def test_import_is_light() -> None:
    """Nor must `ebm-prior --help` wait for torch, which the commands import when they are called."""
    program = "import sys, ebm_prior; print(*sys.modules); import ebm_prior.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    library, commands = ({name.split(".")[0] for name in line.split()} for line in done.stdout.splitlines())
    assert not library & {"torch", "torchvision", "cleanfid", "matplotlib", "click", "safetensors", "scipy", "PIL"}
    assert not commands & {"torch", "torchvision", "cleanfid", "matplotlib"}
